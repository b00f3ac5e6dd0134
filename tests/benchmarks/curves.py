"""Accuracy against steps: both teachers, their ensemble, the student alone and distilled.

    python tests/benchmarks/curves.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/curves.py --data DIR --weights DIR --student-weights FILE \\
        --sets elpv_100 --seeds 100 --lengths 500 2000 --models alone distilled
    pip install matplotlib && python tests/benchmarks/curves.py --picture    # from the CSV alone

Development pictures: a third of the training ones (whole positions of the ball screw), another
third for every seed, or another draw of the embedded set, so the test split stays shut. Every point
is a training of its own with its own schedule. Students of all lengths see the same pictures, and
the distilled ones learn from the same ensemble, whose teachers were trained for TAUGHT steps:
longer ones of DINOv2 were no better on the first sets. A point that is in the CSV is not made
again.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from bench import (
    append_rows,
    call,
    link,
    print_table,
    read_rows,
    rounded,
    run_stages,
    select,
    this_commit,
    values_of,
    with_std,
)
from sets import TASKS as AS_TESTED
from sets import TEACHERS, add_sources, group_of, lay_out, source_of, teach

from common import cli
from common.fasteners import dataset as fasteners
from common.files import load_json

SIZES = {"ballscrew": "32x80"}  # px of the views; of other sets SIZE
SIZE = "64"
LENGTHS, TAUGHT = (500, 2000, 8000), ((TEACHERS[0], 500), (TEACHERS[1], 2000))
PICTURE_VIEWS = 48_000  # stored for the distilled student: a quarter of what it sees in 8,000 steps
MODELS = (*TEACHERS, "ensemble", "alone", "distilled")
SETS = ("elpv_100", "neu_cls_10", "embedded", "elpv_all", "ballscrew")
OTHER_SEED = fasteners.SEED + 1000  # of the embedded set's development pictures
COLUMNS = ("balanced_accuracy", "auroc", "nll")  # of the tables
FIELDS = (
    "set", "seed", "model", "steps", "n", "accuracy", "balanced_accuracy", "auroc", "nll",
    "val_accuracy", "val_balanced_accuracy", "seconds", "code",
)


# ------------------------------------------------------------------------------------ pictures


def task_of(name):
    """The set as accuracy.py has it, but small, and trained without flags."""
    return replace(AS_TESTED[name], size=SIZES.get(name, SIZE), flags=())


def development_folder(task, args, home, seed):
    """The set as accuracy.py lays it out, but a third of its training pictures are test/.

    The embedded set is drawn anew, with another seed, and has its own test sets then.
    """
    if task.folder == "embedded":
        return another_draw(home.parent / "data")
    theirs, source = source_of(task, args.data, Path(args.output)), home / "source"
    if not (source / "done").is_file():
        files = sorted(file for file in (theirs / "train").rglob("*") if file.is_file())
        group = {file: str(group_of(task, file)) for file in files}
        held = set(np.random.default_rng(seed).permutation(sorted(set(group.values())))[::3])
        for file in files:
            side = "test" if group[file] in held else "train"
            link(file, source / side / file.parent.name / file.name)
        (source / "done").touch()
    return lay_out(task, source, home, seed)


def another_draw(folder):
    """The embedded set, drawn with another seed where it is missing; returns the folder."""
    fasteners.SEED = OTHER_SEED
    fasteners.make_dataset(folder)
    return folder


# ------------------------------------------------------------------------------------- running


def run(name, model, steps, seed, args):
    """Train one model for one length and append its row."""
    task, home = task_of(name), Path(args.output) / name / f"seed_{seed}"
    pictures = development_folder(task, args, home, seed)
    if model in TEACHERS:
        path = teacher(task, pictures, home, seed, args, model, steps)
    else:
        path = ensemble(task, pictures, home, seed, args)
    if model in ("alone", "distilled"):
        alpha = ["--alpha", 0] if model == "alone" else []
        path = student(model, steps, path, task, home, seed, args, *alpha)
    row = [name, seed, model, steps, *score(path, pictures, home), this_commit()]
    append_rows(args.csv, FIELDS, [row])


def score(path, pictures, home):
    """What a model says of the development pictures: the columns from n to seconds."""
    scores = evaluated(path, pictures, home)
    last = read_rows(path.parent / "log.csv")[-1] if path.name == "model.pt" else {}
    found = rounded(scores, ("accuracy", "balanced_accuracy", "auroc", "nll"))
    found += [last.get(key, "") for key in ("val_accuracy", "val_balanced_accuracy", "seconds")]
    return [scores["n"], *found]


def evaluated(path, pictures, home):
    """The scores of evaluate.py for a model on a folder's test pictures, mean of the test sets."""
    report = home / "report_of_one"  # accuracy.py's stays
    call("evaluate.py", path, "--data-dir", pictures, "--skip-audit", "--output", report)
    (result,) = load_json(report / "metrics.json")["models"].values()
    return mean_scores(list(result["sets"].values()))


def mean_scores(sets):
    """The means of some scores over test sets, and how many pictures these have."""
    columns = [name for name in ("accuracy", *COLUMNS) if name in sets[0]]
    means = {name: np.mean([each[name] for each in sets]) for name in columns}
    return {"n": sum(each["n"] for each in sets), **means}


