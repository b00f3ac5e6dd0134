"""Judge pictures with the exported student alone: this file and that one are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures 'shots/*.png'
    python infer.py --watch /mnt/camera --json           # what a camera drops there, each once
    python infer.py --heatmap overlays data/fasteners/test/scratched
    python infer.py --info                               # what the file says about itself
    python infer.py --model student.onnx shots/          # the same on a device without torch

Needs numpy, Pillow and torch, or for an .onnx file onnxruntime in its place. Prints a line per
picture: path, class, probability, and PASS, REJECT or REVIEW where the file holds a threshold on
the defect score 1 - p(good class). What cannot be printed is escaped as in a Python string (\\n,
\\x1b, \\udcff; a backslash as \\\\); in --csv a path that a spreadsheet would take for a formula
(=1+1.png) gets ./ in front. Exit status 2 when nothing could be done (wrong usage, no model, a full
disk), 1 when some pictures could not be read.

A .ts file is a program, and loading it runs it: load only files you trust. --sha256 HEX refuses
every file but the one that distill.py printed HEX for.
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from timeit import repeat

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices of `resize` are too small for more

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageOps  # noqa: E402

EXTENSIONS = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .pgm .ppm".split())
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever a file's name says
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 80_000_000, 65_535, 50
LARGE, DENSITY = 16_000_000, 250  # pixels; most pixels per byte of a file with more
BAND = 128  # rows that are converted at a time
SCHEMA = 4  # of the exported file, as in common/export.py
SEALS = {".ts": 95, ".onnx": 89}  # bytes at a file's end that hold the sha256 of all before them
BLOCK = 4  # rows that `resize` makes at a time
FIELDS = ("path", "decision", "class", "probability", "defect_score")  # of --csv
POLL, SETTLE = 0.1, 2.0  # s between looks at a folder; age at which an unreadable file is bad
CONTROLS = r"\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069"  # and direction marks
RED, OPACITY, LARGEST = (230, 20, 20), 160, 480  # of a heatmap; px of its longer side
# Of `explain`: places per side that are covered in turn; radius of a cover, as a share of half the
# side; px per side that what is under a cover is reduced to; nats that count as full evidence.
PLACES, COVER, BLUR, FULL_HEAT = 8, 0.3, 4, 2.0
warnings.filterwarnings("ignore", message=".*torch.jit")  # TorchScript is deprecated upstream
warnings.filterwarnings("ignore", module="PIL")  # a picture is read, or reported in one line


def fail(message):
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def printable(text):
    """Text that is one line and drives no terminal: the rest and bytes of no UTF-8 are escaped."""
    return re.sub(rf"[\\{CONTROLS}\ud800-\udfff]", lambda found: repr(found[0])[1:-1], str(text))


def read_picture(file, white_level=65535):
    """Decode a picture to uint8 RGB [H, W, 3], upright; the same lines as common/images.py's."""
    with Image.open(file, formats=FORMATS) as image:
        image.filename = ""  # else Pillow may map the file, and a file cut off meanwhile is fatal
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            limit = f"{MAX_PIXELS} or {MAX_SIDE} a side"
            raise ValueError(f"{width} x {height} pixels, over the limit of {limit}")
        place = image.fp.tell()
        size = image.fp.seek(0, io.SEEK_END)
        image.fp.seek(place)
        if width * height > max(LARGE, DENSITY * size):
            raise ValueError(f"{width} x {height} pixels in {size} bytes, as no camera writes them")
        if "progressive" in image.info and image.fp.read().count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans, which takes minutes")
        ImageOps.exif_transpose(image, in_place=True)
        picture = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, BAND):  # converted whole, it would take twice the memory
            rows = picture[top:top + BAND]
            band = image.crop((0, top, image.width, top + len(rows)))
            if band.mode.startswith(("I", "F")):  # convert("RGB") would clip at 255
                values = np.asarray(band, dtype=np.float32) / (white_level / 255)
                band = Image.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
            rows[:] = np.asarray(band.convert("RGB"))
        return picture


def try_to_read(path, white_level):
    """The picture, or the exception that reading it raised."""
    try:
        return read_picture(path, white_level)
    except Exception as error:  # Pillow raises many kinds for damaged files
        return error


