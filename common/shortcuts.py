"""Classifiers that never look at the part: on mean colour, thumbnails and file properties.

Where one of them comes near a network's accuracy, the set does not measure inspection: the classes
were photographed on different days, or saved by different programs.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F

from common.metrics import score

PENALTY = 100.0  # of the ridge classifier; features are standardised
FILE_TYPES = (".png", ".jpg", ".jpeg", ".bmp")
BLOCK = 512  # pictures read at a time


def probe(train, tests):
    """Score ridge classifiers fitted on train, and the answer that is always the largest class.

    A network should be far better than all of them. train: Pictures; tests: {name: Pictures} with
    the same classes. Returns {probe: {set: {"accuracy", "balanced_accuracy"}}}. One pass over the
    decoded cache; 2 kB per picture.
    """
    classes = int(train.labels.max()) + 1
    largest = np.bincount(train.labels).argmax()
    found = {"largest class": {}}
    for of, test in tests.items():
        answers = np.zeros((len(test), classes))
        answers[:, largest] = 1.0
        found["largest class"][of] = score_answers(answers, test)

    known = properties(train)
    known_of_tests = [properties(test) for test in tests.values()]
    for name, features in known.items():
        others = [known_of_test[name] for known_of_test in known_of_tests]
        answers = ridge(features, train.labels.numpy(), others)
        found[name] = {}
        for (of, test), answer in zip(tests.items(), answers):
            found[name][of] = score_answers(answer, test)
    return found


def score_answers(answers, test):
    """Accuracy and balanced accuracy of scores [N, K]. They tell how far a probe gets.

    The scores are no probabilities, so only the largest of each picture counts.
    """
    decisions = np.eye(answers.shape[1])[answers.argmax(1)]
    metrics = score(decisions, test.labels)
    return {
        "accuracy": metrics["accuracy"],
        "balanced_accuracy": metrics["balanced_accuracy"],
    }


def properties(pictures):
    """What is known of each picture without looking at the part: {name: float [N, D]}.

    If it tells the classes apart, a network may learn it instead of the defects.
    """
    # colours and thumbnails
    colours = []
    thumbnails = []
    for start in range(0, len(pictures), BLOCK):
        indices = range(start, min(start + BLOCK, len(pictures)))
        pixels = pictures.batch(indices).permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, size=(8, 8), mode="area")
        colours.append(pixels.mean((2, 3)).numpy())
        thumbnails.append(small.flatten(1).numpy())

    # files
    files = []
    for i, (width, height, size) in enumerate(pictures.facts()):
        suffix = Path(pictures.path(i)).suffix.lower()
        kind = [float(suffix == each) for each in FILE_TYPES]
        files.append([*kind, width, height, width / height, np.log(size)])

    return {
        "mean colour": np.concatenate(colours),
        "8x8 thumbnail": np.concatenate(thumbnails),
        "file type and size": np.array(files),
    }


def ridge(x, labels, others):
    """Fit a class-balanced ridge classifier; its scores [N', K] for each of others [N', D].

    Every class weighs the same, since otherwise the largest class hides what the features tell.
    x: features [N, D]; labels: int [N]. Minimises sum_n w_n |W x_n - onehot(y_n)|^2 +
    PENALTY |W|^2 over standardised features and a constant, w_n = N / (K N_{y_n}).
    """
    counts = np.bincount(labels)
    class_weights = len(labels) / (len(counts) * np.maximum(counts, 1))
    weights = class_weights[labels]
    targets = np.eye(len(counts))[labels]

    mean = x.mean(0)
    spread = x.std(0) + 1e-9

    def scaled(features):
        return np.c_[(features - mean) / spread, np.ones(len(features))]

    # the normal equations
    fitted = scaled(x)
    weighted = fitted * weights[:, None]
    penalty = PENALTY * np.eye(fitted.shape[1])
    solution = np.linalg.solve(weighted.T @ fitted + penalty, weighted.T @ targets)
    return [scaled(features) @ solution for features in others]
