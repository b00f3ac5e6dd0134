"""Judge pictures with the exported student: this file and that one are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures 'shots/*.png'
    python infer.py --watch /mnt/camera --json --heatmap overlays

Needs numpy, Pillow and torch, or for an .onnx file onnxruntime in its place; --watch filelock, too.
Prints a line per picture: path, class, probability, and PASS, REJECT or REVIEW where the file holds
a threshold on the defect score, the probability of all classes but the good one; odd characters are
escaped as in Python strings. Exit status 2: nothing could be done, 1: some pictures are unreadable.
A .ts file is a program, and loading it runs it: load only files you trust; --sha256 refuses others.
"""

import csv
import glob
import hashlib
import io
import json
import os
import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from timeit import repeat

import numpy as np
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .pgm .ppm".split())
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever a file's name says
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 80_000_000, 65_535, 50
LARGE, DENSITY = 16_000_000, 250  # pixels; most pixels per byte of a file with more
BAND, BLOCK = 128, 4  # rows that are converted at a time, and that `resize` makes at a time
SCHEMA = 6  # of the exported file, as in common/export.py
CHECKSUMS = {".ts": 95, ".onnx": 89}  # bytes at a file's end with the sha256 of all before them
ENGINES = ("x86", "fbgemm", "qnnpack", "onednn")  # for int8, best first; ARM has the last two
FIELDS = ("path", "decision", "class", "probability", "defect_score")  # of --csv
POLL, SETTLE = 0.1, 2.0  # s between looks at a folder; age at which an unreadable file is bad
RED, OPACITY, LARGEST = (230, 20, 20), 160, 480  # of a heatmap; px of its longer side
warnings.filterwarnings("ignore", message=".*torch.jit")  # TorchScript is deprecated upstream
warnings.filterwarnings("ignore", module="PIL")  # a picture is read, or reported in one line


class Refused(Exception):
    """What cannot be done, in one line; the program prints it and ends with status 2."""


def printable(text):
    """Text that is one line and drives no terminal: the rest and backslashes are escaped."""
    return "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in str(text))


def csv_name(name):
    """The name of a file, folder or class so that no spreadsheet takes it for a formula."""
    return f"./{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def read_picture(file, white_level=65535):
    """Decode a picture, a path or binary file, to uint8 RGB [H, W, 3], upright by its EXIF tag.

    Grey pictures of more than 8 bits are scaled so that `white_level` becomes 255. Raises Pillow's
    exceptions, or ValueError for more than MAX_PIXELS, MAX_SIDE or MAX_SCANS, or above LARGE pixels
    DENSITY a byte, before anything is decoded. Takes 7 bytes a pixel, some formats up to 16.
    """
    with Image.open(file, formats=FORMATS) as image:
        image.filename = ""  # else Pillow may map the file, and a file cut off meanwhile is fatal
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(f"{image.size}: over the limit of {MAX_PIXELS} or {MAX_SIDE} a side")
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
            if is_deep(band):  # convert("RGB") would clip at 255
                values = np.asarray(band, dtype=np.float32) / (white_level / 255)
                band = Image.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
            rows[:] = np.asarray(band.convert("RGB"))
        return picture


def is_deep(image):
    """Whether a PIL image has more than 8 bits a pixel."""
    return image.mode.startswith(("I", "F"))


def list_pictures(names):
    """Paths of files as given, patterns expanded, folders searched through, all sorted."""
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        files = list(filter(os.path.isfile, matches))  # no pipe, which never ends
        if not matches:
            raise Refused(f"{name}: no such file or folder")
        yield from map(Path, files)
        for folder in filter(os.path.isdir, [] if files else matches):
            yield from sorted(pictures_below(folder))


def give_up(error):
    raise error


def pictures_below(folder):
    """Paths of the pictures below a folder, links followed unless they lead in a circle."""
    for here, folders, files in os.walk(folder, onerror=give_up, followlinks=True):
        yield from filter(key_of, (Path(here, name) for name in files))
        above = {path.resolve() for path in (Path(here), *Path(here).parents)}
        folders[:] = [f for f in folders if f[0] != "." and Path(here, f).resolve() not in above]


