"""Does distillation pay? Stand-alone networks, ensemble and distilled ResNet18 on real sets, several seeds.

    python tests/benchmarks/accuracy.py --data ../data --weights ../weights            # all sets, 3 seeds; 10 hours on two cores
    python tests/benchmarks/accuracy.py --data ../data --weights ../weights --sets neu_cls_10 --seeds 0
    python tests/benchmarks/accuracy.py --table                                        # from the CSV alone

Runs the five scripts as a user would, in runs/accuracy/<set>/seed_N/; a stage that finished is not run again, and a set and
seed whose rows are in the CSV is skipped (its folder, 1.3 GB, may go). The seed chooses the labelled pictures, initialisation,
order and views. Of each class, `labelled` pictures train and half as many (at least 4) validate; with a pool, the other training
pictures lose their labels.

    data/<folder>/{train,test}/<class>/*          the sets below; elpv comes from `pip install elpv-dataset`, embedded is drawn
    weights/<timm name>.safetensors               of the pretrained teachers

Students start from scratch: no pretrained ResNet18 is at hand. All have the same steps, augmentation and rule of selection.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.data import EMBEDDED, data_folder  # noqa: E402
from default_chain import combined_interval, with_spread  # noqa: E402

TEACHERS = ("vit_small_patch14_dinov2", "tf_efficientnet_lite0")
EXTRA_CNN = "resnet10t"  # from scratch
FIELDS = ("set", "seed", "model", "test_set", "n", "accuracy", "balanced_accuracy", "nll", "ece",
          "minus_alone", "minus_alone_low", "minus_alone_high", "steps", "seconds", "code")  # code: the commit when the row was written
BATCH = 24


@dataclass(frozen=True)
class Task:
    """One set as it is used here. labelled: pictures per class, 0 for all; side: px; steps: of every CNN, students included."""

    folder: str
    labelled: int
    pool: bool
    side: int  # a multiple of the transformer's 14 px
    steps: int
    transformer_steps: int
    group: str = ""  # regular expression: pictures of one part or photo stay on one side of train and val
    views: tuple = ()  # changes of the view recipe, for all models of the set; chosen on training pictures (levers.py)
    flags: tuple = ()  # of train_teacher.py and distill.py alike


TASKS = {
    "neu_cls_10": Task("neu_cls", 10, True, 70, 800, 150, views=("zoom_min=0.5",)),
    "neu_cls_40": Task("neu_cls", 40, True, 70, 800, 150, views=("zoom_min=0.5",)),
    "screw_missing_10": Task("screw_missing", 10, True, 70, 800, 150, r"^(\d+)_"),
    "elpv_100": Task("elpv", 100, True, 70, 800, 150),  # good or defective solar cells, 300 labels with those of val
    "embedded": Task("embedded", 0, True, 70, 800, 150),  # with pretrained teachers, other than in the README's first table
    "mvtec_screw": Task("mvtec_screw", 0, False, 168, 400, 150, views=("rotate=180",), flags=("--balance-classes",)),
}


def lay_out(task, source, home, seed):
    """Links (or copies) of the set's pictures as an ImageFolder of its own; returns the data folder."""
    folder = home / "data"
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(seed)
    rest, trained = {}, set()
    for class_folder in sorted(p for p in (source / "train").iterdir() if p.is_dir()):
        files = sorted(class_folder.iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        n = task.labelled or round(0.8 * len(files))
        for file in files[:n]:
            link(file, folder / "train" / class_folder.name / file.name)
            trained.add(group_of(task, file))
        rest[class_folder.name] = files[n:]
    held = set()
    for name, files in rest.items():
        val = [file for file in files if group_of(task, file) not in trained]
        for file in val[:max(4, task.labelled // 2)] if task.labelled else val:
            link(file, folder / "val" / name / file.name)
            held.add(group_of(task, file))
    for name, files in rest.items() if task.pool else []:
        for file in files:
            if group_of(task, file) not in held:
                link(file, folder / "unlabelled" / f"{name}_{file.name}")
    for file in sorted((source / "test").rglob("*")):
        if file.is_file():
            link(file, folder / file.relative_to(source))
    (folder / "done").touch()
    return folder


def source_of(task, args, home):
    """The set's own ImageFolder: a folder of --data, or solar cells written out, 30 % of each class for testing."""
    folder = home / "source"
    if task.folder != "elpv":
        return Path(args.data) / task.folder
    if not (folder / "done").is_file():
        from elpv_dataset.utils import load_dataset
        pictures, defect_probabilities, _ = load_dataset()
        rng = np.random.default_rng(0)  # whatever the seed: levers.py must never look at a test picture
        for name, rows in (("good", np.flatnonzero(defect_probabilities < 0.5)), ("defective", np.flatnonzero(defect_probabilities >= 0.5))):
            for place, row in enumerate(rng.permutation(rows)):
                target = folder / ("test" if place < 0.3 * len(rows) else "train") / name / f"{row:04d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pictures[row]).save(target)
        (folder / "done").touch()
    return folder


def group_of(task, file):
    """What may not stand in both train and val: the first match group of task.group in the file's name, or the file."""
    match = re.search(task.group, file.name) if task.group else None
    return match.group(1) if match else file


def link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # an earlier start that was interrupted
        return
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def stages(task, data, home, weights, seed):
    """(name, command words) of one set and seed, in order."""
    labelled = sum(1 for p in (data / "train").rglob("*") if p.is_file())
    pooled = labelled + sum(1 for p in (data / "unlabelled").rglob("*") if p.is_file())

    def epochs(pictures, steps=task.steps):  # as many passes as come nearest to the steps
        return max(1, round(steps / -(-pictures // BATCH)))

    rest = ["--seed", seed, "--overwrite"]
    pictures = ["--data-dir", data, "--view-size", task.side, *(["--view-recipe", *task.views] if task.views else [])]
    teachers = [home / name / "best.pt" for name in TEACHERS]
    files = [weights / f"{name}.safetensors" for name in TEACHERS]
    yield "teachers", ["train_teacher.py", *pictures, "--model", *TEACHERS, "--weights", *files,
                       "--epochs", epochs(labelled, task.transformer_steps), epochs(labelled), "--output", home, *task.flags, *rest]
    yield "extra_cnn", ["train_teacher.py", *pictures, "--model", EXTRA_CNN, "--epochs", epochs(labelled), "--output", home, *task.flags, *rest]
    yield "ensemble", ["build_ensemble.py", *teachers, "--unlabelled", "none", "--output", home / "ensemble", *rest]
    yield "alone", ["distill.py", home / "ensemble", "--alpha", 0, "--epochs", epochs(labelled), "--output", home / "alone", *task.flags, *rest]
    yield "distilled", ["distill.py", home / "ensemble", "--epochs", epochs(labelled), "--output", home / "distilled", *task.flags, *rest]
    students = ["alone", "distilled"]
    if task.pool:
        yield "ensemble_pool", ["build_ensemble.py", *teachers, "--output", home / "ensemble_pool", *rest]
        yield "distilled_pool", ["distill.py", home / "ensemble_pool", "--epochs", epochs(pooled), "--output", home / "distilled_pool", *task.flags, *rest]
        students.append("distilled_pool")
    best = home / students[-1] / "student.int8.ts"
    yield "evaluate", ["evaluate.py", *teachers, home / EXTRA_CNN / "best.pt", home / "ensemble",
                       *(home / name / "best.pt" for name in students), *([best] if best.is_file() else []),
                       "--data-dir", data, "--baseline", home / "alone" / "best.pt", "--output", home / "report"]


def run(task, name, seed, args):
    """Run what is missing of one set and seed, then append its rows to the CSV."""
    home = Path(args.output) / name / f"seed_{seed}"
    data = data_folder(EMBEDDED) if task.folder == "embedded" else lay_out(task, source_of(task, args, home), home, seed)
    log = home / "seconds.json"
    seconds = json.loads(log.read_text()) if log.is_file() else {}
    for stage, words in stages(task, data, home, Path(args.weights), seed):
        if stage in seconds:
            continue
        print(f"== {name} seed {seed}: {stage}", flush=True)
        start = time.perf_counter()
        call(*words)
        seconds[stage] = round(time.perf_counter() - start, 1)
        log.write_text(json.dumps(seconds))
    append(args.csv, FIELDS, results(name, seed, home, seconds))


def call(script, *words):
    """One of the scripts, as a user would call it."""
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)


def results(name, seed, home, seconds):
    """One row per model and test set from the report."""
    report = json.loads((home / "report" / "metrics.json").read_text())
    code = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for model, result in report["models"].items():
        part = Path(model).parent.name if model.endswith("best.pt") else Path(model).name
        part = "int8" if part.endswith(".ts") else part
        trained = read(Path(model).parent / "log.csv")[-1] if model.endswith("best.pt") else {"steps": "", "seconds": seconds.get(part, "")}
        for test_set, s in result["sets"].items():
            difference = s["minus_baseline"]
            yield (name, seed, part, test_set, s["n"], *(round(s[key], 5) for key in ("accuracy", "balanced_accuracy", "nll", "ece")),
                   *(round(v, 5) for v in (difference["difference"], *difference["interval"])), trained["steps"], trained["seconds"], code)


def append(path, fields, rows):
    """Add rows to a CSV file, which begins with the fields' names."""
    new = not Path(path).is_file()
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*[fields] * new, *rows])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder that holds the sets' folders")
    p.add_argument("--weights", help="folder with the teachers' weight files")
    p.add_argument("--sets", nargs="+", default=list(TASKS), metavar="NAME", help="which (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--output", default="runs/accuracy")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")), help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the table of the CSV, and end")
    args = p.parse_args()
    if not args.table:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to run anything")
        for seed in args.seeds:  # one seed of every set before the next
            for name in args.sets:
                if (name, str(seed)) not in {(row["set"], row["seed"]) for row in read(args.csv)}:
                    run(TASKS[name], name, seed, args)
    rows = read(args.csv)
    print_table(rows)
    print_models(rows)
    print_figures(rows)


def read(path):
    return list(csv.DictReader(open(path, newline="", encoding="utf-8"))) if Path(path).is_file() else []


def balanced_accuracies(rows):
    """In %, one per seed, the mean over its test sets."""
    return [np.mean([100 * float(row["balanced_accuracy"]) for row in rows if row["seed"] == seed]) for seed in sorted({row["seed"] for row in rows})]


def minus_alone(rows):
    """(accuracy minus the stand-alone student's in points, half of its 95 % interval) over the seeds and test sets of one model and set."""
    of_seeds = []
    for seed in sorted({row["seed"] for row in rows}):
        value, half = mean_of([[100 * float(row["minus_alone"]), 50 * (float(row["minus_alone_high"]) - float(row["minus_alone_low"]))]
                               for row in rows if row["seed"] == seed])
        of_seeds.append({"difference": value, "interval": (value - half, value + half)})
    return combined_interval(of_seeds)


def mean_of(parts):
    """The mean of independent (value, half interval), as such a pair."""
    values, halves = np.transpose(parts)
    return values.mean(), (halves**2).sum() ** 0.5 / len(halves)


def print_table(rows):
    """Balanced accuracy per set and model over seeds, the difference to the stand-alone ResNet18, and its errors removed."""
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        seeds = sorted({row["seed"] for row in of_set})
        print(f"\n{name}: seeds {', '.join(seeds)}, {of_set[0]['n']} test pictures, {next(r['steps'] for r in of_set if r['model'] == 'alone')} steps\n")
        print("| model | balanced accuracy, % | accuracy minus stand-alone, points | stand-alone's errors removed, % | seconds |\n|---|---|---|---|---|")
        alone = np.mean(balanced_accuracies([row for row in of_set if row["model"] == "alone"]))
        for model in dict.fromkeys(row["model"] for row in of_set):
            of_model = [row for row in of_set if row["model"] == model]
            values = balanced_accuracies(of_model)
            value, half = minus_alone(of_model)
            time_taken = [float(row["seconds"]) for row in of_model if row["seconds"]]
            removed = f"{100 * (np.mean(values) - alone) / (100 - alone):.0f}" if alone < 100 else ""
            columns = ["", ""] if model == "alone" else [f"{value:+.1f} ± {half:.1f}", removed]
            print(f"| {model} | {with_spread(values)} | {' | '.join(columns)} | {f'{np.mean(time_taken):.0f}' if time_taken else ''} |")


def print_models(rows):
    """Balanced accuracy of each model on each set, over seeds, and its mean over the sets that have all models, so that means compare."""
    sets, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "model"))
    values = {(model, name): balanced_accuracies([row for row in rows if (row["set"], row["model"]) == (name, model)]) for model in models for name in sets}
    common = [name for name in sets if all(values[model, name] for model in models)]
    print(f"\n| balanced accuracy, % | {' | '.join(sets)} | mean of {len(common)} |\n|---|{'---|' * (len(sets) + 1)}")
    for model in models:
        mean = f"{np.mean([np.mean(values[model, name]) for name in common]):.1f}" if common else ""
        print(f"| {model} | {' | '.join(with_spread(values[model, name]) if values[model, name] else '' for name in sets)} | {mean} |")


