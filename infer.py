"""Judge pictures with the exported student: this file and that one are all a device needs.

    python infer.py --model runs/student/student.ts picture.jpg folder_of_pictures 'shots/*.png'
    python infer.py --watch /mnt/camera --json --heatmap overlays

Needs numpy, Pillow and torch, or for an .onnx file onnxruntime in its place; --watch filelock, too.
Prints a line per picture: path, class, probability, and PASS, REJECT or REVIEW where the file holds
a threshold on the defect score, the probability of all classes but the good ones; odd characters
are escaped as in Python strings. Exit status 2: nothing could be done, 1: some pictures were
unreadable. A .ts file is a program, and loading it runs it: load only files you trust; --sha256
refuses others.
"""

import csv
import glob
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from timeit import repeat

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

EXTENSIONS = set(".jpg .jpeg .jpe .jfif .jif .png .apng .bmp .dib .tif .tiff .webp .gif .pgm .ppm "
                 ".pnm .pbm".split())
LEFT_BEHIND = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
               "lost+found", "system volume information"}  # folders of systems, not of users
OURS = {"judged.jsonl", "thumbs.db", "desktop.ini"}  # files that need no word
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever a file's name says
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 80_000_000, 65_535, 50
LARGE, DENSITY = 16_000_000, 250  # pixels; most pixels per byte of a file with more
ORIENTATION = 274  # a tag of EXIF
SUBFILE, BITS, WHITE_IS, PLANES = 254, 258, 262, 284  # tags of TIFF; SUBFILE: odd for a thumbnail
OTHER_BYTE = {"LA;16B": "RGBA", "RGB;16L": "RGB;16B", "RGB;16B": "RGB;16L", "RGBA;16L": "RGBA;16B",
              "RGBA;16B": "RGBA;16L", "RGBX;16L": "RGBX;16B", "RGBX;16B": "RGBX;16L"}
BAND, BLOCK = 128, 4  # rows that are converted at a time, and that `resize` makes at a time
SCHEMA = 7  # of the exported file, as in common/export.py
CHECKSUMS = {".ts": 95, ".onnx": 89}  # bytes at a file's end with the sha256 of all before them
OLDEST = {".ts": "2.0", ".onnx": "1.14", "Pillow": "9.0"}  # versions that were tried
ENGINES = ("x86", "fbgemm", "qnnpack", "onednn")  # for int8, best first; ARM has the last two
FIELDS = ("path", "decision", "class", "probability", "defect_score")  # of --csv
POLL, SETTLE = 0.1, 2.0  # s between looks at a folder; s at rest until an unreadable file is bad
DARK = 1 / 16  # of the white level: a picture that never reaches it is of another bit depth
FLAT = 16  # of 255: what has less between the least and the most of each colour shows no part
TAIL = 4096  # bytes at a file's end: where all are 0 they may be room that is filled later
AGAIN = 10.0  # s until a picture is tried again that something around it kept from being read
RED, OPACITY, LARGEST = (230, 20, 20), 160, 480  # of a heatmap; px of its longer side
warnings.filterwarnings("ignore", message=".*torch.jit")  # TorchScript is deprecated upstream
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # microscopes write notes
warnings.filterwarnings("ignore", module="PIL")  # a picture is read, or reported in one line


class Refused(Exception):
    """What cannot be done, in one line; the program prints it and ends with status 2."""


def printable(text):
    """Text that is one line and drives no terminal: the rest and backslashes are escaped."""
    return "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in str(text))


