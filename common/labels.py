"""Doubtful labels: pictures whose label all teachers reject for the same other class.

Worth a look by the person who labelled them; nothing is changed.
"""

import numpy as np
import torch
import torch.nn.functional as F

NEIGHBOURS = 7  # whose labels are compared with a picture's own
BLOCK = 1024  # pictures at a time
REFERENCES = 10_000  # pictures that each one is compared with, so that time grows with N alone
ITSELF = -2.0  # less than any cosine
SHOWN = 3  # examples in a line


def neighbour_votes(features, labels, classes):
    """What the labels of the most similar other pictures say of each picture.

    features: float [N, D], of a teacher; labels: int64 [N]. Returns float32 [N, classes], rows
    summing to 1. A teacher knows its own training labels by heart, wrong ones too, but puts a
    picture beside those it resembles (Bahri et al. 2020). A vote weighs 1 / (pictures of its
    class), or rare classes would be outvoted. Of more than 10,000 pictures, so many drawn at random
    are the ones that vote.
    """
    unit = F.normalize(features, dim=1)
    everyone = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    voters = everyone[:REFERENCES].sort().values
    weight = 1.0 / torch.bincount(labels[voters], minlength=classes).clamp(min=1)
    votes = torch.zeros(len(labels), classes)
    for rows in torch.arange(len(labels)).split(BLOCK):
        cosine = unit[rows] @ unit[voters].T
        cosine[rows[:, None] == voters] = ITSELF
        nearest = cosine.topk(min(NEIGHBOURS, len(labels) - 1), dim=1).indices
        theirs = labels[voters][nearest]
        votes[rows] = torch.zeros(len(rows), classes).scatter_add_(1, theirs, weight[theirs])
    return votes / votes.sum(1, keepdim=True)


def doubtful_labels(answers, labels):
    """The labels that all teachers reject for one other class, which gets over half of their mean.

    answers: one float array [N, K] of probabilities per teacher, on pictures it was not trained on,
    or of `neighbour_votes`; labels: int [N]. Returns dicts with row, label, suggested and
    probability, the most doubtful first.
    """
    if not answers:
        return []
    decisions = np.stack([answer.argmax(1) for answer in answers])
    mean = np.mean(answers, axis=0)
    suggested = mean.argmax(1)
    agreed = (decisions == decisions[0]).all(0)
    rows = np.flatnonzero(agreed & (suggested != labels) & (mean.max(1) > 0.5))
    lead = mean[rows, suggested[rows]] - mean[rows, labels[rows]]
    found = []
    for i in rows[np.argsort(-lead, kind="stable")]:
        found.append({
            "row": int(i),
            "label": int(labels[i]),
            "suggested": int(suggested[i]),
            "probability": float(mean[i].max()),
        })
    return found


def doubtful_pictures(pictures, answers):
    """`doubtful_labels` of `Pictures`, with the path of each."""
    found = doubtful_labels(answers, pictures.labels.numpy())
    return [{**doubt, "picture": pictures.path(doubt["row"])} for doubt in found]


def describe(doubtful, classes):
    """A line per set with the first of its doubtful labels; doubtful: {set: doubtful pictures}."""
    lines = []
    for name, found in doubtful.items():
        some = []
        for doubt in found[:SHOWN]:
            suggested = f"all say {classes[doubt['suggested']]}, {100 * doubt['probability']:.0f} %"
            some.append(f"{doubt['picture']} ({suggested})")
        if found:
            more = ", ..." if len(found) > SHOWN else ""
            lines.append(f"{len(found)} doubtful labels in {name}: {', '.join(some)}{more}")
    return lines
