"""Does distillation pay? Stand-alone networks, ensemble and distilled ResNet18 on real pictures.

    python tests/benchmarks/accuracy.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/accuracy.py --table                      # from the CSV alone, 5 s

Runs the commands of the repository's README, on the sets of sets.py, in
runs/accuracy/<set>/seed_N/; a stage that finished is not run again, and a set and seed whose rows
are in the CSV is skipped (its folder, 0.9 GB, may go). The seed chooses the labelled pictures,
initialisation, order and views.

All networks start pretrained: the teachers from their published weights, the students, stand-alone
and distilled alike, from --student-weights. `alone` has as many steps as `distilled`; `alone_short`
has a quarter of them, since a stand-alone student may be at its best before.
"""

from pathlib import Path

import numpy as np
from bench import (
    append_rows,
    combined_interval,
    half_width,
    print_table,
    read_rows,
    rounded,
    run_stages,
    select,
    this_commit,
    values_of,
    with_interval,
    with_std,
)
from sets import CNN, TASKS, TEACHERS, add_sources, pictures_of, teach

from common import cli
from common.files import load_json

STUDENTS = {"alone_short": (0.25, 0), "alone": (1, 0), "distilled": (1, 0.9)}  # of steps, alpha
SCORES = ("accuracy", "balanced_accuracy", "auroc", "nll", "ece")
FIELDS = (
    "set", "size", "seed", "model", "test_set", "n", *SCORES,
    "minus_alone", "minus_alone_low", "minus_alone_high",  # of accuracy, over test pictures
    "val_balanced_accuracy", "steps", "seconds",
    "code",  # the commit when the row was written
)


# ------------------------------------------------------------------------------------- running


def stages(task, pictures, home, weights, seed, student_weights):
    """(name, command words) of one set and seed, in order."""
    teachers = [home / name / "model.pt" for name in TEACHERS]
    rest = ["--seed", seed, "--overwrite"]
    yield teach(task, pictures, home, weights, seed)
    yield "ensemble", ["build_ensemble.py", *teachers, "--output", home / "ensemble", *rest]
    for name, (share, alpha) in STUDENTS.items():
        steps = round(share * task.steps)
        words = ["distill.py", home / "ensemble", "--steps", steps, "--alpha", alpha]
        words += ["--weights", student_weights, "--output", home / name]
        yield name, [*words, *task.flags, *task.students, *rest]

    models = [*teachers, home / "ensemble", *(home / name / "model.pt" for name in STUDENTS)]
    int8 = home / "distilled" / "student.int8.ts"
    if int8.is_file():  # it may have lost too much to be written
        models.append(int8)
    compare = ["--baseline", home / "alone" / "model.pt", "--output", home / "report"]
    yield "evaluate", ["evaluate.py", *models, "--data-dir", pictures, *compare]


def run(name, seed, args):
    """Run what is missing of one set and seed, then append its rows to the CSV."""
    task, home = TASKS[name], Path(args.output) / name / f"seed_{seed}"
    pictures = pictures_of(task, args.data, home, seed)
    todo = stages(task, pictures, home, args.weights, seed, args.student_weights)
    seconds = run_stages(todo, home)
    height, width = load_json(home / "ensemble" / "ensemble.json")["dataset"]["view_size"]
    append_rows(args.csv, FIELDS, results([name, f"{height}x{width}", seed], home, seconds))


def results(key, home, seconds):
    """One row per model and test set from the report. key: the columns from set to seed."""
    code = this_commit()
    for model, result in load_json(home / "report" / "metrics.json")["models"].items():
        path = Path(model)
        part = "int8" if path.suffix == ".ts" else path.name
        last = {"seconds": seconds.get(part, "")}
        if path.name == "model.pt":
            part = path.parent.name
            last = read_rows(path.parent / "log.csv")[-1]
        own = [last.get(key, "") for key in ("val_balanced_accuracy", "steps", "seconds")]
        for test_set, s in result["sets"].items():
            d = s["minus_baseline"]
            gain = [round(value, 5) for value in (d["difference"], *d["interval"])]
            yield [*key, part, test_set, s["n"], *rounded(s, SCORES), *gain, *own, code]


# -------------------------------------------------------------------------------------- tables


def mean_of_tests(rows, column):
    """{seed: mean of a column over the seed's test sets, in %} of one model's rows on a set."""
    return {seed: 100 * np.mean([float(row[column]) for row in select(rows, seed=seed)])
            for seed in sorted(values_of(rows, "seed"))}


