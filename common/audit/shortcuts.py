"""Classifiers that never look at the part: on mean colour, thumbnails and file properties.

Where one of them comes near a network's accuracy, the set does not measure inspection: the classes
were photographed on different days, or saved by different programs.
"""

import numpy as np
import torch.nn.functional as F
from torch.utils.data import BatchSampler

from common.metrics import score

PENALTY = 100.0  # pictures' worth of a covariance that is the identity
FILE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
BLOCK = 32  # pictures read at a time


def probe(train, tests):
    """Score linear discriminants fitted on train, and the answer that is always the largest class.

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
            answers[name] = discriminant(fitted_on[name], labels, x)
        for name, answer in answers.items():
            result = score(one_hot[answer.argmax(1)], test.labels)  # scores are no probabilities
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


def discriminant(x, labels, other):
    """Scores [N', K] that a class-balanced linear discriminant fitted on x has for other [N', D].

    Score k is x S^-1 m_k - m_k S^-1 m_k / 2, of the class means m_k and the covariance S within
    classes (Fisher 1936), which PENALTY shrinks to a multiple of the identity; x: float [N, D],
    standardised here; labels: int [N]. Picture n counts N / (K N_{y_n}), or a large class would
    decide S. What never varies in x tells nothing, however it is in other.
    """
    counts = np.bincount(labels)
    mean, spread = x.mean(0), x.std(0)
    spread[spread < 1e-6 * (1 + np.abs(mean))] = 1
    fitted, other = ((each - mean) / spread for each in (x, other))
    centres = np.stack([fitted[labels == k].mean(0) for k in range(len(counts))])
    weights = len(labels) / (len(counts) * counts[labels])
    within = (fitted - centres[labels]) * np.sqrt(weights)[:, None]
    covariance = within.T @ within + PENALTY * np.eye(x.shape[1])
    directions = np.linalg.solve(covariance, centres.T)
    return other @ directions - (centres.T * directions).sum(0) / 2
