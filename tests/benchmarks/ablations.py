"""What is each lever of the recipe worth? One change at a time to accuracy.py's distilled student, on other pictures.

    python tests/benchmarks/levers.py --data ../data --weights ../weights [--sets neu_cls_10 elpv_100] [--levers ...]
    python tests/benchmarks/levers.py --table

The test split stays shut: of the training pictures that accuracy.py would leave without a label, half keep that role and half are
the development set that is scored here. Teachers are trained once per set and seed, with the seeds from 100 on, which no
other benchmark uses. Restartable; rows are appended to a CSV.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from accuracy import TASKS, TEACHERS, append, call, lay_out, link, read, source_of, stages  # noqa: E402
from common.data import EMBEDDED, data_folder  # noqa: E402

DRAWN = "drawn parts"  # in place of a folder: as many of the embedded set's pictures as the set has labelled ones
# lever: (teachers, flags of build_ensemble.py, flags of distill.py, steps as a multiple)
LEVERS = {
    "base": (TEACHERS, (), (), 1),
    "stand-alone": (TEACHERS, (), ("--alpha", 0), 1),
    "labelled pictures only": (TEACHERS, ("--unlabelled", "none"), (), 1),
    "labelled pictures only, not blended": (TEACHERS, ("--unlabelled", "none", "--mixup", 0), (), 1),
    "labelled pictures and drawn parts": (TEACHERS, ("--unlabelled", DRAWN, "--mixup", 0.7), (), 1),
    "blended views": (TEACHERS, ("--mixup", 0.7), (), 1),
    "6 views": (TEACHERS, ("--views", 6), (), 1),
    "crops down to half the side": (TEACHERS, ("--view-recipe", "zoom_min=0.5"), (), 1),
    "crops down to 0.85 of the side": (TEACHERS, ("--view-recipe", "zoom_min=0.85"), (), 1),
    "stand-alone, crops down to half the side": (TEACHERS, ("--view-recipe", "zoom_min=0.5"), ("--alpha", 0), 1),
    "stand-alone, crops down to 0.85 of the side": (TEACHERS, ("--view-recipe", "zoom_min=0.85"), ("--alpha", 0), 1),
    "temperature 1": (TEACHERS, (), ("--temperature", 1), 1),
    "temperature 4": (TEACHERS, (), ("--temperature", 4), 1),
    "soft targets only (alpha 1)": (TEACHERS, (), ("--alpha", 1), 1),
    "twice the learning rate": (TEACHERS, (), ("--lr", 2e-3), 1),
    "twice the steps": (TEACHERS, (), (), 2),
    "stand-alone, twice the steps": (TEACHERS, (), ("--alpha", 0), 2),
    "transformer teacher alone": (TEACHERS[:1], (), (), 1),
    "CNN teacher alone": (TEACHERS[1:], (), (), 1),
    "equal weights": (TEACHERS, ("--weights", "equal"), (), 1),
    "no averaged weights": (TEACHERS, (), ("--ema-decay", 0), 1),
}
FIELDS = ("set", "side", "seed", "lever", "n", "accuracy", "balanced_accuracy", "nll", "steps", "seconds")


def development_folder(task, args, home, seed):
    """As accuracy.py lays a set out, but with half of the unlabelled pictures, under their labels, for test/."""
    folder = lay_out(task, source_of(task, args, home), home, seed)
    if not (folder / "development").is_file():
        for file in (folder / "test").rglob("*.*"):
            file.unlink()
        classes = [p.name for p in (folder / "train").iterdir()]
        for file in sorted((folder / "unlabelled").iterdir())[::2]:
            label = next(c for c in classes if file.name.startswith(f"{c}_"))
            file.rename(folder / "test" / label / file.name)
        (folder / "development").touch()
    return folder


def drawn_parts(home, data):
    """A folder with as many drawn fasteners as there are labelled pictures: do parts of another world make good questions to the teachers?"""
    labelled = sum(1 for file in (data / "train").rglob("*") if file.is_file())
    for file in sorted((data_folder(EMBEDDED) / "unlabelled").iterdir())[:labelled]:
        link(file, home / "drawn" / file.name)
    return home / "drawn"


def run(name, seed, levers, args):
    task = TASKS[name]
    home = Path(args.output) / name / f"seed_{seed}_{task.side}px"
    data = development_folder(task, args, home, seed)
    done = {row["lever"] for row in read(args.csv) if (row["set"], row["side"], row["seed"]) == (name, str(task.side), str(seed))}
    teach = dict(stages(task, data, home, Path(args.weights), seed))["teachers"]
    if not (home / "taught").is_file():
        call(*teach)
        (home / "taught").touch()
    for lever in [lever for lever in levers if lever not in done]:
        print(f"== {name} seed {seed}: {lever}", flush=True)
        teachers, ensemble_flags, student_flags, factor = LEVERS[lever]
        key = "_".join(map(str, (len(teachers), teachers[0][:3], *ensemble_flags))).replace("/", "")
        ensemble, student = home / f"ensemble_{key}", home / f"student_{list(LEVERS).index(lever)}"
        ensemble_flags = [drawn_parts(home, data) if flag == DRAWN else flag for flag in ensemble_flags]
        call("build_ensemble.py", *(home / teacher / "best.pt" for teacher in teachers), *ensemble_flags, "--output", ensemble, "--seed", seed)
        pictures = json.loads((ensemble / "ensemble.json").read_text())["pictures"]
        epochs = max(1, round(factor * task.steps / -(-pictures // 24)))
        call("distill.py", ensemble, *student_flags, "--epochs", epochs, "--output", student, "--seed", seed, "--overwrite")
        call("evaluate.py", student / "best.pt", "--data-dir", data, "--output", student / "report")
        (result,) = json.loads((student / "report" / "metrics.json").read_text())["models"].values()
        log = read(student / "log.csv")[-1]
        scores = result["sets"]["test"]
        append(args.csv, FIELDS, [(name, task.side, seed, lever, scores["n"], *(round(scores[k], 5) for k in ("accuracy", "balanced_accuracy", "nll")),
                                   log["steps"], log["seconds"])])


def print_table(rows):
    """Balanced accuracy per set and side in px, and the mean over these and seeds of the difference to base, with its standard error from three on."""
    found = {(row["lever"], (row["set"], row["side"]), row["seed"]): 100 * float(row["balanced_accuracy"]) for row in rows}
    sets = list(dict.fromkeys(its for _, its, _ in found))
    print(f"| lever | {' | '.join(f'{name}, {side} px' for name, side in sets)} | minus base |\n|---|{'---|' * len(sets)}---|")
    for lever in dict.fromkeys(row["lever"] for row in rows):
        of_lever = {key: value for key, value in found.items() if key[0] == lever}
        cells = []
        for its in sets:
            values = [value for key, value in of_lever.items() if key[1] == its]
            cells.append(f"{np.mean(values):.1f}" if values else "")
        gains = [value - found["base", its, seed] for (_, its, seed), value in of_lever.items() if ("base", its, seed) in found]
        spread = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 2 else ""
        print(f"| {lever} | {' | '.join(cells)} | {f'{np.mean(gains):+.1f}{spread}' if gains and lever != 'base' else ''} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder that holds the sets' folders")
    p.add_argument("--weights", help="folder with the teachers' weight files")
    p.add_argument("--sets", nargs="+", default=["neu_cls_10", "elpv_100"], metavar="NAME")
    p.add_argument("--levers", nargs="+", default=list(LEVERS), choices=list(LEVERS), metavar="NAME")
    p.add_argument("--seeds", type=int, nargs="+", default=[100])
    p.add_argument("--output", default="runs/levers")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")))
    p.add_argument("--table", action="store_true", help="print the table of the CSV, and end")
    args = p.parse_args()
    if not args.table:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to run anything")
        for seed in args.seeds:
            for name in args.sets:
                run(name, seed, args.levers, args)
    print_table(read(args.csv))


if __name__ == "__main__":
    main()
