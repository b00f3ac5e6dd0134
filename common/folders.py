"""Where pictures lie: the folders of a data folder, their spellings, classes, and what is unused.

    DIR/train/<class>/*   DIR/val/<class>/*   DIR/test*/<class>/*   DIR/unlabelled/*
"""

import unicodedata
from pathlib import Path

from common import fasteners
from common.files import UserError
from common.pictures import list_pictures, require_target, say_once
from infer import left_out_as

EMBEDDED = "data/fasteners"
SPELLINGS = {  # other names of a folder, in small letters, as other programs write them
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "unlabelled": ("unlabelled", "unlabeled"),
}


def data_folder(data_dir):
    """The data folder as a Path; the embedded set is drawn first when asked for and missing.

    Raises UserError where there is no such folder. Says which folders in it no stage reads.
    """
    folder = Path(data_dir)
    if is_embedded(folder):
        try:
            fasteners.make_dataset(folder)
        except ValueError as error:
            raise UserError(str(error)) from None
    if not folder.is_dir():
        raise UserError(f"{data_dir}: no such folder, seen from {Path.cwd()}; --data-dir says "
                        "where the pictures lie")
    unread = [f"{path.name}/" for path in folders_in(folder) if not is_read(path.name)]
    if unread and part_folder(folder, "train").is_dir():
        read = "train/, val/, test*/ and unlabelled/"
        say_once(f"{folder}: no stage reads {', '.join(unread)} unless a flag names it; "
                 f"what is read is {read}")
    return folder


def train_folder(data_dir):
    """The folder of the training pictures. Raises UserError where there is none."""
    folder = part_folder(data_dir, "train")
    if not folder.is_dir():
        found = ", ".join(f"{path.name}/" for path in folders_in(data_dir)) or "no folder"
        inside = is_read(Path(data_dir).name)
        raise UserError(
            f"--data-dir {data_dir}: no train/ in it, but {found}; pictures go to "
            "DIR/train/<class>/ and DIR/test/<class>/"
            + ("; give the folder above it" if inside else "")
        )
    return folder


def is_embedded(folder):
    """Whether a data folder is the embedded set's."""
    return Path(folder) == Path(EMBEDDED)


def folders_in(folder):
    """The folders in a folder but the hidden ones, sorted; none where there is no such folder.

    Raises UserError for a link to nothing, which may have been one.
    """
    inside = Path(folder).iterdir() if Path(folder).is_dir() else ()
    seen = sorted(path for path in inside if not path.name.startswith("."))
    for path in seen:
        require_target(path)
    return [path for path in seen if path.is_dir()]


def is_read(name):
    """Whether a stage reads a folder of this name in a data folder."""
    known = {each for names in SPELLINGS.values() for each in names}
    return name.lower() in known or name.lower().startswith("test")


def part_folder(data_dir, part):
    """The folder of "train", "val" or "unlabelled" as it is spelt, `data_dir/part` where none is.

    Raises UserError where there are two of them.
    """
    found = [p for p in folders_in(data_dir) if p.name.lower() in SPELLINGS[part]]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]}: both are read as {part}/; keep one of them")
    return found[0] if found else Path(data_dir, part)


def test_folders(data_dir):
    """The test* folders of a data folder, sorted."""
    return [path for path in folders_in(data_dir) if path.name.lower().startswith("test")]


def pool_folder(data_dir, named=None):
    """The folder of unlabelled pictures, or None where there is none.

    named: the folder asked for, 'none' for none, or None for the data folder's own.
    """
    if named:
        return None if named == "none" else Path(named)
    folder = part_folder(data_dir, "unlabelled")
    return folder if folder.is_dir() else None


def class_folders(folder, may_lack=False):
    """{name of a folder: its class} of a labelled set, sorted by class.

    A class is the folder's name in composed Unicode, since a Mac stores accents apart. may_lack: of
    a test set, where one class is enough and empty folders do not count. Raises UserError for a
    missing folder, too few class folders, two that look alike, or a class without a picture.
    """
    filled = {path.split("/")[0] for path in list_pictures(folder)}
    names = [path.name for path in folders_in(folder)]
    names = [name for name in names if left_out_as(name, is_folder=True) is None]
    empty = [name for name in names if name not in filled]
    if may_lack:
        names, empty = [name for name in names if name in filled], []
    least = 1 if may_lack else 2
    if len(names) < least:
        raise UserError(
            f"{folder}: {len(names)} class folders found, at least {least} needed: "
            f"{folder}/<class>/<picture>"
        )
    if empty:
        raise UserError(f"{folder / empty[0]}: this class has no pictures; add some or remove it")
    class_of = {name: unicodedata.normalize("NFC", name) for name in names}
    twins = [name for name in names if list(class_of.values()).count(class_of[name]) > 1]
    if twins:
        raise UserError(
            f"{folder}: {' and '.join(map(ascii, twins))} look alike (composed and decomposed "
            "letters); put their pictures into one folder"
        )
    return dict(sorted(class_of.items(), key=lambda item: item[1]))
