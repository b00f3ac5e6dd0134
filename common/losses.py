"""The distillation loss and the soft target it pulls towards."""

import torch
import torch.nn.functional as F

from common.data import UNLABELLED


def mixture(logits, temperatures, weights, tau=1.0):
    """The ensemble's probabilities: q_tau = sum_t w_t softmax(z_t / (T_t tau)).

    logits: float [teachers, ..., classes]; temperatures, weights: one number per teacher, weights
    summing to 1. Returns float [..., classes], summing to 1 over classes.
    """
    q = 0.0
    for z, temperature, weight in zip(logits, temperatures, weights):
        q = q + weight * F.softmax(z / (temperature * tau), dim=-1)
    return q


def class_weights(labels, classes):
    """w_c = N / (K N_c) for labels int64 [N] of K classes: all classes weigh alike, and pictures 1 on average. float32 [K]."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes))


def labelled_cross_entropy(logits, labels, weights=None):
    """Mean cross-entropy over the pictures that have a label (label >= 0), times their class's weight; 0 when none has."""
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    return F.cross_entropy(logits, labels, weights, ignore_index=UNLABELLED, reduction="sum") / labelled


def distillation_loss(logits, labels, soft_targets, alpha, tau, weights=None):
    """(1 - alpha) CE(s, y) + alpha tau^2 KL(q_tau || softmax(s / tau))   (Hinton et al. 2015).

    logits s: float [B, K]; labels y: int64 [B], -1 for unlabelled; soft_targets q_tau: float [B, K],
    already softened by tau; weights: of the classes in CE, float [K] or None. CE is the mean over
    labelled pictures, KL is summed over classes and averaged over the batch, and tau^2 keeps its
    gradient's size independent of tau, so alpha means the same for every K and tau. alpha 0 never
    looks at the soft targets. Returns a scalar.
    """
    if alpha == 0:
        return labelled_cross_entropy(logits, labels, weights)
    kl = F.kl_div(F.log_softmax(logits / tau, dim=1), soft_targets, reduction="batchmean")
    return (1 - alpha) * labelled_cross_entropy(logits, labels, weights) + alpha * tau**2 * kl


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of softmax(logits / T)   (Guo et al. 2017).

    logits: float [N, K]; labels: int64 [N]. Returns a float, kept in [0.05, 20]. A model without a mistake on few pictures would
    ask for T = 0, and its soft targets would be hard; so each label counts as wrong with probability 1 / (N + 2), Laplace's
    rule of succession, spread over the other classes (as Platt 1999 does for two). The NLL is convex in 1/T; bisection on its slope.
    """
    z = logits.double()
    wrong = 1 / (len(z) + 2)
    label = z.gather(1, labels[:, None])[:, 0]
    others = (z.sum(1) - label) / (z.shape[1] - 1)
    expected = (1 - wrong) * label + wrong * others
    low, high = 1 / 20, 1 / 0.05  # of 1/T
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((F.softmax(z * middle, dim=1) * z).sum(1) - expected).mean()  # d NLL / d (1/T)
        low, high = (middle, high) if slope <= 0 else (low, middle)
    return float(1 / middle)


def fit_weights(probabilities, labels, iterations=200):
    """Mixture weights that minimise the NLL of sum_t w_t p_t, by expectation maximisation.

    probabilities: float [teachers, N, K]; labels: int64 [N]. Returns a list of floats summing to 1.
    One more picture is imagined for each teacher, which it alone explains (a Dirichlet prior): on few pictures a teacher that is
    luckier by one must not get all the weight. The NLL with it is convex in w, and each iteration lowers it (Dempster, Laird and Rubin 1977).
    """
    likelihood = probabilities.double().gather(2, labels[None, :, None].expand(len(probabilities), -1, 1))[..., 0]
    likelihood = likelihood.clamp(min=1e-12)
    teachers, pictures = likelihood.shape
    w = torch.full((teachers, 1), 1 / teachers, dtype=torch.double)
    for _ in range(iterations):
        share = w * likelihood / (w * likelihood).sum(0)
        w = (share.sum(1, keepdim=True) + 1) / (pictures + teachers)
    return [float(v) for v in w[:, 0]]