def list_pictures(names):
    """Files as given, patterns expanded, folders searched through, links followed, all sorted."""
    for name in names:
        if os.path.isdir(name):
            yield from pictures_below(Path(name))
        elif found := [name] if os.path.isfile(name) else glob.glob(name, recursive=True):
            yield from map(Path, sorted(filter(os.path.isfile, found)))  # no pipe, which never ends
        else:
            fail(f"{name}: no such file or folder")


def pictures_below(folder, above=()):
    """The pictures below a folder; above: the folders on the way here."""
    here = folder.resolve()
    for path in sorted(folder.iterdir()) if here not in above else ():  # else a link in a circle
        if path.is_dir():
            yield from pictures_below(path, (*above, here))
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path


# ------------------------------------------------------------------------------------- the student


def load_student(path, sha256=None, threads=None):
    """(student, metadata) of an exported file; ends the program with one line for any other.

    student: uint8 pictures [H, W, 3] or [B, H, W, 3] -> probabilities, float32 [B, K].
    """
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file; distill.py writes it")
    data = path.read_bytes()  # once, so that what is loaded is what was checked
    if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        fail(f"{path}: its sha256 is {found}, not {sha256}; copy the file again")
    try:
        load = load_onnx if path.suffix == ".onnx" else load_torchscript
        student, metadata, runtime = load(data, threads)
        check(student, metadata)
        return student, {**metadata, "runtime": runtime}
    except ModuleNotFoundError as error:
        fail(f"{path}: needs {error.name}, which is not installed; pip install {error.name}")
    except Exception:  # of many kinds
        name = "student.onnx" if path.suffix == ".onnx" else "student.ts"
        fail(f"{path}: not a {name} of this version, or damaged; export it again (distill.py)")


