"""Training, validation and test pictures: labels from folder names, the split, exact leaks.

A data record is a dict that every stage passes on, so that all see the same split:

    dir, view_size, white_level              what is read, and how
    val_fraction, group_regex                how a part of train/ is held out where there is no val/
    dropped                                  training pictures that a test set holds, left out
    classes, fingerprint                     what was found; compared when a later stage opens it
"""

import re
from pathlib import Path

import numpy as np

from common.errors import UserError, require_same
from common.folders import data_folder
from common.listing import holds_pictures, list_pictures, say_once
from common.pictures import Pictures

TRAINING_SETS = ("train", "val", "unlabelled")  # names that no test set may take


def class_folders(folder):
    """Sorted names of the class folders of a labelled set.

    Raises UserError for a missing folder, no or one class folder, or a class without a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(
            f"{folder}: {len(classes)} class folders found, at least two are needed: "
            f"{folder}/<class>/<picture>"
        )
    filled = {path.split("/")[0] for path in list_pictures(folder)}
    for name in classes:
        if name not in filled:
            raise UserError(
                f"{folder / name}: this class has no pictures; add some or remove the folder"
            )
    return classes


def open_labelled(cache, folder, record):
    """(classes, Pictures) of a folder with a folder per class.

    record: with view_size and white_level. Raises UserError as `class_folders` does, and for
    pictures or whole classes that cannot be read.
    """
    folder = Path(folder)
    classes = class_folders(folder)
    decoded = cache.open(folder, record["view_size"], record["white_level"])
    decoded.require_readable(cache.skip_bad)

    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and path.is_dir() and holds_pictures(path):
            say_once(f"{folder}: left out the folder {path.name}, whose name begins with a dot")

    number = {name: k for k, name in enumerate(classes)}
    owners = [path.split("/")[0] for path in decoded.paths]
    rows = np.array([row for row, name in enumerate(owners) if name in number], np.int64)
    labels = np.array([number[owners[row]] for row in rows], np.int64)
    if len(rows) < len(owners):
        print(f"{folder}: left out {len(owners) - len(rows)} pictures beside the class folders")
    for k, name in enumerate(classes):
        if not (labels == k).any():
            raise UserError(
                f"{folder / name}: no picture of this class can be read; "
                "mend them or remove the folder"
            )
    return classes, Pictures.of(decoded, rows, labels)


def open_unlabelled(cache, folder, record):
    """Pictures without labels, from anywhere below a folder; errors as of `cache.open`."""
    decoded = cache.open(folder, record["view_size"], record["white_level"])
    decoded.require_readable(cache.skip_bad)
    return Pictures.of(decoded)


def open_same_pool(cache, folder, record, pool):
    """The unlabelled pictures of an ensemble, or None where it has none.

    pool: {"dir", "fingerprint"} as ensemble.json has it, or None; folder: where they lie now, None
    for where they lay or, where the data folder has moved, in that. Raises UserError where they are
    not the same.
    """
    if pool is None:
        return None
    beside = Path(record["dir"]) / "unlabelled"
    if folder is None:
        folder = pool["dir"] if Path(pool["dir"]).is_dir() or not beside.is_dir() else beside
    pictures = open_unlabelled(cache, folder, record)
    require_same(
        {"unlabelled": pool["fingerprint"]},
        {"unlabelled": pictures.fingerprint()},
        f"{folder} against the ensemble",
        "give the --unlabelled folder it was made from, or build it again",
    )
    return pictures


def open_training(cache, record):
    """(train, val, record) for a data record; every stage calls this, hence sees the same split.

    The returned record adds classes and fingerprint. A record that has them already is compared
    with what is found, and a UserError names what differs.
    """
    folder = data_folder(record["dir"])
    classes, train = open_labelled(cache, folder / "train", record)
    fingerprint = train.fingerprint()
    if (folder / "val").is_dir():
        its_classes, val = open_labelled(cache, folder / "val", record)
        require_same(
            {"classes": classes},
            {"classes": its_classes},
            f"{folder / 'val'} against train",
            "both need the same class folders",
        )
        fingerprint += f"+{val.fingerprint()}"
    else:
        below = [path.split("/", 1)[1] for path in train.paths()]
        groups = groups_of(below, record["group_regex"])
        kept, held = hold_out(train.labels.numpy(), groups, record["val_fraction"])
        train, val = train.take(kept), train.take(held)

    found = {**record, "dir": folder.as_posix(), "classes": classes, "fingerprint": fingerprint}
    if "fingerprint" in record:
        require_same(
            {**record, "dir": found["dir"]},
            found,
            f"the pictures in {folder}",
            "give the --data-dir that the earlier stage was made from, or make that stage again",
        )
    dropped = set(record["dropped"])
    return without(train, dropped, classes), without(val, dropped, classes), found


def without(pictures, paths, classes):
    """The pictures but those at these paths. Raises UserError where that empties a class."""
    if not paths:
        return pictures
    kept = [i for i, path in enumerate(pictures.paths()) if path not in paths]
    rest = pictures.take(np.array(kept, np.int64))
    lost = set(pictures.labels.tolist()) - set(rest.labels.tolist())
    if lost:
        raise UserError(
            f"--drop-leaks: leaves {classes[min(lost)]} without a picture; "
            "remove the copies from the test set instead"
        )
    return rest


def groups_of(paths, pattern):
    """A group name per path: the first match group of the pattern, or the path itself."""
    if pattern is None:
        return paths
    matches = [re.search(pattern, path) for path in paths]
    if not any(matches):
        raise UserError(f"--group-regex {pattern!r} matches no path; one of them is {paths[0]!r}")
    return [match.group(1) or path if match else path for match, path in zip(matches, paths)]


def hold_out(labels, groups, share, seed=0):
    """Split rows into (train, val), whole groups at a time, each class near its share.

    labels: int [N]; groups: N names; share: of each class to hold out. Groups are visited in an
    order drawn from the seed and held out when that brings the class counts nearer to their
    targets. Returns two sorted int arrays. Raises UserError when a class is left without a picture.
    """
    labels = np.asarray(labels)
    rows_of = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)

    total = np.bincount(labels)
    target = np.maximum(1, np.round(share * total)).astype(int)
    class_of, missing, val = labels.tolist(), target.tolist(), []  # plain ints: numpy is slow here
    names = sorted(rows_of)
    for position in np.random.default_rng([seed, 0]).permutation(len(names)).tolist():
        rows, counts = rows_of[names[position]], {}
        for row in rows:
            counts[class_of[row]] = counts.get(class_of[row], 0) + 1
        if sum([abs(missing[k] - n) - abs(missing[k]) for k, n in counts.items()]) < 0:
            for k, n in counts.items():
                missing[k] -= n
            val += rows

    held = target - missing
    split = (held > 0) & (held < total)
    if not split.all():
        raise UserError(
            f"class number {int(np.argmin(split))} cannot be split into train and val "
            "(too few pictures or groups); give a val/ folder"
        )
    val = np.sort(np.array(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def open_tests(cache, folders, record):
    """{name: Pictures} of test folders, named as the folder, or by its path where names collide.

    record: a data record with classes. Raises UserError as `open_labelled` does, for a folder with
    other classes, and for pictures given twice, which would count twice in the mean.
    """
    names = [Path(folder).name for folder in folders]
    taken = {name for name in names if names.count(name) > 1} | set(TRAINING_SETS)
    sets, known = {}, {}
    for folder, name in zip(folders, names):
        classes, pictures = open_labelled(cache, folder, record)
        other = known.setdefault(pictures.fingerprint(), folder)
        if other is not folder:
            raise UserError(f"{folder}: the pictures of {other}; give each test set once")
        require_same(
            {"classes": record["classes"]},
            {"classes": classes},
            f"{folder} against the models",
            "a test set needs one folder for each class the models know",
        )
        path = Path(folder).resolve() if str(folder) == name else Path(folder)
        sets[path.as_posix() if name in taken else name] = pictures
    return sets


def find_leaks(cache, pictures, folders, record):
    """Which pictures have the bytes or the pixels of one in a test folder: [(path, test path)].

    Test folders are read as they are: one that is flat, empty or lacks a class is for evaluate.py
    to refuse, and must not stop a training.
    """
    known = {}
    for folder in folders:
        try:
            decoded = cache.open(folder, record["view_size"], record["white_level"])
        except UserError:  # no pictures
            continue
        test = Pictures.of(decoded)
        for digests in (test.digests(), test.pixel_digests()):
            known.update(zip(digests, test.paths()))

    found = []
    for i, digests in enumerate(zip(pictures.digests(), pictures.pixel_digests())):
        copies = [known[digest] for digest in digests if digest in known]
        if copies:
            found.append((pictures.path(i), copies[0]))
    return found
