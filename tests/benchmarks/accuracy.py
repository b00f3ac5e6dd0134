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
(cold). They and EfficientNet-Lite0 have the same steps, picture size and augmentation.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import (
    append_rows,
    combined_interval,
    link,
    mean_of_independent,
    print_table,
    read_rows,
    run_stages,
    select,
    this_commit,
    with_interval,
    with_std,
)
from PIL import Image

from common import cli
from common.files import UserError, load_json
from common.folders import EMBEDDED, data_folder

TEACHERS = ("vit_small_patch14_dinov2", "tf_efficientnet_lite0")
FIELDS = (
    "set", "side", "classes", "seed", "start", "model", "test_set", "n", "accuracy",
    "balanced_accuracy", "nll", "ece",
    "minus_alone", "minus_alone_low", "minus_alone_high", "steps", "seconds",
    "code",  # the commit when the row was written
)

STUDENTS = ("alone", "distilled", "distilled_pool")
PERFECT = 99.5  # balanced accuracy in %: a set where every model has it tells nothing
NEAR_GUESSING = 5  # points: nor does one where no model is so far above guessing


@dataclass(frozen=True)
class Task:
    """One set as it is used here.

    labelled: pictures per class, 0 for all, of which train_teacher.py then holds a fifth out;
    size: --view-size, best of whole patches of 14 for the transformer; steps: of every CNN,
    students included; group: regular expression, pictures of one part or photo stay on one side of
    train and val; views: changes of the view recipe, chosen on training pictures; flags: of
    train_teacher.py and distill.py alike.
    """

    folder: str
    labelled: int
    pool: bool
    size: int | str
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
    "ballscrew": Task("ballscrew", 0, False, "80x208", 800, 300, group=r"(\d{6}_\d{3})-"),
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


def teach(task, pictures, home, weights, seed, *more, steps=None):
    """The stage that trains both teachers, or those of steps, {name: steps}: (name, words)."""
    steps = steps or dict(zip(TEACHERS, (task.transformer_steps, task.steps)))
    files = [weights / f"{name}.safetensors" for name in steps]
    words = ["train_teacher.py", "--data-dir", pictures, "--view-size", task.size]
    words += ["--model", *steps, "--weights", *files, "--output", home]
    words += ["--steps", *steps.values(), *task.flags, *more]
    if task.views:
        words += ["--view-recipe", *task.views]
    if task.group and not task.labelled:
        words += ["--group-regex", task.group]
    return "teachers", [*words, "--seed", seed, "--overwrite"]


def stages(task, pictures, home, weights, seed, start, student_weights):
    """(name, command words) of one set, seed and start, in order; the starts share teachers."""
    yield teach(task, pictures, home, weights, seed)
    teachers, folder = [home / name / "model.pt" for name in TEACHERS], home / start
    warm = ["--weights", student_weights] if start == "warm" else []
    rest = ["--seed", seed, "--overwrite"]

    def build(ensemble, *more):
        words = ["build_ensemble.py", *teachers, "--output", home / ensemble]
        return ensemble, [*words, *more, *rest]

    def distil(student, ensemble, *more):
        words = ["distill.py", home / ensemble, "--steps", task.steps, "--output", folder / student]
        return f"{start} {student}", [*words, *more, *warm, *task.flags, *rest]

    yield build("ensemble", "--unlabelled", "none")
    yield distil("alone", "ensemble", "--alpha", 0)
    yield distil("distilled", "ensemble")
    if task.pool:
        yield build("ensemble_pool")
        yield distil("distilled_pool", "ensemble_pool")

    students = [folder / name for name in (STUDENTS if task.pool else STUDENTS[:2])]
    models = [*teachers, home / "ensemble", *(student / "model.pt" for student in students)]
    int8 = students[-1] / "student.int8.ts"
    if int8.is_file():  # it may have lost too much to be written
        models.append(int8)
    compare = ["--baseline", students[0] / "model.pt", "--output", folder / "report"]
    yield f"{start} evaluate", ["evaluate.py", *models, "--data-dir", pictures, *compare]


def run(name, seed, start, args):
    """Run what is missing of one set and seed, then append its rows to the CSV."""
    task, home = TASKS[name], Path(args.output) / name / f"seed_{seed}"
    if task.folder == "embedded":
        pictures = data_folder(EMBEDDED)
    else:
        pictures = lay_out(task, source_of(task, args.data, home), home, seed)
    todo = stages(task, pictures, home, args.weights, seed, start, args.student_weights)
    seconds = run_stages(todo, home)
    classes = sum(1 for path in (pictures / "train").iterdir() if path.is_dir())
    key = (name, task.size, classes, seed, start)
    append_rows(args.csv, FIELDS, results(key, home / start, seconds))


