"""Picture files -> decoded cache: read once, resized, stored as one memory-mapped uint8 array.

    runs/decoded/<folder>-<side>-<hash of its path>/images.bin   uint8 [N, S, S, 3], RGB
                                                   /index.json   path, sha256, size of each picture

Every opening hashes the bytes of all files (about a second per GB), since names, sizes and time
stamps can stay while the contents change; then the array is made again. The array is hashed too.
"""

import hashlib
import io
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import check_seal, clear_stale, file_sha256, load_json, save_json, sealed
from common.listing import list_pictures

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever a file's name says
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 80_000_000, 65_535, 50
LARGE, DENSITY = 16_000_000, 250  # pixels; most pixels per byte of a file with more
BAND = 128  # rows that are converted at a time
WHITE_LEVEL = 65535  # of pictures with more than 8 bits per pixel
VERSION = 4  # raise it when decoding or resizing changes
warnings.filterwarnings("ignore", module="PIL")  # a picture is read, or listed as unreadable


def read_picture(file, white_level=WHITE_LEVEL):
    """Decode a picture to uint8 RGB [H, W, 3], upright.

    file: path or binary file. EXIF orientation is applied; grey, palette, RGBA and CMYK pictures
    are converted. Grey pictures of more than 8 bits are scaled so that `white_level` becomes 255,
    the same for every picture of a set. Raises an exception of Pillow's, or ValueError for more
    than MAX_PIXELS pixels, MAX_SIDE a side, MAX_SCANS scans, or of more than LARGE pixels DENSITY a
    byte (cameras write less than 10), before anything is decoded. Takes 7 bytes a pixel,
    progressive JPEG and WebP up to 16. infer.py holds the same lines, because it travels alone; a
    test keeps the two equal.
    """
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
            if is_deep(band):  # convert("RGB") would clip at 255
                values = np.asarray(band, dtype=np.float32) / (white_level / 255)
                band = Image.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
            rows[:] = np.asarray(band.convert("RGB"))
        return picture


def is_deep(image):
    """Whether a PIL image has more than 8 bits per pixel."""
    return image.mode.startswith(("I", "F"))


def resize(picture, side):
    """uint8 tensor [H, W, 3] -> uint8 [side, side, 3]: antialiased, squeezed, never cropped.

    torch's operator in integers, which gives the same bytes on every processor; the exported model
    carries the same operator.
    """
    planes = picture.permute(2, 0, 1)[None]
    small = F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0)


@dataclass(frozen=True)
class Decoded:
    """The readable pictures of one folder at one side length.

    images: uint8 memory map [N, S, S, 3]; paths: below the folder; digests: sha256 of each file;
    facts: (width, height, bytes) of each file; bad: {path: why it cannot be read}; fingerprint: a
    hash of all that decides the images.
    """

    folder: Path
    images: np.ndarray
    paths: list
    digests: list
    facts: list
    bad: dict
    fingerprint: str

    def require_readable(self, skip_bad):
        """Raise a UserError that lists every unreadable picture, or with skip_bad only print it."""
        if not self.bad:
            return
        rows = "\n".join(f"  {self.folder / path}: {why}" for path, why in self.bad.items())
        if not skip_bad:
            raise UserError(
                f"{self.folder}: {len(self.bad)} pictures cannot be read; "
                f"mend them or use --skip-bad\n{rows}"
            )
        print(f"{self.folder}: left out {len(self.bad)} pictures that cannot be read\n{rows}")


