"""Judge pictures with the exported student alone: this file and student.ts are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures 'shots/*.png'
    python infer.py --watch /mnt/camera --json           # judge what a camera drops there, each picture once
    python infer.py --heatmap overlays data/fasteners/test/scratched
    python infer.py --info                               # what the file says about itself
    python infer.py --benchmark                          # what this device can do

Needs torch, numpy and Pillow. Prints one line per picture: path, class, probability, and PASS, REJECT or REVIEW
where the file holds a threshold (tab-separated; --csv and --json for machines). The defect score is 1 - p(good class);
a part is rejected when it reaches the threshold. Exit status 2 when nothing could be done (wrong usage, no model),
1 when some pictures could not be read; they are reported on standard error and the others go on.
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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
MAX_PIXELS = 80_000_000
FIELDS = ("path", "decision", "class", "probability", "defect_score")
POLL, SETTLE = 0.1, 2.0  # seconds between two looks at a watched folder; age at which an unreadable file counts as bad
PLACES, COVER = 8, 0.3  # places per side that a heatmap covers in turn; radius of a cover, as a share of half the side
FULL_HEAT = 2.0  # least nats by which covering a place must weaken the defect for that place to be drawn in full red


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


def load_student(path, engine="auto"):
    """(module, metadata) of a student.ts; ends the program with one line when it is not one.

    A float file is compiled for this processor. An int8 file is packed for one of torch's engines while
    it is loaded; the fastest depends on the processor, so 'auto' tries each for a moment.
    """
    if not Path(path).is_file():
        fail(f"{path}: no such file; distill.py writes it")
    module, metadata = _load(path)
    frame = torch.zeros(metadata["view_size"], metadata["view_size"], 3, dtype=torch.uint8)
    if metadata.get("precision") == "float32" and torch.backends.mkldnn.is_available():
        torch.jit.enable_onednn_fusion(True)  # convolution, sum and ReLU in one go: a quarter faster
        for _ in range(3):  # the first call is looked at and the second compiled, before any picture waits
            _timed(module, frame)
    if metadata.get("precision") != "int8":
        return module, metadata
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if engine != "auto":
        if engine not in engines:
            fail(f"--engine {engine}: this torch has {', '.join(engines)}")
        engines = [engine]
    modules, seconds = {}, {}
    for name in engines:
        torch.backends.quantized.engine = name
        modules[name] = _load(path)[0]
        seconds[name] = min(_timed(modules[name], frame) for _ in range(6))
    best = min(seconds, key=seconds.get)
    torch.backends.quantized.engine = best
    print(f"int8 engine: {best}", file=sys.stderr)
    return modules[best], metadata


def _load(path):
    extra = {"metadata.json": ""}
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript and quantised tensors are deprecated upstream
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return module, json.loads(extra["metadata.json"])
    except (RuntimeError, ValueError, zipfile.BadZipFile):
        fail(f"{path}: not a student.ts, or damaged; export it again with distill.py")


@torch.inference_mode()
def _timed(module, frame):
    start = time.perf_counter()
    module(frame)
    return time.perf_counter() - start


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


def decode_ahead(paths, count=4):
    """(path, picture or the exception that reading it raised), in order, decoded beside the caller's work."""
    def read(path):
        try:
            return path, read_picture(path)
        except Exception as error:  # Pillow raises many kinds for damaged files
            return path, error

    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for path in paths:
            waiting.append(pool.submit(read, path))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Judge:
    """Student, operating point and where heatmaps go: picture -> verdict."""

    def __init__(self, student, metadata, review_band=None, heatmap=None):
        self.student, self.classes, self.view_size, self.heatmap = student, metadata["classes"], metadata["view_size"], heatmap
        point = metadata.get("operating_point")
        self.good = self.classes.index(metadata["good_class"]) if metadata.get("good_class") else None
        self.threshold = point["threshold"] if point else None
        self.band = review_band or (self.threshold, self.threshold)

    @torch.inference_mode()
    def __call__(self, path, picture):
        """The verdict on one uint8 [H, W, 3] picture, as plain data with FIELDS and all probabilities."""
        p = self.student(torch.from_numpy(picture))[0].tolist()
        best = max(range(len(p)), key=p.__getitem__)
        score = None if self.good is None else 1.0 - p[self.good]
        return {"path": str(path), "decision": self.decide(score), "class": self.classes[best], "probability": p[best],
                "defect_score": score, "probabilities": dict(zip(self.classes, p))}

    def decide(self, score):
        if self.threshold is None:
            return None
        low, high = self.band
        return "REJECT" if score >= high else "REVIEW" if score >= low else "PASS"

    def draw(self, verdict, picture):
        """Where heatmaps are asked for and it did not pass: write the overlay of the likeliest defect under what was decided."""
        if not self.heatmap or verdict["decision"] == "PASS":
            return
        image, defect = overlay(self.student, picture, self.view_size, self.good)
        sheet = Image.new("RGB", (image.width, image.height + 18), "white")
        sheet.paste(image, (0, 18))
        text = f"{verdict['decision'] or ''} {verdict['class']} {verdict['probability']:.2f}; red: {self.classes[defect]}"
        ImageDraw.Draw(sheet).text((3, 3), text.strip(), fill="black")
        name = "_".join(Path(verdict["path"]).parts[-2:]).replace("/", "_").replace("\\", "_")
        sheet.save(Path(self.heatmap) / (Path(name).stem + ".jpg"), quality=90)