def key_of(file):
    """(name, size, time of change in ns) of a Path or DirEntry; None where it is no picture."""
    if os.path.splitext(file.name)[1].lower() in EXTENSIONS and not file.name.startswith("."):
        with suppress(OSError):  # moved away meanwhile
            stat = file.stat()
            return (file.name, stat.st_size, stat.st_mtime_ns) if file.is_file() else None


def resize(picture, view_size):
    """uint8 [H, W, 3] -> uint8 [*view_size, 3]; bytes as of torch, squeezed, never cropped."""
    height, width, _ = picture.shape
    if [height, width] == list(view_size):
        return picture
    rows = picture.reshape(height, -1)  # 0.5 is added below so that halves go up
    across = [(rows[:, a:b] @ m.T + 0.5).astype("u1") for m, a, b in mixing(width, view_size[1], 3)]
    rows = np.concatenate(across, axis=1)
    down = [(m @ rows[a:b] + 0.5).astype("u1") for m, a, b in mixing(height, view_size[0], 1)]
    return np.concatenate(down).reshape(*view_size, 3)


@lru_cache(maxsize=8)
def mixing(size, small, channels):
    """[(matrix, a, b)] along one axis: matrix @ pixels[a:b] makes BLOCK of the pixels of `resize`.

    Means under a triangle as wide as two pixels of the smaller picture; as in torch, weights are
    fractions of 2**bits that fit in 15 bits, whose sums up to 16 bits are exact in float32.
    """
    scale = size / small
    centre = scale * (np.arange(small) + 0.5)[:, None]
    weights = np.maximum(1 - np.abs(np.arange(size) + 0.5 - centre) / max(scale, 1), 0)
    weights /= weights.sum(1, keepdims=True)
    bits = min(22, int(np.log2((2**15 - 0.5) / weights.max())))
    weights = (np.floor(weights * 2**bits + 0.5) / 2**bits).astype("f4" if bits <= 16 else "f8")
    blocks = np.split(weights, range(BLOCK, small, BLOCK))
    spans = [np.flatnonzero(block.any(0))[[0, -1]] + (0, 1) for block in blocks]
    eye = np.eye(channels, dtype=weights.dtype)
    return [(np.kron(block[:, a:b], eye), a * channels, b * channels)
            for block, (a, b) in zip(blocks, spans)]


def load_student(path, sha256=None, threads=None):
    """(student, metadata) of an exported file; `Refused` for any other.

    student: uint8 pictures [H, W, 3] or [B, H, W, 3] -> probabilities, float32 [B, K].
    """
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such file; distill.py writes it")
    data = Path(path).read_bytes()  # once, so that what is loaded is what was checked
    if sha256 and (its := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise Refused(f"{path}: its sha256 is {its}, not {sha256}; copy the file again")
    kind, load = (".onnx", load_onnx) if Path(path).suffix == ".onnx" else (".ts", load_torchscript)
    try:
        content, checksum = data[:-CHECKSUMS[kind]], data[-CHECKSUMS[kind]:]
        if hashlib.sha256(content).hexdigest().encode() not in checksum:
            raise ValueError("damaged")
        student, metadata = load(data, threads)
        if metadata["schema"] != SCHEMA or not metadata["white_level"] > 0:
            raise ValueError("foreign")
        height, width = metadata["view_size"]
        Judge(student, metadata)(Path(), np.zeros((height, width, 3), np.uint8))  # wrong types fail
        json.dumps(metadata, indent=1)  # as does what is nested too deep for --info
        return student, metadata
    except ModuleNotFoundError as error:
        raise Refused(f"{path}: needs {error.name}; pip install {error.name}") from None
    except Exception:  # of many kinds
        reason = f"not a student{kind} of this version, or damaged; export it again"
        raise Refused(f"{path}: {reason}") from None


def load_torchscript(data, threads):
    """(student, metadata) of a .ts file."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # int8 is deprecated upstream as well
    import torch
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.jit.enable_onednn_fusion(torch.backends.mkldnn.is_available())  # a quarter faster
    extra = {"metadata.json": ""}

    def load():
        module = torch.jit.load(io.BytesIO(data), map_location="cpu", _extra_files=extra)
        return torch.inference_mode()(lambda frames: module(torch.from_numpy(frames)).numpy())

    student, engine = first_working_engine(load, np.zeros((64, 64, 3), np.uint8))
    metadata = json.loads(extra["metadata.json"])
    engine = {"float32": "", "int8": f", engine {engine}"}[metadata["precision"]]
    runtime = f"torch {torch.__version__}, {torch.get_num_threads()} threads{engine}"
    return student, {**metadata, "runtime": runtime}


def first_working_engine(load, frame):
    """(student, engine): load() under the first of ENGINES, which round differently, that works."""
    from torch.backends import quantized
    for engine in (*ENGINES, "none"):  # which is enough for float32
        with suppress(RuntimeError):  # also where torch has no such engine
            quantized.engine = engine  # a file is packed for it while it is loaded
            student = load()
            student(frame)
            return student, engine
    raise RuntimeError("no int8 engine of this torch works")


def load_onnx(data, threads):
    """(student, metadata) of an .onnx file."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one for each core
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # who waits, sleeps
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["metadata.json"])

    def student(pictures):
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
        frames = [resize(picture, metadata["view_size"]) for picture in pictures]
        return session.run(None, {"pictures": np.stack(frames)})[0]
    runtime = f"onnxruntime {onnxruntime.__version__}, {threads or 'default'} threads"
    return student, {**metadata, "runtime": runtime}