class DecodedCache:
    """Where decoded folders are kept, and how they are read."""

    def __init__(self, home, workers=2, skip_bad=False):
        """home: folder of the cache; workers: threads that decode."""
        self.home, self.workers, self.skip_bad = Path(home), workers, skip_bad

    def open(self, folder, side, white_level=WHITE_LEVEL):
        """The `Decoded` of a folder, made or made again where need be.

        side: px. Costs a decoding per picture once, and a hashing of all bytes at each opening.
        Raises UserError for a missing folder or one without a picture.
        """
        folder = Path(folder)
        paths = list_pictures(folder)
        with ThreadPoolExecutor(self.workers) as pool:
            digests = list(pool.map(lambda path: file_sha256(folder / path), paths))
            wanted = {
                "version": VERSION,
                "side": side,
                "white_level": white_level,
                "files": [list(row) for row in zip(paths, digests)],
            }
            home = self.home_of(folder, side, white_level)
            index = read_index(home, wanted)
            if index is None:
                index = decode_folder(folder, home, wanted, pool)
        warn_if_dark(folder, index)

        kept = [row for row in wanted["files"] if row[0] not in index["bad"]]
        shape = (len(kept), side, side, 3)
        images = np.empty(shape, np.uint8)
        if kept:
            images = np.memmap(home / "images.bin", np.uint8, "r", shape=shape)
        content = json.dumps([VERSION, side, white_level, kept])
        return Decoded(
            folder=folder,
            images=images,
            paths=[path for path, _ in kept],
            digests=[digest for _, digest in kept],
            facts=index["facts"],
            bad=index["bad"],
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        )

    def home_of(self, folder, side, white_level):
        """The cache's folder for one folder of pictures."""
        read = os.fsencode(folder.resolve()) + str(white_level).encode()
        key = hashlib.sha256(read).hexdigest()[:8]
        return self.home / f"{folder.name}-{side}-{key}"


def read_index(home, wanted):
    """The stored index where it matches `wanted` and its array is undamaged, else None."""
    try:
        index = load_json(home / "index.json")
        if any(index.get(name) != value for name, value in wanted.items()):
            return None
        return index if check_seal(home / "images.bin") == index["sha256"] else None
    except UserError:
        return None


def decode_folder(folder, home, wanted, pool):
    """Decode every picture of `wanted` into home/images.bin; returns the index beside it."""
    start = time.perf_counter()
    (home / "index.json").unlink(missing_ok=True)  # an array is valid with the index after it only

    def decode(row):
        return decode_file(folder / row[0], row[1], wanted["side"], wanted["white_level"])

    for each in (home, home.parent):
        clear_stale(each)

    bad, facts, brightest = {}, [], None
    files = wanted["files"]
    with sealed(home / "images.bin") as array:
        array.reserve(len(files) * wanted["side"] ** 2 * 3)
        rows = pool.map(decode, files)
        bar = tqdm(rows, f"decoding {folder}", len(files), disable=None, leave=False)
        for (path, _), (pixels, told) in zip(files, bar):
            if pixels is None:
                bad[path] = told
                continue
            array.write(pixels.numpy().tobytes())
            facts.append([told["width"], told["height"], told["bytes"]])
            if told["deep"]:
                brightest = max(brightest or 0, int(pixels.max()))

    index = {
        **wanted,
        "bad": bad,
        "facts": facts,
        "brightest_deep": brightest,
        "sha256": array.digest.hexdigest(),
    }
    save_json(index, home / "index.json")
    seconds = time.perf_counter() - start
    print(f"decoded {len(facts)} pictures of {folder} at {wanted['side']} px in {seconds:.1f} s")
    return index


def decode_file(path, digest, side, white_level):
    """(uint8 tensor [side, side, 3], what is known of the file), or (None, why not)."""
    data = None
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("changed while it was read")
        with Image.open(io.BytesIO(data)) as image:
            deep = is_deep(image)
        picture = read_picture(io.BytesIO(data), white_level)
        height, width = picture.shape[:2]
        told = {"width": width, "height": height, "bytes": len(data), "deep": deep}
        return resize(torch.from_numpy(picture), side), told
    except Exception as error:  # Pillow raises many kinds for damaged files
        if data == b"":
            return None, "the file is empty"
        reason = first_line(error).split(" <_io")[0]  # the path is told beside it
        return None, f"{type(error).__name__}: {reason}"


def warn_if_dark(folder, index):
    """Say so where 16-bit pictures use no more than the lowest 12 bits, as of a 12-bit camera."""
    darkest_white = 255 * 4095 // WHITE_LEVEL
    brightest = index["brightest_deep"]
    if index["white_level"] != WHITE_LEVEL or brightest is None or brightest > darkest_white:
        return
    print(
        f"warning: {folder}: no 16-bit picture exceeds 4095 of {WHITE_LEVEL}, so all are nearly "
        "black; for a 12-bit camera train with --white-level 4095"
    )
