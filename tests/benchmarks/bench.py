"""What the benchmarks share: calling the scripts, intervals over pictures and seeds, tables.

Not a benchmark itself. Importing it puts the repository on Python's path, so that common/ and
infer.py are found from any working directory. Wherever a table says ±, it is half the width of a
95 % interval; standard deviations over seeds stand in brackets, under (std).
"""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from common.files import versions  # noqa: E402

Z = 1.96  # two-sided 95 % of the normal distribution
STUDENT_T = {  # the same of Student's t, by the number of values
    2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26,
}


# ------------------------------------------------------------------------------------- running


def call(script, *words):
    """Run one of the scripts as a user would; CalledProcessError where it fails."""
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)


def process_server(*modules):
    """A multiprocessing context whose processes have imported these modules already.

    A server imports them once and forks a process whenever one is wanted. Forking the process that
    wants it would not do, since torch's threads do not survive that.
    """
    here = str(Path(__file__).parent)
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes' networks are too tiny for more
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), here])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


def run_stages(stages, home):
    """Call what has not finished before; returns {stage: seconds it took}.

    stages: iterable of (name, [script, *words]), each made when the ones before it are done.
    home/seconds.json says what finished.
    """
    log = home / "seconds.json"
    seconds = json.loads(log.read_text()) if log.is_file() else {}
    for name, words in stages:
        if name in seconds:
            continue
        print(f"== {home}: {name}", flush=True)
        start = time.perf_counter()
        call(*words)
        seconds[name] = round(time.perf_counter() - start, 1)
        log.write_text(json.dumps(seconds))
    return seconds


def link(source, target):
    """A hard link to a picture, or a copy where the disk is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # an earlier start that was interrupted
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def make_pictures(folder, per_class, classes=("good", "hole", "scratch"), side=64, seed=0):
    """Write an ImageFolder of JPEG files fast, about a tenth of a millisecond each plus the disk.

    A class is a blurred pattern; each picture of it is moved, and has grain of its own, so that no
    two are copies. per_class: {"train": pictures per class, ...}; those of "unlabelled" lie flat.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 170, (len(classes), 5, 5, 3), dtype=np.uint8)
    patterns = [np.array(Image.fromarray(each).resize((side, side), 3)) for each in coarse]
    grain = rng.integers(0, 80, 2**22, dtype=np.uint8)  # pieces of it are faster than new numbers
    size = patterns[0].size
    starts = iter(rng.permutation(len(grain) - size))
    for name, count in per_class.items():
        for pattern, label in zip(patterns, classes):
            home = folder / name / ("" if name == "unlabelled" else label)
            home.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                moved = np.roll(pattern, rng.integers(0, side // 4, 2), (0, 1))
                start = next(starts)
                own = grain[start:start + size].reshape(pattern.shape)
                Image.fromarray(moved + own).save(home / f"{label}_{number:06d}.jpg", quality=90)


# ----------------------------------------------------------------------------------- intervals


def combined_interval(differences):
    """(mean, half width of its 95 % interval) of a paired difference that several seeds measured.

    differences: per seed {"difference", "interval"}, as in metrics.json. The half width is the root
    of two squares: that over test pictures, which the seeds share, so it is not divided by their
    number; and that over seeds, by Student's t (of one seed, nothing).
    """
    values = np.array([each["difference"] for each in differences])
    halves = [(each["interval"][1] - each["interval"][0]) / 2 for each in differences]
    over_pictures = np.mean(np.square(halves))
    over_seeds = half_width(values) ** 2 if len(values) > 1 else 0.0
    return values.mean(), np.sqrt(over_pictures + over_seeds)


def half_width(values):
    """Half the width of the 95 % interval of a mean of two or more values, by Student's t."""
    t = STUDENT_T[min(len(values), 10)]  # of more than ten a little wide
    return t * np.std(values, ddof=1) / len(values) ** 0.5


# -------------------------------------------------------------------------------------- tables


def print_table(columns, rows):
    """Print a Markdown table. columns: text; rows: lists of text, as many cells as columns."""
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def with_std(values, sign=""):
    """'mean (standard deviation)' of one number per seed; of a single seed the number alone."""
    mean = f"{np.mean(values):{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ({np.std(values, ddof=1):.1f})"


def with_interval(value, half):
    """'+1.2 ± 0.3' of a difference and the half width of its 95 % interval."""
    return f"{value:+.1f} ± {half:.1f}"


def machine(*more):
    """The processor, torch's threads and the versions that timings depend on, in words.

    more: names of installed packages beside those that the scripts need.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    parts = [f"{processor()} ({capability})", f"torch threads {torch.get_num_threads()}"]
    installed = {**versions(), **{name: version(name) for name in more}}
    return ", ".join([*parts, *(f"{name} {number}" for name, number in installed.items())])


def processor():
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


# ------------------------------------------------------------------------------------ CSV files


def read_rows(path):
    """The rows of a CSV file as dicts of text; none where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def select(rows, **wanted):
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values_of(rows, key):
    """The different values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def rounded(scores, columns):
    """Some scores for a row, empty where there is none: no AUROC where no class is good."""
    return [round(scores[key], 5) if key in scores else "" for key in columns]


def this_commit():
    """The short name of the commit that the repository is at; empty where there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def append_rows(path, fields, rows):
    """Add rows to a CSV file, which begins with the fields' names."""
    new = not Path(path).is_file()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(fields)
        writer.writerows(rows)
