"""How many views a second the loader delivers, and how many pictures a second networks train on.

    python tests/benchmarks/throughput.py                       # a few minutes on two cores
    python tests/benchmarks/throughput.py --turns 1 --steps 2   # to see that it works
    python tests/benchmarks/throughput.py --device cuda --steps 100 --batch-sizes 96 768

The loader alone: rows of a memory map (of noise, in the page cache after the first turn), read one
batch ahead, rendered as views. Training: the loop of distill.py with --alpha 0, views included, but
without validations, with the ResNet18 in channels_last and in contiguous layout, and both
pretrained teachers as timm has them and as `on_device` of common/models.py does. Every setting has
its turn in each round; the medians of the rounds are printed.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench import machine, print_table
from epoch_cost import CLASSES, random_pictures, wait
from sets import TEACHERS
from timm.optim import param_groups_weight_decay

from common import cli, training
from common.losses import label_rows, labelled_cross_entropy
from common.models import autocast, create_student, create_teacher, on_device, precision
from common.views import ViewRecipe, render

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
COUNT, TEACHERS_SIDE = 960, 128  # pictures; px of those that teachers are measured at


def network(name, how, size, device):
    """A `Classifier` for views of `size`; how: a layout, or "on_device"."""
    student = name in ("", "resnet18")
    model = create_student(CLASSES, size) if student else create_teacher(name, CLASSES, size)
    if how == "on_device":
        return on_device(model, device)
    return model.to(device, memory_format=LAYOUTS[how or "channels_last"])


def pictures_a_second(pictures, name, how, batch_size, steps, device):
    """Read, render and train a network, or without a name do not train.

    The first step does not count.
    """
    model = network(name, how, pictures.view_size, device)
    schedule = training.Schedule(1 + steps, lr=1e-3, clip_grad=1.0, seed=0)
    groups = param_groups_weight_decay(model.backbone, 0.05)
    run = training.Run(model, groups, schedule, Path("throughput"), {})
    for number, (indices, views, batch) in enumerate(run.batches(pictures, batch_size)):
        if number == 1:
            wait(device)
            start = time.perf_counter()
        pixels = render(batch, indices, views, 0, ViewRecipe())
        if name:
            pixels = pixels.contiguous(memory_format=LAYOUTS.get(how, torch.channels_last))
            with autocast(device):
                logits = run.network(pixels)
            y = label_rows(pictures.labels[indices], logits.shape[1]).to(device)
            run.step(labelled_cross_entropy(logits.float(), y))
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
        for side in {*args.sides, TEACHERS_SIDE}:
            folder = Path(home) / str(side)
            folder.mkdir()
            pictures[side] = random_pictures(folder, COUNT, side, rng)

        first = args.sides[0]
        sizes = args.batch_sizes
        settings = [(side, size, "", "") for side in args.sides for size in sizes]
        settings += [(first, size, "resnet18", how) for size in sizes for how in LAYOUTS]
        settings += [(TEACHERS_SIDE, sizes[0], name, how)
                     for name in TEACHERS for how in ("channels_last", "on_device")]
        rates = {setting: [] for setting in settings}
        for _ in range(args.turns):
            for side, size, *what in settings:
                rate = pictures_a_second(pictures[side], *what, size, args.steps, device)
                rates[(side, size, *what)].append(rate)

    dtype = str(precision(device) or torch.float32).removeprefix("torch.")
    print(f"{machine()}, {args.device}, training in {dtype}")
    rows = []
    for (side, size, name, how), values in rates.items():
        what = f"training {name}, pictures" if name else "loader alone, views"
        rows.append([what, f"{side}", f"{size}", how, f"{statistics.median(values):.1f}"])
    print_table(["", "side, px", "batch", "layout", "a second"], rows)


if __name__ == "__main__":
    cli.run(main)
