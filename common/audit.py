"""Can the numbers be trusted? What is wrong with the pictures themselves, found before any training.

Copies across splits (a model is praised for what it has seen), equal pictures with different labels, classifiers that never
look at the part, groups of pictures that the file names suggest, and sets too small for what is claimed of them.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import duplicates
from common.checkpoints import load_json, save_json
from common.cli import UserError
from common.data import Pictures, open_pack, open_test_sets, test_folders, whole
from common.shortcuts import probe

VERSION = 3  # raise it when the audit changes
FEW = 10  # test pictures of a class, below which nothing can be said about it
NEIGHBOURS = 7  # whose labels are compared with a picture's own
SHOWN = 3  # examples of each finding that are printed


def audit(sets, cache_dir):
    """All findings as plain data, from the cache where the pictures are the same as before.

    sets: {name: Pictures}, train first, then val, an unlabelled pool, test sets. Keys of the result: `copies` (dicts with picture, set,
    row and of, of_set, of_row, kind 'bytes', 'pixels' or 'near', likeness, labels), `conflicts` (equal pictures of one set with
    different labels), `shortcuts` (see `probe`), `groups` (a proposal or None), `sizes` and `per_class` (pictures per set), `side` (px at which they were looked at).
    """
    key = hashlib.sha256(json.dumps([VERSION, [[name, *(pack.fingerprint for pack in pictures.packs), hashlib.sha256(pictures.rows.tobytes()).hexdigest()]
                                               for name, pictures in sets.items()]]).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"audit-{key}.json"
    try:
        return load_json(path)
    except UserError:
        pass
    labelled = {name: pictures for name, pictures in sets.items() if (pictures.labels >= 0).all()}
    train, tests = sets["train"], {name: pictures for name, pictures in labelled.items() if name not in ("train", "val")}
    copies, conflicts = find_copies(sets)
    found = {"copies": copies, "conflicts": conflicts, "shortcuts": probe(train, tests) if tests else {},
             "groups": propose_groups([train.path(i) for i in range(len(train))]),
             "sizes": {name: len(pictures) for name, pictures in sets.items()}, "side": int(train.packs[0].images.shape[1]),
             "per_class": {name: np.bincount(pictures.labels, minlength=int(train.labels.max()) + 1).tolist()
                           for name, pictures in labelled.items()}}
    save_json(found, path)
    return found


def all_sets(train, val, record, tests, args):
    """{name: Pictures} in the order that `audit` wants: train, val, the unlabelled pool if any (args.unlabelled or the data folder's), tests."""
    pool = Path(getattr(args, "unlabelled", None) or Path(record["dir"]) / "unlabelled")
    unlabelled = {"unlabelled": whole(open_pack(pool, record["view_size"], args, labelled=False))} if pool.is_dir() else {}
    return {"train": train, "val": val, **unlabelled, **tests}


def find_copies(sets):
    """(copies, conflicts): see `audit`. A picture is listed once, with the strongest kind of copy."""
    pictures = Pictures(*(part for each in sets.values() for part in each.parts))
    sizes = [len(each) for each in sets.values()]
    begin, names = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes), np.repeat(list(sets), sizes)
    pixels = pictures.pixel_digests()
    found = {}

    def add(kind, i, j, likeness=1.0):
        found.setdefault(i, {"picture": pictures.path(i), "set": str(names[i]), "row": int(i - begin[i]), "kind": kind,
                             "of": pictures.path(j), "of_set": str(names[j]), "of_row": int(j - begin[j]),
                             "likeness": likeness, "labels": [int(pictures.labels[i]), int(pictures.labels[j])]})

    for kind, digests in (("bytes", pictures.digests()), ("pixels", pixels)):
        for pair in duplicates.exact_copies(digests, begin):
            add(kind, *pair)
    for triple in duplicates.near_copies(pictures, begin, known=found):
        add("near", *triple)
    conflicts, first = [], {}
    for i, digest in enumerate(pixels):
        j = first.setdefault((names[i], digest), i)
        if pictures.labels[i] != pictures.labels[j]:
            conflicts.append({"set": str(names[i]), "picture": pictures.path(i), "of": pictures.path(j)})
    return [found[i] for i in sorted(found)], conflicts


def propose_groups(paths):
    """A --group-regex that the file names suggest, with what it would do, or None.

    Names such as 17_2.jpg, part17-b.png: many pictures share what stands before the last separator.
    """
    pattern = r"([^/]+)[_-][^_\-/]*\.\w+$"
    stems = [match.group(1) for path in paths if (match := re.search(pattern, path))]
    sizes = Counter(stems)
    if len(stems) < 0.9 * len(paths) or len(sizes) < 10 or len(stems) < 2 * len(sizes):  # few "groups" are class names or series
        return None
    return {"group_regex": pattern, "groups": len(sizes), "largest": max(sizes.values()), "example": paths[0]}