STAND_ALONE_CNNS = ("alone", EXTRA_CNN, "tf_efficientnet_lite0")
FIGURES = {  # of m, model -> balanced accuracy in % of one set and seed, mean over its test sets: (a difference, the whole it is a share of)
    "distilled (labelled only) minus stand-alone": lambda m: (m["distilled"] - m["alone"], 100),
    "distilled (with the pool) minus stand-alone": lambda m: (m["distilled_pool"] - m["alone"], 100),
    "stand-alone's errors removed (labelled only), %": lambda m: (m["distilled"] - m["alone"], 100 - m["alone"]),
    "stand-alone's errors removed (with the pool), %": lambda m: (m["distilled_pool"] - m["alone"], 100 - m["alone"]),
    "distilled minus the best stand-alone CNN": lambda m: (m.get("distilled_pool", m["distilled"]) - max(m[name] for name in STAND_ALONE_CNNS), 100),
    "ensemble minus distilled (labelled only)": lambda m: (m["ensemble"] - m["distilled"], 100),
    "ensemble minus distilled (with the pool)": lambda m: (m["ensemble"] - m["distilled_pool"], 100),
    "ensemble minus its best teacher": lambda m: (m["ensemble"] - max(m[name] for name in TEACHERS), 100),
    "stand-alone's drop on test_shifted minus the distilled one's": lambda m: (m["drop alone"] - m["drop distilled_pool"], 100),
}


