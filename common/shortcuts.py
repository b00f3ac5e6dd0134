"""What one can tell without looking at the part: classifiers on colour, thumbnails and file properties.

Where one of these comes near a network's accuracy, the set does not measure inspection: the classes were photographed
on different days, or saved by different programs.
"""

import re
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from common.metrics import score

PENALTY = 100.0  # of the ridge classifier; features are standardised
NUMBER_BINS = 20
BLOCK = 512


def probe(train, tests):
    """{probe: {set: {"accuracy", "balanced_accuracy"}}} of ridge classifiers fitted on train, and of the largest class.

    train: Pictures; tests: {name: Pictures} with the same classes. The classifiers weigh the classes alike, since otherwise
    the largest class hides what they know. One pass over the packs; 2 kB per picture.
    """
    classes = int(train.labels.max()) + 1
    found = {"largest class": {name: _score(np.eye(classes)[[np.bincount(train.labels).argmax()] * len(test)], test)
                               for name, test in tests.items()}}
    described, others = properties(train), {name: properties(test) for name, test in tests.items()}
    for name, x in described.items():
        if all(name in other for other in others.values()):
            rest = [other[name] for other in others.values()]
            if name == "number in the file name":  # steps of equal numbers of pictures, for series taken class by class
                edges = np.quantile(x, np.linspace(0, 1, NUMBER_BINS + 1)[1:-1])
                x, *rest = (np.eye(NUMBER_BINS)[np.searchsorted(edges, each[:, 0])] for each in (x, *rest))
            found[name] = {of: _score(answer, test) for (of, test), answer in zip(tests.items(), ridge(x, train.labels.numpy(), rest))}
    return found


def _score(answers, test):
    metrics = score(np.eye(answers.shape[1])[answers.argmax(1)], test.labels)
    return {key: metrics[key] for key in ("accuracy", "balanced_accuracy")}


def properties(pictures):
    """{name: float [N, D]} of what is known of each picture without its content."""
    colours, thumbnails = [], []
    for start in range(0, len(pictures), BLOCK):
        pixels = pictures.batch(range(start, min(start + BLOCK, len(pictures)))).permute(0, 3, 1, 2).float()
        colours.append(pixels.mean((2, 3)).numpy())
        thumbnails.append(F.interpolate(pixels, size=(8, 8), mode="area").flatten(1).numpy())
    paths = [Path(pictures.path(i)) for i in range(len(pictures))]
    found = {"mean colour": np.concatenate(colours), "8x8 thumbnail": np.concatenate(thumbnails),
             "file type and size": np.c_[[[path.suffix.lower() == kind for kind in (".png", ".jpg", ".jpeg", ".bmp")] for path in paths],
                                         [[width, height, width / height, np.log(size)] for width, height, size in pictures.facts()]]}
    numbers = [re.findall(r"\d+", path.stem) for path in paths]
    if all(numbers):
        found["number in the file name"] = np.array([[float(n[-1])] for n in numbers])
    return found


def ridge(x, labels, others):
    """Scores [N', K] for each of others [N', D] by a class-balanced ridge classifier fitted on x [N, D] and labels [N].

    Minimises sum_n w_n |W x_n - onehot(y_n)|^2 + PENALTY |W|^2 over standardised features and a constant, w_n = N / (K N_{y_n}).
    """
    counts = np.bincount(labels)
    weights = (len(labels) / (len(counts) * np.maximum(counts, 1)))[labels]
    mean, spread = x.mean(0), x.std(0) + 1e-9
    scaled = [np.c_[(each - mean) / spread, np.ones(len(each))] for each in (x, *others)]
    weighted = scaled[0] * weights[:, None]
    solution = np.linalg.solve(weighted.T @ scaled[0] + PENALTY * np.eye(weighted.shape[1]), weighted.T @ np.eye(len(counts))[labels])
    return [each @ solution for each in scaled[1:]]