def load_torchscript(data, threads):
    """(student, metadata, runtime) of a .ts file: compiled, or on the fastest int8 engine."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # int8 is deprecated upstream as well
    import torch

    check_seal(data, SEALS[".ts"])
    if threads:
        torch.set_num_threads(threads)
    runtime = f"torch {torch.__version__}, {torch.get_num_threads()} threads"

    def load():
        extra = {"metadata.json": ""}
        module = torch.jit.load(io.BytesIO(data), map_location="cpu", _extra_files=extra)

        @torch.inference_mode()
        def student(pictures):
            return module(torch.from_numpy(pictures)).numpy()

        return student, json.loads(extra["metadata.json"])

    student, metadata = load()
    frame = np.zeros((metadata["view_size"], metadata["view_size"], 3), np.uint8)
    if metadata["precision"] == "float32":
        torch.jit.enable_onednn_fusion(torch.backends.mkldnn.is_available())  # a quarter faster
        for _ in range(3):  # the first call is looked at and the second compiled
            student(frame)
        return student, metadata, runtime

    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    students, seconds = {}, {}
    for name in engines:  # a file is packed for an engine while it is loaded
        torch.backends.quantized.engine = name
        students[name] = load()[0]
        seconds[name] = min(repeat(partial(students[name], frame), number=1, repeat=6))
    torch.backends.quantized.engine = best = min(seconds, key=seconds.get)
    return students[best], metadata, f"{runtime}, engine {best}"


def load_onnx(data, threads):
    """(student, metadata, runtime) of an .onnx file, on ONNX Runtime."""
    import onnxruntime

    check_seal(data, SEALS[".onnx"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one for each core
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # who waits, sleeps
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["metadata.json"])
    side = metadata["view_size"]

    def student(pictures):
        pictures = pictures if pictures.ndim == 4 else pictures[None]
        frames = np.stack([resize(picture, side) for picture in pictures])
        return session.run(None, {"pictures": frames})[0]

    runtime = f"onnxruntime {onnxruntime.__version__}, {threads or 'default'} threads"
    return student, metadata, runtime


def check_seal(data, size):
    """Raise ValueError unless the last `size` bytes hold the sha256 of all before them."""
    if hashlib.sha256(data[:-size]).hexdigest().encode() not in data[-size:]:
        raise ValueError("damaged")


def check(student, metadata):
    """Raise an exception of some kind for a file that is not of this version."""
    known = metadata["schema"] == SCHEMA and metadata["precision"] in ("float32", "int8")
    if not known or not metadata["white_level"] > 0:
        raise ValueError("foreign")
    side = metadata["view_size"]
    Judge(student, metadata)(Path(), np.zeros((side, side, 3), np.uint8))  # wrong types fail
    json.dumps(metadata, indent=1)  # what is nested too deep for --info fails


def resize(picture, side):
    """uint8 [H, W, 3] -> [side, side, 3], with the very bytes of common.images.resize."""
    if picture.shape[:2] == (side, side):
        return picture
    rows = picture.reshape(len(picture), -1)
    across = [to_bytes(rows[:, a:b] @ m.T) for m, a, b in mixing(picture.shape[1], side, 3)]
    rows = np.concatenate(across, axis=1)
    down = [to_bytes(m @ rows[a:b]) for m, a, b in mixing(picture.shape[0], side, 1)]
    return np.concatenate(down).reshape(side, side, 3)


def to_bytes(values):
    """Numbers from 0 to 255 as uint8, rounded, halves up."""
    return (values + np.float32(0.5)).astype(np.uint8)


@lru_cache(maxsize=8)
def mixing(size, side, channels):
    """What `resize` mixes along one axis: [(matrix, first, last)], BLOCK of its pixels each.

    matrix @ pixels[first:last] gives them. Weights are those of torch's antialiased "bilinear" for
    integers: a triangle as wide as two pixels of the smaller picture, rounded to fractions of
    2**bits that fit in 15 bits. Sums of them are exact in float32 up to 16 bits.
    """
    scale = size / side
    reach = max(scale, 1.0)
    centre = scale * (np.arange(side) + 0.5)[:, None]
    first = np.maximum(centre - reach + 0.5, 0).astype(int)
    last = np.minimum(centre + reach + 0.5, size).astype(int)
    pixel = np.arange(size)
    weights = np.maximum(1 - np.abs(pixel + 0.5 - centre) / reach, 0)
    weights *= (pixel >= first) & (pixel < last)
    weights /= weights.sum(1, keepdims=True)
    bits = min(22, int(np.log2((2**15 - 0.5) / weights.max())))
    weights = (np.floor(weights * 2**bits + 0.5) / 2**bits).astype("f4" if bits <= 16 else "f8")
    parts = []
    for some in np.split(np.arange(side), range(BLOCK, side, BLOCK)):
        a, b = first[some[0], 0], last[some[-1], 0]
        matrix = np.kron(weights[some, a:b], np.eye(channels, dtype=weights.dtype))
        parts.append((matrix, a * channels, b * channels))
    return parts


def explain(student, frame, good):
    """Evidence, float [8, 8] in 0..1, of one uint8 [S, S, 3] picture at the view size.

    It is how much covering each place weakens the likeliest defect, the likeliest class that is not
    number `good` (None for none): each place in turn is blurred away, softly, and the change of
    log p(defect) - log p(good) counts (occlusion, Zeiler and Fergus 2014). Weak evidence stays
    below 1. Costs 64 more pictures through the student.
    """
    side = len(frame)
    small = Image.fromarray(frame).resize((BLUR, BLUR), Image.Resampling.BOX)
    blurred = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float32)

    # Every cover is the product of a row's and a column's bell curve: [64, S, S, 1].
    pixel = (np.arange(side, dtype=np.float32) * 2 + 1) / side - 1
    place = (np.arange(PLACES, dtype=np.float32) * 2 + 1) / PLACES - 1
    near = np.exp(-(((pixel - place[:, None]) / COVER) ** 2))
    covers = (near[:, None, :, None] * near[None, :, None, :]).reshape(-1, side, side, 1)

    answers = [student(frame[None])]
    for part in np.split(covers, 4):  # 16 at once
        answers.append(student(np.rint(frame + part * (blurred - frame)).astype(np.uint8)))
    log_p = np.log(np.maximum(np.concatenate(answers), 1e-9))
    candidates = log_p[0].copy()
    if good is not None:
        candidates[good] = -np.inf
    lead = log_p[:, candidates.argmax()] - (0 if good is None else log_p[:, good])
    weakened = np.maximum(lead[0] - lead[1:], 0).reshape(PLACES, PLACES)
    return weakened / max(weakened.max(), FULL_HEAT)


# ------------------------------------------------------------------------------------ the verdicts


class Judge:
    """Student and operating point: picture -> verdict."""

    def __init__(self, student, metadata, review_band=None, heatmaps=None):
        """heatmaps: folder that the evidence is drawn into where a picture does not pass."""
        self.student, self.side = student, metadata["view_size"]
        self.classes = [printable(name) for name in metadata["classes"]]
        good, point = metadata["good_class"], metadata["operating_point"]
        self.good = metadata["classes"].index(good) if good else None
        self.heatmaps = heatmaps
        self.band = review_band or (point and (point["threshold"], point["threshold"]))

    def __call__(self, path, picture):
        """The verdict on one uint8 [H, W, 3] picture, or why there is none, as plain data."""
        named = printable(path.as_posix())
        if isinstance(picture, Exception):
            return {"path": named, "error": printable(picture) or type(picture).__name__}
        p = self.student(picture)[0].tolist()
        score = None if self.good is None else 1.0 - p[self.good]
        verdict = {
            "path": named,
            "decision": self.decide(score) if self.band else None,
            "class": self.classes[p.index(max(p))],
            "probability": max(p),
            "defect_score": score,
            "probabilities": dict(zip(self.classes, p, strict=True)),
        }
        if self.heatmaps and verdict["decision"] != "PASS":
            self.draw(verdict, path, picture)
        return verdict

    def decide(self, score):
        low, high = self.band
        return "REJECT" if score >= high else "REVIEW" if score >= low else "PASS"

    def draw(self, verdict, path, picture):
        """Write the picture with red over what speaks for the likeliest defect."""
        evidence = explain(self.student, resize(picture, self.side), self.good)
        size = [max(1, round(n * LARGEST / max(picture.shape))) for n in picture.shape[1::-1]]
        image = Image.fromarray(picture).resize(size)
        mask = Image.fromarray((evidence * OPACITY).astype(np.uint8))
        image.paste(RED, mask=mask.resize(size, Image.Resampling.BICUBIC))

        defects = [name for k, name in enumerate(self.classes) if k != self.good]
        red = max(defects, key=verdict["probabilities"].get)
        text = f"{verdict['decision'] or ''} {verdict['class']} {verdict['probability']:.2f}"
        sheet = Image.new("RGB", (image.width, image.height + 18), "white")
        sheet.paste(image, (0, 18))
        ImageDraw.Draw(sheet).text((3, 3), f"{text}; red: {red}".strip(), fill="black")

        # The path as it was named, below the folder, so that every picture has a file of its own.
        parts = ["up" if part == ".." else part for part in path.parts if part != path.anchor]
        if len(os.fsencode(path.name)) > 250:  # a file system takes 255 with the ending
            parts[-1] = hashlib.sha256(os.fsencode(path.name)).hexdigest()
        file = Path(self.heatmaps, *parts[:-1], f"{parts[-1]}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.samefile(path.parent):
            fail(f"--heatmap {self.heatmaps}: would write among the pictures; name another folder")
        sheet.save(file, quality=90)


def show(verdict, as_json, as_csv):
    """Print a verdict in one line, at once."""
    if "error" in verdict:
        print(f"{verdict['path']}: cannot be read ({verdict['error']})", file=sys.stderr)
    elif as_json:
        print(json.dumps({name: value for name, value in verdict.items() if value is not None}))
    elif as_csv:
        formula = verdict["path"].startswith(("=", "+", "-", "@"))
        row = ("./" * formula + verdict["path"], *(verdict[name] for name in FIELDS[1:]))
        csv.writer(sys.stdout, lineterminator="\n").writerow(row)
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
        keys = {key_of(path): path for path in paths}
        for key in sorted(keys.keys() - judged - {None}, key=lambda key: (key[2], key[0])):
            picture = try_to_read(keys[key], white_level)
            if isinstance(picture, Exception) and time.time() - key[2] / 1e9 < SETTLE:
                continue  # half-written, most likely
            if key_of(keys[key]) == key:  # else it was still being written
                yield keys[key], key, picture
        time.sleep(POLL)


def key_of(path):
    """(name, size, time of change in ns) of a file, None where there is none."""
    with suppress(OSError):  # moved away meanwhile
        stat = path.stat()
        if path.is_file():
            return printable(path.name), stat.st_size, stat.st_mtime_ns


def watch(folder, white_level, judge, report):
    """Judge what arrives in `folder`, each picture once, across restarts, kills and full disks.

    folder/judged.jsonl gets a line per picture, after its heatmap and before its report; where one
    of the three cannot be written, the picture counts as not judged.
    """
    log = Path(folder, "judged.jsonl")
    with open(log, "ab", buffering=0) as file, open(Path(folder, ".judged.lock"), "a") as single:
        lock(single)
        judged, end = read_judged(log)
        file.truncate(end)
        begin = f"watching {printable(folder)}; {len(judged)} judged before; Ctrl-C ends"
        print(begin, file=sys.stderr)
        for path, key, picture in arrivals(folder, judged, white_level):
            verdict = judge(path, picture)
            line = (json.dumps({"key": key, **verdict}) + "\n").encode()
            end = file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk may take a part before it is full
                    line = line[file.write(line):]
                os.fsync(file.fileno())
                report(verdict)
            except OSError:
                file.truncate(end)
                raise
            judged.add(key)


def lock(file):
    """Take the system's lock on an open file, or end the program where another one holds it."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"{Path(file.name).parent}: watched by another infer.py already; end that one first")


