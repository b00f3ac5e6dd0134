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

from common import data, shortcuts, synthetic  # noqa: E402


def thumbnails(pictures, side):
    """float [N, 3 side^2], values 0..255."""
    return np.array([np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX)).ravel() for picture in pictures], float)


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
        tests = [thumbnails(splits[s][0], side) for s in ("test", "test_shifted")]
        for source, (pictures, labels) in sources.items():
            answers = shortcuts.ridge(thumbnails(pictures, side), labels, tests)
            test, shifted = (100 * (answer.argmax(1) == splits[s][1]).mean() for answer, s in zip(answers, ("test", "test_shifted")))
            print(f"{name}, {len(labels)} pictures ({source}): test {test:.1f} %, test_shifted {shifted:.1f} %")


if __name__ == "__main__":
    main()
