"""The four exported files side by side: what they decide on test pictures, and how they differ.

    python distill.py --resume --onnx
    python tests/benchmarks/formats.py runs/student [other/student ...]

Reads run folders of distill.py with all four files, and the test* folders beside the pictures they
were trained on. Seconds, once the files are there.
"""

from pathlib import Path

import numpy as np
from bench import machine, print_table

from common import cli, folders, splits
from common.export import load_exported
from common.metrics import score
from common.models import read_header
from common.pictures import DecodedCache

NAMES = ("student.ts", "student.onnx", "student.int8.ts", "student.int8.onnx")
PAIRS = ((0, 1), (0, 2), (0, 3), (2, 3))  # that decisions are compared of
BATCH = 64


def answers(path, pictures):
    """Probabilities, float32 [N, K]."""
    student = load_exported(path)[0]
    rows = np.arange(len(pictures))
    batches = np.split(rows, range(BATCH, len(rows), BATCH))
    return np.concatenate([student(pictures.batch(batch)).numpy() for batch in batches])


def rows_of(folder):
    """A row per test set of one run folder."""
    dataset = read_header(folder / "model.pt")["dataset"]
    tests = folders.test_folders(dataset["dir"])
    sets = splits.open_tests(DecodedCache(cli.CACHE), tests, dataset)
    for name, pictures in sets.items():
        said = [answers(folder / file, pictures) for file in NAMES]
        row = [Path(dataset["dir"]).name, name, f"{len(pictures)}"]
        row += [f"{100 * score(p, pictures.labels)['accuracy']:.1f}" for p in said]
        for a, b in PAIRS:
            row.append(f"{(said[a].argmax(1) != said[b].argmax(1)).sum()}")
        yield [*row, f"{np.abs(said[0] - said[1]).max():.0e}"]


def main():
    p = cli.parser(__doc__)
    p.add_argument("folder", nargs="+", type=Path, help="run folders with the four files")
    args = p.parse_args()
    rows = [row for folder in args.folder for row in rows_of(folder)]
    print(f"\nAccuracy in %, pictures that two files decide otherwise, {machine('onnxruntime')}\n")
    pairs = [f"{NAMES[a]}, {NAMES[b]}".replace("student.", "") for a, b in PAIRS]
    names = [name.removeprefix("student.") for name in NAMES]
    print_table(["pictures", "test set", "n", *names, *pairs, "probability, ts to onnx"], rows)


if __name__ == "__main__":
    cli.run(main)
