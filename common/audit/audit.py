"""Can the pictures be trusted? Copies, labels that contradict, shortcuts, groups, small sets.

A set that leaks praises every model. What is wrong with it is told; nothing is changed.
"""

import re
from collections import Counter
from functools import partial

import numpy as np

from common import files, folders, splits
from common.audit import near_duplicates, shortcuts
from common.files import UserError, px, some_of

VERSION = 10  # raise it when the audit changes
FEW = 10  # test pictures of a class, below which nothing can be said about it
CONFLICTS = 6  # lines about copies with different labels


def open_training_sets(cache, dataset, specs, moved_to=None):
    """The pictures that models learnt from, {"train", "val", "unlabelled"}; {} if not here.

    dataset: of the training, or None where no model says; specs: of the ensembles among the models,
    the first names the unlabelled pictures; moved_to: where the data folder may lie now, or None.
    """
    if dataset is None:
        print("audit: left out; an exported file does not say which pictures it was trained on")
        return {}
    moved = moved_to and folders.part_folder(moved_to, "train").is_dir()
    try:
        train, val, dataset = splits.open_training(cache, dataset, moved_to if moved else None)
    except UserError as error:
        print(f"audit: left out, since the training pictures are not here as they were ({error})")
        return {}
    sets, beside = {"train": train, "val": val}, folders.pool_folder(dataset["dir"])
    try:
        if specs and specs[0]["unlabelled"]:
            unlabelled = specs[0]["unlabelled"]
            sets["unlabelled"] = splits.open_same_pool(cache, None, dataset, unlabelled)
        elif beside and not specs:  # of students alone what lies in the data folder
            sets["unlabelled"] = splits.open_pool(cache, beside, dataset)
    except UserError as error:
        print(f"audit: without the unlabelled pictures ({error})")
    return sets


def audit(cache, dataset, sets):
    """All findings as plain data, from the cache where the pictures are the same as before.

    dataset: with view_size and white_level; sets: {name: Pictures}, train first, then val, an
    unlabelled pool, test sets. Keys: `copies`, `conflicts` and `repeats` (see `find_copies`),
    `parts` (see `find_parts`), `shortcuts` (see `shortcuts.probe`), `groups` (see
    `propose_groups`), `sizes` and `per_class` (pictures in each set), `compared_at` ([H, W] at
    which near-duplicates were looked for).
    """
    of_sets = {name: each.fingerprint() for name, each in sets.items()}
    identity = [VERSION, dataset["group_regex"], of_sets]
    make = partial(findings_of, cache, dataset, sets)
    return files.remembered(cache.home, "audit", identity, make)


def findings_of(cache, dataset, sets):
    """`audit`, made anew."""
    train, detailed = sets["train"], splits.in_detail(cache, dataset, *sets.values())
    classes = int(train.labels.max()) + 1
    labels = {name: each.labels for name, each in sets.items() if name != "unlabelled"}
    tests = {name: each for name, each in sets.items() if name not in splits.TRAINING_SETS}
    return {
        **find_copies(sets, sum(detailed[1:], start=detailed[0])),
        "parts": find_parts(dataset["group_regex"], sets, tests),
        "shortcuts": shortcuts.probe(train, tests),
        "groups": propose_groups(train.paths()),
        "sizes": {name: len(each) for name, each in sets.items()},
        "per_class": {k: np.bincount(v, minlength=classes).tolist() for k, v in labels.items()},
        "compared_at": detailed[0].view_size,
    }


def find_copies(sets, detailed):
    """Pictures that repeat others, as plain data.

    copies: of another set; conflicts: of the same set, equal in pixels but not in label; both lists
    of dicts: picture, set, row and of, of_set, of_row, kind "bytes", "pixels" or "near", likeness,
    labels, each picture once, as the strongest kind. repeats: {set: how many repeat others of it,
    pixel for pixel}. detailed: the `Pictures` of all sets one behind another, at
    `splits.in_detail`.
    """
    first, *others = sets.values()
    pictures = sum(others, start=first)
    lengths = [len(each) for each in sets.values()]
    begin = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each picture's own set
    names = np.repeat(list(sets), lengths).tolist()
    labels = pictures.labels.tolist()
    pixels = pictures.pixel_digests()

    originals = {}
    for kind, digests in (("bytes", pictures.digests()), ("pixels", pixels)):
        for i, j in near_duplicates.exact_copies(digests, begin):
            originals.setdefault(i, (j, kind, 1.0))
    for i, j, likeness in near_duplicates.near_duplicates(detailed, begin, skip=originals):
        originals[i] = j, "near", likeness

    def pair(i, j, kind, likeness):
        return {
            "picture": pictures.path(i), "set": names[i], "row": int(i - begin[i]),
            "of": pictures.path(j), "of_set": names[j], "of_row": int(j - begin[j]),
            "kind": kind, "likeness": likeness, "labels": [labels[i], labels[j]],
        }

    copies = [pair(i, *originals[i]) for i in sorted(originals)]
    twins = near_duplicates.exact_copies(zip(names, pixels), begin=np.arange(len(pictures)))
    conflicts = [pair(i, j, "pixels", 1.0) for i, j in twins if labels[i] != labels[j]]
    repeats = Counter(names[i] for i, _ in twins)
    return {"copies": copies, "conflicts": conflicts, "repeats": dict(repeats)}


