"""Which pictures: folders, classes, what is held out, leaks, test sets, and the embedded set.

A dataset is a dict that every stage passes on, so that all see the same split:

    dir, view_size, white_level    where the pictures are, and how they are read: [H, W] in px
    val_fraction, group_regex      how a part of train/ is held out where there is no val/
    held_out                       the paths of these; drawn once, then every stage has the same
    dropped                        training pictures that are left out, since a test set holds them
    classes, fingerprint           what these are; compared when a later stage opens it
"""

from pathlib import Path

import numpy as np

from common import fasteners, validation
from common.audit import near_duplicates
from common.files import UserError, require_same
from common.pictures import Pictures, is_picture, list_pictures, say_once

EMBEDDED = "data/fasteners"
TRAINING_SETS = ("train", "val", "unlabelled")  # names that no test set may take


# --------------------------------------------------------------------------------------- folders


def data_folder(data_dir):
    """The data folder as a Path; the embedded set is drawn first when asked for and missing.

    Raises UserError where there is no such folder.
    """
    folder = Path(data_dir)
    if is_embedded(folder):
        try:
            fasteners.make_dataset(folder)
        except ValueError as error:
            raise UserError(str(error)) from None
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    return folder


def is_embedded(folder):
    """Whether a data folder is the embedded set's."""
    return Path(folder) == Path(EMBEDDED)


def test_folders(data_dir):
    """The test* folders of a data folder, sorted."""
    return sorted(path for path in Path(data_dir).glob("test*") if path.is_dir())


def pool_folder(data_dir, named=None):
    """The folder of unlabelled pictures, or None where there is none.

    named: the folder asked for, 'none' for none, or None for the data folder's unlabelled/.
    """
    folder = Path(named or Path(data_dir, "unlabelled"))
    return folder if named != "none" and (named or folder.is_dir()) else None


# ----------------------------------------------------------------------------------- labelled sets


def class_folders(folder):
    """Sorted names of the class folders of a labelled set.

    Raises UserError for a missing folder, no or one class folder, or a class without a picture.
    """
    filled = {path.split("/")[0] for path in list_pictures(folder)}
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(
            f"{folder}: {len(classes)} class folders found, at least two are needed: "
            f"{folder}/<class>/<picture>"
        )
    empty = [name for name in classes if name not in filled]
    if empty:
        raise UserError(f"{folder / empty[0]}: this class has no pictures; add some or remove it")
    return classes


def open_labelled(cache, folder, dataset):
    """(classes, Pictures) of a folder with a folder per class.

    dataset: with view_size and white_level. Raises UserError as `class_folders` does, and for
    pictures or whole classes that cannot be read.
    """
    folder = Path(folder)
    classes = class_folders(folder)
    decoded = cache.open(folder, dataset["view_size"], dataset["white_level"])
    decoded.require_readable(cache.skip_bad)

    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.is_dir()
        if hidden and any(is_picture(each.name) for each in path.rglob("*")):
            say_once(f"{folder}: left out the folder {path.name}, whose name begins with a dot")

    number = {name: k for k, name in enumerate(classes)}
    owners = [path.split("/")[0] for path in decoded.paths]
    rows = np.array([row for row, name in enumerate(owners) if name in number], np.int64)
    labels = np.array([number[owners[row]] for row in rows], np.int64)
    if len(rows) < len(owners):
        print(f"{folder}: left out {len(owners) - len(rows)} pictures beside the class folders")
    unread = [name for k, name in enumerate(classes) if k not in labels]
    if unread:
        raise UserError(f"{folder / unread[0]}: no picture of it can be read; mend or remove it")
    return classes, Pictures.of(decoded, rows, labels)


