"""How long do the README's commands for pictures of one's own take?

    python tests/benchmarks/hours.py                      # 600 pictures, 10 minutes on two cores
    python tests/benchmarks/hours.py --pool 2000 --device cuda

Runs every stage that has a length at two short ones, takes the slope as the cost of a step (or of a
stored view) and prints the time of the default length; evaluate.py runs once. What does not grow
with the length, the start, ten validations and the export, is in both runs. Decoding is done before
and not counted. The pictures are drawn patterns of 480 x 480 px and the networks' weights are
random, which costs the same. Leave the machine alone meanwhile.
"""

import shutil
import tempfile
import time
from pathlib import Path

from bench import call, machine, make_pictures, print_table
from sets import TEACHERS

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
    """(name, command at a length, two lengths, the default length) of each stage that has one."""
    labelled = args.pictures - args.pictures // 5  # the rest validates
    data = ["--data-dir", home / "data", "--overwrite", "--device", args.device]
    size = ["--view-size", args.view_size] if args.view_size else []
    lengths = train_teacher.OF_TRANSFORMERS, train_teacher.LENGTH
    for name, length in zip(TEACHERS, lengths):
        steps = train_teacher.default_steps(labelled, BATCH, *length)
        words = ["train_teacher.py", *data, *size, "--model", name, "--output", home, "--steps"]
        yield f"{name}, {steps} steps", lambda n, words=words: [*words, n], STEPS, steps

    def build(views):
        teachers = [home / name / "model.pt" for name in TEACHERS]
        folder = home / "ensemble" / str(views)  # each anew
        return ["build_ensemble.py", *teachers, "--output", folder, *data, "--views", views]

    views = build_ensemble.default_views(labelled + args.pool)
    call(*build(2))  # decodes the pool
    yield f"ensemble, {views} views", build, VIEWS, views
    for name, alpha in (("distilled", 0.9), ("alone", 0)):
        words = ["distill.py", home / "ensemble" / "2", "--alpha", alpha, *data]
        words += ["--output", home / name, "--steps"]
        steps = distill.STEPS
        yield f"{name}, {steps} steps", lambda n, words=words: [*words, n], STEPS, steps


def evaluate(home, args):
    """The command that measures all of them."""
    files = [home / name / "model.pt" for name in (*TEACHERS, "distilled", "alone")]
    files += [home / "ensemble" / "2", home / "distilled" / "student.ts"]
    words = ["evaluate.py", *files, "--baseline", home / "alone" / "model.pt"]
    return [*words, "--device", args.device, "--output", home / "report"]


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
    for name, command, lengths, wanted in stages(home, args):
        measured = [seconds_of(*command(length)) for length in lengths]
        seconds = at_length(measured, lengths, wanted)
        total += seconds
        rows.append([name, *(f"{each:.0f}" for each in (*measured, seconds))])
    seconds = seconds_of(*evaluate(home, args))
    rows.append(["evaluate.py", "", "", f"{seconds:.0f}"])
    total += seconds
    shutil.rmtree(home)

    rows.append(["all", "", "", f"{total:.0f} ({total / 3600:.1f} h)"])
    print(f"\n{machine()}, {args.pictures} labelled pictures, {args.pool} without a label\n")
    print_table(["stage", "short, s", "longer, s", "default, s"], rows)


if __name__ == "__main__":
    cli.run(main)