def say(text):
    """Print a line on stderr; a reader of it that has gone keeps no verdict back."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def csv_name(name):
    """The name of a file, folder or class so that no spreadsheet takes it for a formula."""
    return f"./{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def decode(content, white_level=65535):
    """(picture, brightest, several) of a file's bytes: uint8 RGB [H, W, 3], upright by EXIF.

    Values of more than 8 bits are scaled so that `white_level` becomes 255; brightest is the
    highest of them, or None. Of several pages the first that is no thumbnail is read. Raises
    Pillow's exceptions, or ValueError for more than MAX_PIXELS, MAX_SIDE or MAX_SCANS, or above
    LARGE pixels DENSITY a byte, before anything is decoded. Takes 7 bytes a pixel beside the
    file's, some formats up to 16.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        several = go_to_first_page(image)
        refuse_huge(image, content)
        low = low_bytes(image, content)
        image.load()
        picture, brightest = np.empty((image.height, image.width, 3), np.uint8), None
        for top in range(0, image.height, BAND):  # converted whole, it would take twice the memory
            rows = picture[top:top + BAND]
            box = (0, top, image.width, top + len(rows))
            band = image.crop(box)
            values = deep_values(band, low and low.crop(box))
            if values is None:
                rows[:] = np.asarray(band.convert("RGB"))
            else:
                brightest = max(float(values.max()), brightest or 0.0)
                rows[:] = (values / (white_level / 255)).clip(0, 255).astype(np.uint8)
        tag = 1
        with suppress(Exception):  # a damaged EXIF block, of which Pillow raises many kinds
            if image.format != "TIFF":  # which Pillow turns; 9.1 to 10.0 leave the tag
                tag = image.getexif().get(ORIENTATION)
    return upright(picture, tag), brightest, several


def go_to_first_page(image):
    """Whether a PIL image has several pages; it is left at the first that is no thumbnail."""
    several = image.format != "MPO" and getattr(image, "is_animated", False)  # a phone's JPEG
    with suppress(EOFError):  # all are thumbnails
        while several and image.format == "TIFF" and image.tag_v2.get(SUBFILE, 0) & 1:
            image.seek(image.tell() + 1)
    return several


def refuse_huge(image, content):
    """Raise ValueError for what would take too much memory or time to decode."""
    (width, height), size = image.size, len(content)
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels, over the limit of {MAX_PIXELS} or {MAX_SIDE} "
                         "a side (MAX_PIXELS, MAX_SIDE in infer.py); cut it up or shrink it")
    if width * height > max(LARGE, DENSITY * size):
        raise ValueError(f"{width} x {height} pixels in {size} bytes, as no camera writes them")
    if "progressive" in image.info and content.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans, which takes minutes")


def deep_values(image, low):
    """float32 [H, W, 1 or 3] of a PIL image of more than 8 bits, else None; low: of `low_bytes`."""
    if is_deep(image):  # convert("RGB") would clip at 255
        return np.nan_to_num(np.asarray(image, dtype=np.float32))[..., None]
    if low:
        high = np.asarray(image.convert("RGB"), dtype=np.float32)
        return 256 * high + np.asarray(low.convert("RGB"))
    return None


def low_bytes(image, content):
    """The low bytes of 16-bit colours as another PIL image, since Pillow reads the high ones alone.

    Told that the two bytes come in the other order, it takes the low ones. None for other pictures.
    Raises ValueError for deep colours of another layout, and for deep grey whose white is 0.
    """
    native = {"little": "16L", "big": "16B"}[sys.byteorder]
    args = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
    if image.format == "PPM" and image.mode == "RGB" and max([0, *args[0][1:]]) > 255:
        raise ValueError("16-bit colours in a .ppm, of which 8 bits would be read; save it as PNG")
    layout = str(args[0][0]).replace("16N", native) if args else None
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if layout in OTHER_BYTE and tags.get(PLANES) != 2:
        other = Image.open(io.BytesIO(content), formats=FORMATS)
        other.seek(image.tell())
        for number, (tile, (_, *more)) in enumerate(zip(other.tile, args)):
            where, swapped = tile[:3], (OTHER_BYTE[layout], *more)
            plain = type(tile) is tuple  # as before Pillow 11
            other.tile[number] = (*where, swapped) if plain else type(tile)(*where, swapped)
        return other.getchannel(1) if layout.startswith("LA") else other
    deep = max(tags.get(BITS, (8,))) > 8
    if deep and tags.get(WHITE_IS) == 0:
        raise ValueError("16-bit grey whose white is 0, of which a negative would be read; save it "
                         "as PNG")
    if deep and not is_deep(image):
        raise ValueError("16-bit colours plane by plane, as CMYK or premultiplied; save it as RGB")
    return None


