"""What each part of the recipe is worth: one change at a time, on development pictures.

    python tests/benchmarks/ablations.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/ablations.py --data DIR --weights DIR --student-weights FILE \\
        --groups pool --sets neu_cls_10 --seeds 101 --ablations base "temperature 1"
    python tests/benchmarks/ablations.py --table                       # from the CSV alone, 5 s

Three groups of rows. pool: the student of accuracy.py that sees the unlabelled pictures is `base`.
labelled: none is seen. resolution: views are stored at 160 px, the teachers see them at 70, and
only the student's size changes, with as many steps as take the same time. Every row changes one
thing of the first row of its group.

The test split stays shut: of the training pictures that accuracy.py would leave without a label,
half keep that role, and half are the development set that is scored here. Teachers are trained once
per set and seed, with seeds from 100 on, which no other benchmark uses. A row that is in the CSV is
not made again.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accuracy import CROPS, TEACHERS, Task, lay_out, source_of, teach, values_of
from bench import (
    append_rows,
    call,
    half_width,
    link,
    print_table,
    read_rows,
    run_stages,
    select,
    this_commit,
)

from build_ensemble import in_batches, teacher_logits
from common import cli, models, splits
from common.ensemble import load_ensemble, write_view
from common.files import load_json, save_json
from common.metrics import wilson
from common.pictures import DecodedCache
from common.views import ViewRecipe, render

TASKS = {
    "neu_cls_10": Task("neu_cls", 10, True, 70, 800, 150, views=CROPS),
    "neu_cls_40": Task("neu_cls", 40, True, 70, 800, 150, views=CROPS),
    "elpv_100": Task("elpv", 100, True, 70, 800, 150),
    "elpv_300": Task("elpv", 300, True, 70, 800, 150),
}
STORED, SEEN = 160, 70  # px of the views and of what teachers see, in the group resolution
FOLDS = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Ablation:
    """Flags of build_ensemble.py and distill.py, multiple of the steps, which teachers."""

    build: tuple = ()
    student: tuple = ()
    steps: float = 1
    teachers: tuple = TEACHERS
    cross_fitted: bool = False


ALONE = ("--alpha", 0)
NO_POOL = ("--unlabelled", "none")
MANY = (*NO_POOL, "--views", 32)


def crops(share):
    """Views cropped down to this share of the side."""
    return ("--view-recipe", f"zoom_min={share}")


def at(side, steps, *flags):
    """A student at this size, with as many steps as take the same time."""
    return Ablation(student=("--img-size", side, *flags), steps=steps / 800)


# The CSV has rows of changes whose code is gone since they did not pay (layer decay, DIST,
# standardised logits, exits); its column `code` names the commit that has them.
GROUPS = {
    "pool": {
        "base": Ablation(),
        "stand-alone": Ablation(student=ALONE),
        "soft targets only (alpha 1)": Ablation(student=("--alpha", 1)),
        "alpha 0.5": Ablation(student=("--alpha", 0.5)),
        "temperature 1": Ablation(student=("--temperature", 1)),
        "temperature 4": Ablation(student=("--temperature", 4)),
        "a third of the learning rate": Ablation(student=("--lr", 3e-4)),
        "half the steps": Ablation(steps=0.5),
        "twice the steps": Ablation(steps=2),
        "stand-alone, half the steps": Ablation(student=ALONE, steps=0.5),
        "stand-alone, twice the steps": Ablation(student=ALONE, steps=2),
        "stand-alone, a third of the learning rate": Ablation(student=(*ALONE, "--lr", 3e-4)),
        "batch 48, half the steps": Ablation(student=("--batch-size", 48), steps=0.5),
        "batch 96, a quarter of the steps": Ablation(student=("--batch-size", 96), steps=0.25),
        "crops down to 0.5 of the side": Ablation(crops(0.5)),
        "crops down to 0.85 of the side": Ablation(crops(0.85)),
        "16 views": Ablation(("--views", 16)),
        "transformer teacher alone": Ablation(teachers=TEACHERS[:1]),
        "CNN teacher alone": Ablation(teachers=TEACHERS[1:]),
    },
    "labelled": {
        "labelled only": Ablation(NO_POOL),
        "stand-alone": Ablation(NO_POOL, ALONE),
        "32 views": Ablation(MANY),
        "32 views, alpha 0.5": Ablation(MANY, ("--alpha", 0.5)),
        "32 views, cross-fitted": Ablation(MANY, cross_fitted=True),
        "32 views, alpha 0.5, cross-fitted": Ablation(MANY, ("--alpha", 0.5), cross_fitted=True),
        "32 views, temperature 4": Ablation(MANY, ("--temperature", 4)),
        "32 views, twice the steps": Ablation(MANY, steps=2),
    },
    "resolution": {
        "70 px, 1600 steps": at(70, 1600),
        "96 px, 850 steps": at(96, 850),
        "128 px, 480 steps": at(128, 480),
        "160 px, 306 steps": at(160, 306),
        "stand-alone, 70 px, 1600 steps": at(70, 1600, *ALONE),
        "stand-alone, 96 px, 850 steps": at(96, 850, *ALONE),
        "stand-alone, 128 px, 480 steps": at(128, 480, *ALONE),
        "stand-alone, 160 px, 306 steps": at(160, 306, *ALONE),
    },
}
FIELDS = (
    "group", "set", "seed", "start", "ablation", "n", "accuracy", "balanced_accuracy", "nll",
    "steps", "seconds", "code",
)


# ------------------------------------------------------------------------------------ pictures


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
        target = folder / "test" / label / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    (folder / "development").touch()
    return folder


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


# ------------------------------------------------------------------------------------- running


def run(group, name, seed, args):
    """Run the ablations of one group, set and seed that the CSV lacks, and append their rows."""
    task = TASKS[name]
    img_size = []
    if group == "resolution":
        task, img_size = replace(task, size=STORED), ["--img-size", SEEN]
    home = Path(args.output) / name / f"seed_{seed}_{task.size}px"
    pictures = development_folder(task, args, home, seed)
    run_stages([teach(task, pictures, home, args.weights, seed, *img_size)], home)

    start = "warm" if args.student_weights else "cold"
    key = [group, name, str(seed), start]
    for ablation, change in GROUPS[group].items():
        wanted = dict(zip(FIELDS, [*key, ablation]))
        chosen = not args.ablations or ablation in args.ablations
        if chosen and not select(read_rows(args.csv), **wanted):
            print(f"== {' '.join(key)}: {ablation}", flush=True)
            result = run_ablation(ablation, change, task, pictures, home, seed, args)
            append_rows(args.csv, FIELDS, [[*key, ablation, *result, this_commit()]])


def run_ablation(ablation, change, task, pictures, home, seed, args):
    """Build, distil and evaluate one; returns its row from n to seconds."""
    ensemble = build(change, task, pictures, home, seed, args)
    student = home / file_name("student", *change.build, ablation)
    steps = round(change.steps * task.steps)
    rest = ["--steps", steps, "--output", student, "--seed", seed, "--overwrite"]
    if args.student_weights:
        rest += ["--weights", args.student_weights]
    call("distill.py", ensemble, *change.student, *rest)
    model, report = student / "model.pt", student / "report"
    call("evaluate.py", model, "--data-dir", pictures, "--skip-audit", "--output", report)

    (result,) = load_json(report / "metrics.json")["models"].values()
    scores = result["sets"]["test"]
    rounded = [round(scores[key], 5) for key in ("accuracy", "balanced_accuracy", "nll")]
    last = read_rows(student / "log.csv")[-1]
    return [scores["n"], *rounded, last["steps"], last["seconds"]]


def build(change, task, pictures, home, seed, args):
    """The folder of the ablation's ensemble, built where it is missing."""
    teachers = [home / teacher / "model.pt" for teacher in change.teachers]
    words = [*change.build, "cross_fitted" if change.cross_fitted else ""]
    ensemble = home / file_name("ensemble", len(teachers), change.teachers[0], *words)
    if not (ensemble / "ensemble.json").is_file():
        call("build_ensemble.py", *teachers, *change.build, "--output", ensemble, "--seed", seed)
        if change.cross_fitted:
            cross_fit(ensemble, task, pictures, home, seed, args)
    return ensemble


