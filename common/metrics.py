"""Numbers about predictions, as the literature defines them, with intervals. Needs numpy alone.

Where some classes are good, a part passes or is rejected. The *defect score* of a picture is the
probability of all other classes together; a part is rejected when its score reaches the threshold.
A *miss* is a defect that passes, a *false alarm* a good part that is rejected.
"""

import math

import numpy as np

BINS = 15  # of calibration
Z = 1.959964  # two-sided 95 % of the normal distribution
RISK = 0.05  # that a promised rate does not hold


# ---------------------------------------------------------------------------------------- scores


def score(probabilities, labels, good=(), parts=None):
    """All metrics of one model on one set, as plain data: fractions in [0, 1], nll in nats.

    probabilities: float [N, K], rows summing to 1; labels: int [N] in [0, K). Balanced accuracy is
    the mean per-class recall; macro F1 the mean per-class F1. good: numbers of the classes that are
    no defect; "auroc" is of the defect scores, where there are good parts and defects; the recall
    of a class without pictures is None. parts: N names of what the pictures show, None for others
    on each; "trials" is as how many independent pictures they count in the interval.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    matrix = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    right, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    recall = right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    own = probabilities[np.arange(len(labels)), labels]
    scores, defective = defects(probabilities, labels, good)
    both = 0 < defective.sum() < len(labels)
    n = trials(probabilities.argmax(1) == labels, parts)
    accuracy = float(right.sum() / matrix.sum())
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(wilson(accuracy * n, n)),
        "trials": n,
        "balanced_accuracy": float(recall[true > 0].mean()),
        "macro_f1": float(f1[true + predicted > 0].mean()),
        "nll": float(-np.log(np.maximum(own, 1e-12)).mean()),
        "ece": ece(probabilities, labels),
        "n": len(labels),
        **({"auroc": auroc(scores, defective)} if both else {}),
        "recall": [r if n else None for r, n in zip(recall.tolist(), true)],
        "confusion_matrix": matrix.tolist(),
    }


def confusion_matrix(labels, predicted, classes):
    """int64 [classes, classes]; rows are true, columns predicted classes."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes)


def reliability(probabilities, labels):
    """(confidence, accuracy, share) of the decisions in each bin that has some, float [B] each.

    The bins are 15 equal ones of the top probability; confidence is its mean, share the part of all
    decisions. probabilities: float [N, K]; labels: int [N].
    """
    top = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bin_of = np.minimum((top * BINS).astype(int), BINS - 1)
    count = np.bincount(bin_of, minlength=BINS)
    filled = count > 0
    sums = [np.bincount(bin_of, values, BINS)[filled] for values in (top, right)]
    confidence, accuracy = sums / count[filled]
    return confidence, accuracy, count[filled] / len(labels)