def print_figures(rows):
    """What the project is judged by: points of balanced accuracy per set, with their standard deviation over seeds, and over all sets that have the models."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    print(f"\n| balanced accuracy, points | {' | '.join(sets)} | mean |\n|---|{'---|' * (len(sets) + 1)}")
    for figure, formula in FIGURES.items():
        found = []
        for name in sets:
            found.append([])
            for seed in sorted({row["seed"] for row in rows if row["set"] == name}):
                try:
                    found[-1].append(formula(balanced([row for row in rows if (row["set"], row["seed"]) == (name, seed)])))
                except KeyError:  # a set without a pool, or without test_shifted
                    continue
        cells = [with_spread([100 * part / whole for part, whole in pairs if whole], "+") if any(whole for _, whole in pairs) else "" for pairs in found]
        parts, wholes = np.sum([np.mean(pairs, axis=0) for pairs in found if pairs] or [[0, 0]], axis=0)
        print(f"| {figure} | {' | '.join(cells)} | {f'{100 * parts / wholes:+.1f}' if wholes else ''} |")
    for model in ("distilled", "distilled_pool"):
        differences = [minus_alone(of_set) for name in sets if (of_set := [row for row in rows if (row["set"], row["model"]) == (name, model)])]
        if differences:
            value, half = mean_of(differences)
            print(f"\n{model} minus stand-alone, accuracy, mean over {len(differences)} sets: {value:+.1f} ± {half:.1f} points (95 %, over pictures and, where "
                  "there are several, seeds; the sets taken as independent)")


def balanced(rows):
    """model -> balanced accuracy in %, mean over test sets; 'drop <model>' -> what test_shifted costs it, where there is one."""
    by_set = {(row["model"], row["test_set"]): 100 * float(row["balanced_accuracy"]) for row in rows}
    m = {model: np.mean([value for (its, _), value in by_set.items() if its == model]) for model, _ in by_set}
    return m | {f"drop {model}": by_set[model, "test"] - by_set[model, "test_shifted"] for model, test in by_set if test == "test_shifted"}


if __name__ == "__main__":
    main()
