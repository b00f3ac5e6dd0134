"""What helps small defects: sizes, poolings, turning and balancing, on development pictures.

    python tests/benchmarks/small_defects.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/small_defects.py --data DIR --weights DIR --student-weights FILE \\
        --sets ballscrew --seeds 0 --networks student --rows "size 1x" "size 4x"
    python tests/benchmarks/small_defects.py --table                   # from the CSV alone

Of the training pictures a third is the development set that is scored here, whole positions of the
ball screw at a time, another third for every seed. The test split stays shut but for --test, which
trains on all of train/ and scores test/. A row at n times the pixels has an nth of the steps, so
that all take the same time. The stand-alone ResNet18 and EfficientNet-Lite0 start from the given
weights. A row that is in the CSV is not made again.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import (
    append_rows,
    call,
    half_width,
    link,
    print_table,
    read_rows,
    select,
    this_commit,
    with_interval,
    with_std,
)

from common import cli
from common.files import load_json

CNN = "tf_efficientnet_lite0"
STEPS = {"student": 600, "cnn": 400}  # at the default size: as long, on one core


@dataclass(frozen=True)
class Task:
    """A set: its size at each multiple of the default's pixels, recipe and flags of every row."""

    sizes: dict
    recipe: tuple = ()
    flags: tuple = ()
    part: str | None = None  # pattern of what stays on one side


@dataclass(frozen=True)
class Row:
    """What one row changes."""

    size: str = "2x"
    recipe: tuple = ()
    flags: tuple = ()
    gone: bool = False  # the CSV's column `code` names a commit that has its code


TASKS = {
    "ballscrew": Task(
        {"square": "128", "1x": "80x208", "2x": "112x288", "4x": "160x416"},
        part=r"(\d{6}_\d{3})-",
    ),
    "mvtec_screw": Task(
        {"1x": "128", "2x": "176", "4x": "256"},
        recipe=("rotate=180",),
        flags=("--balance-classes",),
    ),
}
ROWS = {
    "size 1x": Row("1x"),
    "size 2x": Row("2x"),
    "size 4x": Row("4x"),
    "a square of 1x": Row("square"),
    "(mean + max) / 2": Row(gone=True),
    "generalised mean": Row(gone=True),
    "turned by up to 180 degrees": Row(recipe=("rotate=180",)),
    "turned by up to 12 degrees": Row(recipe=("rotate=12",)),
    "classes balanced": Row(flags=("--balance-classes",)),
}
TIMES = {"square": 1, "1x": 1, "2x": 2, "4x": 4}
FIELDS = (
    "pictures", "set", "seed", "network", "row", "view_size", "n", "accuracy",
    "balanced_accuracy", "nll", "steps", "seconds", "code",
)


# ------------------------------------------------------------------------------------ pictures


