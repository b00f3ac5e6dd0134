"""Which folders hold the pictures: data folder, test sets, pool, and the embedded set."""

from pathlib import Path

import numpy as np
from PIL import Image

from common import synthetic
from common.errors import UserError
from common.listing import list_pictures

EMBEDDED = "data/fasteners"
EMBEDDED_SIDE = 64  # px; its defects are large, so that its chain takes minutes on two cores
LARGEST_SIDE, SMALLEST_SIDE, STEP = 128, 32, 32  # px of the default view size


def data_folder(data_dir):
    """The data folder as a Path; the embedded set is drawn first when asked for and missing.

    Raises UserError where there is no such folder.
    """
    folder = Path(data_dir)
    if is_embedded(folder):
        try:
            synthetic.make_dataset(folder)
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
    if named == "none":
        return None
    if named is not None:
        return Path(named)
    beside = Path(data_dir) / "unlabelled"
    return beside if beside.is_dir() else None


def default_view_size(data_dir):
    """128 px, or less for smaller pictures: their median longer side, in steps of 32 px.

    128 px with fewer steps beats 70 px with more in the same time (tests/benchmarks/ablations.py),
    and a student's 1,000 steps take minutes on two CPU cores. Small defects need more.
    """
    if is_embedded(data_dir):
        return EMBEDDED_SIDE
    folder = Path(data_dir) / "train"
    paths = list_pictures(folder)
    sides = []
    for path in paths[:: max(1, len(paths) // 100)]:
        try:
            with Image.open(folder / path) as image:
                sides.append(max(image.size))
        except Exception:  # opening the decoded cache lists what cannot be read
            continue
    if not sides:
        return LARGEST_SIDE
    side = STEP * round(float(np.median(sides)) / STEP)
    return min(LARGEST_SIDE, max(SMALLEST_SIDE, side))
