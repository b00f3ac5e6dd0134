"""Fitted on validation pictures: a teacher's temperature, and the teachers' weights.

Both are kept soft where pictures are few: a teacher without a mistake on thirty pictures would
otherwise ask for hard targets.
"""

import torch
import torch.nn.functional as F

SMALLEST, LARGEST = 0.05, 20.0  # temperatures, and weights at most the latter
ROUNDS = 50  # over the teachers; ten are enough for four digits


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of softmax(logits / T)   (Guo et al. 2017).

    logits: float [N, K]; labels: int64 [N]. Returns a float in [0.05, 20]. Labels are softened as
    in `soft_labels`. The NLL is convex in 1/T, so bisection on its slope finds it.
    """
    z, y = logits.double(), soft_labels(labels, logits.shape[1])
    return 1 / best_weight(0.0, z, y, 1 / LARGEST, 1 / SMALLEST)


def fit_weights(logits, labels):
    """The weights w_t >= 0 that minimise the NLL of softmax(sum_t w_t z_t).

    logits: float [teachers, N, K], each teacher's divided by its temperature; labels: int64 [N].
    Returns a list of floats in [0, 20]. Their sum is above 1 where teachers bring evidence of
    their own. Labels are softened as in `soft_labels`. The NLL is convex in w, and a round finds
    the best w_t of each teacher in turn with the others held fixed (coordinate descent).
    """
    z, y = logits.double(), soft_labels(labels, logits.shape[2])
    w = torch.full((len(z), 1, 1), 1 / len(z), dtype=torch.double)
    for _ in range(ROUNDS):
        for t in range(len(z)):
            others = (w * z).sum(0) - w[t] * z[t]
            w[t] = best_weight(others, z[t], y, 0.0, LARGEST)
    return [float(v) for v in w.flatten()]


def soft_labels(labels, classes):
    """Each label counts as wrong with probability 1 / (N + 2), spread over the other classes.

    Laplace's rule of succession, as Platt (1999) uses it for two classes. labels: int64 [N].
    Returns float64 [N, classes].
    """
    wrong = 1 / (len(labels) + 2)
    one_hot = F.one_hot(labels, classes).double()
    return one_hot * (1 - wrong) + (1 - one_hot) * wrong / (classes - 1)


def best_weight(others, z, y, low, high):
    """The w in [low, high] that minimises the mean NLL of softmax(others + w z), by bisection.

    others: float64 [N, K] or 0; z: float64 [N, K]; y: soft labels, float64 [N, K].
    """
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((F.softmax(others + middle * z, dim=1) - y) * z).sum(1).mean()  # d NLL / d w
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (low + high) / 2
