"""From class probabilities to pass or reject: the threshold, what it rests on, and what it costs.

The defect score of a picture is 1 - p(good). A part is rejected when its score reaches the
threshold. A *miss* is a defect that passes, a *false alarm* a good part that is rejected.
"""

import math

import numpy as np

GOOD_NAMES = ("good", "ok")
Z = 1.959964  # two-sided 95 % of the normal distribution


def good_class(classes, wanted=None):
    """The class that is no defect: `wanted`, or the one called good or ok, or None without one."""
    named = (name for name in classes if name.lower() in GOOD_NAMES)
    return wanted or next(named, None)


def wilson(k, n):
    """95 % interval of a share k / n   (Wilson 1927): (low, high), or (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, spread = k / n, Z**2 / n
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def pictures_needed(target):
    """How many pictures, none of them wrong, show with 95 % confidence a rate of at most `target`.

    (1 - target)^n <= 0.05; about 3 / target.
    """
    return math.ceil(math.log(0.05) / math.log(1 - target))


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


def choose_threshold(scores, defective, max_miss_rate=None, max_false_alarm_rate=None):
    """The threshold that meets one target on validation pictures and is kindest to the other rate.

    scores: float [N] in [0, 1]; defective: bool [N], both kinds present; exactly one target, in
    (0, 1). For a miss rate that is the highest threshold at which at most that share of the defects
    scores below it; for a false-alarm rate the lowest at which at most that share of the good parts
    reaches it. Each is moved to the middle of the gap between two pictures' scores, which changes
    no decision here and leaves room for rounding on another device. Returns plain data: threshold,
    target, the rates on these pictures, and how many `pictures` of the kind that the target is
    about there are and are `needed`.
    """
    scores, defective = np.asarray(scores, np.float64), np.asarray(defective, bool)
    if (max_miss_rate is None) == (max_false_alarm_rate is None):
        raise ValueError("give one of max_miss_rate and max_false_alarm_rate")
    if max_miss_rate is not None:
        name, target = "max_miss_rate", max_miss_rate
        rising = np.sort(scores[defective])
        pictures = len(rising)
        reject = rising[int(target * pictures)]  # the mildest score to be rejected
        let_pass = scores[scores < reject].max(initial=0.0)
    else:
        name, target = "max_false_alarm_rate", max_false_alarm_rate
        falling = np.sort(scores[~defective])[::-1]
        pictures = len(falling)
        let_pass = falling[int(target * pictures)]  # the worst score to pass
        above_one = 1.0 + 1e-6  # where even a score of 1 is to pass
        reject = scores[scores > let_pass].min(initial=above_one)
    threshold = float((let_pass + reject) / 2)
    return {
        "threshold": threshold,
        "target": {name: target},
        "validation": rates(scores, defective, threshold),
        "pictures": pictures,
        "needed": pictures_needed(target),
    }


def describe_rates(point):
    """What `rates` found, in words."""
    missed = describe_rate(point["miss"], "defects missed")
    return f"{missed}, {describe_rate(point['false_alarm'], 'good parts rejected')}"


def describe_rate(r, title):
    """A rate in words: 3 of 60 defects missed (5.0 %, 95 % interval 1.7 to 13.7)."""
    if not r["n"]:
        return f"none there to be {title}"
    low, high = r["interval"]
    share = f"{100 * r['rate']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return f"{r['count']} of {r['n']} {title} ({share})"


def describe(point, good):
    """A line about `choose_threshold`'s result, and a warning where too few pictures support it."""
    ((name, target),) = point["target"].items()
    text = (
        f"threshold {point['threshold']:.4f} on 1 - p({good}), for {name.replace('_', ' ')} "
        f"{100 * target:g} %; on validation {describe_rates(point['validation'])}"
    )
    if point["pictures"] < point["needed"]:
        text += (
            f"\nwarning: {point['pictures']} validation pictures cannot support {100 * target:g} %;"
            f" {point['needed']} would be needed, even with none of them wrong"
        )
    return text
