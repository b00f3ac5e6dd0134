"""Label errors: labels that all teachers reject for the same other class. Nothing is changed."""

from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from common.files import some_of
from common.models import predict

NEIGHBOURS = 7  # whose labels are compared with a picture's own
BLOCK = 1024  # pictures at a time
REFERENCES = 10_000  # pictures that each one is compared with, so that time grows with N alone


def find_label_errors(teachers, train, val, answers):
    """{"val", "train"}: `label_errors_of` each, by what the teachers say and by `neighbour_votes`.

    teachers: `Classifier`s; train, val: `Pictures`; answers: the teachers' calibrated
    probabilities of val, float32 [teachers, N, K].
    """
    device = next(teachers[0].parameters()).device
    votes = []
    for teacher in teachers:
        features = predict(partial(before_the_head, teacher), train, device)
        votes.append(neighbour_votes(features, train.labels, answers.shape[2]).numpy())
    return {"val": label_errors_of(val, answers.numpy()), "train": label_errors_of(train, votes)}


def before_the_head(teacher, pixels):
    """What a teacher's last layer sees: float [B, D]."""
    maps = teacher.backbone.forward_features(teacher.normalise(pixels))
    return teacher.backbone.forward_head(maps, pre_logits=True)


def neighbour_votes(features, labels, classes):
    """What the labels of the most similar other pictures say of each picture.

    A teacher knows its own training labels by heart, wrong ones too, but puts a picture beside
    those it resembles (Bahri et al. 2020). features: float [N, D], of a teacher; labels: int64 [N].
    Returns float32 [N, classes], rows summing to 1. A vote weighs 1 / (pictures of its class), or
    rare classes would be outvoted. Of more than 10,000 pictures, so many drawn at random vote.
    """
    unit = F.normalize(features, dim=1)
    everyone = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    voters = everyone[:REFERENCES].sort().values
    weight = 1.0 / torch.bincount(labels[voters], minlength=classes).clamp(min=1)
    votes = torch.zeros(len(labels), classes)
    for rows in torch.arange(len(labels)).split(BLOCK):
        cosine = unit[rows] @ unit[voters].T
        cosine[rows[:, None] == voters] = -torch.inf  # nobody votes for itself
        nearest = cosine.topk(min(NEIGHBOURS, len(labels) - 1), dim=1).indices
        theirs = labels[voters][nearest]
        votes[rows] = votes[rows].scatter_add(1, theirs, weight[theirs])
    return votes / votes.sum(1, keepdim=True)


def label_errors(answers, labels):
    """The labels that all teachers reject for one other class, which gets over half of their mean.

    answers: each teacher's probabilities, float [N, K], on pictures it was not trained on, or its
    `neighbour_votes`; labels: int [N]. Dicts of row, label, suggested, probability, surest first.
    """
    if not len(answers):
        return []
    mean = np.mean(answers, axis=0)
    suggested = mean.argmax(1)
    agreed = (np.argmax(answers, axis=2) == suggested).all(0)
    rows = np.flatnonzero(agreed & (suggested != labels) & (mean.max(1) > 0.5))
    lead = mean[rows, suggested[rows]] - mean[rows, labels[rows]]
    errors = []
    for i in rows[np.argsort(-lead, kind="stable")].tolist():
        error = {"row": i, "label": int(labels[i]), "suggested": int(suggested[i])}
        errors.append({**error, "probability": float(mean[i].max())})
    return errors


def label_errors_of(pictures, answers):
    """`label_errors` of `Pictures`, with the path of each as picture."""
    errors = label_errors(answers, pictures.labels.numpy())
    return [{**error, "picture": pictures.path(error["row"])} for error in errors]


def label_errors_of_sets(stored, audited, tests, answers):
    """{set: label errors}: as build_ensemble.py stored them, and of test sets anew.

    stored: dicts {set: label errors}, left out where audited, {set: Pictures}, has other pictures
    by now; tests: {set: Pictures}; answers: {set: as for `label_errors`}.
    """
    still_there = {}
    for name, errors in chain(*(of_sets.items() for of_sets in stored)):
        paths = dict(enumerate(audited[name].paths() if name in audited else []))
        if all(paths.get(error["row"]) == error["picture"] for error in errors):
            still_there[name] = errors
    return still_there | {name: label_errors_of(tests[name], answers[name]) for name in tests}


def label_error_lines(label_errors, classes):
    """A line per set with the first of its label errors; label_errors: {set: dicts}."""
    lines = []
    for name, errors in label_errors.items():
        told = [(e["picture"], classes[e["suggested"]], e["probability"]) for e in errors]
        examples = [f"{path} (all say {what}, {100 * p:.0f} %)" for path, what, p in told]
        if errors:
            lines.append(f"{len(errors)} label errors suspected in {name}: {some_of(examples)}")
    return lines