def ece(probabilities, labels):
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), in [0, 1].

    The mean of |accuracy - confidence| over the bins of `reliability`, weighted by their shares.
    """
    confidence, accuracy, share = reliability(probabilities, labels)
    return float((share * np.abs(accuracy - confidence)).sum())


def auroc(scores, positive):
    """Area under the ROC curve, in [0, 1]: do positives score higher, whatever the threshold?

    The share of pairs of a positive and a negative that the scores put in that order, equal ones
    counting half (Hanley and McNeil 1982). scores: float [N]; positive: bool [N], both kinds there.
    """
    positives, negatives = scores[positive], np.sort(scores[~positive])
    below = np.searchsorted(negatives, positives, "left")
    up_to = np.searchsorted(negatives, positives, "right")
    return float((below + up_to).mean() / (2 * len(negatives)))


# -------------------------------------------------------------------------- intervals and tests


def wilson(k, n):
    """95 % interval of a share k / n   (Wilson 1927): (low, high), or (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = k / n, Z**2 / n
    middle = share + z2 / 2
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    return max(0.0, float(low)), min(1.0, float(high))


def by_part(values, parts):
    """float [G]: sums over the pictures of each part, scaled to have the mean of the pictures.

    values: float [N]; parts: N names of what the pictures show.
    """
    _, part_of = np.unique(parts, return_inverse=True)
    sums = np.bincount(part_of, values)
    return sums * len(sums) / len(values)


def trials(values, parts=None):
    """As how many independent pictures those of several parts count in the interval of their mean.

    N over the design effect, the variance that parts give the mean over that of as many independent
    pictures (Kish 1965); at most N, as where parts have nothing in common, or nothing varies.
    values: float or bool [N]; parts: as of `by_part`, None for another one on each picture.
    """
    each, n = values if parts is None else by_part(values, parts), len(values)
    effect = each.var() / len(each) / (values.var() / n) if values.var() else 1.0
    return n / max(1.0, effect)


def difference(rights_a, rights_b, parts=None):
    """Paired difference of mean accuracy over test sets, a - b, as plain data.

    rights_a, rights_b: one bool [N_set] per test set; parts: names as of `by_part` per test set.
    `interval`, of 95 %, takes two pictures more, spread over all cells of the sets' tables of two
    by two (Agresti and Min 2005; Price and Bonett 2004), without which it would be too narrow where
    the two seldom differ; pictures count as `trials` has them. `wins` and `losses` count the parts
    of which a or b got more pictures right, over all sets, and `p` is `sign_test` of them.
    """
    parts = parts or [None] * len(rights_a)
    each = [a * 1.0 - b for a, b in zip(rights_a, rights_b)]
    mean = np.array([d.mean() for d in each])
    unequal = np.array([np.abs(d).mean() for d in each])
    n = np.array([trials(d, its) for d, its in zip(each, parts)])
    more = 2 / len(n)
    middle = n * mean / (n + more)
    variance = ((n * unequal + more / 2) / (n + more) - middle**2) / (n + more)
    half = Z * np.sqrt(variance.sum()) / len(n)
    low, high = middle.mean() - half, middle.mean() + half
    votes = [d if its is None else by_part(d, its) for d, its in zip(each, parts)]
    wins, losses = (sum(int((sign * v > 0).sum()) for v in votes) for sign in (1, -1))
    return {
        "difference": float(mean.mean()),
        "interval": [max(-1.0, float(low)), min(1.0, float(high))],
        "wins": wins,
        "losses": losses,
        "p": sign_test(wins, losses),
    }


def sign_test(wins, losses):
    """Two-sided p of the exact sign test, McNemar's on discordant pictures (1947); 1 for none."""
    tail = binomial(wins + losses, 0.5)[: min(wins, losses) + 1].sum()
    return min(1.0, 2 * float(tail))


def verdict(comparison):
    """A `difference` in words, at 5 %: "better than", "worse than" or "not told apart from"."""
    low, high = comparison["interval"]
    if comparison["p"] > 0.05 or low <= 0 <= high:  # sets of unequal size may contradict the count
        return "not told apart from"
    return "better than" if low > 0 else "worse than"


def binomial(n, p):
    """P(Bin(n, p) = k) for k = 0 .. n, 0 < p < 1: float64 [n + 1], in logarithms for large n."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))


# ---------------------------------------------------------------------------- the operating point


def good_classes(classes, wanted=None):
    """The classes that are no defect: `wanted`, or those called good or ok."""
    return wanted or [name for name in classes if name.lower() in ("good", "ok")]


def numbers_of(names, classes):
    """The numbers of some classes. Raises ValueError where one is not among `classes`."""
    return [classes.index(name) for name in names]


def defect_scores(probabilities, good):
    """float [N]: the probability of all classes but those of the numbers `good`.

    probabilities: float [N, K]. Their sum, not 1 - p(good), in which float32 loses scores below
    6e-8.
    """
    return np.delete(np.asarray(probabilities), good, axis=1).sum(1)


def defects(probabilities, labels, good, parts=None):
    """(scores, defective): the defect score of each picture, float [N], and its truth, bool [N].

    labels: int [N]; good: numbers of the good classes; parts: N names of what the pictures show,
    of each of which all pictures count once, see `of_parts`; None: each picture counts.
    """
    scores, defective = defect_scores(probabilities, good), ~np.isin(labels, good)
    return (scores, defective) if parts is None else of_parts(scores, defective, parts)


def of_parts(scores, defective, parts):
    """(scores, defective) with a row per part in place of a row per picture.

    A part's row is the picture on which it is easiest to go wrong: of a defective part the lowest
    score, of a good one the highest. Several pictures of one part are no independent trials, so
    they promise no more than one. scores: float [N]; defective: bool [N]; parts: N names.
    """
    score_of = {}
    for its, is_defect, part in zip(scores.tolist(), defective.tolist(), parts):
        least_sure = min if is_defect else max
        score_of[part, is_defect] = least_sure(its, score_of.get((part, is_defect), its))
    return np.array([*score_of.values()]), np.array([is_defect for _, is_defect in score_of])


def rates(scores, defective, threshold):
    """Miss rate and false-alarm rate at a threshold, as plain data with counts and intervals.

    scores: float [N] in [0, 1]; defective: bool [N]. Intervals are Wilson's, of 95 %.
    """
    rejected = np.asarray(scores) >= threshold
    missed, alarmed = ~rejected & defective, rejected & ~defective
    return {
        "miss": rate(missed.sum(), defective.sum()),
        "false_alarm": rate(alarmed.sum(), (~defective).sum()),
    }


def rate(k, n):
    """k of n as plain data; the rate is None where n is 0."""
    k, n = int(k), int(n)
    return {"rate": k / n if n else None, "count": k, "n": n, "interval": list(wilson(k, n))}


def largest_count(n, target):
    """The largest k with P(Bin(n, target) <= k) <= 0.05, or -1 where n is too small for any.

    With 95 % confidence the rate is below `target` where k of n parts are on the wrong side
    (Clopper and Pearson 1934), also of a threshold taken from their own scores (Wilks 1941).
    """
    return int((np.cumsum(binomial(n, target)) <= RISK).sum()) - 1


def promised_rate(k, n):
    """The rate p that k of n wrong ones promise with 95 % confidence: P(Bin(n, p) <= k) = 0.05."""
    low, high = 0.0, 1.0
    for _ in range(50 if k < n else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial(n, middle)[: k + 1].sum() > RISK else (low, middle)
    return high


def pictures_needed(target):
    """The smallest n whose `largest_count` is 0: (1 - target)^n <= 0.05, about 3 / target."""
    return math.ceil(math.log(RISK) / math.log1p(-target))


def choose_threshold(scores, defective, goal, target):
    """The threshold that keeps one rate at its target and is kindest to the other.

    scores: float [N] in [0, 1]; defective: bool [N], of validation pictures, both kinds present;
    goal: "miss" or "false_alarm"; target: in (0, 1). Of the kind that the goal is about,
    `largest_count` pictures may be on the wrong side, so that with 95 % confidence the target holds
    for parts like these; none where they are too few. The threshold lies in the middle of the gap
    between two pictures' scores, which leaves room for rounding on another device.

    Returns plain data: threshold, goal, target, the rates on these pictures, how many `pictures`
    the goal is about there are and are `needed`, and the rate that is `promised` with 95 %
    confidence: at most the target, but for too few pictures.
    """
    scores, defective = np.asarray(scores, np.float64), np.asarray(defective, bool)
    pictures = int((defective == (goal == "miss")).sum())
    allowed = max(0, largest_count(pictures, target))
    if goal == "miss":
        reject = np.sort(scores[defective])[allowed]  # the mildest score to be rejected
        let_pass = scores[scores < reject].max(initial=0.0)
    else:
        let_pass = np.sort(scores[~defective])[::-1][allowed]  # the worst score to pass
        above_one = 1.0 + 1e-6  # where even a score of 1 is to pass
        reject = scores[scores > let_pass].min(initial=above_one)
    threshold = float((let_pass + reject) / 2)
    return {
        "threshold": threshold,
        "goal": goal,
        "target": target,
        "validation": rates(scores, defective, threshold),
        "pictures": pictures,
        "needed": pictures_needed(target),
        "promised": promised_rate(allowed, pictures),
    }


def target_verdict(point):
    """A target on a test set, at 95 % confidence: "met", "missed" or "not shown to be met".

    point: goal and target of `choose_threshold`, and `rates` of the test set. The bound is that of
    `largest_count`, by which the threshold was chosen.
    """
    k, n, target = point[point["goal"]]["count"], point[point["goal"]]["n"], point["target"]
    if k <= largest_count(n, target):
        return "met"
    return "missed" if binomial(n, target)[k:].sum() <= RISK else "not shown to be met"


def describe_rates(point, by_part=False):
    """`rates` in words: 3 of 60 defects missed (5.0 %, 95 % interval 1.7 to 13.7), ...

    by_part: whether they are of `of_parts`.
    """
    words = []
    for goal, title in (("miss", "defects missed"), ("false_alarm", "good parts rejected")):
        r = point[goal]
        low, high = r["interval"]
        text = f"{r['count']} of {r['n']} {title}"
        if r["n"]:
            share = f"{100 * r['rate']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f}"
            text += f" ({share})"
        words.append(text)
    of_parts = "; a part counts by the picture on which it is easiest to go wrong"
    return ", ".join(words) + (of_parts if by_part else "")
