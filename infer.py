"""Classify pictures with the exported student alone: this file and student.ts are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures
    python infer.py --json data/fasteners/unlabelled | head

Needs torch, numpy and Pillow. Prints one line per picture: path, class, probability (tab-separated),
or a JSON object with --json. Exit status 2 when nothing could be done (wrong usage, no model), 1 when
some pictures could not be read; they are reported on standard error and the others go on.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
MAX_PIXELS = 80_000_000


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_picture(file):
    """Decode a picture to uint8 RGB [H, W, 3], upright; the same lines as common/data.py's."""
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels is over the limit of {MAX_PIXELS}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 bits per pixel; convert("RGB") would clip at 255
            values = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((values / (257.0 if values.max() > 255 else 1.0)).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def load_student(path):
    """(module, metadata) of a student.ts; ends the program with one line when it is not one."""
    if not Path(path).is_file():
        fail(f"{path}: no such file; distill.py writes it")
    extra = {"metadata.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return module, json.loads(extra["metadata.json"])
    except (RuntimeError, ValueError):
        fail(f"{path}: not a student.ts, or damaged; export it again with distill.py")


def list_pictures(names):
    """Files as given, folders searched through in sorted order."""
    for name in map(Path, names):
        if name.is_dir():
            yield from sorted(p for p in name.rglob("*") if p.suffix.lower() in EXTENSIONS)
        elif name.is_file():
            yield name
        else:
            fail(f"{name}: no such file or folder")


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("pictures", nargs="*", default=["data/fasteners/test"], metavar="PICTURE_OR_FOLDER",
                   help="pictures, or folders searched through (default: the embedded test set)")
    p.add_argument("--model", default="runs/student/student.ts", help="exported student (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="a JSON object per line with all probabilities")
    args = p.parse_args()
    student, metadata = load_student(args.model)
    paths, unreadable = list(list_pictures(args.pictures)), 0
    if not paths:
        fail(f"no pictures in {', '.join(args.pictures)}")
    for path in paths:
        try:
            picture = read_picture(path)
        except Exception as error:  # Pillow raises many kinds for damaged files
            print(f"{path}: cannot be read ({error})", file=sys.stderr)
            unreadable += 1
            continue
        probabilities = student(torch.from_numpy(picture))[0].tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        name = metadata["classes"][best]
        if args.json:
            print(json.dumps({"path": str(path), "class": name, "probability": probabilities[best],
                              "probabilities": dict(zip(metadata["classes"], probabilities))}), flush=True)
        else:
            print(f"{path}\t{name}\t{probabilities[best]:.3f}", flush=True)
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more at exit
        sys.exit(0)
