"""Swapped labels: how many the scripts point at, and how many cleanlab does from the same probabilities.

    python tests/benchmarks/label_issues.py --data ../data/neu_cls --weights ../weights [--seeds 0 1 2]
    pip install cleanlab            # for its rows; left out where it is missing

Of an ImageFolder's training pictures `--per-class` train and half as many validate; a tenth of the labels of both is swapped for
another class. train_teacher.py and build_ensemble.py run as a user would run them; what the latter lists in ensemble.json is compared
with what was swapped. What ran before is not run again.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from accuracy import TEACHERS, call, link  # noqa: E402

from common import audit, data, models  # noqa: E402
from common.ensemble import load_ensemble, open_views  # noqa: E402

SWAPPED, SIDE, EPOCHS, VIEWS = 0.1, 98, 15, 6


def lay_out(source, per_class, home, seed):
    """Links under home/data; returns the names of the swapped pictures, which are unique."""
    rng = np.random.default_rng(seed)
    classes = sorted(p.name for p in (source / "train").iterdir() if p.is_dir())
    swapped = set()
    for name in classes:
        files = sorted((source / "train" / name).iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        for split, some in (("train", files[:per_class]), ("val", files[per_class:per_class + per_class // 2])):
            for place, file in enumerate(some):
                label = name
                if place < round(SWAPPED * len(some)):
                    label = rng.choice([c for c in classes if c != name])
                    swapped.add(f"{name}_{file.name}")
                link(file, home / "data" / split / label / f"{name}_{file.name}")
    return swapped


def report(what, found, swapped, seconds=None):
    hits = len(found & swapped)
    print(f"  {what}: {len(found)} named, precision {hits / max(len(found), 1):.2f}, recall {hits / len(swapped):.2f}"
          + (f", {1e3 * seconds:.0f} ms" if seconds is not None else ""), flush=True)


def measure(args, seed):
    home = Path(args.output) / f"seed_{seed}"
    swapped = lay_out(args.data, args.per_class, home, seed)
    teachers = [home / name / "best.pt" for name in TEACHERS]
    weights = [args.weights / f"{name}.safetensors" for name in TEACHERS]
    if not (home / "taught").is_file():
        call("train_teacher.py", "--data-dir", home / "data", "--view-size", SIDE, "--model", *TEACHERS, "--weights", *weights,
             "--epochs", EPOCHS, "--output", home, "--seed", seed, "--overwrite")
        (home / "taught").touch()
    call("build_ensemble.py", *teachers, "--views", VIEWS, "--output", home / "ensemble", "--seed", seed, "--overwrite")
    record = load_ensemble(home / "ensemble")
    names = {split: {p.name for p in (home / "data" / split).rglob("*.*")} for split in ("train", "val")}
    print(f"\nseed {seed}: {len(swapped & names['train'])} of {len(names['train'])} training labels and "
          f"{len(swapped & names['val'])} of {len(names['val'])} validation labels swapped")
    for split, found in record["suspicions"].items():
        report(f"ours, {split}", {Path(s["picture"]).name for s in found}, swapped & names[split])
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        return
    device = torch.device("cpu")
    networks = [models.load_model(path, device)[0] for path in teachers]
    train, val, _ = data.open_training_data(record["data"], argparse.Namespace(cache_dir="runs/packs", workers=2, skip_bad=False))
    views = [torch.from_numpy(np.array(view[:, :len(train)])) for view in open_views(home / "ensemble", record)]
    classes = len(record["data"]["classes"])
    for what, pictures, said in (
            ("val, the teachers' probabilities", val, [torch.softmax(models.predict(network, val, device), 1) for network in networks]),
            ("train, the teachers' probabilities, mean over views", train, torch.stack([torch.softmax(view, 2) for view in views]).mean(0)),
            ("train, our neighbours' votes", train, [audit.neighbour_votes(models.features(network, train, device), train.labels, classes) for network in networks])):
        start = time.perf_counter()
        issues = find_label_issues(pictures.labels.numpy(), torch.stack(list(said)).mean(0).numpy())
        report(f"cleanlab on {what}", {Path(pictures.path(i)).name for i in np.flatnonzero(issues)}, swapped & names[what.split(",")[0]], time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="an ImageFolder with train/")
    p.add_argument("--weights", type=Path, required=True, help="folder with the teachers' weight files")
    p.add_argument("--per-class", type=int, default=40)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--output", default="runs/label_issues")
    args = p.parse_args()
    for seed in args.seeds:
        measure(args, seed)


if __name__ == "__main__":
    main()
