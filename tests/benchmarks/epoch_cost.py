"""What a distillation epoch costs: with cached logits, stand-alone, and with the teachers run online.

    python tests/benchmarks/epoch_cost.py                    # DINOv2 ViT-S and EfficientNet-Lite0 at 224 px
    python tests/benchmarks/epoch_cost.py --steps 4 --teachers levit_conv_128s resnet10t --side 64

Everything in one process, the kinds of step in turn (A B C A B C ...), medians and ratios. Weights do
not change the time, so the teachers start from random ones; pictures are random and lie in memory maps
as in a pack.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from common.data import Pack, whole  # noqa: E402
from common.ensemble import soft_targets  # noqa: E402
from common.losses import distillation_loss, mixture  # noqa: E402
from common.models import autocast, create_student, create_teacher, parameter_groups  # noqa: E402
from common.views import ViewRecipe, render  # noqa: E402

CLASSES = 6


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teachers", nargs="+", default=["vit_small_patch14_dinov2", "tf_efficientnet_lite0"])
    p.add_argument("--side", type=int, default=224, help="px (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=24)
    p.add_argument("--steps", type=int, default=7, help="of each kind, after one that is not counted (default: %(default)s)")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    device, rng = torch.device(args.device), np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as folder:
        count = 4 * args.batch_size
        images = np.lib.format.open_memmap(f"{folder}/images.npy", "w+", np.uint8, (count, args.side, args.side, 3))
        images[:] = rng.integers(0, 256, images.shape, dtype=np.uint8)
        pictures = whole(Pack(Path(folder), images, [], rng.integers(0, CLASSES, count), [], ""))
        np.save(f"{folder}/view.npy", rng.normal(size=(len(args.teachers), count, CLASSES)).astype(np.float32))
        cached = [np.load(f"{folder}/view.npy", mmap_mode="r")] * 2
        measure(args, device, pictures, cached)


def measure(args, device, pictures, cached):
    weights = [1 / len(args.teachers)] * len(args.teachers)
    record = {"temperatures": [1.0] * len(args.teachers), "weights": weights}
    teachers = [create_teacher(name, CLASSES, args.side).to(device, memory_format=torch.channels_last).eval() for name in args.teachers]
    student = create_student(CLASSES, args.side).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.05), lr=1e-4, fused=True)
    recipe, seconds = ViewRecipe(), {"cached": [], "alone": [], "online": [], "views": []}

    def train_step(pixels, labels, soft, alpha):
        with autocast(device):
            logits = student(pixels)
        distillation_loss(logits.float(), labels, soft, alpha, 2.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(args.steps + 1):
        indices = (np.arange(args.batch_size) + step * args.batch_size) % len(pictures)
        labels = pictures.labels[indices].to(device)
        for kind in ("cached", "alone", "online"):
            start = time.perf_counter()
            pixels = render(pictures.batch(indices, device), indices, np.ones_like(indices), 0, recipe)
            seconds["views"].append(time.perf_counter() - start)
            soft = None
            if kind == "cached":
                soft = soft_targets(cached, record, np.ones_like(indices), indices, 2.0).to(device)
            elif kind == "online":
                with torch.inference_mode(), autocast(device):
                    logits = torch.stack([teacher(pixels).float() for teacher in teachers])
                soft = mixture(logits, record["temperatures"], weights, 2.0).clone()
            train_step(pixels, labels, soft, 0.0 if kind == "alone" else 0.9)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[kind].append(time.perf_counter() - start)

    cached_s, alone, online = (statistics.median(seconds[kind][1:]) for kind in ("cached", "alone", "online"))
    views = statistics.median(seconds["views"][3:])
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}; "
          f"ResNet18 at {args.side} px, batch {args.batch_size}, teachers {', '.join(args.teachers)}; medians of {args.steps} steps")
    print(f"stand-alone step {1e3 * alone:.0f} ms; cached {1e3 * cached_s:.0f} ms; teachers online {1e3 * online:.0f} ms; views {1e3 * views:.0f} ms")
    print(f"cached / stand-alone {cached_s / alone:.3f} (at most 1.1)")
    print(f"online / cached {online / cached_s:.2f} (at least 2.3 with the default teachers and side)")
    print(f"views / stand-alone step {views / alone:.3f} (at most 0.10)")


if __name__ == "__main__":
    main()