def overlay(student, picture, side, good):
    """(image, class number): the picture, uint8 [H, W, 3], with red where the `evidence` for its likeliest defect is."""
    heat, defect = evidence(student, picture, side, good)
    image = ImageOps.contain(Image.fromarray(picture), (480, 480))
    mask = Image.fromarray((heat * 160).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    image.paste((230, 20, 20), mask=mask)
    return image, defect


@torch.inference_mode()
def evidence(student, picture, side, good):
    """(heat, class number): float [PLACES, PLACES] in 0..1, by how much covering each place weakens the likeliest defect.

    Occlusion (Zeiler and Fergus 2014): each place in turn is blurred away, softly, and the change of log p(defect) - log p(good) counts.
    Costs PLACES^2 more pictures through the student; its own `explain` is free, but points worse (tests/benchmarks/heatmaps.py).
    picture: uint8 [H, W, 3]; side: the student's view size in px; good: number of the good class or None.
    """
    frame = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None], size=(side, side), mode="bilinear", antialias=True)
    blurred = F.interpolate(F.interpolate(frame.float(), size=(4, 4), mode="area"), size=(side, side), mode="bilinear")
    pixel, place = ((torch.arange(n) * 2 + 1) / n - 1 for n in (side, PLACES))
    near = torch.exp(-((pixel - place[:, None]) / COVER).square())
    covers = (near[:, None, :, None] * near[None, :, None, :]).flatten(0, 1)[:, None]
    covered = (frame + covers * (blurred - frame)).round().to(torch.uint8)
    log_p = torch.cat([student(part) for part in (frame, *covered.split(16))]).clamp(min=1e-9).log()
    defect = max((c for c in range(log_p.shape[1]) if c != good), key=log_p[0].__getitem__)
    lead = log_p[:, defect] - (log_p[:, good] if good is not None else 0.0)
    weakened = (lead[0] - lead[1:]).clamp(min=0).view(PLACES, PLACES)
    return (weakened / weakened.max().clamp(min=FULL_HEAT)).numpy(), defect  # weak evidence stays pale


def printer(form):
    """A function that prints a verdict as 'text', 'csv' or 'json', one line each, at once."""
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()

    def show(verdict):
        if form == "json":
            print(json.dumps({name: value for name, value in verdict.items() if value is not None}))
        elif form == "csv":
            writer.writerow(verdict)
        else:
            decision = f"\t{verdict['decision']}" if verdict["decision"] else ""
            print(f"{verdict['path']}\t{verdict['class']}\t{verdict['probability']:.3f}{decision}")
        sys.stdout.flush()
    return show


def arrivals(folder, judged, poll=POLL, settle=SETTLE):
    """Pictures as a camera drops them into `folder`: (path, key, picture or exception), in order of arrival, for ever.

    A file is yielded when it decodes, or, with the exception, when it has not changed for `settle` seconds and
    still does not. key = name, size and time of change; files whose key is in `judged` are left alone.
    """
    while True:
        found = []
        for entry in os.scandir(folder):
            if entry.is_file() and Path(entry.name).suffix.lower() in EXTENSIONS:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # moved away meanwhile
                    continue
                key = (entry.name, stat.st_size, stat.st_mtime_ns)
                if key not in judged:
                    found.append((stat.st_mtime_ns, entry.name, key))
        for changed, name, key in sorted(found):
            path = Path(folder) / name
            try:
                picture = read_picture(path)
            except Exception as error:
                if time.time() - changed / 1e9 < settle:
                    continue  # half-written, most likely
                picture = error
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if (name, stat.st_size, stat.st_mtime_ns) == key:  # else it was still being written
                yield path, key, picture
        time.sleep(poll)


