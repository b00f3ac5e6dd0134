"""What a distillation step costs: with cached logits, stand-alone, and with the teachers online.

    python tests/benchmarks/epoch_cost.py --steps 3       # 2 minutes on two cores
    python tests/benchmarks/epoch_cost.py --side 64 --teachers coatnet_nano_rw_224 resnet10t

Everything in one process, the kinds of step in turn (A B C A B C ...), medians and ratios. Weights
do not change the time, so teachers and student start from random ones; pictures and logits are
random and lie in memory maps, as in the decoded cache and the ensemble.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench import machine
from timm.optim import param_groups_weight_decay

from common import cli
from common.ensemble import CachedLogits, write_view
from common.losses import label_rows, labelled_cross_entropy, product_of_experts, soft_divergence
from common.models import autocast, create_student, create_teacher
from common.pictures import Decoded, Pictures
from common.views import ViewRecipe, render

CLASSES = 6
ALPHA, T = 0.9, 2.0  # as distill.py's defaults
BATCHES = 4  # of different pictures


def random_pictures(folder, count, side, rng):
    """`Pictures` of noise in a memory map below folder."""
    shape = (count, side, side, 3)
    images = np.memmap(folder / "images.bin", np.uint8, "w+", shape=shape)
    images[:] = rng.integers(0, 256, shape, dtype=np.uint8)
    decoded = Decoded(folder, images, [""] * count, [], [], {}, fingerprint="")
    return Pictures.of(decoded, labels=rng.integers(0, CLASSES, count))


def random_logits(folder, teachers, count, rng):
    """`CachedLogits` of noise, of one view."""
    write_view(folder, 1, rng.normal(size=(teachers, count, CLASSES)).astype(np.float32))
    return CachedLogits(folder, {
        "temperatures": [1.0] * teachers,
        "weights": [1 / teachers] * teachers,
        "views": 1,
    })


class Steps:
    """Training steps of one student, timed by kind: cached, alone or online."""

    def __init__(self, args, pictures, cache):
        self.pictures, self.cache, self.device = pictures, cache, torch.device(args.device)
        size = [args.side, args.side]
        self.teachers = [self.place(create_teacher(n, CLASSES, size)) for n in args.teachers]
        self.student = self.place(create_student(CLASSES, size)).train()
        groups = param_groups_weight_decay(self.student.backbone, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def place(self, model):
        """The model on the device, in evaluation mode."""
        return model.to(self.device, memory_format=torch.channels_last).eval()

    def render(self, indices):
        """Pixels of view 1 of some pictures."""
        batch = self.pictures.batch(indices, self.device)
        return render(batch, indices, np.ones_like(indices), 0, ViewRecipe())

    def soft_targets(self, kind, indices, pixels):
        """What a step of this kind learns from, beside the labels; None for nothing."""
        if kind == "alone":
            return None
        if kind == "cached":
            return self.cache.targets(np.ones_like(indices), indices, T).to(self.device)
        with torch.inference_mode(), autocast(self.device):
            logits = torch.stack([teacher(pixels).float() for teacher in self.teachers])
        return product_of_experts(logits, self.cache.temperatures, self.cache.weights, T).clone()

    def time(self, kind, indices):
        """(seconds of one step, seconds of it that rendering took)."""
        start = time.perf_counter()
        pixels = self.render(indices)
        wait(self.device)
        rendered = time.perf_counter()

        q = self.soft_targets(kind, indices, pixels)
        with autocast(self.device):
            logits = self.student(pixels)
        logits = logits.float()
        y = label_rows(self.pictures.labels[indices], logits.shape[1]).to(self.device)
        loss = labelled_cross_entropy(logits, y)
        if q is not None:
            loss = (1 - ALPHA) * loss + ALPHA * T**2 * soft_divergence(q, logits / T)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return time.perf_counter() - start, rendered - start


def wait(device):
    """Let a GPU finish what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(args, pictures, cache):
    """Median seconds {cached, alone, online, views}, without the first step of each kind."""
    steps = Steps(args, pictures, cache)
    seconds = {"cached": [], "alone": [], "online": [], "views": []}
    for step in range(1 + args.steps):
        place = step % BATCHES
        indices = np.arange(place * args.batch_size, (place + 1) * args.batch_size)
        for kind in ("cached", "alone", "online"):
            whole, views = steps.time(kind, indices)
            if step:
                seconds[kind].append(whole)
                seconds["views"].append(views)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def main():
    p = cli.parser(__doc__)
    p.add_argument("--teachers", nargs="+", metavar="NAME",
                   default=["vit_small_patch14_dinov2", "tf_efficientnet_lite0"])
    p.add_argument("--side", type=cli.positive_int, default=224, help="px")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=24)
    p.add_argument("--steps", type=cli.positive_int, default=7,
                   help="of each kind, after one that is not counted")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()

    rng, count = np.random.default_rng(0), BATCHES * args.batch_size
    with tempfile.TemporaryDirectory() as home:
        pictures = random_pictures(Path(home), count, args.side, rng)
        cache = random_logits(Path(home), len(args.teachers), count, rng)
        median = measure(args, pictures, cache)

    print(f"{machine()}, {args.device}")
    names = ", ".join(args.teachers)
    print(f"ResNet18 at {args.side} px, batch {args.batch_size}, teachers {names}")
    print(f"medians of {args.steps} steps of each kind:")
    milliseconds = {kind: f"{1e3 * value:.0f} ms" for kind, value in median.items()}
    print(f"  stand-alone     {milliseconds['alone']}, of which views {milliseconds['views']}")
    print(f"  cached logits   {milliseconds['cached']}")
    print(f"  teachers online {milliseconds['online']}")
    print(f"cached / stand-alone {median['cached'] / median['alone']:.3f}")
    print(f"online / cached      {median['online'] / median['cached']:.2f}")
    print(f"views / stand-alone  {median['views'] / median['alone']:.3f}")


if __name__ == "__main__":
    cli.run(main)
