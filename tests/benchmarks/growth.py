"""Do time and memory grow in line with the pictures? Every stage at ten times as many, and again.

    python tests/benchmarks/growth.py --sizes 1000 10000
    python tests/benchmarks/growth.py                       # 1,000, 10,000 and 100,000

Of N made pictures of 64 px in four classes, half are labelled (a fifth of these for validation), a
quarter has no labels and a quarter is for testing; views are 32 px, the teacher is timm's smallest.
Decoding, and the split with its search for leaks, run as functions in processes of their own, since
train_teacher.py does both and trains as well; all else are the scripts as a user calls them, with
as many steps as make one pass over the pictures, and the parts of a script are those that it prints
itself. All pictures of a class look alike but in their grain, so that the audit compares nearly
every later picture in detail: its dearest case.

Bytes on disk, for views of side S, T teachers, V stored views, K classes:

    runs/decoded     3 S^2 a picture, and about 200 for its path, hash and size in index.json
    runs/ensemble    4 T K V a training or unlabelled picture
    runs/report      about 80 + 9 K a model and test picture in predictions.csv
    runs/decoded/audit-*.json, metrics.json   about 400 for each copy or near-duplicate

Checkpoints and exported files do not grow. Beside other work set OMP_NUM_THREADS=1: two threads
that wait for one core make the times many times too high.

A memory map counts as memory of its process although the system takes it back when it is short, so
"flat" is about the other memory, which is looked at every 20 ms.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import ROOT, machine, make_pictures, print_table

from common import cli, splits
from common.files import UserError
from common.pictures import WHITE_LEVEL, DecodedCache

CLASSES = ("good", "hole", "rust", "scratch")
SIDE, VIEWS = 32, 8
BYTES = 20_000  # a picture with all that is made from it takes less
LINEAR, FLAT = 1.15, 300  # times the growth of the pictures; MB
SHORT = 5.0  # s, below which a time says nothing about growth
CPU = ("--device", "cpu")
BATCH = 128
STAGES = {
    "decoding": ("tests/benchmarks/growth.py", "--stage", "decode"),
    "split and leak check": ("tests/benchmarks/growth.py", "--stage", "leaks"),
    "train_teacher.py": (
        "train_teacher.py", "--data-dir", "parts", "--view-size", SIDE, "--model", "test_resnet",
        "-b", BATCH, *CPU),
    "build_ensemble.py": ("build_ensemble.py", "--views", VIEWS, *CPU),
    "distill.py": ("distill.py", "-b", BATCH, *CPU),
    "evaluate.py": ("evaluate.py", *CPU),
}
PASS_OVER = {"train_teacher.py": 0.4, "distill.py": 0.65}  # shares of the pictures


def decode():
    """Every picture into the cache."""
    for name in ("train", "unlabelled", "test"):
        DecodedCache(cli.CACHE).open(Path("parts") / name, [SIDE, SIDE])


def leaks():
    """What every stage does first, and the search for test pictures among the training ones."""
    cache = DecodedCache(cli.CACHE)
    train, val, dataset = splits.open_training(cache, {
        "dir": "parts", "view_size": [SIDE, SIDE], "white_level": WHITE_LEVEL, "val_fraction": 0.2,
        "group_regex": None, "dropped": [],
    })
    cli.lap("hashing and split")
    tests = splits.open_to_compare(cache, dataset)
    splits.leaked_paths(train + val, tests, "training", drop=True, allow=False)
    cli.lap("leak check")
    cli.print_laps()


def measure(words, home):
    """Run a stage in `home`: its parts' seconds, MB of memory in all and without maps, MB written.
    """
    before, begin = megabytes(home), time.perf_counter()
    with open(home / "output.txt", "w+") as output:
        command = [sys.executable, ROOT / words[0], *map(str, words[1:])]
        process = subprocess.Popen(command, cwd=home, stdout=output, stderr=subprocess.STDOUT)
        own, ended = 0.0, 0
        while not ended:
            own = max(own, own_memory(process.pid))
            time.sleep(0.02)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = {"in all": time.perf_counter() - begin}
        output.seek(0)
        said = output.read()
    if status:
        raise RuntimeError(f"{words[0]} ended with {os.waitstatus_to_exitcode(status)}:\n{said}")
    times = re.findall(r"^time: .*\((.*)\)$", said, re.MULTILINE)
    for part in times[-1].split(", ") if times else []:
        name, value = part.rsplit(" ", 1)
        seconds[name] = float(value)
    return seconds, usage.ru_maxrss / 1024, own, megabytes(home) - before


def own_memory(pid):
    """MB that a process holds beside its memory maps; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    line = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(line[1]) / 1024 if line else 0.0


