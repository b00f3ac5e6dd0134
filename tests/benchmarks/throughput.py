"""How many views a second the loader delivers, and how many pictures a second a ResNet18 trains on.

    python tests/benchmarks/throughput.py                       # a few minutes on two cores
    python tests/benchmarks/throughput.py --turns 1 --steps 2   # to see that it works
    python tests/benchmarks/throughput.py --device cuda --steps 100 --batch-sizes 96 768

The loader alone: rows of a memory map (of noise, in the page cache after the first turn), read one
batch ahead, rendered as views. Training: the loop of distill.py with --alpha 0, views included,
with the network in channels_last and in contiguous layout. Every setting has its turn in each
round; the medians of the rounds are printed.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench import machine, print_table
from epoch_cost import CLASSES, random_pictures

from common import cli, training
from common.losses import labelled_cross_entropy
from common.models import autocast, create_student, parameter_groups, precision
from common.views import ViewRecipe, batch_plan, render

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
COUNT = 960  # pictures


def wait(device):
    """Let a GPU finish what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def views_per_second(pictures, batch_size, steps, device):
    """Read and render; the first step does not count."""
    plan = batch_plan(len(pictures), batch_size, 0, 0, 1 + steps)
    for number, (indices, passes, batch) in enumerate(pictures.ahead(plan, device)):
        if number == 1:
            wait(device)
            start = time.perf_counter()
        render(batch, indices, 1 + passes, 0, ViewRecipe())
    wait(device)
    return steps * batch_size / (time.perf_counter() - start)


def pictures_per_second(pictures, layout, batch_size, steps, device):
    """Train a ResNet18 from scratch in this memory format; the first step does not count."""
    model = create_student(CLASSES, pictures.side).to(device, memory_format=layout)
    schedule = training.Schedule(1, 1 + steps, 1e-3, 0.998, 1.0, seed=0)
    run = training.Run(model, parameter_groups(model, 0.05), schedule, "throughput", {})
    for _ in run.epochs():
        plan = run.batches(len(pictures), batch_size)
        for number, (indices, passes, batch) in enumerate(pictures.ahead(plan, device)):
            if number == 1:
                wait(device)
                start = time.perf_counter()
            pixels = render(batch, indices, 1 + passes, 0, ViewRecipe())
            pixels = pixels.contiguous(memory_format=layout)
            with autocast(device):
                logits = run.network(pixels)
            labels = pictures.labels[indices].to(device)
            run.step(labelled_cross_entropy(logits.float(), labels))
    wait(device)
    return steps * batch_size / (time.perf_counter() - start)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--turns", type=cli.positive_int, default=5, help="rounds")
    p.add_argument("--steps", type=cli.positive_int, default=10,
                   help="timed steps of each setting in a round")
    p.add_argument("--sides", type=cli.positive_int, nargs="+", default=[64, 224],
                   help="px of the loader's pictures; training is measured at the first")
    p.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[24, 96])
    p.add_argument("--threads", type=cli.positive_int, default=2, help="of torch on the CPU")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()

    torch.set_num_threads(args.threads)
    device, rng = torch.device(args.device), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        pictures = {}
        for side in args.sides:
            folder = Path(home) / str(side)
            folder.mkdir()
            pictures[side] = random_pictures(folder, COUNT, side, rng)

        settings = {}
        for side in args.sides:
            for size in args.batch_sizes:
                name = ("loader alone, views", f"{side}", f"{size}", "")
                settings[name] = views_per_second, (pictures[side], size)
        for size in args.batch_sizes:
            for layout, memory_format in LAYOUTS.items():
                name = ("training, pictures", f"{args.sides[0]}", f"{size}", layout)
                first = pictures[args.sides[0]]
                settings[name] = pictures_per_second, (first, memory_format, size)
        rates = {name: [] for name in settings}
        for _ in range(args.turns):
            for name, (measure, what) in settings.items():
                rates[name].append(measure(*what, args.steps, device))

    dtype = str(precision(device) or torch.float32).removeprefix("torch.")
    print(f"{machine()}, {args.device}, training in {dtype}")
    rows = [[*name, f"{statistics.median(values):.0f}"] for name, values in rates.items()]
    print_table(["", "side, px", "batch", "layout", "a second"], rows)


if __name__ == "__main__":
    cli.run(main)