def cross_fit(ensemble, task, pictures, home, seed, args):
    """Replace an ensemble's answers: of each picture, those of teachers that never saw it.

    Each fold's teachers are trained on the other folds; their logits are divided by the
    temperatures that their own validation gives, and weighted as the fold's own were (Dao et al.
    2021, "Knowledge distillation as semiparametric inference").
    """
    spec = load_ensemble(ensemble)
    train, _, dataset = splits.open_training(DecodedCache(cli.CACHE), spec["dataset"])
    fold_of = {f"train/{file.parent.name}/{file.name}": number % FOLDS
               for number, file in enumerate(training_files(pictures))}
    folds = np.array([fold_of[path] for path in train.paths()])

    shape = (1 + spec["views"], len(TEACHERS), len(train), len(dataset["classes"]))
    answers, weights = np.zeros(shape, np.float32), []
    for fold in range(FOLDS):
        folder = fold_folder(pictures, home, fold)
        networks, mixture = fold_teachers(folder, task, seed, args)
        temperatures = np.array(mixture["temperatures"], np.float32)[:, None, None]
        for rows in in_batches(np.flatnonzero(folds == fold), 64):
            for view, logits in enumerate(answers):
                pixels = view_of(train, rows, view, spec)
                logits[:, rows] = teacher_logits(networks, pixels) / temperatures
        weights.append(mixture["weights"])
    for view, logits in enumerate(answers):
        write_view(ensemble, view, logits)
    changed = {"temperatures": [1.0] * len(TEACHERS), "weights": np.mean(weights, axis=0).tolist()}
    save_json({**spec, **changed}, ensemble / "ensemble.json")


