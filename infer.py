"""Judge pictures with the exported student alone: this file and student.ts are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures 'shots/*.png'
    python infer.py --watch /mnt/camera --json           # what a camera drops there, each once
    python infer.py --heatmap overlays data/fasteners/test/scratched
    python infer.py --info                               # what the file says about itself

Needs torch, numpy and Pillow. Prints a line per picture: path, class, probability, and PASS, REJECT
or REVIEW where the file holds a threshold on the defect score 1 - p(good class). Exit status 2 when
nothing could be done (wrong usage, no model), 1 when some pictures could not be read.
"""

import argparse
import csv
import glob
import json
import os
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .pgm .ppm".split())
MAX_PIXELS = 80_000_000
FIELDS = ("path", "decision", "class", "probability", "defect_score")  # of --csv
POLL, SETTLE = 0.1, 2.0  # s between looks at a folder; age at which an unreadable file is bad
RED, OPACITY, LARGEST = (230, 20, 20), 160, 480  # of a heatmap; px of its longer side
warnings.filterwarnings("ignore", message=".*torch.jit")  # TorchScript is deprecated upstream


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_picture(file, white_level=65535):
    """Decode a picture to uint8 RGB [H, W, 3], upright; the same lines as common/images.py's."""
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over the limit {MAX_PIXELS}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # convert("RGB") would clip at 255
            values = np.asarray(image, dtype=np.float32) / (white_level / 255)
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def try_to_read(path, white_level):
    """The picture, or the exception that reading it raised."""
    try:
        return read_picture(path, white_level)
    except Exception as error:  # Pillow raises many kinds for damaged files
        return error


def list_pictures(names):
    """Files as given, patterns expanded, folders searched through in sorted order."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
        elif path.is_file():
            yield path
        elif matches := sorted(glob.glob(name, recursive=True)):
            yield from map(Path, matches)
        else:
            fail(f"{name}: no such file or folder")


def load_student(path):
    """(module, metadata) of a student.ts, made ready: compiled, or on the fastest int8 engine."""
    module, metadata = load(path)
    frame = torch.zeros(metadata["view_size"], metadata["view_size"], 3, dtype=torch.uint8)
    if metadata["precision"] == "float32":
        torch.jit.enable_onednn_fusion(torch.backends.mkldnn.is_available())  # a quarter faster
        for _ in range(3):  # the first call is looked at and the second compiled
            module(frame)
        return module, metadata

    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    modules, seconds = {}, {}
    for name in engines:  # a file is packed for an engine while it is loaded
        torch.backends.quantized.engine = name
        modules[name] = load(path)[0]
        seconds[name] = min(repeat(partial(modules[name], frame), number=1, repeat=6))
    torch.backends.quantized.engine = best = min(seconds, key=seconds.get)
    return modules[best], {**metadata, "engine": best}


def load(path):
    """(module, metadata) of a file; ends the program with one line when it is no student.ts."""
    extra = {"metadata.json": ""}
    if not Path(path).is_file():
        fail(f"{path}: no such file; distill.py writes it")
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return module, json.loads(extra["metadata.json"])
    except (RuntimeError, ValueError, zipfile.BadZipFile):
        fail(f"{path}: not a student.ts, or damaged; export it again with distill.py")


class Judge:
    """Student and operating point: picture -> verdict."""

    def __init__(self, student, metadata, review_band=None):
        self.student, self.classes = student, metadata["classes"]
        good, point = metadata["good_class"], metadata["operating_point"]
        self.good = self.classes.index(good) if good else None
        self.band = review_band or (point and (point["threshold"], point["threshold"]))

    def __call__(self, path, picture):
        """The verdict on one uint8 [H, W, 3] picture, or why there is none, as plain data."""
        if isinstance(picture, Exception):
            return {"path": str(path), "error": str(picture)}
        p = self.student(torch.from_numpy(picture))[0].tolist()
        score = None if self.good is None else 1.0 - p[self.good]
        return {
            "path": str(path),
            "decision": self.decide(score) if self.band else None,
            "class": self.classes[p.index(max(p))],
            "probability": max(p),
            "defect_score": score,
            "probabilities": dict(zip(self.classes, p)),
        }

    def decide(self, score):
        low, high = self.band
        return "REJECT" if score >= high else "REVIEW" if score >= low else "PASS"

    def draw(self, verdict, picture, folder):
        """Write the picture below `folder` with red over what speaks for the likeliest defect."""
        evidence = self.student.explain(torch.from_numpy(picture))[1].numpy()
        image = ImageOps.contain(Image.fromarray(picture), (LARGEST, LARGEST))
        mask = Image.fromarray((evidence * OPACITY).astype(np.uint8))
        image.paste(RED, mask=mask.resize(image.size, Image.Resampling.BICUBIC))

        defects = [name for k, name in enumerate(self.classes) if k != self.good]
        red = max(defects, key=verdict["probabilities"].get)
        text = f"{verdict['decision'] or ''} {verdict['class']} {verdict['probability']:.2f}"
        sheet = Image.new("RGB", (image.width, image.height + 18), "white")
        sheet.paste(image, (0, 18))
        ImageDraw.Draw(sheet).text((3, 3), f"{text}; red: {red}".strip(), fill="black")

        # The path as it was named, below the folder, so that every picture has a file of its own.
        path = Path(verdict["path"])
        parts = ["up" if part == ".." else part for part in path.parts if part != path.anchor]
        file = Path(folder, *parts[:-1], f"{parts[-1]}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file, quality=90)


def show(verdict, as_json, as_csv):
    """Print a verdict in one line, at once."""
    if as_json:
        print(json.dumps({name: value for name, value in verdict.items() if value is not None}))
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerow([verdict[name] for name in FIELDS])
    else:
        words = (verdict["path"], verdict["class"], f"{verdict['probability']:.3f}")
        print(*words, *filter(None, [verdict["decision"]]), sep="\t")
    sys.stdout.flush()


def pictures_of(paths, white_level):
    """(path, picture or exception) of each path, the next one decoded beside the caller's work."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(try_to_read, paths[0], white_level)
        for path, following in zip(paths, [*paths[1:], None]):
            picture = upcoming.result()
            if following:
                upcoming = pool.submit(try_to_read, following, white_level)
            yield path, picture


