"""Does the red point at the defect? Evidence on drawn parts whose defects are known pixel by pixel.

    python tests/benchmarks/heatmaps.py runs/student/student.ts --sheet heatmaps.png   # a minute
    python tests/benchmarks/heatmaps.py runs/*/student.ts --count 20

Every defective part is drawn twice from the same random numbers, once without its defect; where the
two pictures differ, there it is. On pictures whose class the student names: the pixel AUROC, the
probability that a pixel of the defect is redder than one beside it (0.5 is chance). Two occlusion
maps: of the picture, and of another picture of the class, which knows that parts lie in the middle
and heads at an end, but has not seen this part. The seed is none of the embedded set's. A bend is
not in one place, so bent parts are left out.
"""

from pathlib import Path

import numpy as np
from bench import Z, print_table
from PIL import Image

from common import cli
from common.fasteners import CLASSES
from common.fasteners.drawing import draw
from common.files import px
from common.metrics import numbers_of
from infer import load_student, occlusion_map, redden, resize

SEED, SPLIT = 77, 0
CHANGED = 12  # of 255, from which a pixel belongs to the defect
LOCAL = [name for name in CLASSES if name not in ("good", "bent")]
SHOWN, SIDE = 5, 240  # pictures per class on the sheet; px of each


def draw_twins(name, number):
    """(picture uint8 [S, S, 3], bool [S, S] that is True where the defect is)."""
    picture, flawless = (draw(each, (SEED, SPLIT, number)) for each in (name, "good"))
    difference = np.abs(picture.astype(int) - flawless).max(2)
    return picture, difference > CHANGED


def enlarged(evidence, size):
    """The evidence [h, w] at (width, height), as infer.py lays it over a picture."""
    return np.asarray(Image.fromarray(evidence).resize(size, Image.Resampling.BICUBIC))


def pixel_auroc(evidence, defect):
    """Probability that a pixel of the defect is redder than one beside it; ties count half.

    evidence: float [h, w]; defect: bool [S, S].
    """
    heat = enlarged(evidence, defect.shape[::-1]).ravel()
    _, rank, count = np.unique(heat, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # from 1, of equal values together
    n = defect.sum()
    of_defect = mean_rank[rank][defect.ravel()].sum()
    return (of_defect - n * (n + 1) / 2) / (n * (defect.size - n))


def overlay(picture, evidence, side):
    """The picture at side x side px, with red where the evidence [h, w] in 0..1 is."""
    image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    redden(image, evidence)
    return image


def named_parts(student, metadata, name, count):
    """[(picture, evidence, defect)] of the parts of a class that the student names."""
    parts, good = [], numbers_of(metadata["good_classes"], metadata["classes"])
    for number in range(count):
        picture, defect = draw_twins(name, number)
        said = metadata["classes"][int(student(picture).argmax())]
        if said == name and defect.any():
            evidence = occlusion_map(student, resize(picture, metadata["view_size"]), good)
            parts.append((picture, evidence, defect))
    return parts


def score(parts):
    """The cells of one class: AUROC of each picture's own evidence, and of the next one's."""
    maps = [evidence for _, evidence, _ in parts]
    defects = [defect for _, _, defect in parts]
    cells = []
    for some in (maps, maps[1:] + maps[:1]):
        areas = [pixel_auroc(evidence, defect) for evidence, defect in zip(some, defects)]
        half = Z * np.std(areas, ddof=1) / len(areas) ** 0.5
        cells.append(f"{np.mean(areas):.2f} ± {half:.2f}")
    covered = 100 * np.mean([defect.mean() for defect in defects])
    return [*cells, f"{covered:.0f}"]


def sheet_row(picture, evidence, defect):
    """Picture, overlay and defect beside each other."""
    plain = overlay(picture, np.zeros_like(evidence), SIDE)
    mask = Image.fromarray(defect).convert("RGB").resize((SIDE, SIDE))
    parts = [plain, overlay(picture, evidence, SIDE), mask]
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


def measure(path, count):
    """Print the table of one exported student; returns what is shown on the sheet."""
    student, metadata = load_student(path)
    rows, shown = [], []
    for name in LOCAL:
        parts = named_parts(student, metadata, name, count)
        cells = score(parts) if len(parts) > 1 else ["", "", ""]
        rows.append([name, f"{len(parts)} of {count}", *cells])
        shown += parts[:SHOWN]
    print(f"\n{path}: view size {px(metadata['view_size'])}, {metadata['precision']}\n")
    print_table([
        "class", "named", "pixel AUROC", "of another picture's map", "defect covers, % of picture",
    ], rows)
    return shown


def main():
    p = cli.parser(__doc__)
    p.add_argument("model", nargs="+", help="exported students of the embedded set")
    p.add_argument("--count", type=cli.positive_int, default=60, help="parts per class")
    p.add_argument("--sheet", type=Path, metavar="FILE",
                   help="write picture, evidence and defect beside each other, of the last model")
    args = p.parse_args()
    for path in args.model:
        shown = measure(path, args.count)
    print("\n±: half the width of a 95 % interval over the named parts")
    if args.sheet:
        rows = [sheet_row(*each) for each in shown]
        Image.fromarray(np.concatenate(rows)).save(args.sheet)


if __name__ == "__main__":
    cli.run(main)
