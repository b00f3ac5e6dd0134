"""What a linear classifier gets from thumbnails of the embedded set: near chance, or the set has a shortcut.

    python tests/benchmarks/shortcuts.py      # half a minute

Ridge regression on 8x8 thumbnails and on the mean colour, fitted on the labelled training pictures and
on five times as many drawn for this purpose, scored on both test sets. Chance is 16.7 %.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common import data, synthetic  # noqa: E402

PENALTY = 100.0


def thumbnails(pictures, side):
    """float [N, 3 side^2 + 1], values 0..255; the last column is the constant 1."""
    flat = [np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX)).ravel() for picture in pictures]
    return np.c_[np.array(flat, float), np.ones(len(flat))]


def ridge_accuracy(x, labels, tests):
    """Accuracies, in %, on tests [(x, labels)] of a ridge classifier fitted on x, labels."""
    mean, spread = x[:, :-1].mean(0), x[:, :-1].std(0)
    scaled = [np.c_[(each[:, :-1] - mean) / spread, each[:, -1]] for each in (x, *(test for test, _ in tests))]
    train, targets = scaled[0], np.eye(len(synthetic.CLASSES))[labels]
    weights = np.linalg.solve(train.T @ train + PENALTY * np.eye(train.shape[1]), train.T @ targets)
    return [100 * float(((test @ weights).argmax(1) == answer).mean()) for test, (_, answer) in zip(scaled[1:], tests)]


def folder(split):
    files = sorted((ROOT / data.EMBEDDED / split).glob("*/*.jpg"))
    return [Image.open(file) for file in files], np.array([synthetic.CLASSES.index(file.parent.name) for file in files])


def main():
    synthetic.make_dataset(ROOT / data.EMBEDDED)
    splits = {split: folder(split) for split in ("train", "test", "test_shifted")}
    count = 5 * len(splits["train"][0])
    kinds = len(synthetic.CLASSES)
    drawn = [Image.fromarray(synthetic.draw(synthetic.CLASSES[i % kinds], (synthetic.SEED, 99, i))) for i in range(count)]
    sources = {"train/": splits["train"], "drawn": (drawn, np.arange(count) % kinds)}
    for side, name in ((8, "8x8 thumbnail"), (1, "mean colour")):
        tests = [(thumbnails(splits[s][0], side), splits[s][1]) for s in ("test", "test_shifted")]
        for source, (pictures, labels) in sources.items():
            test, shifted = ridge_accuracy(thumbnails(pictures, side), labels, tests)
            print(f"{name}, {len(labels)} pictures ({source}): test {test:.1f} %, test_shifted {shifted:.1f} %")


if __name__ == "__main__":
    main()
