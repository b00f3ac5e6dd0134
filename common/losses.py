"""The distillation loss (Hinton et al. 2015) and its soft target. Needs torch alone.

With student logits s, labels y, ensemble probabilities q and a temperature T that softens both:

    loss = (1 - alpha) * labelled_cross_entropy(s, y) + alpha * T**2 * soft_divergence(q, s / T)

T**2 keeps the size of the second gradient independent of T, so alpha means the same for every T and
every number of classes.
"""

import torch
import torch.nn.functional as F

UNLABELLED = -1


def mixture(logits, temperatures, weights, T=1.0):
    """The ensemble's probabilities: q = sum_t w_t softmax(z_t / (T_t T)).

    logits: float [teachers, ..., classes]; temperatures, weights: one number per teacher, weights
    summing to 1. Returns float [..., classes], summing to 1 over classes.
    """
    q = 0.0
    for z, temperature, weight in zip(logits, temperatures, weights):
        q = q + weight * F.softmax(z / (temperature * T), dim=-1)
    return q


def soft_divergence(q, logits):
    """KL(q || softmax(logits)), summed over classes and averaged over the batch; a scalar.

    q: float [B, K], rows summing to 1; logits: float [B, K], already divided by the temperature.
    """
    return F.kl_div(F.log_softmax(logits, dim=1), q, reduction="batchmean")


def labelled_cross_entropy(logits, labels, weights=None):
    """Mean cross-entropy over the pictures that have a label; a scalar, 0 when none has one.

    logits: float [B, K]; labels: int64 [B], -1 for none; weights: of the classes, float [K].
    """
    summed = F.cross_entropy(logits, labels, weights, ignore_index=UNLABELLED, reduction="sum")
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    return summed / labelled


def class_weights(labels, classes):
    """w_c = N / (K N_c): all classes weigh alike, and pictures 1 on average.

    labels: int64 [N] of K classes. Returns float32 [K].
    """
    return len(labels) / (classes * torch.bincount(labels, minlength=classes))


def kl(q, logits, T):
    """T^2 KL(q || softmax(logits / T)): the loss above."""
    return T**2 * soft_divergence(q, logits / T)


def dist(q, logits, T):
    """T^2 2 (inter + intra): correlations over classes and over the batch (Huang et al. 2022)."""
    p = F.softmax(logits / T, dim=1)
    inter = 1 - correlation(p, q).mean()
    intra = 1 - correlation(p.T, q.T).mean()
    return T**2 * 2 * (inter + intra)


def correlation(a, b):
    """Pearson's r of each row of a with the same row of b; float [rows]."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1)


def standardised(q, logits, T):
    """T^2 KL of logits brought to mean 0 and standard deviation 1 (Sun et al. 2024).

    The ensemble's logits are the logarithm of its probabilities at T = 1 would be; here q at T.
    """
    teacher = F.softmax(standardise(q.clamp_min(1e-7).log()) / T, dim=1)
    return T**2 * soft_divergence(teacher, standardise(logits) / T)


def standardise(logits):
    """Rows with mean 0 and standard deviation 1."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


SOFT_LOSSES = {"kl": kl, "dist": dist, "standardised": standardised}
