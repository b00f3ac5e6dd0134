"""Does distillation pay? Stand-alone networks, ensemble and distilled ResNet18 on real pictures.

    python tests/benchmarks/accuracy.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/accuracy.py --data DIR --weights DIR     # students from scratch (cold)
    python tests/benchmarks/accuracy.py --table                      # from the CSV alone, 5 s

Runs the scripts as a user would, in runs/accuracy/<set>/seed_N/; a stage that finished is not run
again, and a set, seed and start whose rows are in the CSV is skipped (its folder, 1.3 GB, may go).
The seed chooses the labelled pictures, initialisation, order and views. Of each class, `labelled`
pictures train and half as many (at least 4) validate; with a pool, the other training pictures lose
their labels.

    data/<folder>/{train,test}/<class>/*   the sets below; elpv is written from the package
                                           elpv-dataset, the embedded set is drawn
    weights/<timm name>.safetensors        of the two pretrained teachers

Students, stand-alone and distilled alike, start from --student-weights (warm) or from scratch
(cold). They and EfficientNet-Lite0 have the same steps, picture size, augmentation and rule of
selection.
"""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import (
    append_rows,
    combined_interval,
    count_files,
    link,
    mean_of_independent,
    print_table,
    read_rows,
    run_stages,
    select,
    this_commit,
    with_interval,
    with_sd,
)
from PIL import Image

from common import cli
from common.errors import UserError
from common.folders import EMBEDDED, data_folder

TEACHERS = ("vit_small_patch14_dinov2", "tf_efficientnet_lite0")
BATCH = 24
FIELDS = (
    "set", "side", "classes", "seed", "start", "model", "test_set", "n", "accuracy",
    "balanced_accuracy", "nll", "ece",
    "minus_alone", "minus_alone_low", "minus_alone_high", "steps", "seconds",
    "code",  # the commit when the row was written
)

STUDENTS = ("alone", "distilled", "distilled_pool")
STAND_ALONE_CNNS = ("alone", "tf_efficientnet_lite0")
PERFECT = 99.5  # balanced accuracy in %: a set where every model has it tells nothing
NEAR_GUESSING = 5  # points: nor does one where no model is so far above guessing


@dataclass(frozen=True)
class Task:
    """One set as it is used here.

    labelled: pictures per class, 0 for all; side: px, a multiple of the transformer's 14; steps: of
    every CNN, students included; group: regular expression, pictures of one part or photo stay on
    one side of train and val; views: changes of the view recipe, chosen on training pictures;
    flags: of train_teacher.py and distill.py alike.
    """

    folder: str
    labelled: int
    pool: bool
    side: int
    steps: int
    transformer_steps: int
    group: str = ""
    views: tuple = ()
    flags: tuple = ()


CROPS = ("zoom_min=0.5",)
TASKS = {
    "neu_cls_10": Task("neu_cls", 10, True, 126, 480, 150, views=CROPS),
    "neu_cls_40": Task("neu_cls", 40, True, 126, 480, 150, views=CROPS),
    "screw_missing_10": Task("screw_missing", 10, True, 126, 480, 150, group=r"^(\d+)_"),
    "elpv_100": Task("elpv", 100, True, 126, 480, 150),  # solar cells, good or defective
    "embedded": Task("embedded", 0, True, 70, 800, 150),
    "neu_cls_all": Task("neu_cls", 0, False, 126, 800, 300, views=CROPS),
    "elpv_all": Task("elpv", 0, False, 126, 800, 300),
    "mvtec_screw": Task(
        "mvtec_screw", 0, False, 224, 800, 300, views=("rotate=180",), flags=("--balance-classes",)
    ),
}