def occlusion_map(student, frame, good):
    """float [h, w] in 0..1: where a uint8 picture [H, W, 3] at the view size shows a defect.

    Each place in turn is blurred away, softly, and what that takes from log p(defect) - log p(good)
    counts (occlusion, Zeiler and Fergus 2014). The defect is the likeliest class that is not number
    `good` (None for none); 2 nats count as 1. There are at most 64 places, of a square 8 x 8, and
    each costs a picture through the student.
    """
    height, width, _ = frame.shape
    rows = min(64, max(1, round(8 * (height / width) ** 0.5)))
    columns = 64 // rows
    coarse = max(1, columns // 2), max(1, rows // 2)
    small = Image.fromarray(frame).resize(coarse, Image.Resampling.BOX)
    blurred = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), np.float32)

    def near(places, size):  # a bell curve per place of a side
        place, pixel = (np.arange(1, 2 * n, 2, dtype=np.float32) / n - 1 for n in (places, size))
        return np.exp(-(((pixel - place[:, None]) * places / 2.4) ** 2))
    covers = near(rows, height)[:, None, :, None] * near(columns, width)[None, :, None, :]
    covers = covers.reshape(-1, height, width, 1)
    covered = [np.rint(frame + part * (blurred - frame)) for part in np.array_split(covers, 4)]
    answers = [student(frames.astype(np.uint8)) for frames in (frame[None], *covered)]
    log_p = np.log(np.maximum(np.concatenate(answers), 1e-9))
    defect = max(set(range(log_p.shape[1])) - {good}, key=lambda number: log_p[0, number])
    lead = log_p[:, defect] - (0 if good is None else log_p[:, good])
    weakened = np.fmax(lead[0] - lead[1:], 0).reshape(rows, columns)  # NaN counts as nothing
    return weakened / max(weakened.max(), 2)