def differences(rows, column):
    """{title: a difference of a column in points per seed} of one set."""
    found = {model: mean_of_tests(select(rows, model=model), column)
             for model in values_of(rows, "model")}
    seeds = list(found["distilled"])
    stand_alone = [name for name, (_, alpha) in STUDENTS.items() if alpha == 0]

    def minus(a, b):
        return [a[seed] - b[seed] for seed in seeds]

    def best(*names):
        return {seed: max(found[name][seed] for name in names) for seed in seeds}

    return {
        "distilled minus alone": minus(found["distilled"], found["alone"]),
        "distilled minus alone at its better length": minus(found["distilled"], best(*stand_alone)),
        f"distilled minus {CNN}": minus(found["distilled"], found[CNN]),
        "ensemble minus its best teacher": minus(found["ensemble"], best(*TEACHERS)),
        "ensemble minus distilled": minus(found["ensemble"], found["distilled"]),
    }


def over_seeds(values):
    """'mean ± half width' of one difference per seed; of a single seed the number alone."""
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    return with_interval(np.mean(values), half_width(values))


def print_models(rows, column, score):
    """A column of every model on every set: mean (std) over seeds."""
    sets, lines = values_of(rows, "set"), []
    for model in values_of(rows, "model"):
        cells = []
        for name in sets:
            of_seeds = mean_of_tests(select(rows, set=name, model=model), column).values()
            cells.append(with_std(list(of_seeds)) if of_seeds else "")
        lines.append([model, *cells])
    print_table([f"{score}, % (std)", *sets], lines)
    print()


def print_differences(rows, column, score):
    """Differences of a column per set, over seeds, and their means over sets with and without pool.

    The stand-alone student's better length is that of the test pictures, which favours it.
    """
    sets, table = values_of(rows, "set"), {}
    pool = np.array([TASKS[name].pool for name in sets])
    for name in sets:
        for title, values in differences(select(rows, set=name), column).items():
            table.setdefault(title, []).append(values)
    lines = []
    for title, of_sets in table.items():
        mean = np.array([np.mean(values) for values in of_sets])
        means = [f"{mean[each].mean():+.1f}" if any(each) else "" for each in (pool, ~pool)]
        lines.append([title, *map(over_seeds, of_sets), *means])
    print_table([f"{score}, points", *sets, "mean with pool", "mean without"], lines)


def print_gains(rows):
    """Accuracy of the distilled minus the stand-alone student, over test pictures and seeds."""
    for name in values_of(rows, "set"):
        of_set, of_seeds = select(rows, set=name, model="distilled"), []
        for seed in values_of(of_set, "seed"):
            of_tests = select(of_set, seed=seed)
            low, middle, high = (
                100 * np.array([float(row[f"minus_alone{end}"]) for row in of_tests])
                for end in ("_low", "", "_high")
            )
            half = np.sqrt(np.square((high - low) / 2).sum()) / len(of_tests)
            mean = middle.mean()
            of_seeds.append({"difference": mean, "interval": (mean - half, mean + half)})
        gain = with_interval(*combined_interval(of_seeds))
        print(f"{name}: accuracy, distilled minus alone, over pictures and seeds: {gain} points")


def print_sets(rows):
    """What each set's rows rest on."""
    for name in values_of(rows, "set"):
        of_set = select(rows, set=name)
        tests = {row["test_set"]: row["n"] for row in of_set}
        counts = ", ".join(f"{test} {n}" for test, n in tests.items())
        seeds = ", ".join(sorted(values_of(of_set, "seed")))
        print(f"{name}: {of_set[0]['size']} px; seeds {seeds}; test pictures: {counts}")


def main():
    p = cli.parser(__doc__)
    add_sources(p)
    p.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="NAME",
                   help="which sets to run")
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], metavar="N")
    p.add_argument("--output", default="runs/accuracy", help="folder for the runs")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")),
                   help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the tables of the CSV, and end")
    args = p.parse_args()
    if not args.table and not (args.data and args.weights and args.student_weights):
        p.error("--data, --weights and --student-weights are needed to run anything")
    for seed in args.seeds if not args.table else ():  # one seed of every set before the next
        for name in args.sets:
            if not select(read_rows(args.csv), set=name, seed=str(seed)):
                run(name, seed, args)

    rows = read_rows(args.csv)
    with_good = [row for row in rows if row["auroc"]]
    print_sets(rows)
    print()
    for column, score, chosen in (("balanced_accuracy", "balanced accuracy", rows),
                                  ("auroc", "AUROC", with_good), ("accuracy", "accuracy", rows)):
        print_models(chosen, column, score)
        print_differences(chosen, column, score)
        print()
    print_gains(rows)


if __name__ == "__main__":
    cli.run(main)