def read_judged(log):
    """(keys of the pictures judged before, bytes in whole lines) of a judged.jsonl."""
    judged, whole = set(), 0
    for line in io.BytesIO(log.read_bytes()):
        if line.endswith(b"\n"):  # else a kill cut it off
            whole += len(line)
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # else damaged
                record = line[line.rfind(b'{"key":'):]  # after one that a full disk cut off
                judged.add(tuple(json.loads(record)["key"]))
    return judged, whole


def benchmark(judge, runtime, times=500, height=480, width=640):
    """Print how long a frame takes on this device, from uint8 pixels to the decision."""
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    seconds = repeat(partial(judge, Path("frame"), frame), number=1, repeat=times)
    p50, p95, p99 = 1e3 * np.percentile(seconds[10:], (50, 95, 99))  # the first ones warm up
    print(f"{runtime}, {width} x {height} frame to decision: "
          f"p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms (n = {times - 10})")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("pictures", nargs="*", default=["data/fasteners/test"], metavar="PICTURE",
                   help="files, patterns or folders (default: the embedded test set)")
    p.add_argument("--model", default="runs/student/student.ts", metavar="FILE",
                   help="a .ts or .onnx of distill.py (default: %(default)s)")
    p.add_argument("--sha256", metavar="HEX", help="refuse a model with another sha256")
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
        fail(f"--watch {args.watch}: no such folder")
    return args


def main():
    args = parse_arguments()
    student, metadata = load_student(args.model, args.sha256, args.threads)
    if args.review_band and not metadata["operating_point"]:
        fail(f"{args.model}: holds no threshold for --review-band; export it with a --good-class")
    if args.info:
        return print(json.dumps(metadata, indent=1))
    if args.benchmark:
        return benchmark(Judge(student, metadata, args.review_band), metadata["runtime"])

    judge = Judge(student, metadata, args.review_band, args.heatmap)
    report = partial(show, as_json=args.json, as_csv=args.csv)
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerow(FIELDS)
    if args.watch:
        watch(args.watch, metadata["white_level"], judge, report)
    paths, unreadable = list(list_pictures(args.pictures)), False
    if not paths:
        fail(f"no pictures in {', '.join(args.pictures)}")
    for path, picture in pictures_of(paths, metadata["white_level"]):
        report(judge(path, picture))
        unreadable |= isinstance(picture, Exception)
    sys.exit(int(unreadable))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # where it is no UTF-8
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if not isinstance(error, BrokenPipeError):  # a reader, as in `| head`, that has seen enough
            place = error.filename or "a file or the output cannot be written"
            fail(f"{place}: {error.strerror or error}; mend that and start again")