def results(key, folder, seconds):
    """One row per model and test set from the report. key: the columns from set to start."""
    code = this_commit()
    for model, result in load_json(folder / "report" / "metrics.json")["models"].items():
        path = Path(model)
        part = "int8" if path.suffix == ".ts" else path.name
        steps, taken = "", seconds.get(part, "")
        if path.name == "model.pt":
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
        lines.append([model, with_std(accuracies), difference, removed, seconds])
    print_table([
        "model", "balanced accuracy, % (std)", "accuracy minus alone, points",
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
    sets = values_of(rows, "set")
    lines = []
    for model in values_of(rows, "model"):
        scores = [balanced_accuracies(select(rows, set=name, model=model)) for name in sets]
        lines.append([model, *[with_std(of_set) if of_set else "" for of_set in scores]])
    print("\nbalanced accuracy in %, over seeds: mean (std)\n")
    print_table(["model", *sets], lines)


def figures(m):
    """{title: (a difference in points, the whole that it is a share of)} of one set and seed.

    m: of `balanced`.
    """
    taught = [name for name in ("distilled_pool", "distilled") if name in m]
    alone, ensemble = m["alone"], m["ensemble"]
    best_cnn = max(alone, m["tf_efficientnet_lite0"])
    rows = {}
    for name in taught:
        rows[f"{name} minus alone"] = m[name] - alone, 100
    for name in taught:
        rows[f"alone's errors removed by {name}, %"] = m[name] - alone, 100 - alone
    for name in taught:
        rows[f"{name} minus the best stand-alone CNN"] = m[name] - best_cnn, 100
    for name in taught:
        rows[f"ensemble minus {name}"] = ensemble - m[name], 100
    rows["ensemble minus its best teacher"] = ensemble - max(m[name] for name in TEACHERS), 100
    if "drop distilled_pool" in m:
        more = m["drop alone"] - m["drop distilled_pool"]
        rows["alone's drop on test_shifted minus distilled_pool's"] = more, 100
    return rows


def balanced(rows):
    """{model: balanced accuracy in %, mean over test sets} of one set and seed.

    Where there is test_shifted, 'drop <model>' is what it costs the model.
    """
    means = {}
    for model in values_of(rows, "model"):
        of_model = select(rows, model=model)
        scores = {row["test_set"]: 100 * float(row["balanced_accuracy"]) for row in of_model}
        means[model] = np.mean(list(scores.values()))
        if "test_shifted" in scores:
            means[f"drop {model}"] = scores["test"] - scores["test_shifted"]
    return means


def print_figures(rows):
    """Differences of balanced accuracy per set, over seeds, and their means over sets."""
    sets, telling = values_of(rows, "set"), telling_sets(rows)
    pairs = {}  # {title: {set: [(difference, whole) of each seed]}}
    for name in sets:
        of_set = select(rows, set=name)
        for seed in sorted(values_of(of_set, "seed")):
            for title, pair in figures(balanced(select(of_set, seed=seed))).items():
                pairs.setdefault(title, {}).setdefault(name, []).append(pair)
    lines = []
    for title, of_sets in pairs.items():
        cells = []
        for name in sets:
            shares = [100 * part / whole for part, whole in of_sets.get(name, []) if whole]
            cells.append(with_std(shares, "+") if shares else "")
        for chosen in (sets, telling):
            means = [np.mean(of_sets[name], axis=0) for name in chosen if name in of_sets]
            part, whole = np.sum(means, axis=0) if means else (0, 0)
            cells.append(f"{100 * part / whole:+.1f}" if whole else "")
        lines.append([title, *cells])
    print("\nbalanced accuracy in points, or % of errors, over seeds: mean (std)\n")
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


def add_sources(p):
    """The flags that name pictures and weights, to an ArgumentParser."""
    p.add_argument("--data", type=Path, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, help="folder with the teachers' weight files")
    p.add_argument("--student-weights", type=Path, metavar="FILE",
                   help="a ResNet18 that students start from")


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
        "\n(std): standard deviation over seeds. ±: half the width of a 95 % interval over test "
        "pictures and,\nwhere there are several, seeds (Student's t); a mean over sets takes these "
        "as independent."
    )


if __name__ == "__main__":
    cli.run(main)