def teacher(task, pictures, home, seed, args, model, steps, *more):
    """The checkpoint of a teacher, trained where it is missing. more: flags of train_teacher.py."""
    runs = home / file_name("teachers", steps, *more)
    _, words = teach(task, pictures, runs, args.weights, seed, *more, steps={model: steps})
    run_stages([(" ".join(map(str, [model, steps, *more])), words)], home)
    return runs / model / "model.pt"


def ensemble(task, pictures, home, seed, args, *more, taught=TAUGHT, name="ensemble"):
    """The folder of an ensemble, built where it is missing: by default of the students' teachers.

    taught: (model, steps, *flags) of each teacher; more: flags of build_ensemble.py.
    """
    teachers = [teacher(task, pictures, home, seed, args, *each) for each in taught]
    seen = [file for part in ("train", "unlabelled") for file in (pictures / part).rglob("*.*")]
    words = ["build_ensemble.py", *teachers, "--seed", seed, "--output", home / name]
    run_stages([(name, [*words, "--views", PICTURE_VIEWS // len(seen), *more])], home)
    return home / name


def file_name(*words):
    """Words as the name of a folder: letters, digits and underscores."""
    text = "_".join(map(str, words))
    return "".join(c if c.isalnum() else "_" for c in text)


def student(name, steps, ensemble, task, home, seed, args, *more):
    """The checkpoint of a student, trained where it is missing. more: flags of distill.py."""
    folder = home / f"{name}_{steps}"
    words = ["distill.py", ensemble, "--steps", steps, "--weights", args.student_weights, *more]
    words += [*task.flags, "--output", folder, "--seed", seed, "--overwrite"]
    run_stages([(f"{name} {steps}", words)], home)
    return folder / "model.pt"


# ------------------------------------------------------------------------------- picture, tables


def by_length(rows, column):
    """{steps: values of a column, one per seed} of some rows, by their steps."""
    found = {}
    for row in sorted(rows, key=lambda row: int(row["steps"])):
        if row[column]:
            found.setdefault(int(row["steps"]), []).append(float(row[column]))
    return found


def print_curves(rows):
    """A table per set: each model at each length, mean (std) over seeds, and NLL."""
    for name in [name for name in SETS if select(rows, set=name)]:
        of_set = select(rows, set=name)
        lengths = sorted({int(row["steps"]) for row in of_set})
        seeds = ", ".join(sorted({row["seed"] for row in of_set}))
        print(f"\n{name}: seeds {seeds}, {of_set[0]['n']} development pictures\n")
        lines = []
        for model in MODELS:
            of_model, cells = select(of_set, model=model), []
            balanced, auroc, nll = (by_length(of_model, column) for column in COLUMNS)
            for steps in lengths:
                parts = [with_std(100 * np.array(each[steps])) for each in (balanced, auroc)
                         if steps in each]
                parts += [f"{np.mean(nll[steps]):.2f}"] if steps in nll else []
                cells.append(", ".join(parts))
            lines.append([model, *cells])
        with_auroc = any(row["auroc"] for row in of_set)
        head = "balanced accuracy, AUROC, NLL" if with_auroc else "balanced accuracy, NLL"
        print_table([head, *(f"{n} steps" for n in lengths)], lines)


def draw_curves(rows, path):
    """One panel per set, a line per model and seed: AUROC where a class is good, else balanced
    accuracy.
    """
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "curves"  # the same file each time
    sets = [name for name in SETS if select(rows, set=name)]
    figure, panels = plt.subplots(1, len(sets), figsize=(4 * len(sets), 3.6), squeeze=False)
    for panel, name in zip(panels[0], sets):
        of_set = select(rows, set=name)
        column = "auroc" if any(row["auroc"] for row in of_set) else "balanced_accuracy"
        for number, model in enumerate(MODELS):
            for seed in sorted(values_of(of_set, "seed")):
                found = by_length(select(of_set, model=model, seed=seed), column)
                values = 100 * np.array(list(found.values())).reshape(-1)
                label = model if seed == min(values_of(of_set, "seed")) else None
                panel.plot(list(found), values, ".-", color=f"C{number}", label=label)
        title = {"auroc": "AUROC, %", "balanced_accuracy": "balanced accuracy, %"}[column]
        panel.set(title=name, xscale="log", xlim=(400, 10_000), xlabel="steps", ylabel=title)
        panel.set(xticks=LENGTHS, xticklabels=LENGTHS)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(MODELS), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main():
    p = cli.parser(__doc__)
    add_sources(p)
    p.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    p.add_argument("--lengths", type=cli.positive_int, nargs="+", default=LENGTHS, metavar="N")
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[100, 101], metavar="N")
    p.add_argument("--output", default="runs/curves", help="folder for the runs")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")))
    p.add_argument("--picture", action="store_true", help="draw the CSV, print a table, and end")
    args = p.parse_args()
    for seed in args.seeds if not args.picture else ():
        for name in args.sets:
            for steps in args.lengths:
                for model in args.models:
                    steps = TAUGHT[1][1] if model == "ensemble" else steps
                    wanted = dict(set=name, seed=str(seed), model=model, steps=str(steps))
                    if not select(read_rows(args.csv), **wanted):
                        run(name, model, steps, seed, args)
    rows = read_rows(args.csv)
    print_curves(rows)
    if args.picture:
        draw_curves(rows, Path(args.csv).with_suffix(".svg"))


if __name__ == "__main__":
    cli.run(main)
