"""The embedded default, all stages, several seeds: the first row of the repository's README.

    python tests/benchmarks/default_chain.py            # 3 seeds, 10 minutes each on 2 cores
    python tests/benchmarks/default_chain.py --seeds 0

Runs the scripts as a user would, in runs/benchmark/seed_N/; a stage that finished is not run again.
The seed changes initialisation, order and views of every stage; the pictures stay. Prints accuracy
on both test sets, the difference to the stand-alone ResNet18, and the seconds of each stage.
"""

from pathlib import Path

import numpy as np
from bench import combined_interval, machine, print_table, run_stages, with_interval, with_std

from common import cli
from common.files import load_json

TEACHERS = ("coatnet_nano_rw_224", "resnet10t")
ROWS = {  # what the models' folders are called in the table
    "coatnet_nano_rw_224": "teacher coatnet_nano_rw_224 (transformer)",
    "resnet10t": "teacher resnet10t (CNN)",
    "ensemble": "ensemble of the two",
    "alone": "ResNet18 stand-alone (baseline)",
    "student": "**ResNet18 distilled**",
}


def stages(home, seed):
    """(name, command words) of one seed's chain: the README's, but for folders and seed."""
    teachers = [f"{home}/{name}/model.pt" for name in TEACHERS]
    ensemble, alone, student = (f"{home}/{name}" for name in ("ensemble", "alone", "student"))
    students = [f"{alone}/model.pt", f"{student}/model.pt", f"{student}/student.ts"]
    rest = ["--seed", seed, "--overwrite"]
    compare = ["--baseline", f"{alone}/model.pt", "--skip-audit", "--output", f"{home}/report"]
    return [
        ("teachers", ["train_teacher.py", "--output", home, *rest]),
        ("ensemble", ["build_ensemble.py", *teachers, "--output", ensemble, *rest]),
        ("student", ["distill.py", ensemble, "--output", student, *rest]),
        ("alone", ["distill.py", ensemble, "--alpha", 0, "--output", alone, *rest]),
        ("evaluate", ["evaluate.py", *teachers, ensemble, *students, *compare]),
    ]


def of_part(metrics, part):
    """The metrics of the model whose path ends in part or part/model.pt."""
    for path, model in metrics["models"].items():
        if path.removesuffix("/model.pt").endswith(f"/{part}"):
            return model
    raise KeyError(part)


def print_accuracy(runs, sets):
    """The table; runs: metrics.json of each seed."""
    rows = []
    for part, label in ROWS.items():
        models = [of_part(metrics, part) for metrics in runs]
        row = [label]
        for name in sets:
            row.append(with_std([100 * model["sets"][name]["accuracy"] for model in models]))
        row.append(with_std([100 * model["mean_accuracy"] for model in models]))
        value, half = combined_interval([model["minus_baseline"] for model in models])
        row.append("" if part == "alone" else with_interval(100 * value, 100 * half))
        row.append(f"{models[0]['parameters'] / 1e6:.1f}")
        row.append(f"{np.median([model['latency_ms'] for model in models]):.0f}")
        rows.append(row)
    means = [f"{name} (std)" for name in (*sets, "mean")]
    print()
    print_table(["accuracy, %", *means, "mean minus baseline", "parameters, M", "ms"], rows)


def print_differences(runs, sets):
    """What distillation brings on each test set, with every seed's figure."""
    for name in sets:
        each = [of_part(metrics, "student")["sets"][name]["minus_baseline"] for metrics in runs]
        value, half = combined_interval(each)
        of_seeds = ", ".join(f"{100 * difference['difference']:+.1f}" for difference in each)
        print(
            f"\ndistilled minus stand-alone on {name}: {with_interval(100 * value, 100 * half)} "
            f"points; per seed {of_seeds}"
        )


def print_caption(runs, sets, seeds):
    """What the table rests on."""
    first = of_part(runs[0], "student")["sets"]
    sizes = ", ".join(f"{name} {first[name]['n']}" for name in sets)
    print(f"\n{len(seeds)} seeds ({', '.join(map(str, seeds))}); test pictures: {sizes}.")
    print(
        "(std): standard deviation over seeds. ±: half the width of a 95 % interval over pictures\n"
        "and seeds (Student's t). ms: one picture at a time, as evaluate.py times it."
    )
    print(machine())


def main():
    p = cli.parser(__doc__)
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], metavar="N")
    p.add_argument("--output", default="runs/benchmark", help="folder for a folder per seed")
    args = p.parse_args()

    runs, seconds = [], []
    for seed in args.seeds:
        home = Path(args.output) / f"seed_{seed}"
        seconds.append(run_stages(stages(home.as_posix(), seed), home))
        runs.append(load_json(home / "report" / "metrics.json"))

    sets = list(of_part(runs[0], "student")["sets"])
    print_accuracy(runs, sets)
    print_differences(runs, sets)
    print_caption(runs, sets, args.seeds)
    print("\nseconds of each stage, by seed:")
    for stage in seconds[0]:
        print(f"  {stage}: {', '.join(f'{of_seed[stage]:.0f}' for of_seed in seconds)}")


if __name__ == "__main__":
    cli.run(main)
