"""Which pictures: labelled sets, what is held out, the pool, leaks, test sets.

A dataset is a dict that every stage passes on, so that all see the same split:

    dir, view_size, white_level    where the pictures are, and how they are read: [H, W] in px
    val_fraction, group_regex      how a part of train/ is held out where there is no val/
    held_out                       the paths of these; drawn once, then every stage has the same
    dropped                        pictures of train/ and val/ that --drop-leaks left out
    classes, fingerprint           what these are; compared when a later stage opens it
"""

from functools import partial
from pathlib import Path

import numpy as np

from common import folders, validation
from common.audit import near_duplicates
from common.files import UserError, require_same, some_of
from common.pictures import Pictures, list_pictures, say_once

TRAINING_SETS = ("train", "val", "unlabelled")  # names that no test set may take


# ----------------------------------------------------------------------------------- labelled sets


def open_labelled(cache, folder, dataset, classes=None):
    """(classes, Pictures) of a folder with a folder per class.

    dataset: with view_size and white_level; classes: of the models, of which a test set may lack
    some. Raises UserError as `class_folders` does, for other classes, and for pictures or whole
    classes that cannot be read.
    """
    folder = Path(folder)
    class_of = folders.class_folders(folder, may_lack=classes is not None)
    its_classes = list(class_of.values())
    classes = its_classes if classes is None else classes
    if not set(its_classes) <= set(classes):
        what, remedy = f"{folder} against the models", "move these pictures or rename them"
        require_same({"classes": classes}, {"classes": its_classes}, what, remedy)
    lacking = [name for name in classes if name not in its_classes]
    if lacking:
        say_once(f"{folder}: has no pictures of {some_of(lacking)}, so it says nothing about them")
    decoded = cache.open(folder, dataset["view_size"], dataset["white_level"])
    decoded.require_readable(cache.skip_bad)

    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.is_dir()
        if hidden and list_pictures(path):
            say_once(f"{folder}: left out the folder {path.name}, whose name begins with a dot")

    number = {name: classes.index(its_class) for name, its_class in class_of.items()}
    owners = [path.split("/")[0] for path in decoded.paths]
    rows = np.array([row for row, name in enumerate(owners) if name in number], np.int64)
    labels = np.array([number[owners[row]] for row in rows], np.int64)
    if len(rows) < len(owners):
        print(f"{folder}: left out {len(owners) - len(rows)} pictures beside the class folders")
    unread = [name for name, k in number.items() if k not in labels]
    if unread:
        raise UserError(f"{folder / unread[0]}: no picture of it can be read; mend or remove it")
    return classes, Pictures.of(decoded, rows, labels)


def open_training(cache, dataset, moved_to=None):
    """(train, val, dataset); every stage calls this, hence sees the same split.

    dataset: see above; what is returned adds classes, fingerprint and held_out. Where it has them
    already they are compared with what is there, and a UserError names what differs. moved_to:
    where the folder lies now, None for where it lay.
    """
    folder = folders.data_folder(moved_to or dataset["dir"])
    classes, train = open_labelled(cache, folders.train_folder(folder), dataset)
    fingerprint, val_folder = train.fingerprint(), folders.part_folder(folder, "val")
    if val_folder.is_dir():
        its_classes, val = open_labelled(cache, val_folder, dataset)
        what = f"{val_folder} against train"
        remedy = "add pictures of them, or take the folder away: a part of train/ validates then"
        require_same({"classes": classes}, {"classes": its_classes}, what, remedy)
        fingerprint += f"+{val.fingerprint()}"
        held_out = []
    else:
        held_out = dataset.get("held_out")
        if not held_out:
            rest = without(train, dataset["dropped"], classes)
            held_out = validation.hold_out(
                cache.home, *in_detail(cache, dataset, rest), classes, dataset["val_fraction"],
                dataset["group_regex"],
            )
        held = np.isin(train.paths(), held_out)
        train, val = train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))

    opened = {
        **dataset,
        "dir": folder.as_posix(),
        "classes": classes,
        "fingerprint": fingerprint,
        "held_out": held_out,
    }
    if "fingerprint" in dataset:
        if bool(held_out) != bool(dataset["held_out"]):
            found, then = ("there is none", "had") if held_out else ("there is one now", "had no")
            raise UserError(f"{folder}: the earlier stage {then} val/, and {found}; put it as it "
                            "was, or begin again: train_teacher.py --overwrite")
        remedy = ("give the --data-dir that the earlier stage was made from, or begin again: "
                  "train_teacher.py --overwrite")
        expected = {**dataset, "dir": opened["dir"], "fingerprint": fingerprint}
        require_same(expected, opened, f"the pictures in {folder}", remedy)
        if fingerprint != dataset["fingerprint"]:
            raise UserError(f"{folder}: pictures were added, removed or changed since; {remedy}")
    require_named(train + val, held_out + dataset["dropped"], folder)
    train, val = (without(each, dataset["dropped"], classes) for each in (train, val))
    return train, val, opened