def open_training(cache, dataset, moved_to=None):
    """(train, val, dataset); every stage calls this, hence sees the same split.

    dataset: see above; what is returned adds classes, fingerprint and held_out. Where it has them
    already they are compared with what is there, and a UserError names what differs. moved_to:
    where the folder lies now, None for where it lay.
    """
    folder = data_folder(moved_to or dataset["dir"])
    classes, train = open_labelled(cache, folder / "train", dataset)
    fingerprint = train.fingerprint()
    if (folder / "val").is_dir():
        its_classes, val = open_labelled(cache, folder / "val", dataset)
        both = ({"classes": each} for each in (classes, its_classes))
        require_same(*both, f"{folder / 'val'} against train", "both need the same class folders")
        fingerprint += f"+{val.fingerprint()}"
        held_out = []
    else:
        held_out = dataset.get("held_out") or validation.hold_out(
            cache.home, *in_detail(cache, dataset, train), classes, dataset["val_fraction"],
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
        require_same(
            {**dataset, "dir": opened["dir"]},
            opened,
            f"the pictures in {folder}",
            "give the --data-dir that the earlier stage was made from, or make that stage again",
        )
    train, val = (without(each, dataset["dropped"], classes) for each in (train, val))
    return train, val, opened


def in_detail(cache, dataset, *sets):
    """All labelled pictures, a folder each, at a size that tells near-duplicates, or their own.

    So what is split does not depend on the size of the views. Decoded where that size is another.
    """
    sizes = [size[:2] for pictures in sets for size in pictures.sizes()]
    width, height = np.minimum(np.median(sizes, axis=0), near_duplicates.FINE).astype(int).tolist()
    if [height, width] == dataset["view_size"]:
        return list(sets)
    changed = {**dataset, "view_size": [height, width]}
    return [open_labelled(cache, each.parts[0].folder, changed)[1] for each in sets]


# ---------------------------------------------------------------------------------- unlabelled


def open_pool(cache, folder, dataset):
    """(Pictures without labels from anywhere below a folder, {"dir", "fingerprint", "dropped"}).

    Errors as of `cache.open`.
    """
    decoded = cache.open(folder, dataset["view_size"], dataset["white_level"])
    decoded.require_readable(cache.skip_bad)
    pool = Pictures.of(decoded)
    return pool, {"dir": str(folder), "fingerprint": pool.fingerprint(), "dropped": []}


def open_same_pool(cache, folder, dataset, unlabelled):
    """The unlabelled pictures of an ensemble, or None where it has none.

    unlabelled: as ensemble.json has it, or None; folder: where they lie now, None for where they
    lay or, where the data folder has moved, in that. Raises UserError where they are not the same.
    """
    if unlabelled is None:
        return None
    beside = Path(dataset["dir"]) / "unlabelled"
    if folder is None:
        stayed = Path(unlabelled["dir"]).is_dir() or not beside.is_dir()
        folder = unlabelled["dir"] if stayed else beside
    pool, actual = open_pool(cache, folder, dataset)
    pools = ({"unlabelled": each["fingerprint"]} for each in (unlabelled, actual))
    remedy = "give the --unlabelled folder it was made from, or build it again"
    require_same(*pools, f"{folder} against the ensemble", remedy)
    return without(pool, unlabelled["dropped"])


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
        raise UserError(
            f"--drop-leaks: leaves {name} without a picture; "
            "remove the copies from the test set instead"
        )
    return rest


def open_to_compare(cache, dataset):
    """Pictures of each test folder of a dataset, to look for leaks: labels and bad files ignored.

    One that is flat, empty or lacks a class is for evaluate.py to refuse, and stops no training.
    """
    folders = [folder for folder in test_folders(dataset["dir"]) if list_pictures(folder)]
    size, white_level = dataset["view_size"], dataset["white_level"]
    return [Pictures.of(cache.open(folder, size, white_level)) for folder in folders]


def leaked_paths(pictures, others, kind, drop, allow):
    """The paths of pictures to leave out, since others have the same bytes or the same pixels.

    others: list of `Pictures`; kind: "training" or "unlabelled". Where there are some, drop and
    allow say what to do; with neither a UserError says so.
    """
    path_of = {}
    for other in others:
        for digests in (other.digests(), other.pixel_digests()):
            path_of.update(zip(digests, other.paths()))
    leaks = []
    for i, digests in enumerate(zip(pictures.digests(), pictures.pixel_digests())):
        copies = [path_of[digest] for digest in digests if digest in path_of]
        if copies:
            leaks.append((pictures.path(i), copies[0]))
    if not leaks or allow:
        return []
    if not drop:
        ours, theirs = leaks[0]
        raise UserError(
            f"{len(leaks)} {kind} pictures are test or validation pictures too "
            f"({ours} = {theirs}); --drop-leaks leaves them out, --allow-leakage goes on"
        )
    print(f"{len(leaks)} {kind} pictures left out, since they are test or validation pictures too")
    return [path for path, _ in leaks]


# ------------------------------------------------------------------------------------- test sets


def open_tests(cache, folders, dataset):
    """{name: Pictures} of test folders, named as the folder, or by its path where names collide.

    dataset: with classes. Raises UserError as `open_labelled` does, for a folder with other
    classes, and for pictures given twice, which would count twice in the mean.
    """
    names = [Path(folder).name for folder in folders]
    taken = {name for name in names if names.count(name) > 1} | set(TRAINING_SETS)
    sets, folder_of = {}, {}
    for folder, name in zip(folders, names):
        classes, pictures = open_labelled(cache, folder, dataset)
        other = folder_of.setdefault(pictures.fingerprint(), folder)
        if other is not folder:
            raise UserError(f"{folder}: the pictures of {other}; give each test set once")
        both = ({"classes": each} for each in (dataset["classes"], classes))
        remedy = "a test set needs one folder for each class the models know"
        require_same(*both, f"{folder} against the models", remedy)
        path = Path(folder).resolve() if str(folder) == name else Path(folder)
        sets[path.as_posix() if name in taken else name] = pictures
    return sets
