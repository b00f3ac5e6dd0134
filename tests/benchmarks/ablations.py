"""What pays when there is time: one change of the distilled student at a time.

    python tests/benchmarks/ablations.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/ablations.py --data DIR --weights DIR --student-weights FILE \\
        --sets elpv_all --seeds 100 --rows "alpha 0.5"
    python tests/benchmarks/ablations.py --table                       # from the CSV alone, 5 s

Sets, development pictures, teachers and views are those of curves.py, in its folder: nothing is
trained twice, and the test split stays shut. Every row changes one thing of `base`, the distilled
student of STEPS steps in curves.csv. A row that is in the CSV is not made again. The CSV has other
groups of rows as well, of 800 steps, and changes whose code is gone since they did not pay; its
column `code` names the commit that has them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench import (
    append_rows,
    half_width,
    link,
    print_table,
    read_rows,
    select,
    this_commit,
    values_of,
)
from curves import (
    SETS,
    TAUGHT,
    development_folder,
    ensemble,
    file_name,
    score,
    student,
    task_of,
)
from sets import TEACHERS, add_sources

from build_ensemble import in_batches, teacher_logits
from common import cli, models, splits
from common.ensemble import load_ensemble, write_view
from common.files import save_json
from common.metrics import wilson
from common.pictures import DecodedCache
from common.views import ViewRecipe, render

GROUP, STEPS = "patient", 2000
BASES = {  # of each group in the CSV, what the other rows are compared with
    "patient": "base", "pool": "base", "labelled": "labelled only",
    "resolution": "70 px, 1600 steps",
}
FOLDS = 2
CURVES = Path(__file__).with_name("curves.csv")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Flags of build_ensemble.py and distill.py, multiple of the steps, which teachers."""

    build: tuple = ()
    student: tuple = ()
    steps: float = 1
    teachers: tuple = TAUGHT
    cross_fitted: bool = False


FROZEN = (TEACHERS[0], 500, "--frozen", TEACHERS[0])
HALF_FROZEN = (FROZEN, (TEACHERS[1], 500))  # and the other one a quarter as long
ROWS = {
    "crops down to 0.8 of the side": Row(("--view-recipe", "zoom_min=0.8")),
    "crops down to 0.6 of the side": Row(("--view-recipe", "zoom_min=0.6")),
    "crops down to 0.5 of the side": Row(("--view-recipe", "zoom_min=0.5")),
    "alpha 0.5": Row(student=("--alpha", 0.5)),
    "temperature 4": Row(student=("--temperature", 4)),
    "twice the steps": Row(steps=2),
    "batch 96, a quarter of the steps": Row(student=("--batch-size", 96), steps=0.25),
    "transformer teacher alone": Row(teachers=TAUGHT[:1]),
    "CNN teacher alone": Row(teachers=TAUGHT[1:]),
    "a frozen transformer beside them": Row(teachers=(FROZEN, *TAUGHT)),
    "a frozen transformer in place of the tuned one": Row(teachers=(FROZEN, TAUGHT[1])),
    "a frozen transformer, CNN of 500 steps": Row(teachers=HALF_FROZEN),
    "a frozen transformer, CNN of 500 steps, 8 views": Row(("--views", 8), teachers=HALF_FROZEN),
    "a frozen transformer, crops down to 0.6": Row(
        ("--view-recipe", "zoom_min=0.6"), teachers=(FROZEN, TAUGHT[1])
    ),
    "a frozen transformer, both cross-fitted": Row(teachers=(FROZEN, TAUGHT[1]), cross_fitted=True),
}
OF_CURVES = {"distilled": "base", "alone": "stand-alone"}  # students of curves.csv that are rows
FIELDS = (
    "group", "set", "seed", "start", "ablation", "n", "accuracy", "balanced_accuracy", "auroc",
    "nll", "steps", "seconds", "code",
)


# ------------------------------------------------------------------------------------- running


def run(name, row, seed, args):
    """Build, distil and evaluate one row, and append it to the CSV."""
    print(f"== {name}, seed {seed}: {row}", flush=True)
    task, home, change = task_of(name), Path(args.output) / name / f"seed_{seed}", ROWS[row]
    pictures = development_folder(task, args, home, seed)
    taught_by = build(change, task, pictures, home, seed, args)
    steps = round(change.steps * STEPS)
    model = student(file_name(row), steps, taught_by, task, home, seed, args, *change.student)
    n, *scores, _, _, seconds = score(model, pictures, home)
    row = [GROUP, name, seed, "warm", row, n, *scores, steps, seconds, this_commit()]
    append_rows(args.csv, FIELDS, [row])


def build(change, task, pictures, home, seed, args):
    """The folder of the row's ensemble, built where it is missing."""
    words = [word for each in change.teachers for word in each] if change.teachers != TAUGHT else []
    name = file_name("ensemble", *change.build, *words)
    folder = ensemble(task, pictures, home, seed, args, *change.build, taught=change.teachers,
                      name=name)
    if not change.cross_fitted:
        return folder
    fitted = home / f"{name}_cross_fitted"
    if not (fitted / "ensemble.json").is_file():
        cross_fit(folder, fitted, change.teachers, task, pictures, home, seed, args)
    return fitted


