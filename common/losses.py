"""The mathematics of distillation: loss, ensemble, and what is fitted on validation. torch alone.

With student logits s, labels y, ensemble probabilities q and a temperature T that softens both
(Hinton et al. 2015):

    loss = (1 - alpha) * labelled_cross_entropy(s, y) + alpha * T**2 * soft_divergence(q, s / T)

y are rows of probabilities, zeros where there is no label. Both terms are linear in y and q, so
that pictures can be mixed (`views.mixup`). T**2 keeps the size of the second gradient independent
of T, so alpha means the same for every T and every number of classes.
"""

from collections import Counter

import torch
import torch.nn.functional as F

UNLABELLED = -1
SMALLEST, LARGEST = 0.05, 20.0  # fitted temperatures, and weights at most the latter
ROUNDS, SETTLED = 50, 1e-6  # of a fit, at most; largest change of a weight in the last
PRIOR = 30.0  # nats for weights that lie 1 from their mean (tests/benchmarks/combination.py)


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


def label_rows(labels, classes):
    """Labels as probabilities: float32 [B, classes], a row of zeros where there is none.

    labels: int64 [B], -1 for none.
    """
    known = labels != UNLABELLED
    return F.one_hot(labels.clamp(min=0), classes).float() * known[:, None]


def labelled_cross_entropy(logits, rows):
    """Mean cross-entropy over the pictures that have a label; a scalar, 0 when none has one.

    logits, rows: float [B, K]; rows as of `label_rows`, or mixed ones, which count by their sums.
    """
    return F.cross_entropy(logits, rows, reduction="sum") / rows.sum().clamp(min=1)


# ------------------------------------------------------------- fitted on validation pictures


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of softmax(logits / T)   (Guo et al. 2017).

    logits: float [N, K]; labels: int64 [N]. Returns a float in [0.05, 20]. Labels are softened as
    in `soft_labels`. The NLL is convex in 1/T, so bisection on its slope finds it.
    """
    z, y = logits.double(), soft_labels(labels, logits.shape[1])
    return 1 / best_weight(0.0, z, y, 1 / LARGEST, 1 / SMALLEST)


def fit_biases(logits, labels, parts):
    """What to add to logits so that classes weigh alike: T b, float32 [K].

    With T of `fit_temperature`, b minimises sum_i v_i NLL_i(z / T + b) + |b|^2 / 2 (Alexandari et
    al. 2020, bias-corrected temperature scaling, there with v = 1). The v of each class add up to
    the number of parts of the rarest class, in equal shares of its own parts and of their pictures.
    The second term, a normal prior, keeps a class of few parts as it was trained. logits: float
    [N, K]; labels: int64 [N], of all classes, softened as in `soft_labels`; parts: N names, of what
    each picture shows.
    """
    classes = logits.shape[1]
    T, y = fit_temperature(logits, labels), soft_labels(labels, classes)
    shown = list(zip(parts, labels.tolist()))
    pictures = Counter(shown)
    share = torch.tensor([1 / pictures[each] for each in shown], dtype=torch.double)
    total = torch.zeros(classes, dtype=torch.double).index_add(0, labels, share)
    v = share * total.min() / total[labels]

    z, b = logits.double() / T, torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([b], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        nll = F.cross_entropy(z + b, y, reduction="none")
        value = (v * nll).sum() + b.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return (T * b).detach().float()


def fit_weights(logits, labels, prior=PRIOR):
    """The weights w_t >= 0 that minimise N NLL(w) + prior / 2 sum_t (w_t - mean w)^2.

    NLL(w) is the mean one of softmax(sum_t w_t z_t). The second term, a normal prior of equal
    weights, keeps few or easy validation pictures from throwing a good teacher away; the sum of the
    weights stays free, and is above 1 where teachers bring evidence of their own. logits: float
    [teachers, N, K], each teacher's divided by its temperature; labels: int64 [N]. Returns a list
    of floats in [0, 20]. Labels are softened as in `soft_labels`. All is convex in w: a round moves
    all weights alike, then each in turn with the others held fixed (coordinate descent).
    """
    z, y = logits.double(), soft_labels(labels, logits.shape[2])
    teachers, pictures = len(z), len(labels)
    w = torch.full((teachers, 1, 1), 1 / teachers, dtype=torch.double)
    pull = prior * (1 - 1 / teachers) / pictures
    for _ in range(ROUNDS):
        before = w.clone()
        low, high = -float(w.min()), LARGEST - float(w.max())
        w += best_weight((w * z).sum(0), z.sum(0), y, low, high)
        for t in range(teachers):
            others = (w * z).sum(0) - w[t] * z[t]
            their_mean = float(w.sum() - w[t]) / max(1, teachers - 1)
            w[t] = best_weight(others, z[t], y, 0.0, LARGEST, pull, their_mean)
        if (w - before).abs().max() < SETTLED:
            break
    return [float(v) for v in w.flatten()]


def soft_labels(labels, classes):
    """Each label counts as wrong with probability 1 / (N + 2), spread over the other classes.

    Laplace's rule of succession, as Platt (1999) uses it for two classes: a teacher without a
    mistake on thirty pictures would otherwise ask for hard targets. labels: int64 [N]. Returns
    float64 [N, classes].
    """
    wrong = 1 / (len(labels) + 2)
    one_hot = F.one_hot(labels, classes).double()
    return one_hot * (1 - wrong) + (1 - one_hot) * wrong / (classes - 1)


def best_weight(others, z, y, low, high, pull=0.0, towards=0.0):
    """The w in [low, high] that minimises NLL(w) + pull / 2 (w - towards)^2, by bisection.

    NLL(w) is the mean one of softmax(others + w z). others: float64 [N, K] or 0; z: float64 [N, K];
    y: soft labels, float64 [N, K].
    """
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((F.softmax(others + middle * z, dim=1) - y) * z).sum(1).mean()  # d NLL / d w
        slope += pull * (middle - towards)
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (low + high) / 2
