"""The set: how many pictures of each class a split holds, and how they are written, all or none.

A marker file says what a complete set is, so that it is drawn once and recognised later.
"""

import json
import math
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.fasteners.canvas import SIZE
from common.fasteners.defects import (
    BEND_ANGLE,
    CHIP_SIZE,
    CLASSES,
    RUST_AREA,
    SCRATCH_WIDTH,
    STRENGTH,
    THREAD_SHARE,
)
from common.fasteners.drawing import draw

VERSION = 2  # raise it with every change of the drawing; `description` is compared anyway
SEED = 20261124

# Pictures per class: few labels and many unlabelled pictures, as a factory has them. The unlabelled
# pool has no class folders and holds the classes in equal shares.
PER_CLASS = {"train": 18, "val": 18, "test": 150, "test_shifted": 150, "unlabelled": 350}
SHIFTED_SHARE = {"test_shifted": 1.0, "unlabelled": 0.5}  # from the second line; others 0

JPEG_QUALITY = 92
MARKER = "synthetic.json"
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # a container's time on the processors, in Linux


def plan(split):
    """List the pictures of a split as jobs: (file, class, key, shifted).

    Classes and lines are shuffled, so that the number of a file tells neither.
    """
    number = list(PER_CLASS).index(split)
    rng = np.random.default_rng([SEED, number])
    labels = rng.permutation(np.repeat(CLASSES, PER_CLASS[split])).tolist()
    count_shifted = round(SHIFTED_SHARE.get(split, 0.0) * len(labels))
    shifted = rng.permutation(len(labels)) < count_shifted
    jobs = []
    for i, label in enumerate(labels):
        file = f"{split}/{label}/{i:04d}.jpg"
        if split == "unlabelled":
            file = f"{split}/{i:05d}.jpg"
        jobs.append((file, label, (SEED, number, i), bool(shifted[i])))
    return jobs


def save_picture(folder, job):
    """Draw one job of `plan` and save it below a folder. Worker processes run it."""
    file, class_name, key, shifted = job
    picture = Image.fromarray(draw(class_name, key, shifted))
    picture.save(folder / file, quality=JPEG_QUALITY)


def description():
    """What the marker file says about a complete set. A set with another marker is another set."""
    return {
        "version": VERSION,
        "seed": SEED,
        "size": SIZE,
        "per_class": PER_CLASS,
        "shifted_share": SHIFTED_SHARE,
        "ranges": [STRENGTH, BEND_ANGLE, CHIP_SIZE, RUST_AREA, SCRATCH_WIDTH, THREAD_SHARE],
    }


def is_complete(root):
    """Whether the marker in a folder is that of this very set. Then nothing has to be drawn."""
    wanted = json.loads(json.dumps(description()))  # with lists for tuples, as in the file
    try:
        return wanted.items() <= json.loads((root / MARKER).read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError):
        return False


def make_dataset(root):
    """Make the whole set as folder `root`, unless it is there already; returns `root`.

    The pictures are drawn in a folder beside it that is renamed at the end, so that nothing
    half-made is ever seen under `root`. Raises ValueError if `root` holds something else.
    """
    root = Path(root)
    if root.exists():
        if is_complete(root):
            return root
        raise ValueError(
            f"{root} exists but is not the complete fastener set, version {VERSION}: "
            "remove it or name another folder"
        )
    jobs = [job for split in PER_CLASS for job in plan(split)]
    print(f"drawing {len(jobs)} pictures of fasteners into {root} (once)", flush=True)

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as private:
        draft = Path(private) / root.name
        draw_all(draft, jobs)
        text = json.dumps(description(), indent=2) + "\n"
        (draft / MARKER).write_text(text, encoding="utf-8")
        try:
            os.replace(draft, root)
        except OSError:  # another process may have put the same set there in the meantime
            if not is_complete(root):
                raise
    return root


def cores():
    """How many processors this process may use: in a container fewer than there are."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux has it
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no such file, or the quota is "max"
        return count


def draw_all(folder, jobs):
    """Draw all jobs of `plan` below a folder, on all processors, as no picture needs another."""
    for home in {(folder / file).parent for file, *_ in jobs}:
        home.mkdir(parents=True)
    with ProcessPoolExecutor(min(cores(), 61)) as pool:  # more of them Windows refuses
        done = pool.map(partial(save_picture, folder), jobs, chunksize=32)
        for _ in tqdm(done, "drawing pictures", len(jobs), disable=None):  # a bar on a terminal
            pass
