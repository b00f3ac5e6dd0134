"""Fitted on validation pictures: a teacher's temperature, and the teachers' weights in the mixture.

Both are kept soft where pictures are few: a teacher without a mistake on thirty pictures would
otherwise ask for hard targets, and one that is luckier by a picture would get all the weight.
"""

import torch
import torch.nn.functional as F

SMALLEST, LARGEST = 0.05, 20.0  # temperatures


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of softmax(logits / T)   (Guo et al. 2017).

    logits: float [N, K]; labels: int64 [N]. Returns a float in [0.05, 20]. Each label counts as
    wrong with probability 1 / (N + 2), Laplace's rule of succession, spread over the other classes
    (as Platt 1999 does for two). The NLL is convex in 1/T, so bisection on its slope finds it.
    """
    z = logits.double()
    wrong = 1 / (len(z) + 2)
    label = z.gather(1, labels[:, None])[:, 0]
    others = (z.sum(1) - label) / (z.shape[1] - 1)
    expected = (1 - wrong) * label + wrong * others

    low, high = 1 / LARGEST, 1 / SMALLEST  # of 1/T
    for _ in range(60):
        middle = (low * high) ** 0.5
        predicted = (F.softmax(z * middle, dim=1) * z).sum(1)
        slope = (predicted - expected).mean()  # d NLL / d (1/T)
        low, high = (middle, high) if slope <= 0 else (low, middle)
    return float(1 / middle)


def fit_weights(probabilities, labels, iterations=200):
    """Mixture weights that minimise the NLL of sum_t w_t p_t, by expectation maximisation.

    probabilities: float [teachers, N, K]; labels: int64 [N]. Returns a list of floats summing to 1.
    One more picture is imagined for each teacher, which it alone explains (a Dirichlet prior). The
    NLL with it is convex in w, and each iteration lowers it (Dempster, Laird and Rubin 1977).
    """
    teachers, pictures = probabilities.shape[:2]
    index = labels[None, :, None].expand(teachers, -1, 1)
    likelihood = probabilities.double().gather(2, index)[..., 0].clamp(min=1e-12)
    w = torch.full((teachers, 1), 1 / teachers, dtype=torch.double)
    for _ in range(iterations):
        share = w * likelihood / (w * likelihood).sum(0)
        w = (share.sum(1, keepdim=True) + 1) / (pictures + teachers)
    return [float(v) for v in w[:, 0]]