class Judge:
    """Student and operating point: picture -> verdict; `heatmaps` is the folder to draw into."""

    def __init__(self, student, metadata, review_band=None, heatmaps=None):
        self.student, self.heatmaps = student, heatmaps
        self.view_size, self.white_level = metadata["view_size"], metadata["white_level"]
        self.classes = [printable(name) for name in metadata["classes"]]
        good, point = metadata["good_class"], metadata["operating_point"]
        self.good = metadata["classes"].index(good) if good else None
        self.band = review_band or (point and (point["threshold"], point["threshold"]))

    def __call__(self, path, picture=None):
        """The verdict on the picture in a file, or on the given one [H, W, 3], as plain data."""
        verdict = {"path": printable(path.as_posix())}
        try:
            picture = read_picture(path, self.white_level) if picture is None else picture
        except Exception as error:  # Pillow raises many kinds for damaged files
            return {**verdict, "error": printable(error) or type(error).__name__}
        p = self.student(picture)[0].tolist()
        score = None if self.good is None else sum(p[:self.good] + p[self.good + 1:])
        verdict["decision"] = self.decide(score) if self.band else None
        verdict["class"], verdict["probability"] = self.classes[p.index(max(p))], max(p)
        verdict["defect_score"] = score  # as a sum, since 1 - p(good) would be 0 below 6e-8
        verdict["probabilities"] = dict(zip(self.classes, p, strict=True))
        if self.heatmaps and verdict["decision"] != "PASS":
            verdict["heatmap"] = self.draw(verdict, path, picture)
        return verdict

    def decide(self, score):
        """REJECT unless the score is below a limit, so NaN is rejected."""
        return "PASS" if score < self.band[0] else "REVIEW" if score < self.band[1] else "REJECT"

    def draw(self, verdict, path, picture):
        """Write the picture with red over what speaks for the likeliest defect; the file's name."""
        os.makedirs(self.heatmaps, exist_ok=True)
        if os.path.samefile(self.heatmaps, path.parent):
            raise Refused(f"--heatmap {self.heatmaps}: among the pictures; name another folder")
        heat = occlusion_map(self.student, resize(picture, self.view_size), self.good) * OPACITY
        size = [max(1, round(n * LARGEST / max(picture.shape))) for n in picture.shape[1::-1]]
        image = Image.fromarray(picture).resize(size)
        mask = Image.fromarray(heat.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        image.paste(RED, mask=mask)
        defects = (name for k, name in enumerate(self.classes) if k != self.good)
        text = f"{verdict['decision'] or ''} {verdict['class']} {verdict['probability']:.2f}"
        text = f"{text.strip()}; red: {max(defects, key=verdict['probabilities'].get)}"
        sheet = ImageOps.expand(image, (0, 18, 0, 0), "white")
        ImageDraw.Draw(sheet).text((3, 3), text, fill="black")
        name = printable(path.name).replace("\\", "_").encode()[:200].decode(errors="ignore")
        file = f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}.jpg"
        sheet.save(Path(self.heatmaps, file), quality=90)
        return file


def show(verdict, as_json, as_csv):
    """Print a verdict in one line, at once; returns whether the picture could not be read."""
    if "error" in verdict:
        print(f"{verdict['path']}: cannot be read ({verdict['error']})", file=sys.stderr)
    elif as_json:
        print(json.dumps({name: value for name, value in verdict.items() if value is not None}))
    elif as_csv:
        row = {**verdict, "path": csv_name(verdict["path"]), "class": csv_name(verdict["class"])}
        csv.writer(sys.stdout, lineterminator="\n").writerow(row[name] for name in FIELDS)
    else:
        words = (verdict["path"], verdict["class"], f"{verdict['probability']:.3f}")
        print(*words, *filter(None, [verdict["decision"]]), sep="\t")
    sys.stdout.flush()
    return "error" in verdict


def watch(folder, judge, report):
    """Judge what arrives in `folder`, each picture once, across restarts, kills and full disks.

    judged.jsonl gets a line per picture, after its heatmap and before its report; where one of the
    three cannot be written, the picture counts as not judged.
    """
    try:
        from filelock import FileLock, Timeout
        lock = FileLock(Path(folder, ".judged.lock"))
        lock.acquire(timeout=0)
    except ModuleNotFoundError:
        raise Refused("--watch needs filelock; pip install filelock") from None
    except Timeout:
        raise Refused(f"{folder}: watched by another infer.py; end that one first") from None
    with open(Path(folder, "judged.jsonl"), "ab", buffering=0) as log:
        *lines, cut_off = Path(log.name).read_bytes().split(b"\n")
        log.truncate(log.tell() - len(cut_off))
        judged = set()
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # else damaged
                whole = line[line.rfind(b'{"key":'):]  # after one that a full disk cut off
                judged.add(tuple(json.loads(whole)["key"]))
        print(f"watching {printable(folder)}, {len(judged)} judged before", file=sys.stderr)
        for path, key in arrivals(folder, judged):
            verdict = judge(path)
            if key_of(path) != key or "error" in verdict and time.time() - key[2] / 1e9 < SETTLE:
                continue  # it is still being written
            line = (json.dumps({"key": key, **verdict}) + "\n").encode()
            end = log.seek(0, os.SEEK_END)
            try:
                while line:  # a disk may take a part before it is full
                    line = line[log.write(line):]
                os.fsync(log.fileno())
                report(verdict)
            except OSError:
                log.truncate(end)
                raise
            judged.add(key)


