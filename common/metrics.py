"""Numbers about predictions: what they are in the literature, with intervals. Needs numpy alone."""

import numpy as np

BINS = 15
RESAMPLES = 10_000


def confusion_matrix(labels, predicted, classes):
    """int64 [classes, classes]; rows are true, columns predicted classes."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes)


def ece(probabilities, labels):
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), in [0, 1].

    15 equal bins of the top probability, mean of |accuracy - confidence| weighted by the bins'
    shares. probabilities: float [N, K]; labels: int [N].
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, right - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / len(labels))


def score(probabilities, labels):
    """All metrics of one model on one set, as plain data.

    probabilities: float [N, K], rows summing to 1; labels: int [N] in [0, K). Fractions in [0, 1];
    nll in nats. Balanced accuracy is the mean per-class recall; macro F1 the mean per-class F1.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    matrix = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    right, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    recall = right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    own = probabilities[np.arange(len(labels)), labels]
    return {
        "accuracy": float(right.sum() / matrix.sum()),
        "accuracy_interval": list(accuracy_interval(right.sum(), len(labels))),
        "balanced_accuracy": float(recall[true > 0].mean()),
        "macro_f1": float(f1[true + predicted > 0].mean()),
        "nll": float(-np.log(np.maximum(own, 1e-12)).mean()),
        "ece": ece(probabilities, labels),
        "n": len(labels),
        "recall": recall.tolist(),
        "confusion_matrix": matrix.tolist(),
    }


def good_enough(history, n):
    """Whether the last validation is within one standard error of the highest so far.

    history: balanced accuracies, the latest last; n: validation pictures, of `balanced_number`. So
    best.pt ends as the latest checkpoint that n pictures cannot tell from the best; the highest of
    thirty pictures alone is often one of mid-schedule that had luck. The rule of Breiman et al.
    1984, with the longest training for the simplest model; the standard error is Agresti and
    Coull's (1998), of two more pictures right and two more wrong, so that p = 1 has one.
    """
    highest = max(history)
    p = (n * highest + 2) / (n + 4)
    standard_error = (p * (1 - p) / (n + 4)) ** 0.5
    return history[-1] >= highest - standard_error


def balanced_number(labels):
    """Pictures of equal classes that give balanced accuracy the standard error it has with these.

    labels: int [N]. K^2 / sum_c 1 / N_c, for the K classes that occur.
    """
    counts = np.unique(labels, return_counts=True)[1]
    return float(len(counts) ** 2 / (1 / counts).sum())


def interval(samples):
    """The middle 95 % of bootstrap samples: (low, high)."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def accuracy_interval(right, n, seed=0):
    """95 % percentile bootstrap interval of an accuracy right / n.

    Resampling n pictures with replacement makes the number of right ones binomial, so it is drawn
    from that directly: the same bootstrap, at a cost that does not grow with n.
    """
    counts = np.random.default_rng(seed).binomial(n, right / n, RESAMPLES)
    return interval(counts / n)


def resampled_differences(right_a, right_b, seed=0):
    """Bootstrap samples of accuracy(a) - accuracy(b) on the same pictures: float [10000].

    right_a, right_b: bool [N]. A picture contributes -1, 0 or 1, so a resample is multinomial.
    """
    difference = right_a.astype(int) - right_b.astype(int)
    shares = [(difference == value).mean() for value in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(len(difference), shares, RESAMPLES)
    return (counts[:, 2] - counts[:, 0]) / len(difference)


def difference(rights_a, rights_b):
    """Paired difference of mean accuracy over test sets, a - b, with its 95 % bootstrap interval.

    rights_a, rights_b: one bool [N_set] per test set; pictures are resampled within each set.
    """
    pairs = list(zip(rights_a, rights_b))
    samples = [resampled_differences(a, b, seed) for seed, (a, b) in enumerate(pairs)]
    value = np.mean([a.mean() - b.mean() for a, b in pairs])
    return {"difference": float(value), "interval": list(interval(np.mean(samples, axis=0)))}