def watch(folder, record, judge, show):
    """Judge what arrives in `folder`, each picture once, across restarts.

    record: file that gets one JSON line per picture, in one write, before anything is printed: what it holds
    was judged, what it does not hold was not, wherever the process is killed.
    """
    judged = set()
    with open(record, "ab+") as file:
        file.seek(0)
        lines = file.read().split(b"\n")
        if lines[-1]:  # the write of the last line was cut off
            file.truncate(file.tell() - len(lines[-1]))
        for line in lines[:-1]:
            judged.add(tuple(json.loads(line)["key"]))
        print(f"watching {folder}; {len(judged)} judged before, in {record}; Ctrl-C ends", file=sys.stderr)
        for path, key, picture in arrivals(folder, judged):
            if isinstance(picture, Exception):
                verdict = {"path": str(path), "error": str(picture)}
            else:
                verdict = judge(path, picture)
            judged.add(key)
            os.write(file.fileno(), (json.dumps({"key": key, **verdict}) + "\n").encode())
            os.fsync(file.fileno())
            if "error" in verdict:
                print(f"{path}: cannot be read ({picture})", file=sys.stderr)
            else:
                show(verdict)
                judge.draw(verdict, picture)


def benchmark(judge, seconds=5.0, frame_size=(480, 640)):
    """Frame to decision on this device: median, 95th and 99th percentile in ms and frames per second."""
    frame = np.random.default_rng(0).integers(0, 256, (*frame_size, 3), dtype=np.uint8)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        times = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 30:
            start = time.perf_counter()
            judge("frame", frame)
            times.append(1e3 * (time.perf_counter() - start))
        p50, p95, p99 = np.percentile(times[10:], (50, 95, 99))  # the first ten warm up
        print(f"{threads} threads, {frame_size[1]} x {frame_size[0]} frame to decision: p50 {p50:.2f} ms, p95 {p95:.2f} ms, "
              f"p99 {p99:.2f} ms, {1e3 / np.mean(times[10:]):.0f} frames/s (n = {len(times) - 10})")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("pictures", nargs="*", default=["data/fasteners/test"], metavar="PICTURE_OR_FOLDER",
                   help="pictures, patterns, or folders searched through (default: the embedded test set)")
    p.add_argument("--model", default="runs/student/student.ts", help="exported student (default: %(default)s)")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="a JSON object per line with all probabilities")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated, with a header")
    p.add_argument("--review-band", nargs=2, type=float, metavar=("LOW", "HIGH"),
                   help="defect scores from LOW to below HIGH are neither passed nor rejected: REVIEW")
    p.add_argument("--heatmap", metavar="DIR", help="also write each picture that does not pass with red over the evidence for a defect "
                   f"({PLACES}x{PLACES} more pictures through the student)")
    p.add_argument("--watch", metavar="DIR", help="judge pictures as they arrive in DIR, each once, until stopped")
    p.add_argument("--record", metavar="FILE", help="what --watch has judged (default: DIR/judged.jsonl)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument("--engine", default="auto", help="of an int8 file: auto (the fastest here), x86, fbgemm, onednn, qnnpack")
    p.add_argument("--info", action="store_true", help="print what the file says about itself, and end")
    p.add_argument("--benchmark", action="store_true", help="measure this device, and end")
    args = p.parse_args()
    if args.threads is not None and args.threads < 1:
        p.error("--threads: at least 1")
    if args.review_band and not 0 <= args.review_band[0] <= args.review_band[1] <= 1:
        p.error("--review-band: wants 0 <= LOW <= HIGH <= 1")
    return args


def main():
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    student, metadata = load_student(args.model, args.engine)
    if args.info:
        print(json.dumps(metadata, indent=1))
        return
    if args.review_band and not metadata.get("operating_point"):
        fail(f"{args.model}: holds no threshold, so --review-band has no meaning; export it with a --good-class")
    if args.heatmap:
        Path(args.heatmap).mkdir(parents=True, exist_ok=True)
    judge = Judge(student, metadata, args.review_band, args.heatmap)
    if args.benchmark:
        benchmark(judge)
        return
    show = printer(args.form)
    if args.watch:
        if not Path(args.watch).is_dir():
            fail(f"--watch {args.watch}: no such folder")
        watch(args.watch, args.record or Path(args.watch) / "judged.jsonl", judge, show)
    paths, unreadable = list(list_pictures(args.pictures)), 0
    if not paths:
        fail(f"no pictures in {', '.join(args.pictures)}")
    for path, picture in decode_ahead(paths):
        if isinstance(picture, Exception):
            print(f"{path}: cannot be read ({picture})", file=sys.stderr)
            unreadable += 1
        else:
            verdict = judge(path, picture)
            show(verdict)
            judge.draw(verdict, picture)
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more at exit
        sys.exit(0)