def arrivals(folder, judged):
    """(path, key) of pictures in a folder that are not in `judged`, oldest first, for ever."""
    before = set()
    while True:
        start = time.perf_counter()
        now = set(map(key_of, os.scandir(folder))) - {None}
        fresh = (now & before) - judged  # its size may be final long before its last pixels
        took = time.perf_counter() - start
        for key in sorted(fresh, key=lambda key: (key[2], key[0])):
            yield Path(folder, key[0]), key
        before = now
        time.sleep(max(POLL, 20 * took))  # so looking takes 5 % of a core at most


def run():
    """The program; returns its exit status."""
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = p.add_argument
    add("pictures", nargs="*", default=["data/fasteners/test"], help="files, patterns or folders")
    add("--model", default="runs/student/student.ts", help="a .ts or .onnx of distill.py")
    add("--sha256", metavar="HEX", help="refuse a model with another sha256")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object per line, all probabilities")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a header")
    add("--heatmap", metavar="DIR", help="draw what does not pass, red over what speaks for it")
    add("--watch", metavar="DIR", help="judge what arrives, each once (judged.jsonl)")
    add("--review-band", nargs=2, type=float, metavar=("LOW", "HIGH"), help="scores of a REVIEW")
    add("--threads", type=int, choices=range(1, 257), metavar="N", help="CPU threads")
    add("--info", action="store_true", help="print what the file says about itself")
    add("--benchmark", action="store_true", help="measure this device")
    args = p.parse_args()
    if args.review_band and not 0 <= args.review_band[0] <= args.review_band[1] <= 1:
        p.error("--review-band: wants 0 <= LOW <= HIGH <= 1")
    if args.watch and not Path(args.watch).is_dir():
        raise Refused(f"--watch {args.watch}: no such folder")

    student, metadata = load_student(args.model, args.sha256, args.threads)
    if args.review_band and not metadata["operating_point"]:
        raise Refused(f"{args.model}: no threshold for --review-band; export it with --good-class")
    judge = Judge(student, metadata, args.review_band, args.heatmap)
    report = partial(show, as_json=args.json, as_csv=args.csv)
    if args.info:
        print(json.dumps(metadata, indent=1))
    if args.benchmark:
        frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        seconds = repeat(lambda: judge(Path("frame"), frame), number=1, repeat=500)
        p50, p95, p99 = 1e3 * np.percentile(seconds[10:], (50, 95, 99))  # the first ones warm up
        print(f"{metadata['runtime']}, 640 x 480 frame to decision: p50 {p50:.2f} ms, "
              f"p95 {p95:.2f} ms, p99 {p99:.2f} ms (n = 490)")
    if args.info or args.benchmark:
        return 0
    if args.csv:
        print(*FIELDS, sep=",")
    if args.watch:
        watch(args.watch, judge, report)
    paths = list(list_pictures(args.pictures))
    if not paths:
        raise Refused(f"no pictures in {', '.join(args.pictures)}")
    return int(max([report(judge(path)) for path in paths]))  # 1 where some could not be read


def main():
    """End with the status of `run`, or with 2 and one line for what cannot be done."""
    sys.stdout.reconfigure(errors="backslashreplace")  # where it is no UTF-8
    status, reason = 2, None
    try:
        status = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except Refused as error:
        reason = error
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 0 if isinstance(error, BrokenPipeError) else 2  # `| head` has seen enough
        reason = status and f"{error.filename or 'output'}: {error.strerror or error}"
    if reason:
        print(f"error: {printable(reason)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
