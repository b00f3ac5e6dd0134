"""A teacher from patches: frozen DINOv2, a linear head on every patch, the highest of them.

    python tests/benchmarks/patch_teacher.py --data DIR --weights DIR --sets mvtec_screw --seeds 0 1

The development pictures of small_defects.py. Every picture passes once through the frozen network
at a size of many pixels; what is trained is a linear head on its tokens. A picture's logit of a
defect is the mean over a share of its patches, those with the highest logit of it (as DevNet, Pang
et al. 2021, and DRA, Ding et al. 2022, pool; AnomalyDINO, Damm et al. 2025, scores so); good has
the logit 0. Beside it a linear head on the class token of the same pass.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from small_defects import TASKS, development_folder
from torch import nn
from tqdm import tqdm

from common import cli, metrics, models, splits
from common.losses import class_weights
from common.pictures import WHITE_LEVEL, DecodedCache

NAME = "vit_small_patch14_dinov2"
SIZES = {"mvtec_screw": [448, 448], "ballscrew": [280, 700]}
TOPS = (0.05, 0.01, 0.003)  # shares of the patches
STEPS, LR, WEIGHT_DECAY, BATCH = 300, 3e-3, 1e-2, 64


@torch.inference_mode()
def tokens_of(backbone, pictures, file):
    """(class tokens, patch tokens): float16 [N, C] and [N, T, C]; kept in a file, once made."""
    if file.is_file():
        return torch.load(file)
    classes, patches = [], []
    for i in tqdm(range(len(pictures)), "tokens", disable=None, leave=False):
        pixels = pictures.batch([i]).permute(0, 3, 1, 2).float()
        with models.autocast(pixels.device):
            tokens = backbone.backbone.forward_features(backbone.normalise(pixels))
        classes.append(tokens[:, 0].half())
        patches.append(tokens[:, 1:].half())
    tokens = torch.cat(classes), torch.cat(patches)
    torch.save(tokens, file)
    return tokens


def pooled(logits, top):
    """[B, T, K] -> [B, K]: of each class the mean of this share of its patches, the highest."""
    return logits.topk(max(1, round(top * logits.shape[1])), dim=1).values.mean(1)


def fit(features, labels, classes, good, top, seed):
    """A linear head, trained with the classes balanced; features: [N, T, C] or [N, C]."""
    torch.manual_seed(seed)
    head = nn.Linear(features.shape[-1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    weights = class_weights(labels, classes)
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,))
        loss = F.cross_entropy(answer(head, features[rows], good, top), labels[rows], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def answer(head, features, good, top):
    """Logits [B, K] of features [B, T, C] or [B, C]."""
    logits = head(F.layer_norm(features.float(), features.shape[-1:]))
    if logits.dim() == 3:
        logits = pooled(logits, top)
        logits = torch.where(torch.arange(logits.shape[1]) == good, 0.0, logits)
    return logits


def measure(name, seed, args):
    """Print the balanced accuracy of both heads on the development pictures."""
    folder = development_folder(name, seed, False, args)
    cache = DecodedCache(Path(args.output) / "decoded")
    dataset = {"dir": folder.as_posix(), "view_size": SIZES[name], "white_level": WHITE_LEVEL,
               "val_fraction": 0.2, "group_regex": None, "dropped": []}
    train, val, dataset = splits.open_training(cache, dataset)
    classes = len(dataset["classes"])
    file = Path(args.weights) / f"{NAME}.safetensors"
    backbone = models.create_teacher(NAME, classes, SIZES[name], weights=file).eval()
    start = time.perf_counter()
    of_train, of_val = (tokens_of(backbone, each, folder / f"{part}.tokens")
                        for part, each in (("train", train), ("val", val)))
    seconds = time.perf_counter() - start
    good = dataset["classes"].index("good")
    for top in (None, *TOPS):
        x, y = of_train[top is not None], of_val[top is not None]
        start = time.perf_counter()
        head = fit(x, train.labels, classes, good, top, seed)
        took, scores = time.perf_counter() - start, []
        for features, pictures in ((x, train), (y, val)):
            with torch.inference_mode():
                logits = [answer(head, rows, good, top) for rows in features.split(BATCH)]
            score = metrics.score(torch.softmax(torch.cat(logits), 1), pictures.labels)
            scores.append(f"{100 * score['balanced_accuracy']:.1f}")
        kind = f"highest {100 * top:g} % of the patches" if top else "class token"
        print(f"{name}, seed {seed}, {kind}: balanced {' % of train, '.join(scores)} % of the "
              f"{len(val)} others; tokens {seconds:.0f} s, head {took:.0f} s", flush=True)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", required=True, help="folder with the image sets")
    p.add_argument("--weights", required=True, help="folder with DINOv2's weights")
    p.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--output", default="runs/small_defects", help="working folder")
    args = p.parse_args()
    for name in args.sets:
        for seed in args.seeds:
            measure(name, seed, args)


if __name__ == "__main__":
    main()
