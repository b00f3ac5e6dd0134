"""What a killed script leaves behind: each is killed at random moments, continued, and compared.

    python tests/benchmarks/kills.py                             # 20 runs of each script
    python tests/benchmarks/kills.py --runs 3 --scripts distill.py

A chain of tiny pictures and networks runs once undisturbed, each script on what the ones before it
left. Then each script runs again on that, is killed (SIGKILL) at a moment drawn uniformly from its
duration, and is continued as a user would: with --resume where a run has left last.pt or model.pt,
else by starting it again. Every other continuation is killed too. What it wrote in the end must be
what the undisturbed run wrote: weights, logits, predictions, verdicts, all numbers but seconds.

A first run, "control", is not killed at all: it shows that the comparison is one of equals. The
scripts run in forked processes that have imported torch already, so that no kill is spent on
imports; for the files this is the same.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from bench import machine, make_pictures, print_table, process_server

import build_ensemble
import distill
import evaluate
import infer
import train_teacher
from common import cli
from common.export import load_exported
from common.files import file_sha256
from common.models import load_checkpoint

PICTURES = {"train": 24, "test": 12, "unlabelled": 16}  # per class
TEACHERS = ("test_vit", "test_resnet")  # timm's smallest
CAMERA = 60  # pictures that infer.py --watch finds
LIMIT = 900  # s that a run may take
TRAINING = ("-b", 16, "--device", "cpu")  # the steps are three passes over the pictures
SCRIPTS = {  # script: (what runs, its command line)
    "train_teacher.py": (train_teacher.main, (
        "--data-dir", "parts", "--view-size", 32, "--model", *TEACHERS, "--steps", 12, *TRAINING)),
    "build_ensemble.py": (build_ensemble.main, ("--views", 8, "--device", "cpu")),
    "distill.py": (distill.main, ("--steps", 21, *TRAINING, "--max-int8-drop", 100)),
    "evaluate.py": (evaluate.main, ("--device", "cpu")),
    "infer.py --watch": (infer.main, ("--watch", "camera")),
}
CONTEXT = process_server("train_teacher", "build_ensemble", "distill", "evaluate", "infer")
# What differs between equal runs: times, and the hashes of files that hold times.
MEASURED = {"latency_ms", "seconds", "versions", "checkpoint_sha256", "sha256_of_all_above"}


# ------------------------------------------------------------------------------- running, killing


def start(script, *more):
    """Run a script in a process of its own, its output in output.txt."""
    Path("output.txt").unlink(missing_ok=True)
    process = CONTEXT.Process(target=as_script, args=(script, more, os.getcwd()))
    process.start()
    return process


def warm_up():
    """Let the server do its imports, so that no duration holds them."""
    process = CONTEXT.Process(target=os.getpid)
    process.start()
    process.join()


def as_script(script, more, folder):
    """What that process does: as `cd folder; python SCRIPT WORDS`."""
    os.chdir(folder)
    main, words = SCRIPTS[script]
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [script, *map(str, (*words, *more))]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would have it ignored
    cli.run(main)


def finish(process, script):
    """Wait for a script; its exit status. infer.py --watch is ended once it has judged all."""
    deadline = time.monotonic() + LIMIT
    while script == "infer.py --watch" and process.is_alive() and time.monotonic() < deadline:
        if has_judged_all():
            os.kill(process.pid, signal.SIGINT)
            process.join(2)
        time.sleep(0.002)
    process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        return f"over {LIMIT} s"
    return process.exitcode


def has_judged_all():
    """Whether infer.py --watch has judged all and listens: it says so before it judges anything."""
    output, log = Path("output.txt"), Path("camera/judged.jsonl")
    if not (output.is_file() and output.stat().st_size and log.is_file()):
        return False
    return log.read_bytes().count(b"\n") >= CAMERA


def continue_words(script):
    """How a user continues: with --resume where the script has it and a run has left files."""
    pattern = {"train_teacher.py": "runs/test_*/*.pt", "distill.py": "runs/student/*.pt"}
    there = script in pattern and any(Path().glob(pattern[script]))
    return ("--resume",) if there else ()


def disturb(script, moments):
    """Run a script to its end, killed at these moments (s after each start).

    Returns (kills that found it running, what else a user saw).
    """
    kills, seen = 0, []
    for moment in moments:
        process = start(script, *continue_words(script) if kills else ())
        process.join(moment)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    status = finish(start(script, *continue_words(script)), script)
    if status == 2:  # refused: what is left for a user is to begin anew
        said = [line for line in Path("output.txt").read_text().splitlines() if "error:" in line]
        seen.append(f"refused ({said[-1]})")
        status = finish(start(script, "--overwrite"), script)
    if status not in (0, 130):
        seen.append(f"exit status {status}")
    return kills, seen


# --------------------------------------------------------------------------------- what is left


def artefacts(script):
    """{name: content} of what a script wrote, as far as it is the same in every run."""
    runs = Path("runs")
    if script == "train_teacher.py":
        return {k: v for name in TEACHERS for k, v in trained(runs / name).items()}
    if script == "build_ensemble.py":
        views = {file.name: file_sha256(file) for file in sorted(runs.glob("ensemble/view_*.npy"))}
        return {**views, "ensemble.json": read_json(runs / "ensemble/ensemble.json")}
    if script == "distill.py":
        files = sorted((runs / "student").glob("*.ts"))
        members = {k: v for file in files for k, v in exported(file).items()}
        return {**trained(runs / "student"), **members}
    if script == "evaluate.py":
        audits = {file.name: read_json(file) for file in runs.glob("decoded/audit-*.json")}
        report = runs / "report"
        return {
            "metrics.json": read_json(report / "metrics.json"),
            "predictions.csv": file_sha256(report / "predictions.csv"),
            "report.html": (report / "report.html").is_file(),
            **audits,
        }
    lines = Path("camera/judged.jsonl").read_text().splitlines()
    verdicts = [json.dumps({**json.loads(line), "key": None}) for line in lines]
    return {"judged.jsonl": sorted(verdicts)}  # a picture judged twice has two lines


def trained(folder):
    """Of a training run: the weights, all that resuming needs, and the curve."""
    files = {}
    for name in ("model.pt", "last.pt"):
        state = load_checkpoint(folder / name)
        files[f"{folder.name}/{name}"] = [
            state["weights_sha256"],
            without_measured({key: state[key] for key in ("steps", "metrics", "history")}),
        ]
    rows = (folder / "log.csv").read_text().splitlines()
    files[f"{folder.name}/log.csv"] = [row.rsplit(",", 1)[0] for row in rows]  # seconds are last
    return files


@torch.inference_mode()
def exported(path):
    """Of a student.ts: its metadata, and what it says of four frames of noise."""
    module, metadata = load_exported(path)
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    frames = torch.from_numpy(noise)
    return {
        f"{path.name} metadata": without_measured(metadata),
        f"{path.name} answers": module(frames).tolist(),
    }


def without_measured(value):
    """Plain data without what a stopwatch or another machine changes."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if k not in MEASURED}
    return [without_measured(each) for each in value] if isinstance(value, list) else value


