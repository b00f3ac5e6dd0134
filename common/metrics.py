"""Numbers about predictions: what they are in the literature, with intervals."""

import numpy as np

BINS = 15
RESAMPLES = 10_000


def confusion_matrix(labels, predicted, classes):
    """int64 [classes, classes]; rows are true, columns predicted classes."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def ece(probabilities, labels):
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017): 15 equal bins of the top
    probability, mean of |accuracy - confidence| weighted by the bins' shares. In [0, 1]."""
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
    accuracy = right.sum() / matrix.sum()
    nll = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean()
    return {"accuracy": float(accuracy), "accuracy_interval": list(accuracy_interval(right.sum(), len(labels))),
            "balanced_accuracy": float(recall[true > 0].mean()), "macro_f1": float(f1[true + predicted > 0].mean()),
            "nll": float(nll), "ece": ece(probabilities, labels), "n": len(labels),
            "recall": recall.tolist(), "confusion_matrix": matrix.tolist()}


def _interval(samples):
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def accuracy_interval(right, n, seed=0):
    """95 % percentile bootstrap interval of an accuracy right / n.

    Resampling n pictures with replacement makes the number of right ones binomial, so it is drawn
    from that directly: the same bootstrap, at a cost that does not grow with n.
    """
    return _interval(np.random.default_rng(seed).binomial(n, right / n, RESAMPLES) / n)


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
    samples = np.mean([resampled_differences(a, b, seed) for seed, (a, b) in enumerate(zip(rights_a, rights_b))], axis=0)
    value = np.mean([a.mean() - b.mean() for a, b in zip(rights_a, rights_b)])
    return {"difference": float(value), "interval": list(_interval(samples))}