def fold_teachers(folder, task, seed, args):
    """(networks, the spec of their ensemble) of the teachers trained on one `fold_folder`."""
    runs = folder / "runs"
    checkpoints = [runs / name / "model.pt" for name in TEACHERS]
    build = ["build_ensemble.py", *checkpoints, "--unlabelled", "none", "--views", 1]
    build += ["--output", runs / "ensemble", "--seed", seed, "--overwrite"]
    run_stages([teach(task, folder, runs, args.weights, seed), ("ensemble", build)], folder)
    networks = [models.load_model(path, DEVICE)[0] for path in checkpoints]
    return networks, load_ensemble(runs / "ensemble")


def view_of(pictures, rows, view, spec):
    """Pixels of one view of some pictures, as an ensemble's teachers see it."""
    recipe = ViewRecipe.from_dict(spec["view_recipe"])
    batch = pictures.batch(rows, DEVICE)
    return render(batch, rows, np.full(len(rows), view), spec["seed"], recipe)


def file_name(*words):
    """Words as the name of a folder: letters, digits and underscores."""
    text = "_".join(map(str, words))
    return "".join(c if c.isalnum() else "_" for c in text)


# -------------------------------------------------------------------------------------- tables


def print_group(rows, group):
    """Balanced accuracy per set, and the mean difference to the group's first row."""
    rows = select(rows, group=group)
    base = next(iter(GROUPS[group]))
    scores = {}
    for row in rows:
        key = row["ablation"], row["set"], row["seed"]
        scores[key] = 100 * float(row["balanced_accuracy"])
    sets = values_of(rows, "set")

    lines = []
    for ablation in dict.fromkeys([*GROUPS[group], *values_of(rows, "ablation")]):
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
    print_table(["balanced accuracy, %", *sets, f"minus {base}, points"], lines)


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
    print("±: half the width of a 95 % interval; in the last column over sets and seeds (Student's")
    print("t), where there are several pairs of a row and the first one")


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, help="folder with the teachers' weight files")
    p.add_argument("--student-weights", type=Path, metavar="FILE",
                   help="a ResNet18 that students start from (default: from scratch)")
    p.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS),
                   metavar="NAME")
    p.add_argument("--sets", nargs="+", default=["neu_cls_10", "elpv_100"], metavar="NAME",
                   choices=list(TASKS), help="sets, as in accuracy.py but at 70 px")
    p.add_argument("--ablations", nargs="+", default=[], metavar="NAME",
                   help="which rows (default: all)")
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[100, 101], metavar="N")
    p.add_argument("--output", default="runs/ablations", help="folder for the runs")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")),
                   help="results are appended here")
    p.add_argument("--table", action="store_true", help="print the table of the CSV, and end")
    args = p.parse_args()
    if not args.table:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to run anything")
        for group in args.groups:
            for seed in args.seeds:
                for name in args.sets:
                    run(group, name, seed, args)
    rows = read_rows(args.csv)
    for group in values_of(rows, "group"):
        print_group(rows, group)
    print_caption(rows)


if __name__ == "__main__":
    cli.run(main)