def read_json(path):
    return without_measured(json.loads(path.read_text()))


def leftovers():
    """Temporary files and locks that stay when a killed script has been continued to its end."""
    some = [path for path in Path().rglob(".*") if path.is_file()]
    return ["a lock" if path.name.endswith(".lock") else "a temporary file" for path in some]


def losses(script, wanted):
    """What differs from the undisturbed run's artefacts."""
    try:
        written = artefacts(script)
    except Exception as error:
        return [f"unreadable ({type(error).__name__}: {error})"]
    lost = [f"{name} differs" for name in wanted if written.get(name) != wanted[name]]
    return lost + [f"{name} is new" for name in written if name not in wanted]


# ------------------------------------------------------------------------------------- the table


def measure(script, home, runs, rng):
    """The row of one script; the chain stands in home/work, and stays as it was left there."""
    before, after = home / "before", home / "after"
    shutil.copytree("work", before)
    os.chdir("work")
    begin = time.perf_counter()
    status = finish(start(script), script)
    duration = time.perf_counter() - begin
    if status not in (0, 130):
        raise SystemExit(f"{script} ended with {status}:\n{Path('output.txt').read_text()}")
    wanted = artefacts(script)
    os.chdir(home)
    shutil.copytree("work", after)

    kills, equal, lost, left, seconds, control = 0, 0, Counter(), Counter(), [], ""
    for number in range(runs + 1):
        moments = rng.uniform(0, duration, 2)[: 0 if number == 0 else 1 + number % 2]
        replace_folder(before, home / "work")
        os.chdir("work")
        begin = time.perf_counter()
        hits, seen = disturb(script, moments)
        taken = time.perf_counter() - begin
        differing = losses(script, wanted)
        if number == 0:
            control = "equal" if not differing + seen else ", ".join(differing + seen)
        else:
            kills += hits
            equal += not differing
            lost.update(set(differing + seen))
            left.update(leftovers())
            seconds.append(taken)
        if differing + seen:
            print(f"{script}, killed after {moments}: {', '.join(differing + seen)}", flush=True)
        os.chdir(home)
    replace_folder(after, home / "work")
    for folder in (before, after):
        shutil.rmtree(folder)
    told = [f"{count} x {what}" for what, count in lost.items()] or ["nothing"]
    kept = [f"{count} x {what}" for what, count in left.items()] or ["nothing"]
    times = f"{duration:.1f}, {statistics.median(seconds):.1f}"
    return [script, str(runs), str(kills), control, f"{equal} of {runs}", "; ".join(told),
            "; ".join(kept), times]


def replace_folder(source, target):
    shutil.rmtree(target)
    shutil.copytree(source, target)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--runs", type=cli.positive_int, default=20, help="killed runs of each script")
    p.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS),
                   help="which are killed; all run")
    p.add_argument("--seed", type=cli.seed, default=0, help="of the moments")
    args = p.parse_args()
    warm_up()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        home = Path(name)
        make_pictures(Path("work/parts"), PICTURES)
        make_pictures(Path("camera"), {"unlabelled": CAMERA // 3}, seed=1)
        Path("camera/unlabelled").rename("work/camera")
        rows = []
        for number, script in enumerate(SCRIPTS):
            runs = args.runs if script in args.scripts else 0
            if runs:
                rng = np.random.default_rng([args.seed, number])
                rows.append(measure(script, home, runs, rng))
                continue
            os.chdir("work")
            finish(start(script), script)
            os.chdir(home)
    print_table(
        ["script", "runs", "kills", "control", "bit-equal", "lost, or seen by the user",
         "left behind", "s undisturbed, s killed and continued (median)"], rows)
    print(f"\n{time.perf_counter() - begin:.0f} s. {machine()}")


if __name__ == "__main__":
    main()
