"""How long do the README's commands for pictures of one's own take?

    python tests/benchmarks/hours.py                      # 600 pictures, 10 minutes on two cores
    python tests/benchmarks/hours.py --pool 2000 --device cuda

Runs every stage at two short lengths, takes the slope as the cost of a step (or of a stored view)
and prints the time of the default length. What does not grow with the length, the start, decoding,
ten validations and the export, is in both runs. The pictures are drawn patterns of 480 x 480 px and
the networks' weights are random, which costs the same. Leave the machine alone meanwhile.
"""

import shutil
import tempfile
import time
from pathlib import Path

from bench import call, machine, make_pictures, print_table
from sets import TEACHERS, TRANSFORMER

import build_ensemble
import distill
import train_teacher
from common import cli

STEPS, VIEWS = (20, 60), (1, 4)  # the two lengths
CLASSES, BATCH = 3, 24


def seconds_of(script, *words):
    """Seconds that a script takes as a process of its own."""
    began = time.perf_counter()
    call(script, *words)
    return time.perf_counter() - began


def at_length(measured, lengths, wanted):
    """Seconds at a wanted length, on the line through two measured ones."""
    (short, long), (a, b) = measured, lengths
    return short + (long - short) / (b - a) * (wanted - a)


def stages(home, args):
    """(name, command words that a number ends, two lengths, the default length) of each stage."""
    labelled = args.pictures - args.pictures // 5  # the rest validates
    data = ["--data-dir", home / "data", "--overwrite"]
    size = ["--view-size", args.view_size] if args.view_size else []
    start = home / "start"  # a network to keep as it is
    begin = ["train_teacher.py", *data, *size, "--model"]
    call(*begin, TRANSFORMER, "--output", start, "--steps", 1, "--device", args.device)
    kept = ["--weights", start / TRANSFORMER / "model.pt", "--frozen", TRANSFORMER]
    lengths = train_teacher.FROZEN_STEPS, train_teacher.default_steps(labelled, BATCH)
    for name, steps in zip(TEACHERS, lengths):
        words = [*begin, name, *(kept if name == TRANSFORMER else []), "--output", home, "--steps"]
        yield f"{name}, {steps} steps", words, STEPS, steps
    teachers = [home / name / "model.pt" for name in TEACHERS]
    views = build_ensemble.default_views(labelled + args.pool, home / "data")
    words = ["build_ensemble.py", *teachers, "--output", home / "ensemble", *data, "--views"]
    yield f"ensemble, {views} views", words, VIEWS, views
    for name, alpha in (("distilled", 0.9), ("stand-alone", 0)):
        words = ["distill.py", home / "ensemble", "--alpha", alpha, *data]
        words += ["--output", home / name, "--steps"]
        yield f"{name} student, {distill.STEPS} steps", words, STEPS, distill.STEPS


def main():
    p = cli.parser(__doc__)
    p.add_argument("--pictures", type=cli.positive_int, default=600, metavar="N",
                   help="labelled pictures")
    p.add_argument("--pool", type=int, default=0, metavar="N", help="pictures without a label")
    p.add_argument("--view-size", metavar="HxW", help="of train_teacher.py")
    p.add_argument("--device", default="auto")
    args = p.parse_args()

    home = Path(tempfile.mkdtemp())
    count = {"train": args.pictures // CLASSES, "test": 20, "unlabelled": args.pool // CLASSES}
    make_pictures(home / "data", {key: n for key, n in count.items() if n}, side=480)
    rows, total = [], 0
    for name, words, lengths, wanted in stages(home, args):
        rest = ["--device", args.device]
        measured = [seconds_of(*words, length, *rest) for length in lengths]
        seconds = at_length(measured, lengths, wanted)
        total += seconds
        rows.append([name, *(f"{each:.0f}" for each in (*measured, seconds))])
    shutil.rmtree(home)

    rows.append(["all", "", "", f"{total:.0f} ({total / 3600:.1f} h)"])
    print(f"\n{machine()}, {args.pictures} labelled pictures, {args.pool} without a label\n")
    print_table(["stage", "short, s", "longer, s", "default, s"], rows)


if __name__ == "__main__":
    cli.run(main)
