"""The results table of the README: the embedded default, all stages, several seeds.

    python tests/benchmarks/default_chain.py                # 3 seeds, about 10 minutes each on 2 cores
    python tests/benchmarks/default_chain.py --seeds 0

Runs the scripts as a user would, in runs/benchmark/seed_N/; a stage that finished is not run again. The seed changes initialisation, order and views of every stage; the pictures stay.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 % point, by the number of seeds
TEACHERS = ("levit_conv_128s", "resnet10t")


def stages(home, seed):
    """(name, command words) of one seed's chain, as in the README but for the folders and the seed."""
    teachers = [f"{home}/{name}/best.pt" for name in TEACHERS]
    rest = ["--seed", seed]
    return [
        ("teachers", ["train_teacher.py", "--output", home, *rest]),
        ("ensemble", ["build_ensemble.py", *teachers, "--output", f"{home}/ensemble", *rest]),
        ("student", ["distill.py", f"{home}/ensemble", "--output", f"{home}/student", *rest]),
        ("alone", ["distill.py", f"{home}/ensemble", "--alpha", 0, "--output", f"{home}/alone", *rest]),
        ("evaluate", ["evaluate.py", *teachers, f"{home}/ensemble", f"{home}/alone/best.pt", f"{home}/student/best.pt",
                      f"{home}/student/student.ts", "--baseline", f"{home}/alone/best.pt", "--output", f"{home}/report"]),
    ]


def run_seed(home, seed):
    """Run what is missing of one seed's chain; returns (metrics, seconds per stage)."""
    log = home / "seconds.json"
    seconds = json.loads(log.read_text()) if log.is_file() else {}
    for name, words in stages(home.as_posix(), seed):
        if name in seconds:
            continue
        start = time.perf_counter()
        overwrite = ["--overwrite"] if name != "evaluate" else []
        subprocess.run([sys.executable, *map(str, words), *overwrite], cwd=ROOT, check=True)
        seconds[name] = time.perf_counter() - start
        log.write_text(json.dumps(seconds))
    return json.loads((home / "report" / "metrics.json").read_text()), seconds


def find(metrics, part):
    """The metrics of the model whose path ends in part or part/best.pt."""
    return next(m for path, m in metrics["models"].items() if path.removesuffix("/best.pt").endswith(f"/{part}"))


def with_spread(values, sign=""):
    """'mean ± standard deviation' of one number per seed, the latter where there are several."""
    return f"{np.mean(values):{sign}.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def combined_interval(differences):
    """Mean over seeds of a paired difference and half the width of its 95 % interval.

    differences: per seed {"difference", "interval"} from metrics.json. The half width is the root of two squares: that over test
    pictures (the seeds share them, so it is not divided by their number) and that over seeds, by Student's t (of one seed, nothing).
    """
    values = np.array([d["difference"] for d in differences])
    pictures = np.mean([((d["interval"][1] - d["interval"][0]) / 2) ** 2 for d in differences])
    seeds = STUDENT_T[len(values)] ** 2 * values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return values.mean(), np.sqrt(pictures + seeds)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--output", default="runs/benchmark", help="folder below the repository (default: %(default)s)")
    args = p.parse_args()
    os.chdir(ROOT)
    runs = [run_seed(Path(args.output) / f"seed_{seed}", seed) for seed in args.seeds]

    labels = dict(zip((*TEACHERS, "ensemble", "alone", "student"), (
        *(f"teacher {name}" for name in TEACHERS), "ensemble of the two", "ResNet18 stand-alone (baseline)", "**ResNet18 distilled**")))
    sets = list(next(iter(runs[0][0]["models"].values()))["sets"])
    print(f"\n| accuracy, % | {' | '.join(sets)} | mean | minus baseline | parameters, M | ms |")
    print("|---|" + "---|" * (len(sets) + 4))
    for part, label in labels.items():
        of_part = [find(metrics, part) for metrics, _ in runs]
        columns = [with_spread([100 * m["sets"][s]["accuracy"] for m in of_part]) for s in sets]
        columns.append(with_spread([100 * m["mean_accuracy"] for m in of_part]))
        value, half = combined_interval([m["minus_baseline"] for m in of_part])
        columns.append("" if part == "alone" else f"{100 * value:+.1f} ± {100 * half:.1f}")
        columns += [f"{of_part[0]['parameters'] / 1e6:.1f}", f"{np.median([m['latency_ms'] for m in of_part]):.0f}"]
        print(f"| {label} | {' | '.join(columns)} |")
        if part == "student":
            for s in sets:
                value, half = combined_interval([m["sets"][s]["minus_baseline"] for m in of_part])
                print(f"\ndistilled minus stand-alone on {s}: {100 * value:+.1f} ± {100 * half:.1f} points; per seed "
                      + ", ".join(f"{100 * m['sets'][s]['minus_baseline']['difference']:+.1f}" for m in of_part), end="")
    versions = runs[0][0]["versions"]
    n = ", ".join(f"{s} {next(iter(runs[0][0]['models'].values()))['sets'][s]['n']}" for s in sets)
    print(f"\n\nn = {len(runs)} seeds ({', '.join(map(str, args.seeds))}); test pictures: {n}; ± over seeds in the accuracy columns, "
          "95 % interval over pictures and seeds in the differences")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          + ", ".join(f"{name} {version}" for name, version in versions.items()))
    for name in runs[0][1]:
        print(f"  {name}: " + ", ".join(f"{seconds[name]:.0f}" for _, seconds in runs) + " s")


if __name__ == "__main__":
    main()