def development_folder(name, seed, args):
    """train/ and val/ of a seed, val/ being a third of the training pictures, by parts."""
    folder = Path(args.output) / name / f"seed_{seed}" / "pictures"
    if (folder / "done").is_file():
        return folder
    rng, part = np.random.default_rng(seed), TASKS[name].part
    classes = sorted((Path(args.data) / name / "train").iterdir())
    files = {home.name: sorted(home.iterdir()) for home in classes}
    if part:
        part_of = {file: re.search(part, file.name)[1] for each in files.values() for file in each}
        chosen = set(rng.permutation(sorted(set(part_of.values())))[::3])
        held = {file for file, its_part in part_of.items() if its_part in chosen}
    else:
        held = {file for each in files.values() for file in rng.permutation(each)[::3]}
    for label, each in files.items():
        for file in each:
            link(file, folder / ("val" if file in held else "train") / label / file.name)
    (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------- running


def run(name, seed, network, row, args):
    """Train one network and append its row."""
    task, change = TASKS[name], ROWS[row]
    size, steps = task.sizes[change.size], round(STEPS[network] / TIMES[change.size])
    recipe = [*task.recipe, *change.recipe]
    flags = {*task.flags, *change.flags}
    what = "test" if args.test else "development"
    home = Path(args.output) / name / f"seed_{seed}"
    home /= re.sub(r"\W+", "_", f"{what} {network} {row}")

    pictures, group = Path(args.data) / name, ["--group-regex", task.part] if task.part else []
    if not args.test:
        pictures, group = development_folder(name, seed, args), []
    rest = ["--seed", seed, "--overwrite"]
    teach = ["train_teacher.py", "--data-dir", pictures, *group, "--view-size", size, *rest]
    teach += ["--output", home, *(["--view-recipe", *recipe] if recipe else [])]
    if network == "cnn":
        weights = Path(args.weights) / f"{CNN}.safetensors"
        call(*teach, "--model", CNN, "--weights", weights, "--steps", steps, *flags)
        model = home / CNN / "model.pt"
    else:  # an ensemble says which pictures and views; what its teacher knows is not used
        call(*teach, "--model", "test_resnet", "--steps", 1)
        call("build_ensemble.py", home / "test_resnet" / "model.pt", "--views", 1, "--unlabelled",
             "none", "--output", home / "ensemble", *rest)
        call("distill.py", home / "ensemble", "--alpha", 0, "--weights", args.student_weights,
             "--steps", steps, "--output", home / "student", *flags, *rest)
        model = home / "student" / "model.pt"

    last = read_rows(model.parent / "log.csv")[-1]
    if args.test:
        call("evaluate.py", model, "--skip-audit", "--output", home / "report")
        report = load_json(home / "report" / "metrics.json")
        scores = report["models"][model.as_posix()]["sets"]["test"]
    else:
        scores = {key.removeprefix("val_"): float(value) for key, value in last.items()}
        scores["n"] = sum(1 for file in (pictures / "val").rglob("*.*") if file.is_file())
    found = [round(scores[key], 5) for key in ("n", "accuracy", "balanced_accuracy", "nll")]
    key = [what, name, seed, network, row, size]
    append_rows(args.csv, FIELDS, [[*key, *found, last["steps"], last["seconds"], this_commit()]])


def wanted_rows(name):
    """The rows of a set: what it has as its default is not measured twice."""
    task = TASKS[name]
    default = "turned by up to 180 degrees" if task.recipe else "turned by up to 12 degrees"
    return [
        row for row, change in ROWS.items()
        if change.size in task.sizes and not change.gone and row != default
        and not (change.flags and change.flags == task.flags)
    ]


# -------------------------------------------------------------------------------------- tables


def print_results(rows, pictures, base_row):
    """A table per network: balanced accuracy of every row, and its difference to the base."""
    for network in STEPS:
        of_network = select(rows, network=network, pictures=pictures)
        sets = [name for name in TASKS if select(of_network, set=name)]
        if not sets:
            continue
        print(f"\n{network}, {pictures} pictures\n")
        lines = []
        for row in ROWS:
            cells = []
            for name in sets:
                values = by_seed(of_network, name, row)
                base = by_seed(of_network, name, base_row)
                shared = sorted(set(values) & set(base))
                cells.append(with_std([values[s] for s in values]) if values else "")
                gains = [values[s] - base[s] for s in shared]
                enough = len(gains) > 1 and row != base_row
                cells.append(with_interval(np.mean(gains), half_width(gains)) if enough else "")
            if any(cells):
                lines.append([row, *cells])
        head = [text for name in sets for text in (name, f"minus {base_row}")]
        print_table(["balanced accuracy, %", *head], lines)


def by_seed(rows, name, row):
    """{seed: balanced accuracy in %} of one row of a set."""
    chosen = select(rows, set=name, row=row)
    return {each["seed"]: 100 * float(each["balanced_accuracy"]) for each in chosen}


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", help="folder with the image sets")
    p.add_argument("--weights", help="folder with the CNN's weights")
    p.add_argument("--student-weights", help="the ResNet18's start")
    p.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--networks", nargs="+", choices=STEPS, default=list(STEPS))
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--output", default="runs/small_defects", help="working folder")
    p.add_argument("--csv", default="tests/benchmarks/small_defects.csv")
    p.add_argument("--test", action="store_true", help="train as a user, score the test split")
    p.add_argument("--table", action="store_true", help="print the CSV's rows as tables")
    args = p.parse_args()
    if not args.table:
        for seed in args.seeds:
            for name in args.sets:
                for network in args.networks:
                    for row in wanted_rows(name):
                        wanted = dict(set=name, seed=str(seed), network=network, row=row)
                        wanted["pictures"] = "test" if args.test else "development"
                        if row in args.rows and not select(read_rows(args.csv), **wanted):
                            run(name, seed, network, row, args)
    print_results(read_rows(args.csv), "development", "size 2x")
    print_results(read_rows(args.csv), "test", "a square of 1x")


if __name__ == "__main__":
    main()
