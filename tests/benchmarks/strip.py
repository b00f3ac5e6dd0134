"""The picture at the top of the repository's README: test pictures with the student's verdicts.

    python tests/benchmarks/strip.py runs/student/student.ts --output tests/benchmarks/strip.jpg

A row per test set of the embedded data, a column per class: one picture of each, picked by the seed
and not by hand, so right and wrong verdicts stand as they come. Red lies over what speaks for the
likeliest defect, in pictures that do not pass (as in infer.py --heatmap). Takes 5 seconds.
"""

from pathlib import Path

import numpy as np
from heatmaps import overlay
from PIL import Image, ImageDraw, ImageFont

from common import cli
from common.files import UserError
from common.folders import EMBEDDED, class_folders, data_folder, test_folders
from infer import Judge, decode, load_student, occlusion_map, resize

SIDE, GAP, MARGIN = 160, 12, 8  # px of a picture, between columns, around all
LINE, LINES, BELOW = 17, 3, 14  # px of a line of text; lines under a picture; px below them
LETTERS = 14  # px
COLOURS = {"PASS": (20, 120, 50), "REJECT": (190, 20, 20)}
GREY = (110, 110, 110)


def pick(folders, classes, seed):
    """A row of picture files per folder, one of each class, drawn from the seed."""
    rng = np.random.default_rng(seed)
    rows = []
    for folder in folders:
        row = []
        for name in classes:
            files = sorted((folder / name).iterdir())
            row.append(files[rng.integers(len(files))])
        rows.append(row)
    return rows


def tile(judge, file, font):
    """One picture with its verdict and its true label underneath."""
    picture = decode(file.read_bytes())[0]
    verdict = judge(file, picture)
    decision, true = verdict["decision"], file.parent.name
    evidence = occlusion_map(judge.student, resize(picture, judge.view_size), judge.good)
    if decision == "PASS":
        evidence = np.zeros_like(evidence)

    image = Image.new("RGB", (SIDE, SIDE + 4 + LINES * LINE), "white")
    image.paste(overlay(picture, evidence, SIDE), (0, 0))
    pen = ImageDraw.Draw(image)
    said = f"{verdict['class']} {verdict['probability']:.2f}"
    lines = [(decision, COLOURS[decision]), (said, COLOURS[decision]), (f"true: {true}", GREY)]
    for number, (text, colour) in enumerate(lines):
        pen.text((1, SIDE + 4 + number * LINE), text.replace("_", " "), colour, font)
    return image


def arrange(rows):
    """All tiles on a white sheet."""
    width, height = rows[0][0].size
    columns = len(rows[0])
    sheet_width = 2 * MARGIN + columns * width + (columns - 1) * GAP
    sheet_height = 2 * MARGIN + len(rows) * height + (len(rows) - 1) * BELOW
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (MARGIN + x * (width + GAP), MARGIN + y * (height + BELOW)))
    return sheet


def main():
    p = cli.parser(__doc__)
    p.add_argument("model", help="an exported student of the embedded set")
    p.add_argument("--output", type=Path, default=Path("strip.jpg"), help="picture to write")
    p.add_argument("--seed", type=cli.seed, default=0, help="decides which pictures are shown")
    args = p.parse_args()

    student, metadata = load_student(args.model)
    if not metadata["operating_point"]:
        raise UserError(f"{args.model}: holds no threshold, so there are no verdicts")
    folders = test_folders(data_folder(EMBEDDED))
    classes = list(class_folders(folders[0]).values())
    if classes != metadata["classes"]:
        raise UserError(f"{args.model}: not a student of the embedded set")

    judge, font = Judge(student, metadata), ImageFont.load_default(size=LETTERS)
    files = pick(folders, classes, args.seed)
    sheet = arrange([[tile(judge, file, font) for file in row] for row in files])
    sheet.save(args.output, quality=88, subsampling=0)
    for file in sum(files, []):
        print(file)
    print(f"{args.output}: {sheet.width} x {sheet.height} px, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    cli.run(main)
