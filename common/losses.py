"""The distillation loss (Hinton et al. 2015) and its soft target. Needs torch alone.

With student logits s, labels y, ensemble probabilities q and a temperature T that softens both:

    loss = (1 - alpha) * labelled_cross_entropy(s, y) + alpha * T**2 * soft_divergence(q, s / T)

T**2 keeps the size of the second gradient independent of T, so alpha means the same for every T and
every number of classes.
"""

import torch
import torch.nn.functional as F

UNLABELLED = -1


def product_of_experts(logits, temperatures, weights, T=1.0):
    """The ensemble's probabilities: q = softmax(sum_t w_t z_t / T_t / T)   (Hinton 2002).

    A class that one teacher rules out is ruled out, so teachers that err on different classes help
    each other even where one of them is much the weaker; a mean of probabilities would drown it.
    logits: float [teachers, ..., classes]; temperatures, weights: one number per teacher, weights
    at least 0 with any sum. Returns float [..., classes], summing to 1 over classes.
    """
    z = 0.0
    for teacher, temperature, weight in zip(logits, temperatures, weights):
        z = z + weight * teacher / temperature
    return F.softmax(z / T, dim=-1)


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