def megabytes(folder):
    """What the files of a folder hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def measure_size(n, home):
    """{stage: what `measure` says} for n pictures."""
    begin = time.perf_counter()
    counts = {"train": n // 8, "unlabelled": n // 16, "test": n // 16}
    make_pictures(home / "parts", counts, CLASSES)
    size, seconds = megabytes(home), time.perf_counter() - begin
    print(f"{n} pictures: {size:.0f} MB, made in {seconds:.0f} s", file=sys.stderr)
    costs = {}
    for name, words in STAGES.items():
        if name in PASS_OVER:
            words = (*words, "--steps", math.ceil(PASS_OVER[name] * n / BATCH))
        costs[name] = measure(words, home)
        print(f"{n} {name}: {costs[name]}", file=sys.stderr, flush=True)
    return costs


def print_times(sizes, costs):
    """Seconds of every part at every size, and how many times those of the size before."""
    columns = ["seconds", f"{sizes[0]:,}"]
    for before, n in zip(sizes, sizes[1:]):
        columns += [f"{n:,}", f"times, for {n / before:g} x"]
    rows = []
    for name in STAGES:
        each = [costs[n][name][0] for n in sizes]
        for part in each[-1]:
            values = [seconds.get(part, 0.0) for seconds in each]
            title = name if part == "in all" else f"- {part}"
            row = [title, f"{values[0]:.1f}"]
            for before, value in zip(values, values[1:]):
                row += [f"{value:.1f}", f"{value / before:.1f}" if before >= 0.1 else ""]
            rows.append([*row, verdict(sizes, values)])
    print_table([*columns, "linear within 15 %"], rows)


def verdict(sizes, values):
    """Whether the last step in size cost no more than in line with the pictures."""
    if len(sizes) < 2 or values[-1] < SHORT:
        return "too short"
    allowed = LINEAR * sizes[-1] / sizes[-2]
    return "yes" if values[-1] <= allowed * values[-2] else "**no**"


def print_memory(sizes, costs):
    """Peak memory of every stage at every size, whether it is flat, and what it wrote."""
    columns = ["MB", *(f"peak, {n:,}" for n in sizes), *(f"own, {n:,}" for n in sizes)]
    rows = []
    for name in STAGES:
        each = [costs[n][name] for n in sizes]
        row = [name, *(f"{peak:.0f}" for _, peak, _, _ in each)]
        row += [f"{own:.0f}" for _, _, own, _ in each]
        flat = each[-1][2] - each[0][2] <= FLAT
        rows.append([*row, "yes" if flat else "**no**", *(f"{disk:.1f}" for *_, disk in each)])
    disks = [f"written, {n:,}" for n in sizes]
    print_table([*columns, f"own flat within {FLAT}", *disks], rows)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--sizes", type=cli.positive_int, nargs="+", default=[1000, 10_000, 100_000],
                   metavar="N", help="numbers of pictures, rising")
    p.add_argument("--home", metavar="DIR", help="where to work (default: a temporary folder)")
    p.add_argument("--stage", choices=["decode", "leaks"], help="used by the benchmark itself")
    args = p.parse_args()
    if args.stage:
        return {"decode": decode, "leaks": leaks}[args.stage]()

    costs, begin = {}, time.perf_counter()
    for n in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.home) as home:
            free = shutil.disk_usage(home).free
            if n * BYTES > free:
                raise UserError(f"--sizes {n}: wants {n * BYTES / 1e9:.0f} GB of disk; use --home")
            costs[n] = measure_size(n, Path(home))
    print_times(args.sizes, costs)
    print()
    print_memory(args.sizes, costs)
    print(f"\n{time.perf_counter() - begin:.0f} s. {machine()}")


if __name__ == "__main__":
    cli.run(main)