def upright(picture, tag):
    """A picture [H, W, 3] turned as its EXIF orientation, 1 to 8, says."""
    picture = picture.transpose(1, 0, 2) if tag in (5, 6, 7, 8) else picture
    rows, columns = -1 if tag in (3, 4, 7, 8) else 1, -1 if tag in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])


def is_deep(image):
    """Whether a PIL image has more than 8 bits a pixel."""
    return image.mode.startswith(("I", "F"))


def why_unreadable(error):
    """What is wrong with a picture, and what helps, in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(" <_io")[0]
    cut_off = "truncated" in text or isinstance(error, EOFError)
    return text + ("; copy it again, or open and save it anew" if cut_off else "")


def list_pictures(names):
    """Paths of files as given, patterns expanded, folders searched through, all sorted."""
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise Refused(f"{name}: no such file or folder")
        found = set(map(Path, filter(os.path.isfile, matches)))  # no pipe, which never ends
        for folder in filter(os.path.isdir, matches):
            left_out = Counter()
            found.update(Path(entry) for entry in pictures_below(folder, left_out))
            if left_out:
                say(printable(left_out_line(folder, left_out)))
        yield from sorted(found)


def pictures_below(folder, left_out, above=None, tolerant=False):
    """DirEntry of each picture below a folder, links followed unless they lead in a circle.

    left_out: Counter of what is none, which grows; above: real paths of the folders around it;
    tolerant: whether folders inside that cannot be opened are left out too.
    """
    above = above or {os.path.realpath(each) for each in (folder, *Path(folder).parents)}
    with os.scandir(folder) as entries:
        entries = list(entries)
    for entry in entries:
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        kind = left_out_as(entry.name, is_folder)
        if kind is not None:
            left_out.update([kind] if kind else [])
        elif is_file:
            yield entry
        elif not is_folder:
            left_out["link to nothing" if entry.is_symlink() else "device or pipe"] += 1
        elif (real := os.path.realpath(entry)) not in above:
            try:
                yield from pictures_below(entry.path, left_out, above | {real}, tolerant)
            except OSError as error:
                if not tolerant:
                    raise
                if not isinstance(error, FileNotFoundError):  # moved away meanwhile
                    left_out[f"folder {entry.name} ({error.strerror})"] += 1


def left_out_as(name, is_folder=False):
    """Why a file or folder of this name is left out, as the word that a line counts it under.

    Such as ".heic" or "folder @eaDir"; "" where it is left out without a word, and None where it is
    used. One rule for training and device.
    """
    ending = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return ""
    if name.lower() in LEFT_BEHIND:
        return f"folder {name}"
    if is_folder or ending in EXTENSIONS:
        return None
    return "" if name.lower() in OURS else ending or "without ending"


def left_out_line(folder, left_out):
    """In words how many were left out in a folder: a Counter by `left_out_as`."""
    counts = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
    return f"{folder}: left out, no pictures by their names or not to be opened: {counts}"


def stamp(file):
    """(size, time of change in ns) of a Path or DirEntry; None where it is gone."""
    with suppress(OSError):  # moved away meanwhile
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns


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
        what = "a folder; name a file in it" if os.path.isdir(path) else "no such file"
        raise Refused(f"{path}: {what}, a .ts or .onnx of distill.py")
    kind = Path(path).suffix.lower()
    if kind not in CHECKSUMS:
        raise Refused(f"{path}: no .ts or .onnx; name the student that distill.py exported")
    data = Path(path).read_bytes()  # once, so that what is loaded is what was checked
    its = hashlib.sha256(data).hexdigest()
    if sha256 and its != sha256.lower():
        raise Refused(f"{path}: its sha256 is {its}, not {sha256}; copy the file again")
    load = {".ts": load_torchscript, ".onnx": load_onnx}[kind]
    content, checksum = data[:-CHECKSUMS[kind]], data[-CHECKSUMS[kind]:]
    if hashlib.sha256(content).hexdigest().encode() not in checksum:
        raise foreign(path, kind)
    with refused_as(cannot_run, path, kind):  # the file is whole, so it is the runtime
        student, text, runtime = load(data, threads)
    with refused_as(foreign, path, kind):
        metadata = json.loads(text)
        metadata.update(runtime=runtime[metadata["precision"]], sha256=its)
        if metadata["schema"] != SCHEMA or not metadata["white_level"] > 0:
            raise ValueError("foreign")
        height, width = metadata["view_size"]
        frame, larger = (np.zeros((n * height, n * width, 3), np.uint8) for n in (1, 2))
    with refused_as(cannot_run, path, kind):
        student(larger)  # which it resizes
    with refused_as(foreign, path, kind):
        Judge(student, metadata)(Path(), frame)  # wrong types fail
        json.dumps(metadata, indent=1)  # as does what is nested too deep for --info
    return student, metadata


@contextmanager
def refused_as(reason, path, kind):
    """Raise what `reason` makes of an exception, of which runtimes and foreign files have many."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Refused(f"{path}: needs {error.name}; pip install {error.name}") from None
    except Exception as error:
        raise reason(path, kind, error) from None


