"""Can the numbers be trusted? What is wrong with the pictures themselves.

Copies across splits (a model is praised for what it has seen), equal pictures with different
labels, classifiers that never look at the part, groups of pictures that the file names suggest, and
sets too small for what is claimed of them.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common import duplicates
from common.errors import UserError
from common.files import load_json, save_json
from common.shortcuts import probe
from common.splits import TRAINING_SETS

VERSION = 4  # raise it when the audit changes
FEW = 10  # test pictures of a class, below which nothing can be said about it
SHOWN = 3  # examples of each finding in its line


def audit(sets, cache_dir):
    """All findings as plain data, from the cache where the pictures are the same as before.

    sets: {name: Pictures}, train first, then val, an unlabelled pool, test sets. Keys of the
    result: `copies` (dicts with picture, set, row and of, of_set, of_row, kind 'bytes', 'pixels' or
    'near', likeness, labels), `conflicts` (equal pictures of one set with different labels),
    `shortcuts` (see `probe`), `groups` (a proposal or None), `sizes` and `per_class` (pictures per
    set), `side` (px at which they were looked at).
    """
    content = json.dumps([VERSION, {name: each.fingerprint() for name, each in sets.items()}])
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"audit-{key}.json"
    try:
        return load_json(path)
    except UserError:
        pass

    train = sets["train"]
    classes = int(train.labels.max()) + 1
    labelled = {name: each for name, each in sets.items() if name != "unlabelled"}
    tests = {name: each for name, each in sets.items() if name not in TRAINING_SETS}
    copies, conflicts = find_copies(sets)
    found = {
        "copies": copies,
        "conflicts": conflicts,
        "shortcuts": probe(train, tests) if tests else {},
        "groups": propose_groups(train.paths()),
        "sizes": {name: len(each) for name, each in sets.items()},
        "per_class": {
            name: np.bincount(each.labels, minlength=classes).tolist()
            for name, each in labelled.items()
        },
        "side": train.side,
    }
    save_json(found, path)
    return found


def find_copies(sets):
    """(copies, conflicts): see `audit`. A picture is listed once, as the strongest kind of copy."""
    # All pictures behind one index, and where each one's own set begins.
    pictures = sum(list(sets.values())[1:], start=next(iter(sets.values())))
    sizes = [len(each) for each in sets.values()]
    begin = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    names = np.repeat(list(sets), sizes)
    pixels = pictures.pixel_digests()

    found = {}
    kinds = {"bytes": pictures.digests(), "pixels": pixels}
    for kind, digests in kinds.items():
        for i, j in duplicates.exact_copies(digests, begin):
            found.setdefault(i, (kind, j, 1.0))
    for i, j, likeness in duplicates.near_copies(pictures, begin, known=found):
        found.setdefault(i, ("near", j, likeness))

    copies = []
    for i, (kind, j, likeness) in sorted(found.items()):
        copies.append({
            "picture": pictures.path(i),
            "set": str(names[i]),
            "row": int(i - begin[i]),
            "of": pictures.path(j),
            "of_set": str(names[j]),
            "of_row": int(j - begin[j]),
            "kind": kind,
            "likeness": likeness,
            "labels": [int(pictures.labels[i]), int(pictures.labels[j])],
        })

    conflicts, first = [], {}
    for i, digest in enumerate(pixels):
        j = first.setdefault((names[i], digest), i)
        if pictures.labels[i] != pictures.labels[j]:
            both = {"picture": pictures.path(i), "of": pictures.path(j)}
            conflicts.append({"set": str(names[i]), **both})
    return copies, conflicts


def propose_groups(paths):
    """A --group-regex that the file names suggest, with what it would do, or None.

    Names such as 17_2.jpg, part17-b.png: many pictures share what stands before the last separator.
    """
    pattern = r"([^/]+)[_-][^_\-/]*\.\w+$"
    matches = [re.search(pattern, path) for path in paths]
    stems = [match.group(1) for match in matches if match]
    sizes = Counter(stems)
    few_match = len(stems) < 0.9 * len(paths)
    few_groups = len(sizes) < 10 or len(stems) < 2 * len(sizes)  # class names or series
    if few_match or few_groups:
        return None
    return {
        "group_regex": pattern,
        "groups": len(sizes),
        "largest": max(sizes.values()),
        "example": paths[0],
    }


def describe(found, classes, group_regex=None):
    """The findings in lines for people; nothing for what is as it should be."""
    lines = describe_copies(found) + describe_conflicts(found)
    if found["groups"] and group_regex is None:
        groups = found["groups"]
        lines.append(
            f"file names such as {groups['example']} suggest {groups['groups']} groups of up to "
            f"{groups['largest']} pictures; if these show one part each, split them whole: "
            f"--group-regex '{groups['group_regex']}'"
        )
    return lines + describe_few(found, classes) + describe_shortcuts(found, len(classes))


def describe_copies(found):
    """A line per kind of copy and pair of sets."""
    near = "nearly copies of pictures in"
    if found["side"] < duplicates.FINE:  # parts of one design agree in all that can be seen there
        near = (
            f"perhaps nearly copies (at {found['side']} px hard to tell; "
            f"--view-size {duplicates.FINE} tells more) of pictures in"
        )
    words = {"bytes": "byte for byte in", "pixels": "pixel for pixel in", "near": near}
    pairs = {}
    for copy in found["copies"]:
        example = f"{copy['picture']} = {copy['of']}"
        pairs.setdefault((copy["kind"], copy["set"], copy["of_set"]), []).append(example)
    lines = []
    for kind in words:
        for (its_kind, name, of), examples in pairs.items():
            if its_kind == kind:
                some = ", ".join(examples[:SHOWN])
                more = ", ..." if len(examples) > SHOWN else ""
                count = f"{len(examples)} of {found['sizes'][name]} pictures of {name}"
                lines.append(f"{count} are {words[kind]} {of}: {some}{more}")
    return lines


def describe_conflicts(found):
    """A line for each of a few copies whose labels differ."""
    lines = []
    for each in found["conflicts"]:
        lines.append(
            f"{each['set']}: {each['picture']} and {each['of']} are copies with different labels"
        )
    for copy in found["copies"]:
        a, b = copy["labels"]
        if a != b and min(a, b) >= 0:
            verb = "look like" if copy["kind"] == "near" else "are"
            lines.append(
                f"{copy['set']} and {copy['of_set']}: {copy['picture']} and {copy['of']} "
                f"{verb} copies with different labels"
            )
    return lines[: 2 * SHOWN]


def describe_few(found, classes):
    """A line per test set with classes of which it has too few pictures."""
    lines = []
    for name, counts in found["per_class"].items():
        few = [f"{c} ({n})" for c, n in zip(classes, counts) if n < FEW]
        if few and name not in TRAINING_SETS:
            lines.append(
                f"{name}: fewer than {FEW} pictures of {', '.join(few)}: "
                "nothing can be said about these classes alone"
            )
    return lines


def describe_shortcuts(found, classes):
    """A line per classifier that never looks at the part and is more than half-way to perfect."""
    chance = 1 / classes
    lines = []
    for name, result in found["shortcuts"].items():
        for of, scores in result.items():
            accuracy = scores["balanced_accuracy"]
            if accuracy > chance + 0.5 * (1 - chance):
                share = f"{100 * accuracy:.0f} % balanced accuracy on {of}"
                lines.append(f"shortcut: {name} alone gives {share}")
    return lines