def require_named(pictures, paths, folder):
    """Raise a UserError where one of the paths is of no picture: held out or left out by name."""
    if gone := set(paths).difference(pictures.paths()):
        raise UserError(
            f"{folder}: was divided by names, and has no {min(gone)} any more; "
            "call its folders as they were called, or train again"
        )


def in_detail(cache, dataset, *sets):
    """The same `Pictures` at a size that tells near-duplicates, or their own where that is smaller.

    So what is found does not depend on the size of the views. Decoded where that size is another.
    """
    sizes = [size[:2] for pictures in sets for size in pictures.sizes()]
    width, height = np.minimum(np.median(sizes, axis=0), near_duplicates.FINE).astype(int).tolist()
    if [height, width] == dataset["view_size"]:
        return list(sets)
    detailed = []
    for each in sets:
        sources = [cache.open(source.folder, [height, width], dataset["white_level"])
                   for source in each.sources]
        detailed.append(Pictures(sources, each.source_of, each.row_of, each.labels.numpy()))
    return detailed


# ---------------------------------------------------------------------------------- unlabelled


def open_pool(cache, folder, dataset):
    """`Pictures` without labels from anywhere below a folder. Errors as of `cache.open`."""
    decoded = cache.open(folder, dataset["view_size"], dataset["white_level"])
    decoded.require_readable(cache.skip_bad)
    return Pictures.of(decoded)


def open_same_pool(cache, folder, dataset, unlabelled):
    """The unlabelled pictures of an ensemble, or None where it has none.

    unlabelled: as ensemble.json has it, or None; folder: where they lie now, None for where they
    lay or, where the data folder has moved, in that. Raises UserError where they are not the same.
    """
    if unlabelled is None:
        if folder not in (None, "none"):
            raise UserError(
                f"--unlabelled {folder}: the ensemble was built without unlabelled pictures; "
                "build it again with them"
            )
        return None
    without_it = "build it again, without them by build_ensemble.py --unlabelled none --overwrite"
    if folder == "none":
        raise UserError(f"--unlabelled none: the ensemble was built with {unlabelled['dir']}; "
                        f"{without_it}")
    beside = folders.part_folder(dataset["dir"], "unlabelled")
    if folder is None:
        stayed = Path(unlabelled["dir"]).is_dir() or not beside.is_dir()
        folder = unlabelled["dir"] if stayed else beside
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder, of the ensemble's unlabelled pictures; say "
                        f"with --unlabelled where they lie, or {without_it}")
    pool = open_pool(cache, folder, dataset)
    if pool.fingerprint() != unlabelled["fingerprint"]:
        raise UserError(f"{folder}: pictures were added, removed or changed since the ensemble was "
                        "built; give the --unlabelled folder it was made from, or build it again: "
                        "build_ensemble.py --overwrite")
    moved = [f"{Path(folder).name}/{path.split('/', 1)[1]}" for path in unlabelled["dropped"]]
    require_named(pool, moved, folder)
    return without(pool, moved)


def open_as_taught(cache, spec, data_dir, unlabelled):
    """(labelled, labelled with the pool, val, dataset): the very pictures of an ensemble.

    spec: ensemble.json; data_dir, unlabelled: where they lie now, None for where they lay. Raises
    UserError where they are not the same.
    """
    labelled, val, dataset = open_training(cache, spec["dataset"], data_dir)
    pool = open_same_pool(cache, unlabelled, dataset, spec["unlabelled"])
    return labelled, labelled + pool if pool else labelled, val, dataset


# ------------------------------------------------------------------------------------------ leaks


def without(pictures, paths, classes=()):
    """The pictures but those at these paths. Raises UserError where that empties a class."""
    if not paths:
        return pictures
    left_out = set(paths)
    kept = [i for i, path in enumerate(pictures.paths()) if path not in left_out]
    rest = pictures.take(np.array(kept, np.int64))
    lost = set(pictures.labels.tolist()) - set(rest.labels.tolist())
    if lost:
        name = classes[min(lost)] if classes else "the folder of unlabelled pictures"
        other = "" if classes else ", or say --unlabelled none"
        raise UserError(
            f"--drop-leaks: leaves {name} without a picture; "
            f"remove the copies from the other sets instead{other}"
        )
    return rest


def open_to_compare(cache, dataset):
    """Pictures of each test folder of a dataset, to look for leaks: labels and bad files ignored.

    One that is flat, empty or lacks a class is for evaluate.py to refuse, and stops no training.
    """
    tests = [each for each in folders.test_folders(dataset["dir"]) if list_pictures(each)]
    size, white_level = dataset["view_size"], dataset["white_level"]
    return [Pictures.of(cache.open(folder, size, white_level)) for folder in tests]