def foreign(path, kind, _=None):
    """What is told of a file that is none of ours, or not whole."""
    return Refused(f"{path}: not a student{kind} of this version, or damaged; export it again")


def cannot_run(path, kind, error):
    """What is told of a whole file that the runtime fails at: the end says most."""
    text = (str(error).strip() or type(error).__name__).splitlines()
    return Refused(f"{path}: is whole, but {runtime_of(kind)} cannot run it: {text[0][:200]}"
                   + (f" ... {text[-1][:200]}" if len(text) > 1 else ""))


def runtime_of(kind):
    """The installed runtime of a kind of file, in words, and the oldest one that was tried."""
    name = {".ts": "torch", ".onnx": "onnxruntime"}[kind]
    with suppress(Exception):  # a package that is damaged or fits no other may have no version
        name += " " + importlib.metadata.version(name)
    return f"{name} (oldest that works: {OLDEST[kind]})"


def load_torchscript(data, threads):
    """(student, metadata as text, {precision: runtime in words}) of a .ts file."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # int8 is deprecated upstream as well
    import torch
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.jit.enable_onednn_fusion(torch.backends.mkldnn.is_available())  # a quarter faster
    extra = {"metadata.json": ""}

    def load():
        module = torch.jit.load(io.BytesIO(data), map_location="cpu", _extra_files=extra)
        return torch.inference_mode()(lambda frames: module(torch.from_numpy(frames)).numpy())

    student, engine = first_working_engine(load, np.zeros((64, 64, 3), np.uint8))
    runtime = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    by_precision = {"float32": runtime, "int8": f"{runtime}, engine {engine}"}
    return student, extra["metadata.json"], by_precision


def first_working_engine(load, frame):
    """(student, engine): load() under the first of ENGINES, which round differently, that works.

    Raises the last one's RuntimeError where none does.
    """
    from torch.backends import quantized
    failed = None
    for engine in (*ENGINES, "none"):  # which is enough for float32
        try:
            quantized.engine = engine  # a file is packed for it while it is loaded
        except RuntimeError:  # this torch has no such engine
            continue
        try:
            student = load()
            student(frame)
            return student, engine
        except RuntimeError as error:
            failed = error
    raise failed


def load_onnx(data, threads):
    """(student, metadata as text, {precision: runtime in words}) of an .onnx file."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one for each core
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # who waits, sleeps
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    height, width = session.get_inputs()[0].shape[1:3]

    def student(pictures):
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
        frames = [resize(picture, (height, width)) for picture in pictures]
        return session.run(None, {"pictures": np.stack(frames)})[0]
    text = session.get_modelmeta().custom_metadata_map.get("metadata.json", "")
    runtime = f"onnxruntime {onnxruntime.__version__}, {threads or 'default'} threads"
    return student, text, {"float32": runtime, "int8": runtime}


