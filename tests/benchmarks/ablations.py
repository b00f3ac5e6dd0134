"""What each part of the recipe is worth: one change at a time, on development pictures.

    python tests/benchmarks/ablations.py --data DIR --weights DIR      # 2 sets, 5 minutes a row
    python tests/benchmarks/ablations.py --data DIR --weights DIR --sets neu_cls_10 \\
        --seeds 101 --ablations base "temperature 1"                   # 20 minutes
    python tests/benchmarks/ablations.py --table                       # from the CSV alone, 5 s

The student of accuracy.py that sees the pool (its distilled_pool) is `base`; every other row
changes one thing. The test split stays shut: of the training pictures that accuracy.py would leave
without a label, half keep that role, and half are the development set that is scored here. Teachers
are trained once per set and seed, with seeds from 100 on, which no other benchmark uses. A row that
is in the CSV is not made again.
"""

import json
from pathlib import Path

import numpy as np
from accuracy import TASKS, TEACHERS, epochs_for, lay_out, select, source_of, stages, values_of
from bench import (
    append_rows,
    call,
    count_files,
    half_width,
    link,
    print_table,
    read_rows,
    run_stages,
)

from common import cli
from common.folders import EMBEDDED, data_folder
from common.threshold import wilson

DRAWN = "drawn parts"  # stands for a folder: as many of the embedded set's pictures as have labels
NO_POOL = ("--unlabelled", "none")
ALONE = ("--alpha", 0)
HALF, MOST = (("--view-recipe", f"zoom_min={share}") for share in (0.5, 0.85))

# The NEU sets have crops down to half the side anyway, so there that change is none.
# {ablation: (teachers, flags of build_ensemble.py, flags of distill.py, multiple of the steps)}
# The CSV has rows of ablations that are not here: with cached mixup, whose flag is gone. They stay
# as a record of what was tried.
ABLATIONS = {
    "base": (TEACHERS, (), (), 1),
    "stand-alone": (TEACHERS, (), ALONE, 1),
    "labelled pictures only": (TEACHERS, NO_POOL, (), 1),
    "labelled pictures and drawn parts": (TEACHERS, ("--unlabelled", DRAWN), (), 1),
    "6 views": (TEACHERS, ("--views", 6), (), 1),
    "crops down to half the side": (TEACHERS, HALF, (), 1),
    "crops down to 0.85 of the side": (TEACHERS, MOST, (), 1),
    "stand-alone, crops down to half the side": (TEACHERS, HALF, ALONE, 1),
    "stand-alone, crops down to 0.85 of the side": (TEACHERS, MOST, ALONE, 1),
    "temperature 1": (TEACHERS, (), ("--temperature", 1), 1),
    "temperature 4": (TEACHERS, (), ("--temperature", 4), 1),
    "soft targets only (alpha 1)": (TEACHERS, (), ("--alpha", 1), 1),
    "twice the learning rate": (TEACHERS, (), ("--lr", 2e-3), 1),
    "twice the steps": (TEACHERS, (), (), 2),
    "stand-alone, twice the steps": (TEACHERS, (), ALONE, 2),
    "transformer teacher alone": (TEACHERS[:1], (), (), 1),
    "CNN teacher alone": (TEACHERS[1:], (), (), 1),
    "equal weights": (TEACHERS, ("--mixture", "equal"), (), 1),
    "no averaged weights": (TEACHERS, (), ("--ema-decay", 0), 1),
}
FIELDS = (
    "set", "side", "seed", "ablation", "n", "accuracy", "balanced_accuracy", "nll", "steps",
    "seconds",
)


def development_folder(task, args, home, seed):
    """As accuracy.py lays a set out, but half of the unlabelled pictures are test/, with labels."""
    folder = lay_out(task, source_of(task, args.data, home), home, seed)
    if (folder / "development").is_file():
        return folder
    for file in (folder / "test").rglob("*.*"):
        file.unlink()
    classes = [path.name for path in (folder / "train").iterdir()]
    for file in sorted((folder / "unlabelled").iterdir())[::2]:
        label = next(name for name in classes if file.name.startswith(f"{name}_"))
        file.rename(folder / "test" / label / file.name)
    (folder / "development").touch()
    return folder


def drawn_parts(home, count):
    """A folder with so many drawn fasteners: questions to the teachers from another world."""
    for file in sorted((data_folder(EMBEDDED) / "unlabelled").iterdir())[:count]:
        link(file, home / "drawn" / file.name)
    return home / "drawn"


def file_name(*words):
    """Words as the name of a folder: letters, digits and underscores."""
    text = "_".join(map(str, words))
    return "".join(c if c.isalnum() else "_" for c in text)


