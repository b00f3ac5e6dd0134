"""Label errors: how many swapped labels build_ensemble.py names, and how many others.

    python tests/benchmarks/label_issues.py --data DIR --weights DIR     # some 5 minutes a seed
    python tests/benchmarks/label_issues.py ... --cleanlab     # beside that package, same answers

Of the training pictures of an ImageFolder --per-class train and half as many validate; a tenth of
the labels of both is swapped for another class. train_teacher.py and build_ensemble.py run as a
user would run them, in runs/label_issues/seed_N/; the label errors in ensemble.json are compared
with what was swapped. What ran before is not run again.
"""

import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from bench import link, run_stages
from sets import TEACHERS, Task, teach

from common import cli, models, splits
from common.audit.label_errors import neighbour_votes
from common.ensemble import CachedLogits, load_ensemble
from common.files import UserError
from common.pictures import DecodedCache

SWAPPED, SIDE, STEPS, VIEWS = 0.1, 98, 150, 6
CPU = torch.device("cpu")


def lay_out(source, per_class, home, seed):
    """Links under home/data; returns the names of the swapped pictures, which are unique."""
    rng = np.random.default_rng(seed)
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    swapped = set()
    for name in classes:
        files = sorted((source / "train" / name).iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        half_as_many = files[per_class:per_class + per_class // 2]
        for split, some in (("train", files[:per_class]), ("val", half_as_many)):
            for place, file in enumerate(some):
                label, unique = name, f"{name}_{file.name}"
                if place < round(SWAPPED * len(some)):
                    label = rng.choice([other for other in classes if other != name])
                    swapped.add(unique)
                link(file, home / "data" / split / label / unique)
    return swapped


def stages(home, weights, seed):
    """(name, command words) of one seed."""
    task, steps = Task("", size=str(SIDE)), dict.fromkeys(TEACHERS, STEPS)
    teachers = [home / name / "model.pt" for name in TEACHERS]
    build = ["build_ensemble.py", *teachers, "--views", VIEWS, "--output", home / "ensemble"]
    return [
        teach(task, home / "data", home, weights, seed, steps=steps),
        ("ensemble", [*build, "--seed", seed, "--overwrite"]),
    ]


def names_in(folder):
    """Names of the pictures of a labelled folder."""
    return {path.name for path in folder.glob("*/*")}


def report(what, named, swapped):
    """Print how many of the swapped labels are among the named ones; sets of file names."""
    hits = len(named & swapped)
    print(
        f"  {what}: {len(named)} named, {hits} of them swapped, "
        f"of {len(swapped)} swapped {100 * hits / len(swapped):.0f} % found", flush=True,
    )


def measure(args, seed):
    """One draw of swapped labels."""
    home = Path(args.output) / f"seed_{seed}"
    all_swapped = lay_out(args.data, args.per_class, home, seed)
    run_stages(stages(home, args.weights, seed), home)

    spec = load_ensemble(home / "ensemble")
    swapped = {}
    print(f"\nseed {seed}")
    for split, errors in spec["label_errors"].items():
        names = names_in(home / "data" / split)
        swapped[split] = all_swapped & names
        title = f"ours, {split} ({len(names)} pictures)"
        report(title, {Path(error["picture"]).name for error in errors}, swapped[split])
    if args.cleanlab:
        measure_cleanlab(home, spec, swapped)


def measure_cleanlab(home, spec, swapped):
    """cleanlab on the same pictures, from what the teachers say of them."""
    from cleanlab.filter import find_label_issues

    networks = [models.load_model(home / name / "model.pt", CPU)[0] for name in TEACHERS]
    train, val, dataset = splits.open_training(DecodedCache(cli.CACHE), spec["dataset"])
    cached = CachedLogits(home / "ensemble", spec)
    n, classes = len(train), len(dataset["classes"])

    val_answers = [torch.softmax(models.predict(net, val, CPU), 1) for net in networks]
    train_answers = []
    for view in cached.logits:
        logits = torch.from_numpy(np.array(view[:, :n]))
        train_answers.append(torch.softmax(logits, 2).mean(0))
    votes = []
    for network in networks:
        features = models.features(network, train, CPU)
        votes.append(neighbour_votes(features, train.labels, classes))

    for split, pictures, source, answers in (
        ("val", val, "the teachers' probabilities", val_answers),
        ("train", train, "the teachers' probabilities, mean over views", train_answers),
        ("train", train, "our neighbours' votes", votes),
    ):
        probabilities = torch.stack(answers).mean(0).numpy()
        start = time.perf_counter()
        issues = find_label_issues(pictures.labels.numpy(), probabilities)
        seconds = time.perf_counter() - start
        named = {Path(pictures.path(i)).name for i in np.flatnonzero(issues)}
        report(f"cleanlab, {split}, {source}, {seconds:.2f} s", named, swapped[split])


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="an ImageFolder with train/")
    p.add_argument("--weights", type=Path, required=True,
                   help="folder with the teachers' weight files")
    p.add_argument("--per-class", type=cli.positive_int, default=40, help="training pictures")
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], metavar="N")
    p.add_argument("--output", default="runs/label_issues", help="folder for the runs")
    p.add_argument("--cleanlab", action="store_true", help="the package cleanlab as well")
    args = p.parse_args()
    if args.cleanlab and find_spec("cleanlab") is None:
        raise UserError("--cleanlab: the package cleanlab is not installed")
    for seed in args.seeds:
        measure(args, seed)


if __name__ == "__main__":
    cli.run(main)