def find_parts(pattern, sets, tests):
    """{test set: [(path, path of the other)]} of the pictures whose parts training shows too.

    pattern: --group-regex, or None; sets, tests: {name: Pictures}, of which `tests` are some. None
    in place of a list where the pattern names no part of the set.
    """
    if pattern is None:
        return {}
    names = partial(splits.parts_of, pattern)
    trained = [each for name, each in sets.items() if name not in tests]
    return {name: splits.shared(each, trained, names) if any(names(each)) else None
            for name, each in tests.items()}


def propose_groups(paths):
    """A --group-regex that names such as 17_2.jpg or part17-b.png suggest, as a dict, or None."""
    pattern = r"([^/]+)[_-][^_\-/]*\.\w+$"  # up to the last separator
    matches = [re.search(pattern, path) for path in paths]
    sizes = Counter(match.group(1) for match in matches if match)
    few_match = sizes.total() < 0.9 * len(paths)
    if few_match or len(sizes) < 10 or sizes.total() < 2 * len(sizes):  # class names or series
        return None
    largest = max(sizes.values())
    return {"group_regex": pattern, "groups": len(sizes), "largest": largest, "example": paths[0]}


def audit_lines(findings, classes, group_regex=None):
    """The findings in lines for people; nothing for what is as it should be.

    classes: their names; group_regex: the one in use, so that none is proposed.
    """
    near = "near-duplicates"
    if not near_duplicates.shows_detail(findings["compared_at"]):
        # there, parts of one design agree in all
        near = f"perhaps near-duplicates (at {px(findings['compared_at'])} hard to tell)"
    words = {"bytes": "byte for byte", "pixels": "pixel for pixel", "near": f"{near} of pictures"}
    examples = {}
    for copy in sorted(findings["copies"], key=lambda copy: list(words).index(copy["kind"])):
        texts = examples.setdefault((copy["kind"], copy["set"], copy["of_set"]), [])
        texts.append(f"{copy['picture']} = {copy['of']}")
    lines = []
    for (kind, name, of), texts in examples.items():
        count = f"{len(texts)} of {findings['sizes'][name]} pictures of {name}"
        lines.append(f"{count} are {words[kind]} in {of}: {some_of(texts)}")

    conflicts = []
    for copy in findings["conflicts"] + findings["copies"]:
        a, b = copy["labels"]
        if a != b and min(a, b) >= 0:
            sets = " and ".join(dict.fromkeys([copy["set"], copy["of_set"]]))
            verb = "look like" if copy["kind"] == "near" else "are"
            both = f"{copy['picture']} and {copy['of']} {verb} copies"
            conflicts.append(f"{sets}: {both} with different labels")
    lines += conflicts[:CONFLICTS]
    if conflicts[CONFLICTS:]:
        lines.append(f"and {len(conflicts) - CONFLICTS} more pairs with different labels")

    for name, repeats in findings["repeats"].items():
        if name not in splits.TRAINING_SETS:
            count = f"{repeats} of {findings['sizes'][name]} pictures of {name}"
            lines.append(f"{count} repeat others of it, so its intervals are too narrow")

    if findings["groups"] and group_regex is None:
        proposal = (
            "file names such as {example} suggest {groups} groups of up to {largest} pictures; if "
            "these show one part each, split them whole: --group-regex '{group_regex}'"
        )
        lines.append(proposal.format_map(findings["groups"]))

    for name, pairs in findings["parts"].items():
        if pairs is None:
            lines.append(f"--group-regex matches no picture of {name}, so each counts alone")
        elif pairs:
            count, example = f"{len(pairs)} pictures of {name}", " = ".join(pairs[0])
            lines.append(f"{count} show parts that training shows, by --group-regex: {example}")

    for name, counts in findings["per_class"].items():
        few = [f"{c} ({n})" for c, n in zip(classes, counts) if 0 < n < FEW]
        if few and name not in splits.TRAINING_SETS:
            few = f"fewer than {FEW} pictures of {some_of(few)}"
            lines.append(f"{name}: {few}: nothing can be said about these classes alone")

    for by, of, reached in found_shortcuts(findings):
        share = f"{100 * reached:.0f} % balanced accuracy"
        lines.append(f"shortcut: {by} alone gives {share} on {of}")
    return lines


def found_shortcuts(findings):
    """[(classifier, test set, balanced accuracy)] above half-way from chance to perfect.

    Of test sets with pictures of every class.
    """
    classes_of = {of: len(counts) for of, counts in findings["per_class"].items() if all(counts)}
    return [
        (by, of, scores["balanced_accuracy"])
        for by, scores_of in findings["shortcuts"].items() for of, scores in scores_of.items()
        if of in classes_of and scores["balanced_accuracy"] > (1 + 1 / classes_of[of]) / 2
    ]