def cross_fit(plain, fitted, taught, task, pictures, home, seed, args):
    """Write an ensemble like a plain one whose answers are of teachers that never saw the picture.

    Each fold's teachers are trained on the other folds; their logits are divided by the
    temperatures that their own validation gives, and weighted as the fold's own were (Dao et al.
    2021, "Knowledge distillation as semiparametric inference"). taught: as `ensemble` has it. Of
    sets without a pool.
    """
    spec = load_ensemble(plain)
    train, _, dataset = splits.open_training(DecodedCache(cli.CACHE), spec["dataset"])
    fold_of = {f"train/{file.parent.name}/{file.name}": number % FOLDS
               for number, file in enumerate(training_files(pictures))}
    folds = np.array([fold_of[path] for path in train.paths()])

    shape = (1 + spec["views"], len(TEACHERS), len(train), len(dataset["classes"]))
    answers, weights = np.zeros(shape, np.float32), []
    for fold in range(FOLDS):
        folder = fold_folder(pictures, home, fold)
        networks, mixture = fold_teachers(folder, taught, task, seed, args)
        temperatures = np.array(mixture["temperatures"], np.float32)[:, None, None]
        for rows in in_batches(np.flatnonzero(folds == fold), 64):
            for view, logits in enumerate(answers):
                pixels = view_of(train, rows, view, spec)
                logits[:, rows] = teacher_logits(networks, pixels) / temperatures
        weights.append(mixture["weights"])
    for view, logits in enumerate(answers):
        write_view(fitted, view, logits)
    changed = {"temperatures": [1.0] * len(TEACHERS), "weights": np.mean(weights, axis=0).tolist()}
    save_json({**spec, **changed}, fitted / "ensemble.json")


def fold_teachers(folder, taught, task, seed, args):
    """(networks, the spec of their ensemble) of the teachers trained on one `fold_folder`."""
    spec = load_ensemble(ensemble(task, folder, folder, seed, args, "--views", 1, taught=taught))
    return [models.load_model(each["path"], DEVICE)[0] for each in spec["teachers"]], spec


def view_of(pictures, rows, view, spec):
    """Pixels of one view of some pictures, as an ensemble's teachers see it."""
    recipe = ViewRecipe.from_dict(spec["view_recipe"])
    batch = pictures.batch(rows, DEVICE)
    return render(batch, rows, np.full(len(rows), view), spec["seed"], recipe)


def fold_folder(pictures, home, fold):
    """The development folder without a fold of its training pictures: every FOLDS-th."""
    folder = home / f"fold_{fold}"
    for name in ("val", "test"):
        for file in (pictures / name).rglob("*.*"):
            link(file, folder / name / file.parent.name / file.name)
    for number, file in enumerate(training_files(pictures)):
        if number % FOLDS != fold:
            link(file, folder / "train" / file.parent.name / file.name)
    return folder


def training_files(pictures):
    """The training pictures of a folder, in the order that folds count them by."""
    return sorted((pictures / "train").rglob("*.*"))


# -------------------------------------------------------------------------------------- tables


def rows_of_curves():
    """The students of curves.csv that are rows here."""
    for model, ablation in OF_CURVES.items():
        for row in select(read_rows(CURVES), model=model, steps=str(STEPS)):
            yield {**row, "group": GROUP, "ablation": ablation}


def print_group(rows, group, column, title):
    """A column of a group's rows per set, and its mean difference to the group's base."""
    base, scores = BASES[group], {}
    for row in rows:
        key = row["ablation"], row["set"], row["seed"]
        scores[key] = 100 * float(row[column])
    sets = values_of(rows, "set")

    lines = []
    for ablation in dict.fromkeys([base, *values_of(rows, "ablation")]):
        own = {key[1:]: value for key, value in scores.items() if key[0] == ablation}
        cells = []
        for name in sets:
            values = [value for (its_set, _), value in own.items() if its_set == name]
            cells.append(f"{np.mean(values):.1f}" if values else "")
        pairs = [value - scores[base, *key] for key, value in own.items()
                 if (base, *key) in scores]
        difference = ""
        if pairs and ablation != base:
            difference = f"{round(np.mean(pairs), 1) + 0.0:+.1f}"  # never -0.0
        if difference and len(pairs) > 1:
            difference += f" ± {half_width(pairs):.1f}"
        if own:
            lines.append([ablation, *cells, difference])
    print(f"\n{group}: {len(values_of(rows, 'seed'))} seeds\n")
    print_table([f"{title}, %", *sets, f"minus {base}, points"], lines)


def print_caption(rows):
    """What a cell rests on, and how wide its interval over pictures is."""
    print()
    for name in values_of(rows, "set"):
        of_set = select(rows, set=name)
        n, seeds = int(of_set[0]["n"]), ", ".join(values_of(of_set, "seed"))
        share = np.mean([float(row["accuracy"]) for row in of_set])
        low, high = wilson(share * n, n)
        half = 100 * (high - low) / 2
        print(
            f"{name}: {n} development pictures, seed {seeds}; "
            f"over pictures, an accuracy of {100 * share:.0f} % is known to ± {half:.1f} points"
        )


def main():
    p = cli.parser(__doc__)
    add_sources(p)
    p.add_argument("--sets", nargs="+", default=["elpv_all", "elpv_100"], choices=SETS)
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[100, 101], metavar="N")
    p.add_argument("--output", default="runs/curves", help="folder of curves.py")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")),
                   help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the tables of the CSV, and end")
    args = p.parse_args()
    for seed in args.seeds if not args.table else ():
        for name in args.sets:
            for row in args.rows:
                wanted = dict(group=GROUP, set=name, seed=str(seed), ablation=row)
                if not select(read_rows(args.csv), **wanted):
                    run(name, row, seed, args)
    rows = [*rows_of_curves(), *read_rows(args.csv)]
    for group in values_of(rows, "group"):
        of_group = select(rows, group=group)
        for column, title in (("auroc", "AUROC"), ("balanced_accuracy", "balanced accuracy")):
            with_column = [row for row in of_group if row[column]]
            if with_column:
                print_group(with_column, group, column, title)
        print_caption(of_group)
    print("\n±: half the width of a 95 % interval, in the last column over sets and seeds")


if __name__ == "__main__":
    cli.run(main)