def occlusion_map(student, frame, good):
    """float [h, w] in 0..1: where a uint8 picture [H, W, 3] at the view size shows a defect.

    Each place in turn is blurred away, softly, and what that takes from log p(defect) - log p(good)
    counts (occlusion, Zeiler and Fergus 2014). The defect is the likeliest class that is not among
    the numbers `good`; 2 nats count as 1. There are at most 64 places, of a square 8 x 8, and each
    costs a picture through the student.
    """
    height, width, _ = frame.shape
    rows = min(64, max(1, round(8 * (height / width) ** 0.5)))
    columns = 64 // rows
    coarse = max(1, columns // 2), max(1, rows // 2)
    small = Image.fromarray(frame).resize(coarse, Image.BOX)
    blurred = np.asarray(small.resize((width, height), Image.BILINEAR), np.float32)

    def near(places, size):  # a bell curve per place of a side
        place, pixel = (np.arange(1, 2 * n, 2, dtype=np.float32) / n - 1 for n in (places, size))
        return np.exp(-(((pixel - place[:, None]) * places / 2.4) ** 2))
    covers = near(rows, height)[:, None, :, None] * near(columns, width)[None, :, None, :]
    covers = covers.reshape(-1, height, width, 1)
    covered = [np.rint(frame + part * (blurred - frame)) for part in np.array_split(covers, 4)]
    answers = [student(frames.astype(np.uint8)) for frames in (frame[None], *covered)]
    p = np.maximum(np.concatenate(answers), 1e-9)
    defect = max(set(range(p.shape[1])) - set(good), key=lambda number: p[0, number])
    lead = np.log(p[:, defect] / (p[:, sorted(good)].sum(1) if good else 1))
    weakened = np.fmax(lead[0] - lead[1:], 0).reshape(rows, columns)  # NaN counts as nothing
    return weakened / max(weakened.max(), 2)


def redden(image, heat):
    """Lay red over a PIL image where a map of it, float [h, w] in 0..1, is high."""
    mask = Image.fromarray((heat * OPACITY).astype(np.uint8))
    image.paste(RED, mask=mask.resize(image.size, Image.BICUBIC))


class Judge:
    """Student and operating point: picture -> verdict; `heatmaps` is the folder to draw into."""

    def __init__(self, student, metadata, review_band=None, heatmaps=None):
        self.student, self.heatmaps = student, heatmaps
        self.view_size, self.white_level = metadata["view_size"], metadata["white_level"]
        self.classes = [printable(name) for name in metadata["classes"]]
        self.good = {metadata["classes"].index(name) for name in metadata["good_classes"]}
        point = metadata["operating_point"]
        self.band = review_band or (point and (point["threshold"], point["threshold"]))
        # What decides, in judged.jsonl: the beginning of the model's sha256, and the band.
        self.rule = [metadata.get("sha256", "")[:12], *map(float, self.band or ())]

    def __call__(self, path, picture=None, ready=lambda content: True):
        """The verdict on the picture in a file, or on the given one [H, W, 3], as plain data.

        ready: is told the file's bytes; where it says no, there is no verdict but None.
        """
        verdict = {"path": printable(path.as_posix())}
        try:
            if picture is None:
                content = path.read_bytes()
                if not ready(content):
                    return None
                picture, brightest, several = decode(content, self.white_level)
                verdict["note"] = "; ".join(self.notes(picture, brightest, several)) or None
        except Exception as error:  # Pillow raises many kinds for damaged files
            # What has an error number, a share's bad moment, says nothing about the picture.
            passing = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
            return {**verdict, "error": printable(why_unreadable(error)), "passing": passing}
        p = self.student(picture)[0].tolist()
        if len(p) != len(self.classes):
            raise ValueError(f"{len(p)} probabilities for {len(self.classes)} classes")
        score = sum(p[k] for k in range(len(p)) if k not in self.good) if self.good else None
        verdict["decision"] = self.decide(score) if self.band else None
        verdict["class"], verdict["probability"] = self.classes[p.index(max(p))], max(p)
        verdict["defect_score"] = score  # as a sum, since 1 - p(good) would be 0 below 6e-8
        verdict["probabilities"] = dict(zip(self.classes, p))
        if self.heatmaps and verdict["decision"] != "PASS":
            verdict["heatmap"] = self.draw(verdict, path, picture)
        return verdict

    def notes(self, picture, brightest, several):
        """What is odd about a picture that can be judged; the arguments are as of `decode`."""
        if several:
            yield "the first of several pages is judged"
        if brightest is not None and not DARK <= brightest / self.white_level <= 1:
            effect = "clipped" if brightest > self.white_level else "nearly black"
            yield f"brightest value {brightest:g}, white level {self.white_level:g}: {effect}"
        elif np.ptp(picture, axis=(0, 1)).max() < FLAT:
            yield "all of it is alike: lamp, lens or exposure"

    def decide(self, score):
        """REJECT unless the score is below a limit, so NaN is rejected."""
        return "PASS" if score < self.band[0] else "REVIEW" if score < self.band[1] else "REJECT"

    def draw(self, verdict, path, picture):
        """Write the picture with red over what speaks for the likeliest defect; the file's name."""
        os.makedirs(self.heatmaps, exist_ok=True)
        with suppress(FileNotFoundError):  # the picture's folder was moved away
            if os.path.samefile(self.heatmaps, path.parent):
                raise Refused(f"--heatmap {self.heatmaps}: among the pictures; name another folder")
        frame = resize(picture, self.view_size)
        heat = occlusion_map(self.student, frame, self.good)
        size = [max(1, round(n * LARGEST / max(picture.shape))) for n in picture.shape[1::-1]]
        image = Image.fromarray(picture).resize(size)
        redden(image, heat)
        defects = (name for k, name in enumerate(self.classes) if k not in self.good)
        text = f"{verdict['decision'] or ''} {verdict['class']} {verdict['probability']:.2f}"
        text = f"{text.strip()}; red: {max(defects, key=verdict['probabilities'].get)}"
        sheet = ImageOps.expand(image, (0, 18, 0, 0), "white")
        try:
            ImageDraw.Draw(sheet).text((3, 3), text, fill="black")
        except UnicodeEncodeError:  # Pillow before 10.1 draws Latin-1 alone
            text = text.encode("ascii", "backslashreplace").decode()
            ImageDraw.Draw(sheet).text((3, 3), text, fill="black")
        name = printable(path.name).replace("\\", "_").encode()[:200].decode(errors="ignore")
        its = hashlib.sha256(os.fsencode(path) + frame.tobytes())  # a camera may use a name again
        file = f"{name}-{its.hexdigest()[:8]}.jpg"
        sheet.save(Path(self.heatmaps, file), quality=90)
        return file


def show(verdict, as_json, as_csv):
    """Print a verdict in one line, at once; returns whether the picture could not be read."""
    path, failed = verdict["path"], "error" in verdict
    if failed:
        say(f"{path}: cannot be read ({verdict['error']})")
    elif verdict.get("note"):
        say(f"{path}: {verdict['note']}")
    if as_json:
        print(json.dumps({name: value for name, value in verdict.items() if value is not None}))
    elif as_csv:
        row = {**verdict, "path": csv_name(path), "class": csv_name(verdict.get("class", ""))}
        csv.writer(sys.stdout, lineterminator="\n").writerow(row.get(name) for name in FIELDS)
    elif not failed:
        words = (path, verdict["class"], f"{verdict['probability']:.3f}")
        print(*words, *filter(None, [verdict["decision"]]), sep="\t")
    sys.stdout.flush()
    return failed


def watch(folder, judge, report, rule):
    """Judge what arrives below `folder`, each picture once, across restarts, kills and full disks.

    judged.jsonl gets a line per picture, with the `rule` that decided, after its heatmap and before
    its report; where one of the three cannot be written, the picture counts as not judged. A kill
    between the last two leaves a line that was not reported. A picture that is renamed or moved, or
    whose size or time of change is set anew, is another one.
    """
    with only_watcher(folder), open(Path(folder, "judged.jsonl"), "ab", buffering=0) as log:
        judged, last = judged_before(log)
        other = ", the last by another model or band" if last not in (None, rule) else ""
        say(f"watching {printable(folder)}, {len(judged)} judged before{other}")
        later = {}  # pictures that something around them kept from being read: when to try again
        first = {}  # when others were read for the first time that may not be whole yet

        def rested(key):
            return time.monotonic() - first.setdefault(key, time.monotonic()) >= SETTLE

        for path, key in arrivals(folder, judged):
            if time.monotonic() < later.get(key, 0):
                continue

            def ready(content, path=path, key=key):
                unchanged = stamp(path) in (key[1:], None)  # None: taken away once it was read
                return unchanged and (content[-TAIL:].strip(b"\0") or rested(key))
            verdict = judge(path, ready=ready)
            if not verdict or ("error" in verdict and stamp(path) != key[1:]):
                continue  # it is still being written, or was taken away before it was read
            if verdict.get("passing"):
                if not rested(key):  # its writer may hold it for a moment
                    continue
                if key not in later:
                    report(verdict)
                later[key] = time.monotonic() + AGAIN
                continue
            if "error" in verdict and not rested(key):
                continue
            with all_or_nothing(log):
                append(log, {"key": key, **verdict, "rule": rule})
                report(verdict)
            judged.add(key)
            first.pop(key, None)


def only_watcher(folder):
    """The lock of a watched folder, to be held by a `with`; `Refused` where it cannot be had."""
    try:
        from filelock import FileLock, Timeout
    except ModuleNotFoundError:
        raise Refused("--watch needs filelock; pip install filelock") from None
    try:
        return FileLock(Path(folder, ".judged.lock")).acquire(timeout=0)
    except Timeout:
        raise Refused(f"{folder}: watched by another infer.py, which must end first; or there are "
                      "no file locks there") from None
    except NotImplementedError:
        raise Refused(f"{folder}: no file locks there; watch a folder on another disk") from None


def judged_before(log):
    """(keys in judged.jsonl, the rule of the last); a last line that a kill cut off is removed.

    log: the file, open for appending.
    """
    keys, rule = set(), None
    with open(log.name, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                log.truncate(log.seek(0, os.SEEK_END) - len(line))
                break
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # else damaged
                whole = line[line.rfind(b'{"key": ['):]  # after one that a full disk cut off
                row = json.loads(whole)
                keys.add(tuple(row["key"]))
                rule = row.get("rule")
    return keys, rule


def append(log, row):
    """Write a row to judged.jsonl as a line of JSON, down to the disk."""
    line = (json.dumps(row) + "\n").encode()
    try:
        while line:  # a disk may take a part before it is full
            line = line[log.write(line):]
        os.fsync(log.fileno())
    except OSError as error:
        error.filename = log.name
        raise


@contextmanager
def all_or_nothing(log):
    """Take what was appended in the block back where the block ends with an OSError.

    Raises Refused where judged.jsonl is not the file any more that was opened.
    """
    end = log.seek(0, os.SEEK_END)
    if not os.path.isfile(log.name) or os.path.getsize(log.name) != end:
        raise Refused(f"{log.name}: moved, removed or changed while it was in use; start again")
    try:
        yield
    except OSError:
        log.truncate(end)
        raise


def keys_below(folder, left_out):
    """{(name below the folder, size, time of change)} of the pictures; left_out: a Counter."""
    start, keys = len(os.path.join(folder, "")), set()
    for entry in pictures_below(folder, left_out, tolerant=True):
        changed = stamp(entry)
        if changed:
            keys.add((entry.path[start:].replace(os.sep, "/"), *changed))
    return keys


def arrivals(folder, judged):
    """(path, key) of pictures below a folder that are not in `judged`, oldest first, for ever."""
    before, said, failed = set(), set(), None
    while True:
        start, cpu, left_out, line = time.perf_counter(), time.process_time(), Counter(), None
        try:
            now, failed = keys_below(folder, left_out), None
            if left_out.keys() - said:
                line = left_out_line(folder, left_out)
            said |= left_out.keys()
        except OSError as error:  # a share's bad moment
            if error.strerror != failed:
                line = f"{error.filename}: {error.strerror}; looking again"
            now, failed = set(), error.strerror
        fresh = (now & before) - judged  # its size may be final long before its last pixels
        took, busy = time.perf_counter() - start, time.process_time() - cpu
        if line:
            say(printable(line))
        for key in sorted(fresh, key=lambda key: (key[2], key[0])):
            yield Path(folder, key[0]), key
        waiting, before = now - before - judged, now
        # Half of a share's time; 5 % of a core at most, unless a picture waits for a second look.
        time.sleep(max(POLL, took, 0 if waiting else 20 * busy))


def begun(stream):
    """Whether what a stream writes to is a file with something in it, as after `>>`."""
    with suppress(OSError, ValueError):  # no file at all
        return os.fstat(stream.fileno()).st_size > 0
    return False


def check_reading():
    """Refuse surroundings that read no picture: by them every picture would be unreadable."""
    file = io.BytesIO()
    Image.new("RGB", (2, 1)).save(file, "PNG")
    try:
        decode(file.getvalue())
    except Exception as error:
        raise Refused(f"Pillow {PIL.__version__} reads no picture here ({why_unreadable(error)}); "
                      f"the oldest that works is {OLDEST['Pillow']}") from None


def digest(text):
    """argparse type: 64 hexadecimal digits, behind which sha256sum writes the file's name."""
    first = text.split(None, 1)[0] if text.split() else ""
    if len(first) != 64 or set(first.lower()) - set("0123456789abcdef"):
        raise ArgumentTypeError(f"{text!r} is no sha256, which has 64 hexadecimal digits")
    return first


def parse_arguments():
    """The flags; ends the program for wrong ones, and refuses folders that do not fit."""
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = p.add_argument
    add("pictures", nargs="*", help="files, patterns or folders (default: data/fasteners/test)")
    add("--model", default="runs/student/student.ts", help="a .ts or .onnx of distill.py")
    add("--sha256", metavar="HEX", type=digest, help="refuse a model with another sha256")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object per line, all probabilities")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a header")
    add("--heatmap", metavar="DIR", help="draw what does not pass, red over what speaks for it")
    add("--watch", metavar="DIR", help="judge what arrives below it, each once (judged.jsonl)")
    add("--review-band", nargs=2, type=float, metavar=("LOW", "HIGH"), help="scores of a REVIEW")
    add("--threads", type=int, choices=range(1, 257), metavar="N", help="CPU threads")
    add("--info", action="store_true", help="print what the file says about itself")
    add("--benchmark", action="store_true", help="measure this device")
    args = p.parse_args()
    if args.review_band and not 0 <= args.review_band[0] <= args.review_band[1] <= 1:
        p.error("--review-band: wants 0 <= LOW <= HIGH <= 1")
    if args.watch and not Path(args.watch).is_dir():
        raise Refused(f"--watch {args.watch}: no such folder")
    if args.watch and args.pictures:
        p.error("--watch DIR judges what is below it; give no other pictures")
    args.pictures = args.pictures or ["data/fasteners/test"]
    searched = [args.watch] if args.watch else list(filter(os.path.isdir, args.pictures))
    for folder in searched if args.heatmap else ():
        where = Path(args.heatmap).resolve()
        if Path(folder).resolve() in (where, *where.parents):
            raise Refused(f"--heatmap {args.heatmap}: among the pictures of {folder}; name a "
                          "folder outside of it")
    return args


def run():
    """The program; returns its exit status."""
    args = parse_arguments()
    check_reading()

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
    if args.csv and not begun(sys.stdout):
        print(*FIELDS, sep=",")
    if args.watch:
        try:
            watch(args.watch, judge, report, judge.rule)
        except BrokenPipeError:  # no `| head` that has seen enough
            raise Refused("output: nobody reads it any more, so the watch ends") from None
    paths = list(list_pictures(args.pictures))
    if not paths:
        raise Refused(f"no pictures in {', '.join(args.pictures)}")
    return int(max([report(judge(path)) for path in paths]))  # 1 where some could not be read


def main():
    """End with the status of `run`, or with 2 and one line for what cannot be done."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")  # a shell may have closed them
                              for stream in (sys.stdout, sys.stderr))
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
        say(f"error: {printable(reason)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