# ------------------------------------------------------------------------------------ pictures


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
        n = task.labelled or round(0.8 * len(files))
        for file in files[:n]:
            link(file, folder / "train" / name / file.name)
            trained.add(group_of(task, file))
        rest[name] = files[n:]

    # Validation pictures: the next ones that share no group with these.
    held = set()
    for name, files in rest.items():
        val = [file for file in files if group_of(task, file) not in trained]
        if task.labelled:
            val = val[: max(4, task.labelled // 2)]
        for file in val:
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


def source_of(task, data, home):
    """The set's own ImageFolder: a folder of `data`, or the solar cells written out below home."""
    if task.folder != "elpv":
        return data / task.folder
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
        raise UserError("elpv_100 needs the package elpv-dataset; install it") from None
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


# ------------------------------------------------------------------------------------- running


def epochs_for(steps, pictures):
    """As many passes as come nearest to the steps."""
    return max(1, round(steps / -(-pictures // BATCH)))


def stages(task, data, home, weights, seed, start="cold", student_weights=None):
    """(name, command words) of one set, seed and start, in order; the starts share teachers."""
    labelled = count_files(data / "train")
    pooled = labelled + count_files(data / "unlabelled")
    passes = epochs_for(task.steps, labelled)
    transformer_passes = epochs_for(task.transformer_steps, labelled)
    teachers = [home / name / "best.pt" for name in TEACHERS]
    rest = ["--seed", seed, "--overwrite"]

    pictures = ["--data-dir", data, "--view-size", task.side]
    if task.views:
        pictures += ["--view-recipe", *task.views]
    teach = ["train_teacher.py", *pictures, "--output", home, *task.flags, *rest]
    files = [weights / f"{name}.safetensors" for name in TEACHERS]
    pretrained = ["--model", *TEACHERS, "--weights", *files]
    yield "teachers", [*teach, *pretrained, "--epochs", transformer_passes, passes]

    # Students, and what they learn from.
    def build(folder, *more):
        return ["build_ensemble.py", *teachers, *more, "--output", home / folder, *rest]

    def distil(ensemble, student, epochs, *more):
        words = ["distill.py", home / ensemble, "--epochs", epochs, "--output", folder / student]
        warm = ["--weights", student_weights] if start == "warm" else []
        return [*words, *more, *warm, *task.flags, *rest]

    folder = home / start
    yield "ensemble", build("ensemble", "--unlabelled", "none")
    yield f"{start} alone", distil("ensemble", "alone", passes, "--alpha", 0)
    yield f"{start} distilled", distil("ensemble", "distilled", passes)
    students = ["alone", "distilled"]
    if task.pool:
        yield "ensemble_pool", build("ensemble_pool")
        passes_of_pool = epochs_for(task.steps, pooled)
        yield f"{start} distilled_pool", distil("ensemble_pool", "distilled_pool", passes_of_pool)
        students.append("distilled_pool")

    models = [*teachers, home / "ensemble", *[folder / name / "best.pt" for name in students]]
    int8 = folder / students[-1] / "student.int8.ts"
    if int8.is_file():  # it may have lost too much to be written
        models.append(int8)
    compare = ["--baseline", folder / "alone" / "best.pt", "--output", folder / "report"]
    yield f"{start} evaluate", ["evaluate.py", *models, "--data-dir", data, *compare]


def run(name, seed, start, args):
    """Run what is missing of one set and seed, then append its rows to the CSV."""
    task, home = TASKS[name], Path(args.output) / name / f"seed_{seed}"
    if task.folder == "embedded":
        data = data_folder(EMBEDDED)
    else:
        data = lay_out(task, source_of(task, args.data, home), home, seed)
    todo = stages(task, data, home, args.weights, seed, start, args.student_weights)
    seconds = run_stages(todo, home)
    classes = sum(1 for path in (data / "train").iterdir() if path.is_dir())
    key = (name, task.side, classes, seed, start)
    append_rows(args.csv, FIELDS, results(key, home / start, seconds))


def results(key, folder, seconds):
    """One row per model and test set from the report. key: the columns from set to start."""
    report = json.loads((folder / "report" / "metrics.json").read_text())
    code = this_commit()
    for model, result in report["models"].items():
        path = Path(model)
        part = "int8" if path.suffix == ".ts" else path.name
        steps, taken = "", seconds.get(part, "")
        if path.name == "best.pt":
            part = path.parent.name
            last = read_rows(path.parent / "log.csv")[-1]
            steps, taken = last["steps"], last["seconds"]
        for test_set, s in result["sets"].items():
            difference = s["minus_baseline"]
            scores = [s[key] for key in ("accuracy", "balanced_accuracy", "nll", "ece")]
            scores += [difference["difference"], *difference["interval"]]
            rounded = [round(value, 5) for value in scores]
            yield [*key, part, test_set, s["n"], *rounded, steps, taken, code]


# -------------------------------------------------------------------------------------- tables


def values_of(rows, key):
    """The different values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def balanced_accuracies(rows):
    """In %, one per seed: the mean over its test sets."""
    means = []
    for seed in sorted(values_of(rows, "seed")):
        scores = [100 * float(row["balanced_accuracy"]) for row in select(rows, seed=seed)]
        means.append(np.mean(scores))
    return means


def minus_alone(rows):
    """(accuracy minus the stand-alone student's in points, half width of its 95 % interval).

    rows: of one model and set, over its seeds and test sets.
    """
    of_seeds = []
    for seed in sorted(values_of(rows, "seed")):
        parts = []
        for row in select(rows, seed=seed):
            width = float(row["minus_alone_high"]) - float(row["minus_alone_low"])
            parts.append([100 * float(row["minus_alone"]), 100 * width / 2])
        value, half = mean_of_independent(parts)
        of_seeds.append({"difference": value, "interval": (value - half, value + half)})
    return combined_interval(of_seeds)


def print_set(rows, name):
    """One set: balanced accuracy, the difference to the stand-alone ResNet18, and the time."""
    rows = select(rows, set=name)
    seeds, steps = values_of(rows, "seed"), select(rows, model="alone")[0]["steps"]
    print(f"\n{name}: seeds {', '.join(seeds)}, {rows[0]['n']} test pictures, {steps} steps\n")
    alone = np.mean(balanced_accuracies(select(rows, model="alone")))
    lines = []
    for model in values_of(rows, "model"):
        of_model = select(rows, model=model)
        accuracies = balanced_accuracies(of_model)
        taken = [float(row["seconds"]) for row in of_model if row["seconds"]]
        difference, removed = "", ""
        if model != "alone":
            difference = with_interval(*minus_alone(of_model))
            if alone < 100:
                removed = f"{100 * (np.mean(accuracies) - alone) / (100 - alone):.0f}"
        seconds = f"{np.mean(taken):.0f}" if taken else ""
        lines.append([model, with_sd(accuracies), difference, removed, seconds])
    print_table([
        "model", "balanced accuracy, % (sd)", "accuracy minus alone, points",
        "alone's errors removed, %", "seconds",
    ], lines)


def print_summary(rows):
    """The table of the repository's README: accuracy of the best-taught student per set."""
    lines = []
    for name in values_of(rows, "set"):
        of_set = select(rows, set=name)
        model = "distilled_pool" if TASKS[name].pool else "distilled"
        means = []
        for key in ("alone", model, "ensemble"):
            scores = [float(row["accuracy"]) for row in select(of_set, model=key)]
            means.append(f"{100 * np.mean(scores):.1f}")
        gain = with_interval(*minus_alone(select(of_set, model=model)))
        pool = "yes" if TASKS[name].pool else "no"
        lines.append([name, pool, *means, gain])
    print("\naccuracy in %, mean over seeds and test sets\n")
    columns = ["set", "pool", "stand-alone", "distilled", "ensemble", "gain, points"]
    print_table(columns, lines)


def telling_sets(rows):
    """The sets that can tell models apart: not all are perfect there, nor do all but guess."""
    kept = []
    for name in values_of(rows, "set"):
        of_set = select(rows, set=name)
        scores = [np.mean(balanced_accuracies(select(of_set, model=model)))
                  for model in values_of(of_set, "model")]
        guess = 100 / int(of_set[0]["classes"])
        if min(scores) < PERFECT and max(scores) > guess + NEAR_GUESSING:
            kept.append(name)
    return kept


def print_models(rows):
    """Balanced accuracy of each model on each set."""
    sets, models = values_of(rows, "set"), values_of(rows, "model")
    lines = []
    for model in models:
        found = [balanced_accuracies(select(rows, set=name, model=model)) for name in sets]
        lines.append([model, *[with_sd(scores) if scores else "" for scores in found]])
    print("\nbalanced accuracy in %, over seeds: mean (sd)\n")
    print_table(["model", *sets], lines)


def minus(model, other):
    """For FIGURES: points between two models."""
    return lambda m: (m[model] - m[other], 100)


def errors_removed(model):
    """For FIGURES: what a student gains, as a share of the stand-alone one's errors."""
    return lambda m: (m[model] - m["alone"], 100 - m["alone"])


def best_stand_alone(m):
    """The score of the best CNN that had no teacher."""
    return max(m[name] for name in STAND_ALONE_CNNS)


# {title: function of `balanced` -> (a difference, the whole that it is a share of)}
FIGURES = {
    "distilled_pool minus alone": minus("distilled_pool", "alone"),
    "distilled minus alone": minus("distilled", "alone"),
    "alone's errors removed by distilled_pool, %": errors_removed("distilled_pool"),
    "alone's errors removed by distilled, %": errors_removed("distilled"),
    "distilled_pool minus the best stand-alone CNN": lambda m: (
        m["distilled_pool"] - best_stand_alone(m), 100
    ),
    "distilled minus the best stand-alone CNN": lambda m: (
        m["distilled"] - best_stand_alone(m), 100
    ),
    "ensemble minus distilled_pool": minus("ensemble", "distilled_pool"),
    "ensemble minus distilled": minus("ensemble", "distilled"),
    "ensemble minus its best teacher": lambda m: (
        m["ensemble"] - max(m[name] for name in TEACHERS), 100
    ),
    "alone's drop on test_shifted minus distilled_pool's": minus(
        "drop alone", "drop distilled_pool"
    ),
}


def balanced(rows):
    """{model: balanced accuracy in %, mean over test sets} of one set and seed.

    Where there is test_shifted, 'drop <model>' is what it costs the model.
    """
    scores = {}
    for row in rows:
        of_model = scores.setdefault(row["model"], {})
        of_model[row["test_set"]] = 100 * float(row["balanced_accuracy"])
    found = {model: np.mean(list(of_model.values())) for model, of_model in scores.items()}
    for model, of_model in scores.items():
        if "test_shifted" in of_model:
            found[f"drop {model}"] = of_model["test"] - of_model["test_shifted"]
    return found


def print_figures(rows):
    """Differences of balanced accuracy per set, over seeds, and their means over sets."""
    sets, telling = values_of(rows, "set"), telling_sets(rows)
    lines = []
    for title, formula in FIGURES.items():
        of_sets = {}
        for name in sets:
            pairs = []  # of each seed: (difference, whole)
            for seed in sorted(values_of(select(rows, set=name), "seed")):
                with suppress(KeyError):  # the set has no pool, or no test_shifted
                    pairs.append(formula(balanced(select(rows, set=name, seed=seed))))
            if pairs:
                of_sets[name] = pairs
        cells = []
        for name in sets:
            shares = [100 * part / whole for part, whole in of_sets.get(name, []) if whole]
            cells.append(with_sd(shares, "+") if shares else "")
        for chosen in (sets, telling):
            means = [np.mean(of_sets[name], axis=0) for name in chosen if name in of_sets]
            part, whole = np.sum(means, axis=0) if means else (0, 0)
            cells.append(f"{100 * part / whole:+.1f}" if whole else "")
        if of_sets:
            lines.append([title, *cells])
    print("\nbalanced accuracy in points, or % of errors, over seeds: mean (sd)\n")
    print_table(["", *sets, "all sets", "sets that tell"], lines)
    print(f"\nsets that tell (not all models are perfect or guess): {', '.join(telling)}")


def print_means(rows):
    """The mean over sets of each student's difference to the stand-alone one, with its interval."""
    print()
    for model in STUDENTS[1:]:
        of_model = select(rows, model=model)
        sets = values_of(of_model, "set")
        differences = [minus_alone(select(of_model, set=name)) for name in sets]
        if differences:
            mean = with_interval(*mean_of_independent(differences))
            print(f"{model} minus alone, accuracy, mean over {len(sets)} sets: {mean} points")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, help="folder with the teachers' weight files")
    p.add_argument("--student-weights", type=Path, metavar="FILE",
                   help="a ResNet18 that students start from (default: from scratch)")
    p.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="NAME",
                   help="which sets to run")
    p.add_argument("--seeds", type=cli.natural, nargs="+", default=[0, 1, 2], metavar="N")
    p.add_argument("--output", default="runs/accuracy", help="folder for the runs")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")),
                   help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the tables of the CSV, and end")
    args = p.parse_args()
    if not args.table:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to run anything")
        start = "warm" if args.student_weights else "cold"
        for seed in args.seeds:  # one seed of every set before the next
            for name in args.sets:
                if not select(read_rows(args.csv), set=name, seed=str(seed), start=start):
                    run(name, seed, start, args)

    everything = read_rows(args.csv)
    for start in values_of(everything, "start"):
        rows = select(everything, start=start)
        print(f"\n== students that start {start}")
        for name in values_of(rows, "set"):
            print_set(rows, name)
        print_summary(rows)
        print_models(rows)
        print_figures(rows)
        print_means(rows)
    print(
        "\n(sd): standard deviation over seeds. ±: half the width of a 95 % interval over test "
        "pictures and,\nwhere there are several, seeds (Student's t); a mean over sets takes these "
        "as independent."
    )


if __name__ == "__main__":
    cli.run(main)
