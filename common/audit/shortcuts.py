"""Classifiers that never look at the part: on mean colour, thumbnails and file properties.

Where one of them comes near a network's accuracy, the set does not measure inspection: the classes
were photographed on different days, or saved by different programs.
"""

import numpy as np
import torch.nn.functional as F
from torch.utils.data import BatchSampler

from common.metrics import score

PENALTY = 100.0  # of the ridge classifier; features are standardised
FILE_TYPES = (".png", ".jpg", ".jpeg", ".bmp")
BLOCK = 512  # pictures read at a time


def probe(train, tests):
    """Score ridge classifiers fitted on train, and the answer that is always the largest class.

    train: Pictures; tests: {set: Pictures} of the same classes. Returns {probe: {set: {"accuracy",
    "balanced_accuracy"}}}. One pass over the decoded cache; 2 kB per picture.
    """
    labels = train.labels.numpy()
    counts = np.bincount(labels)
    one_hot = np.eye(len(counts))
    fitted_on = properties(train)
    scores = {}
    for of, test in tests.items():
        answers = {"largest class": np.tile(one_hot[counts.argmax()], (len(test), 1))}
        for name, x in properties(test).items():
            (answers[name],) = ridge(fitted_on[name], labels, [x])
        for name, answer in answers.items():
            result = score(one_hot[answer.argmax(1)], test.labels)  # a ridge gives no probabilities
            kept = {key: result[key] for key in ("accuracy", "balanced_accuracy")}
            scores.setdefault(name, {})[of] = kept
    return scores


def properties(pictures):
    """What each picture tells without a look at the part: {name: float [N, D]}."""
    colours, thumbnails, files = [], [], []
    for block in BatchSampler(range(len(pictures)), BLOCK, drop_last=False):
        pixels = pictures.batch(block).permute(0, 3, 1, 2).float()
        colours.append(pixels.mean((2, 3)))
        thumbnails.append(F.adaptive_avg_pool2d(pixels, 8).flatten(1))
    for path, (width, height, size) in zip(pictures.paths(), pictures.sizes()):
        kind = [path.lower().endswith(each) for each in FILE_TYPES]
        files.append([*kind, width, height, width / height, np.log(size)])
    return {
        "mean colour": np.concatenate(colours),
        "8x8 thumbnail": np.concatenate(thumbnails),
        "file type and size": np.array(files),
    }


def ridge(x, labels, others):
    """Fit a class-balanced ridge classifier; its scores [N', K] for each of others [N', D].

    Minimises sum_n w_n |W x_n - onehot(y_n)|^2 + PENALTY |W|^2 over standardised x, float [N, D],
    and a constant. labels y: int [N]; w_n = N / (K N_{y_n}), or a large class hides small ones.
    """
    counts = np.bincount(labels)
    weights = len(labels) / (len(counts) * counts[labels])
    targets = np.eye(len(counts))[labels]
    mean, std = x.mean(0), x.std(0) + 1e-9
    fitted, *others = [np.c_[(each - mean) / std, np.ones(len(each))] for each in (x, *others)]
    weighted = fitted * weights[:, None]
    penalty = PENALTY * np.eye(fitted.shape[1])
    solution = np.linalg.solve(weighted.T @ fitted + penalty, weighted.T @ targets)
    return [features @ solution for features in others]