def arrivals(folder, judged, white_level):
    """(path, key, picture or exception) as pictures are dropped into a folder, each key once."""
    while True:
        paths = [path for path in Path(folder).iterdir() if path.suffix.lower() in EXTENSIONS]
        keys = {key_of(path) for path in paths} - judged - {None}
        for key in sorted(keys, key=lambda key: key[2]):
            path = Path(folder, key[0])
            picture = try_to_read(path, white_level)
            if isinstance(picture, Exception) and time.time() - key[2] / 1e9 < SETTLE:
                continue  # half-written, most likely
            if key_of(path) == key:  # else it was still being written
                yield path, key, picture
        time.sleep(POLL)


def key_of(path):
    """(name, size, time of change in ns) of a file, None where there is none."""
    with suppress(OSError):  # moved away meanwhile
        stat = path.stat()
        return (path.name, stat.st_size, stat.st_mtime_ns) if path.is_file() else None


def watch(folder, white_level, judge, report):
    """Judge what arrives in `folder`, each picture once, across restarts and kills.

    folder/judged.jsonl gets a line per picture, in one write, before anything is reported.
    """
    with open(Path(folder) / "judged.jsonl", "ab+") as file:
        file.seek(0)
        *lines, cut_off = file.read().split(b"\n")
        file.truncate(file.tell() - len(cut_off))  # a write that a kill interrupted
        judged = {tuple(json.loads(line)["key"]) for line in lines}
        print(f"watching {folder}; {len(judged)} judged before; Ctrl-C ends", file=sys.stderr)
        for path, key, picture in arrivals(folder, judged, white_level):
            verdict = judge(path, picture)
            judged.add(key)
            os.write(file.fileno(), (json.dumps({"key": key, **verdict}) + "\n").encode())
            os.fsync(file.fileno())
            report(picture, verdict)


def benchmark(judge, times=500, height=480, width=640):
    """Print how long a frame takes on this device, from uint8 pixels to the decision."""
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    seconds = repeat(partial(judge, "frame", frame), number=1, repeat=times)
    p50, p95, p99 = 1e3 * np.percentile(seconds[10:], (50, 95, 99))  # the first ones warm up
    threads = f"{torch.get_num_threads()} threads, {width} x {height} frame to decision"
    print(f"{threads}: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms (n = {times - 10})")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("pictures", nargs="*", default=["data/fasteners/test"], metavar="PICTURE",
                   help="files, patterns or folders (default: the embedded test set)")
    p.add_argument("--model", default="runs/student/student.ts", help="default: %(default)s")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object per line, all probabilities")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a header")
    p.add_argument("--heatmap", metavar="DIR", help="write what does not pass, evidence in red")
    p.add_argument("--watch", metavar="DIR", help="judge what arrives, each once (judged.jsonl)")
    p.add_argument("--review-band", nargs=2, type=float, metavar=("LOW", "HIGH"),
                   help="defect scores from LOW to below HIGH are for a person to judge: REVIEW")
    p.add_argument("--threads", type=int, choices=range(1, 257), metavar="N", help="CPU threads")
    p.add_argument("--info", action="store_true", help="print what the file says about itself")
    p.add_argument("--benchmark", action="store_true", help="measure this device")
    args = p.parse_args()
    if args.review_band and not 0 <= args.review_band[0] <= args.review_band[1] <= 1:
        p.error("--review-band: wants 0 <= LOW <= HIGH <= 1")
    if args.watch and not Path(args.watch).is_dir():
        p.error(f"--watch {args.watch}: no such folder")
    return args


@torch.inference_mode()
def main():
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    student, metadata = load_student(args.model)
    if args.review_band and not metadata["operating_point"]:
        fail(f"{args.model}: holds no threshold for --review-band; export it with a --good-class")
    if args.info:
        return print(json.dumps(metadata, indent=1))
    judge, unreadable = Judge(student, metadata, args.review_band), []
    if args.benchmark:
        return benchmark(judge)

    def report(picture, verdict):
        if "error" in verdict:
            unreadable.append(verdict["path"])
            return print(f"{verdict['path']}: cannot be read ({picture})", file=sys.stderr)
        show(verdict, args.json, args.csv)
        if args.heatmap and verdict["decision"] != "PASS":
            judge.draw(verdict, picture, args.heatmap)

    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerow(FIELDS)
    if args.watch:
        watch(args.watch, metadata["white_level"], judge, report)
    paths = list(list_pictures(args.pictures))
    if not paths:
        fail(f"no pictures in {', '.join(args.pictures)}")
    for path, picture in pictures_of(paths, metadata["white_level"]):
        report(picture, judge(path, picture))
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