def run(name, seed, args):
    """Run the ablations of one set and seed that the CSV lacks, and append their rows."""
    task = TASKS[name]
    home = Path(args.output) / name / f"seed_{seed}_{task.side}px"
    data = development_folder(task, args, home, seed)
    teachers = dict(stages(task, data, home, args.weights, seed))["teachers"]
    run_stages([("teachers", teachers)], home)

    stored = select(read_rows(args.csv), set=name, side=str(task.side), seed=str(seed))
    done = values_of(stored, "ablation")
    for ablation in args.ablations:
        if ablation not in done:
            print(f"== {name} seed {seed}: {ablation}", flush=True)
            result = run_ablation(ablation, task, data, home, seed)
            append_rows(args.csv, FIELDS, [[name, task.side, seed, ablation, *result]])


def run_ablation(ablation, task, data, home, seed):
    """Build, distil and evaluate one; returns the rest of its row, from n on."""
    teachers, ensemble_flags, student_flags, multiple = ABLATIONS[ablation]
    ensemble = home / file_name("ensemble", len(teachers), teachers[0], *ensemble_flags)
    student = home / file_name("student", ablation)
    words = list(ensemble_flags)
    if DRAWN in words:
        words[words.index(DRAWN)] = drawn_parts(home, count_files(data / "train"))

    checkpoints = [home / teacher / "best.pt" for teacher in teachers]
    call("build_ensemble.py", *checkpoints, *words, "--output", ensemble, "--seed", seed)
    pictures = json.loads((ensemble / "ensemble.json").read_text())["pictures"]
    epochs = epochs_for(multiple * task.steps, pictures)
    rest = ["--epochs", epochs, "--output", student, "--seed", seed, "--overwrite"]
    call("distill.py", ensemble, *student_flags, *rest)
    report = student / "report"
    model = student / "best.pt"
    call("evaluate.py", model, "--data-dir", data, "--skip-audit", "--output", report)

    metrics = json.loads((report / "metrics.json").read_text())
    scores = metrics["models"][str(model)]["sets"]["test"]
    rounded = [round(scores[key], 5) for key in ("accuracy", "balanced_accuracy", "nll")]
    last = read_rows(student / "log.csv")[-1]
    return [scores["n"], *rounded, last["steps"], last["seconds"]]


def print_ablations(rows):
    """Balanced accuracy per set, and the mean difference to base over sets and seeds with both."""
    scores = {}
    for row in rows:
        key = row["ablation"], row["set"], row["seed"]
        scores[key] = 100 * float(row["balanced_accuracy"])
    sets = values_of(rows, "set")

    lines = []
    for ablation in values_of(rows, "ablation"):
        own = {key[1:]: value for key, value in scores.items() if key[0] == ablation}
        cells = []
        for name in sets:
            values = [value for (its_set, _), value in own.items() if its_set == name]
            cells.append(f"{np.mean(values):.1f}" if values else "")
        pairs = [value - scores["base", *key] for key, value in own.items()
                 if ("base", *key) in scores]
        difference = ""
        if pairs and ablation != "base":
            difference = f"{round(np.mean(pairs), 1) + 0.0:+.1f}"  # never -0.0
        if difference and len(pairs) > 1:
            difference += f" ± {half_width(pairs):.1f}"
        lines.append([ablation, *cells, difference])
    print_table(["balanced accuracy, %", *sets, "minus base, points"], lines)


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
            f"{name}: {of_set[0]['side']} px, {n} development pictures, seed {seeds}; "
            f"over pictures, an accuracy of {100 * share:.0f} % is known to ± {half:.1f} points"
        )
    print("±: half the width of a 95 % interval; in the last column over sets and seeds (Student's")
    print("t), where there are several pairs of an ablation and base")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, help="folder with the teachers' weight files")
    p.add_argument("--sets", nargs="+", default=["neu_cls_10", "elpv_100"], metavar="NAME",
                   choices=[name for name, task in TASKS.items() if task.pool and task.labelled],
                   help="sets of accuracy.py that have a pool")
    p.add_argument("--ablations", nargs="+", default=list(ABLATIONS), choices=list(ABLATIONS),
                   metavar="NAME", help="which changes (default: all)")
    p.add_argument("--seeds", type=cli.natural, nargs="+", default=[100], metavar="N")
    p.add_argument("--output", default="runs/ablations", help="folder for the runs")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")),
                   help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the table of the CSV, and end")
    args = p.parse_args()
    if not args.table:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to run anything")
        for seed in args.seeds:
            for name in args.sets:
                run(name, seed, args)
    rows = read_rows(args.csv)
    print_ablations(rows)
    print_caption(rows)


if __name__ == "__main__":
    cli.run(main)