def leaked_paths(pictures, others, kind, other_kind, drop, allow):
    """The paths of pictures to leave out, since others have the same bytes or the same pixels.

    others: list of `Pictures`; kind, other_kind: of which kind either are, in words. Where there
    are some, drop and allow say what to do; with neither a UserError says so.
    """
    def names(each):
        return zip(each.digests(), each.pixel_digests())
    said = f"{kind} pictures are {other_kind} pictures too"
    return leaks_left_out(shared(pictures, others, names), said, drop, allow)


def paths_of_split_parts(pairs, pattern, drop, allow):
    """The paths of pictures to leave out, since others show the same part, by --group-regex.

    pairs: list of (`Pictures`, list of other `Pictures`); the first pair holds all labelled ones,
    and a line says how many of their paths the pattern does not match. drop, allow: as of
    `leaked_paths`.
    """
    if pattern is None:
        return []
    names = partial(parts_of, pattern)
    leaks, paths = {}, validation.below(pairs[0][0])
    validation.require_match(paths, pattern)
    lone = [path for path in paths if validation.part_of(path, pattern) is None]
    if lone:
        print(f"--group-regex matches {len(paths) - len(lone)} of {len(paths)} paths; each of the "
              f"others counts as a part of its own: {some_of(lone)}")
    for pictures, others in pairs:
        leaks |= dict(shared(pictures, others, names))
    said = "training or validation pictures show parts that others show, by --group-regex"
    return leaks_left_out(list(leaks.items()), said, drop, allow)


def unlabelled_of_parts(pool, others, pattern, drop, allow):
    """The paths of unlabelled pictures to leave out, since others show the same part.

    others: list of `Pictures`, for testing and validation; pattern: --group-regex, or None; drop,
    allow: as of `leaked_paths`. A line says where the pattern matches no path of the pool.
    """
    if pattern is None:
        return []
    names = partial(parts_of, pattern)
    if not any(names(pool)):
        print(f"--group-regex matches no unlabelled picture (one is {validation.below(pool)[0]}), "
              "so their parts are not compared with those of val and test")
    said = "unlabelled pictures show parts that test or validation pictures show, by --group-regex"
    return leaks_left_out(shared(pool, others, names), said, drop, allow)


def parts_of(pattern, pictures):
    """[its part] by --group-regex, or [], of each of the `Pictures`."""
    parts = (validation.part_of(path, pattern) for path in validation.below(pictures))
    return [[part] if part else [] for part in parts]


def shared(pictures, others, names):
    """[(path, path of the other)] of the pictures that share a name with one of the others.

    names: function from `Pictures` to a list of names for each of them: hashes, or its part.
    """
    path_of = {}
    for other in others:
        for path, its_names in zip(other.paths(), names(other)):
            path_of.update(dict.fromkeys(its_names, path))
    both = []
    for path, its_names in zip(pictures.paths(), names(pictures)):
        found = [path_of[name] for name in its_names if name in path_of]
        both += [(path, found[0])] if found else []
    return both


def leaks_left_out(leaks, said, drop, allow):
    """The paths to leave out of [(path, path of the other one)]; a UserError without a choice."""
    if not leaks or allow:
        return []
    if not drop:
        raise UserError(
            f"{len(leaks)} {said} ({' = '.join(leaks[0])}); --drop-leaks leaves them out, "
            "--allow-leakage goes on"
        )
    print(f"left out: {len(leaks)} {said}")
    return [path for path, _ in leaks]


# ------------------------------------------------------------------------------------- test sets


def open_tests(cache, test_dirs, dataset):
    """{name: Pictures} of test folders, named as the folder, or by its path where names collide.

    dataset: with classes, of which a test set may lack some. Raises UserError as `open_labelled`
    does, and for pictures given twice, which would count twice in the mean.
    """
    # "." and ".." have no name of their own.
    test_dirs = [each if Path(each).name.strip(".") else Path(each).resolve() for each in test_dirs]
    names = [Path(folder).name for folder in test_dirs]
    taken = {name for name in names if names.count(name) > 1} | set(TRAINING_SETS)
    sets, folder_of = {}, {}
    for folder, name in zip(test_dirs, names):
        _, pictures = open_labelled(cache, folder, dataset, dataset["classes"])
        other = folder_of.setdefault(pictures.fingerprint(), folder)
        if other is not folder:
            raise UserError(f"{folder}: the pictures of {other}; give each test set once")
        path = Path(folder).resolve() if str(folder) == name else Path(folder)
        sets[path.as_posix() if name in taken else name] = pictures
    return sets
