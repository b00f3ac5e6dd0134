"""Does the red point at the defect? Heatmaps of drawn parts, whose defects are known pixel by pixel.

    python tests/benchmarks/heatmaps.py runs/student/student.ts [more.ts ...] [--sheet heatmaps.png]

Every defective part is drawn twice from the same random numbers, once without its defect; where the two pictures differ, there it is.
On pictures whose class the student names: the pixel AUROC, the probability that a pixel of the defect is redder than one beside it
(0.5 is chance). Three maps: what infer.py draws, by covering places in turn; the same of another picture of the class, which
knows that parts lie in the middle and heads at an end, but has not seen this part; the file's `explain`, a class activation
map that costs nothing. The seed is none of the embedded set's.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.synthetic import CLASSES, draw  # noqa: E402
from infer import evidence, load_student, overlay  # noqa: E402

SEED, CHANGED = 77, 12  # of 255, from which a pixel belongs to the defect
LOCAL = [name for name in CLASSES if name not in ("good", "bent")]  # a bend is not in one place


def twins(name, number):
    """(picture, True where the defect is): uint8 [S, S, 3] and bool [S, S]."""
    picture, flawless = (draw(each, (SEED, 0, number)) for each in (name, "good"))
    return picture, np.abs(picture.astype(int) - flawless).max(2) > CHANGED


def pixel_auroc(heat, defect):
    """Probability that a pixel where `defect` [S, S] is hotter than one where it is not, the map [h, w] enlarged; ties count half."""
    big = np.asarray(Image.fromarray(heat).resize(defect.shape, Image.Resampling.BICUBIC)).ravel()
    _, rank, count = np.unique(big, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(count) - (count - 1) / 2)[rank]  # from 1, of equal values together
    n = defect.sum()
    return (mean_rank[defect.ravel()].sum() - n * (n + 1) / 2) / (n * (defect.size - n))


def activation_map(student, picture, defect, good):
    """The class activation map of the defect over good's, from `explain`: float [h, w]."""
    maps = student.explain(torch.from_numpy(picture))[1][0]
    return (maps[defect] - maps[good]).clamp(min=0).numpy()


@torch.inference_mode()
def measure(path, count, sheet):
    student, metadata = load_student(path)
    side, good, shown = metadata["view_size"], metadata["classes"].index("good"), []
    print(f"{path} at {metadata['img_size']} px")
    for name in LOCAL:
        covered, activations, defects = [], [], []
        for number in range(count):
            picture, defect = twins(name, number)
            decision = int(student(torch.from_numpy(picture)).argmax())
            if metadata["classes"][decision] == name and defect.any():
                covered.append(evidence(student, picture, side, good)[0])
                activations.append(activation_map(student, picture, decision, good))
                defects.append(defect)
                if len(shown) < 5 * (LOCAL.index(name) + 1):
                    shown.append((picture, np.asarray(overlay(student, picture, side, good)[0]), defect))
        scores = [np.mean([pixel_auroc(heat, defect) for heat, defect in zip(heats, defects)])
                  for heats in (covered, covered[1:] + covered[:1], activations)]
        print(f"  {name:15} {len(defects):4} of {count} named; pixel AUROC {scores[0]:.2f}, another picture's map {scores[1]:.2f}, explain {scores[2]:.2f}; "
              f"the defect covers {100 * np.mean([d.mean() for d in defects]):.0f} % of the picture", flush=True)
    if sheet:
        rows = [np.concatenate([np.asarray(Image.fromarray(each).resize((240, 240))) for each in (p, o, np.repeat(d[..., None], 3, 2).astype(np.uint8) * 255)], 1)
                for p, o, d in shown]
        half = (len(rows) + 1) // 2
        columns = [np.concatenate(part) for part in (rows[:half], rows[half:2 * half])]
        Image.fromarray(np.concatenate([column[:min(map(len, columns))] for column in columns], 1)).save(sheet)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="+", help="exported students of the embedded set")
    p.add_argument("--count", type=int, default=60, help="parts per class")
    p.add_argument("--sheet", help="also write picture, overlay and defect side by side, for the last model")
    args = p.parse_args()
    for path in args.model:
        measure(path, args.count, args.sheet)


if __name__ == "__main__":
    main()