def neighbour_votes(features, labels, classes):
    """What the labels of the most similar other pictures say of each picture: float32 [N, K], rows summing to 1.

    features: float [N, D], of a teacher; labels: int64 [N]. A teacher knows its own training labels by heart, wrong ones too, but puts
    a picture beside those it resembles (Bahri et al. 2020). A vote weighs 1 / (pictures of its class), or rare classes would be outvoted.
    """
    unit, weight, votes = F.normalize(features, dim=1), 1.0 / torch.bincount(labels, minlength=classes).clamp(min=1), torch.zeros(len(labels), classes)
    for rows in torch.arange(len(labels)).split(1024):
        likeness = unit[rows] @ unit.T
        likeness[torch.arange(len(rows)), rows] = -2.0  # not itself
        nearest = labels[likeness.topk(min(NEIGHBOURS, len(labels) - 1), dim=1).indices]
        votes[rows] = torch.zeros(len(rows), classes).scatter_add_(1, nearest, weight[nearest])
    return votes / votes.sum(1, keepdim=True)


def suspicious_labels(answers, labels):
    """Pictures whose label all teachers reject for the same other class, which gets over half of the mean, the most doubtful first.

    answers: one float array [N, K] of probabilities per teacher, on pictures it was not trained on, or of `neighbour_votes`;
    labels: int [N]. Returns dicts with row, label, suggested, probability.
    """
    if not answers:
        return []
    decisions, mean = np.stack([a.argmax(1) for a in answers]), np.mean(answers, axis=0)
    suggested = mean.argmax(1)
    rows = np.flatnonzero((decisions == decisions[0]).all(0) & (suggested != labels) & (mean.max(1) > 0.5))
    doubt = mean[rows, labels[rows]] - mean[rows, suggested[rows]]
    return [{"row": int(i), "label": int(labels[i]), "suggested": int(suggested[i]), "probability": float(mean[i].max())} for i in rows[np.argsort(doubt, kind="stable")]]


def doubts(pictures, answers):
    """`suspicious_labels` of Pictures, with the path of each."""
    return [{**found, "picture": pictures.path(found["row"])} for found in suspicious_labels(answers, pictures.labels.numpy())]


def look(train, val, record, args):
    """Audit what belongs to a training run, print what was found, and return it.

    record: of `data.open_training_data`; args: data flags. Costs seconds for thousands of pictures the first time and nothing
    while they stay the same.
    """
    folder, classes = record["dir"], record["classes"]
    sets = all_sets(train, val, record, open_test_sets(test_folders(folder), record["view_size"], classes, args), args)
    found = audit(sets, args.cache_dir)
    for line in describe(found, classes, record["group_regex"]):
        print(f"audit: {line}")
    return found


def check(train, val, record, args):
    """`look`, and raise a UserError where test pictures are among the training ones, unless args.allow_leakage."""
    leaks = [c for c in look(train, val, record, args)["copies"]
             if c["kind"] != "near" and c["of_set"] in ("train", "val") and c["set"] not in ("val", "unlabelled")]
    if leaks and not args.allow_leakage:
        raise UserError(f"{record['dir']}: {len(leaks)} test pictures are among the training pictures ({leaks[0]['picture']} = {leaks[0]['of']}); "
                        "--drop-leaks leaves them out of training, --allow-leakage goes on")


def describe(found, classes, group_regex=None):
    """The findings in lines for people; nothing for what is as it should be."""
    lines, near = [], "nearly copies of pictures in"
    if found["side"] < duplicates.FINE:  # parts of one design agree in all that can be seen there
        near = f"perhaps nearly copies (at {found['side']} px hard to tell; --view-size {duplicates.FINE} tells more) of pictures in"
    for kind, words in (("bytes", "byte for byte in"), ("pixels", "pixel for pixel in"), ("near", near)):
        of_kind = [c for c in found["copies"] if c["kind"] == kind]
        for (name, of), count in Counter((c["set"], c["of_set"]) for c in of_kind).items():
            some = [f"{c['picture']} = {c['of']}" for c in of_kind if (c["set"], c["of_set"]) == (name, of)][:SHOWN]
            lines.append(f"{count} of {found['sizes'][name]} pictures of {name} are {words} {of}: {', '.join(some)}" + (", ..." if count > SHOWN else ""))
    different = [c for c in found["copies"] if min(c["labels"]) >= 0 and c["labels"][0] != c["labels"][1]]
    for c in [*found["conflicts"], *({**c, "set": f"{c['set']} and {c['of_set']}"} for c in different)][:2 * SHOWN]:
        lines.append(f"{c['set']}: {c['picture']} and {c['of']} {'look like' if c.get('kind') == 'near' else 'are'} copies with different labels")
    if found["groups"] and group_regex is None:
        g = found["groups"]
        lines.append(f"file names such as {g['example']} suggest {g['groups']} groups of up to {g['largest']} pictures; if these show one part each, "
                     f"split them whole: --group-regex '{g['group_regex']}'")
    for name, counts in found["per_class"].items():
        few = [f"{c} ({n})" for c, n in zip(classes, counts) if n < FEW]
        if few and name not in ("train", "val"):
            lines.append(f"{name}: fewer than {FEW} pictures of {', '.join(few)}: nothing can be said about these classes alone")
    for name, result in found["shortcuts"].items():
        for of, scores in result.items():
            if scores["balanced_accuracy"] > 1 / len(classes) + 0.5 * (1 - 1 / len(classes)):
                lines.append(f"shortcut: {name} alone gives {100 * scores['balanced_accuracy']:.0f} % balanced accuracy on {of}")
    return lines
