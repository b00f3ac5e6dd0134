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
from bench import (
    append_rows,
    half_width,
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

from common import cli
from common.metrics import wilson

GROUP, STEPS = "patient", 2000
# Of each group in the CSV, what the other rows are compared with.
BASES = {"patient": "base", "pool": "base", "resolution": "70 px, 1600 steps"}
CURVES = Path(__file__).with_name("curves.csv")


@dataclass(frozen=True)
class Row:
    """Flags of build_ensemble.py and distill.py, multiple of the steps, which teachers."""

    build: tuple = ()
    student: tuple = ()
    steps: float = 1
    teachers: tuple = TAUGHT


SHORT_CNN = TEACHERS[1], 500  # a quarter as long
DEFAULT = (TEACHERS[0], 200), SHORT_CNN  # what train_teacher.py gives few labels
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
    "CNN of 500 steps": Row(teachers=(TAUGHT[0], SHORT_CNN)),
    "transformer of 200 steps, CNN of 500 steps": Row(teachers=DEFAULT),
    "transformer of 200, CNN of 500, student of 8000 steps": Row(steps=4, teachers=DEFAULT),
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
    return ensemble(task, pictures, home, seed, args, *change.build, taught=change.teachers,
                    name=name)


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
        pairs = [value - scores[(base, *key)] for key, value in own.items()
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
