"""The image sets of the benchmarks that train: which pictures, how large, and how teachers start.

Not a benchmark itself.

    data/<folder>/{train,test}/<class>/*   the sets below; elpv is written from the package
                                           elpv-dataset, the embedded set is drawn
    weights/<timm name>.safetensors        of the two pretrained teachers

Of each class, `labelled` pictures train and half as many (at least 4) validate; with a pool, the
other training pictures lose their labels. The seed chooses which.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import link
from PIL import Image

from common.files import UserError
from common.folders import EMBEDDED, data_folder

TRANSFORMER, CNN = TEACHERS = ("vit_small_patch14_dinov2", "tf_efficientnet_lite0")


@dataclass(frozen=True)
class Task:
    """One set as it is used here.

    labelled: pictures per class, 0 for all, of which train_teacher.py then holds a fifth out;
    size: --view-size, where it is not train_teacher.py's own; group: regular expression, pictures
    of one part or photo stay on one side of train and val; views: changes of the view recipe,
    chosen on training pictures; flags: of train_teacher.py and distill.py alike; steps: of
    students; students: further flags of distill.py.
    """

    folder: str
    labelled: int = 0
    pool: bool = False
    size: str = ""
    group: str = ""
    views: tuple = ()
    flags: tuple = ()
    steps: int = 2000  # the default for pictures of one's own
    students: tuple = ()


BALANCED = ("--balance-classes",)  # where classes are unequal, since balanced accuracy is scored
TASKS = {
    "elpv_100": Task("elpv", 100, pool=True),  # solar cells, good or defective
    "neu_cls_10": Task("neu_cls", 10, pool=True),
    "embedded": Task("embedded", pool=True),
    "elpv_all": Task("elpv", flags=BALANCED),
    "ballscrew": Task("ballscrew", group=r"(\d{6}_\d{3})-", flags=BALANCED),
    "mvtec_screw": Task("mvtec_screw", size="224", views=("rotate=180",), flags=BALANCED,
                        steps=6000, students=("--mixup",)),
}


def add_sources(p):
    """The flags that name pictures and weights, to an ArgumentParser."""
    p.add_argument("--data", type=Path, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, help="folder with the teachers' weight files")
    p.add_argument("--student-weights", type=Path, metavar="FILE",
                   help="a ResNet18 that students start from")


# ------------------------------------------------------------------------------------ pictures


def pictures_of(task, sets, home, seed):
    """The folder of the set's pictures: the embedded one, or one laid out below home."""
    if task.folder == "embedded":
        return data_folder(EMBEDDED)
    return lay_out(task, source_of(task, sets, home.parent.parent), home, seed)


def lay_out(task, source, home, seed):
    """Links (or copies) of the set's pictures as an ImageFolder of its own; returns the folder."""
    folder = home / "data"
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(seed)

    # Labelled training pictures: the first of each class in a random order.
    rest, trained = {}, set()
    for class_folder in sorted(path for path in (source / "train").iterdir() if path.is_dir()):
        name = class_folder.name
        files = sorted(class_folder.iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        n = task.labelled or len(files)
        for file in files[:n]:
            link(file, folder / "train" / name / file.name)
            trained.add(group_of(task, file))
        rest[name] = files[n:]

    # Validation pictures: the next ones that share no group with these.
    held = set()
    for name, files in rest.items():
        val = [file for file in files if group_of(task, file) not in trained]
        for file in val[: max(4, task.labelled // 2)]:
            link(file, folder / "val" / name / file.name)
            held.add(group_of(task, file))

    # The pool: what is left, without labels.
    for name, files in rest.items():
        for file in files:
            if task.pool and group_of(task, file) not in held:
                link(file, folder / "unlabelled" / f"{name}_{file.name}")

    for file in sorted((source / "test").rglob("*")):
        if file.is_file():
            link(file, folder / file.relative_to(source))
    (folder / "done").touch()
    return folder


def source_of(task, sets, home):
    """The set's own ImageFolder: a folder of `sets`, or the solar cells written out below home."""
    if task.folder != "elpv":
        return sets / task.folder
    folder = home / "source"
    if not (folder / "done").is_file():
        write_solar_cells(folder)
        (folder / "done").touch()
    return folder


def write_solar_cells(folder):
    """The pictures of the package elpv-dataset, 30 % of each class for testing.

    The split does not depend on a seed: ablations.py must never look at a test picture.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise UserError("the solar cells need the package elpv-dataset; install it") from None
    pictures, defect_probabilities, _ = load_dataset()
    good = defect_probabilities < 0.5
    rng = np.random.default_rng(0)
    for name, chosen in (("good", good), ("defective", ~good)):
        rows = rng.permutation(np.flatnonzero(chosen))
        for place, row in enumerate(rows):
            split = "test" if place < 0.3 * len(rows) else "train"
            target = folder / split / name / f"{row:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[row]).save(target)


def group_of(task, file):
    """What may not stand in both train and val: the first match group in the name, or the file."""
    match = re.search(task.group, file.name) if task.group else None
    return match.group(1) if match else file


# ------------------------------------------------------------------------------------- teachers


def teach(task, pictures, home, weights, seed, *more, steps=None):
    """The stage that trains both teachers, or those of {name: steps}: (name, command words)."""
    names = list(steps or TEACHERS)
    files = [weights / f"{name}.safetensors" for name in names]
    words = ["train_teacher.py", "--data-dir", pictures, "--model", *names, "--weights", *files]
    words += ["--output", home, *task.flags, *more]
    if task.size:
        words += ["--view-size", task.size]
    if steps:
        words += ["--steps", *steps.values()]
    if task.views:
        words += ["--view-recipe", *task.views]
    if task.group and not task.labelled:
        words += ["--group-regex", task.group]
    return "teachers", [*words, "--seed", seed, "--overwrite"]
