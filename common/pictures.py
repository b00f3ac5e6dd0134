"""Picture files -> decoded cache -> batches: read once, resized, one memory-mapped uint8 array.

    runs/decoded/<folder>-<view size>-<hash of its path>/images.bin   uint8 [N, H, W, 3], RGB
                                                        /index.json   path, sha256, size of each

Every opening hashes the bytes of all files (about a second per GB), since names, sizes and time
stamps can stay while the contents change; then the array is made again. The array is hashed too.
Files are read by infer.py's own lines, so that a device sees what training saw.
"""

import hashlib
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from tqdm import tqdm

import infer
from common import files
from common.files import UserError
from common.losses import UNLABELLED
from infer import EXTENSIONS, decode, left_out_as, left_out_line, why_unreadable

WHITE_LEVEL = 65535  # of pictures with more than 8 bits per value
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)  # of floats, bytes, cameras of 10 to 16 bits
VERSION = 6  # raise it when decoding or resizing changes
AHEAD = 512  # pictures that may be decoded and not written yet
LIMITS = (infer.MAX_PIXELS, infer.MAX_SIDE, infer.MAX_SCANS, infer.LARGE, infer.DENSITY)
READER = [PIL.__version__, *LIMITS]  # what decides which pictures can be read


# ----------------------------------------------------------------------------------------- files


def list_pictures(folder):
    """Relative paths of the pictures below a folder, class folder after class folder, sorted.

    Links are followed; a line says where some lead out of `folder`, another one what is left out,
    by infer.py's rule. Raises UserError where the folder is missing, and for a link to nothing or
    in a circle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inside = folder.resolve()
    paths, outside, left_out = [], [], Counter()
    for home, folders, names in os.walk(folder, onerror=give_up, followlinks=True):
        folders[:] = used(folders, left_out, are_folders=True)
        pictures = [Path(home, name) for name in used(names, left_out)]
        paths += [path.relative_to(folder).parts for path in pictures if path.is_file()]
        for name in names:  # whatever it is called, since it may stand for a folder
            if not name.startswith("."):
                require_target(Path(home, name))
        below = [Path(home, name) for name in folders]
        for link in filter(Path.is_symlink, below + pictures):
            if Path(home).resolve().is_relative_to(link.resolve()):
                raise UserError(f"{link}: a link to a folder that it lies in; remove it")
            if not link.resolve().is_relative_to(inside):
                outside.append(f"{link} -> {link.resolve()}")
    if outside:
        say_once(f"{folder}: follows {len(outside)} links that lead out of it, the first "
                 f"{min(outside)}")
    if left_out:
        say_once(left_out_line(folder, left_out))
    return ["/".join(parts) for parts in sorted(paths)]


def require_target(path):
    """Raise a UserError for a link to nothing, as to a share that is not mounted."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nothing; mend or remove it")


def give_up(error):
    raise error


def used(names, left_out, are_folders=False):
    """The names that are not left out, by infer.py's rule; the others count in `left_out`."""
    kinds = {name: left_out_as(name, are_folders) for name in names}
    left_out.update(kind for kind in kinds.values() if kind)
    return [name for name in names if kinds[name] is None]


@cache
def say_once(line):
    """Print a line, once in a process: a folder is listed several times."""
    print(line)


def resize(picture, size):
    """uint8 tensor [H, W, 3] -> uint8 [*size, 3]: antialiased, squeezed to it, never cropped.

    torch's operator in integers, as in the exported model: the same bytes on every processor.
    """
    planes = picture.permute(2, 0, 1)[None]
    small = F.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0)


# ----------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Decoded:
    """The readable pictures of one folder at one size.

    images: uint8 memory map [N, H, W, 3]; paths: below the folder; digests: sha256 of each file;
    sizes: (width, height, bytes) of each file; bad: {path: why it cannot be read}; fingerprint: a
    hash of all that decides the images.
    """

    folder: Path
    images: np.ndarray
    paths: list
    digests: list
    sizes: list
    bad: dict
    fingerprint: str

    def require_readable(self, skip_bad):
        """Raise a UserError that lists every unreadable picture, or with skip_bad only print it."""
        rows = "\n".join(f"  {self.folder / path}: {why}" for path, why in self.bad.items())
        count = f"{self.folder}: {len(self.bad)} pictures cannot be read"
        if self.bad and not skip_bad:
            raise UserError(f"{count}; mend them or use --skip-bad\n{rows}")
        if self.bad:
            print(f"{count} and are left out\n{rows}")


class DecodedCache:
    """Where decoded folders are kept, and how they are read."""

    def __init__(self, home, workers=2, skip_bad=False):
        """home: folder of the cache; workers: threads that decode."""
        self.home, self.workers, self.skip_bad = Path(home), workers, skip_bad

    def open(self, folder, view_size, white_level=WHITE_LEVEL):
        """The `Decoded` of a folder at view_size, [H, W] in px, made or made again where need be.

        Costs a decoding per picture once, and a hashing of all bytes at each opening. Raises
        UserError for a missing folder or one without a picture.
        """
        folder = Path(folder)
        paths = list_pictures(folder)
        if not paths:
            raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        with ThreadPoolExecutor(self.workers) as pool:
            digests = list(pool.map(lambda path: files.file_sha256(folder / path), paths))
        wanted = {
            "version": VERSION,
            "view_size": view_size,
            "white_level": white_level,
            "files": [list(row) for row in zip(paths, digests)],
        }
        key = hashlib.sha256(os.fsencode(folder.resolve()) + str(white_level).encode()).hexdigest()
        name = f"{folder.name}-{files.px(view_size).removesuffix(' px')}-{key[:8]}"
        home = self.home / name
        index = read_index(home, wanted)
        if index is None:
            with files.exclusive(home, wait=True):  # another process may be decoding the same
                index = read_index(home, wanted) or self.decode(folder, home, wanted)
        for line in lines_about(folder, index):
            say_once(line)

        kept = [row for row in wanted["files"] if row[0] not in index["bad"]]
        shape = (len(kept), *view_size, 3)
        images = np.empty(shape, np.uint8)
        if kept:  # an empty file cannot be mapped
            images = np.memmap(home / "images.bin", np.uint8, "r", shape=shape)
        paths, digests = ([row[k] for row in kept] for k in (0, 1))
        content = json.dumps([VERSION, view_size, white_level, kept])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return Decoded(folder, images, paths, digests, index["sizes"], index["bad"], fingerprint)

    def decode(self, folder, home, wanted):
        """Decode every picture of `wanted` into home/images.bin; returns the index beside it."""
        start = time.perf_counter()
        (home / "index.json").unlink(missing_ok=True)  # valid only of the array beside it
        rows, size = wanted["files"], wanted["view_size"]
        bad, sizes, brightest, of_several_pages = {}, [], None, 0

        def read(row):
            return decode_file(folder / row[0], row[1], size, wanted["white_level"])

        images, threads = files.checksummed(home / "images.bin"), ThreadPoolExecutor(self.workers)
        with images as array, threads as pool:
            parts = (rows[first:first + AHEAD] for first in range(0, len(rows), AHEAD))
            decoded = chain.from_iterable(pool.map(read, part) for part in parts)
            bar = tqdm(decoded, f"decoding {folder}", len(rows), disable=None, leave=False)
            for (path, _), (pixels, properties) in zip(rows, bar):
                if pixels is None:
                    bad[path] = properties
                    continue
                array.write(pixels.numpy().tobytes())
                its_size, its_brightest, several = properties
                sizes.append(its_size)
                of_several_pages += several
                if its_brightest is not None:
                    brightest = max(brightest or 0.0, its_brightest)
        index = {**wanted, "bad": bad, "reader": READER, "sizes": sizes, "brightest": brightest,
                 "of_several_pages": of_several_pages}
        files.save_json(index, home / "index.json")
        seconds = time.perf_counter() - start
        print(f"decoded {len(sizes)} pictures of {folder} at {files.px(size)} in {seconds:.1f} s")
        return index


def read_index(home, wanted):
    """The stored index where it matches `wanted` and its array is undamaged, else None.

    Of pictures that could not be read it holds for as long as the reader is the same.
    """
    try:
        index = files.load_json(home / "index.json")
        files.check_checksum(home / "images.bin")
    except UserError:
        return None
    outlived = index.get("bad") and index.get("reader") != READER
    return index if wanted.items() <= index.items() and not outlived else None


def decode_file(path, digest, size, white_level):
    """One picture, read and resized: (pixels, properties), or (None, why it cannot be read).

    pixels: uint8 tensor [*size, 3]; properties: ((width, height, bytes) of the file, brightest,
    several), the latter two as of infer.py's `decode`. Raises OSError for what is wrong around a
    picture, such as a share that is gone for a moment.
    """
    with files.named(path):
        content = path.read_bytes()
    try:
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("changed while it was read")
        picture, brightest, several = decode(content, white_level)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = files.first_line(why_unreadable(error), 200)
        return None, "the file is empty" if content == b"" else f"{type(error).__name__}: {reason}"
    height, width = picture.shape[:2]
    small = resize(torch.from_numpy(picture), size)
    return small, ((width, height, len(content)), brightest, several)


def lines_about(folder, index):
    """What is worth a word about the decoded pictures of a folder."""
    if index["of_several_pages"]:
        yield (
            f"{folder}: files with several pages: {index['of_several_pages']}; of each the first "
            "page that is no thumbnail is used"
        )
    brightest, white = index["brightest"], index["white_level"]
    if brightest is None and white != WHITE_LEVEL:
        yield f"{folder}: --white-level {white} is not used, since no value has more than 8 bits"
    if not brightest or white / 3 < brightest <= white:
        return
    fits = next((scale for scale in FULL_SCALES if brightest <= scale), math.ceil(brightest))
    if fits != white:
        effect = "clipped at white" if brightest > white else "dark"
        yield (
            f"warning: {folder}: the brightest value of more than 8 bits is {brightest:g}, white "
            f"level {white:g}, so pictures are {effect}; train with --white-level {fits}"
        )


# --------------------------------------------------------------------------------------- batches


class Pictures:
    """Rows of one or several `Decoded` folders behind one index, with labels.

    A picture's number here is the `index` of its views, so teachers and student must build it
    alike: the labelled training pictures, then the unlabelled ones.
    """

    def __init__(self, sources, source_of, row_of, labels):
        """sources: list of `Decoded`; source_of, row_of, labels: int64 arrays [N]."""
        self.sources, self.source_of, self.row_of = sources, source_of, row_of
        self.labels = torch.from_numpy(labels)

    @classmethod
    def of(cls, decoded, rows=None, labels=None):
        """Rows of one folder, by default all of them and without a label."""
        rows = np.arange(len(decoded.paths)) if rows is None else rows
        labels = np.full(len(rows), UNLABELLED) if labels is None else labels
        return cls([decoded], np.zeros(len(rows), np.int64), rows, labels)

    def __len__(self):
        return len(self.row_of)

    def __add__(self, other):
        """These pictures with the other ones behind them."""
        source_of = np.concatenate([self.source_of, other.source_of + len(self.sources)])
        row_of = np.concatenate([self.row_of, other.row_of])
        labels = torch.cat([self.labels, other.labels]).numpy()
        return Pictures([*self.sources, *other.sources], source_of, row_of, labels)

    def take(self, numbers):
        """The pictures with these numbers, in this order."""
        labels = self.labels.numpy()[numbers]
        return Pictures(self.sources, self.source_of[numbers], self.row_of[numbers], labels)

    def batch(self, indices, device="cpu"):
        """uint8 [B, H, W, 3] on the device."""
        rows = [self.sources[self.source_of[i]].images[self.row_of[i]] for i in indices]
        batch = torch.from_numpy(np.stack(rows))
        if torch.device(device).type == "cuda":  # else the copy would wait for the GPU
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)

    @property
    def view_size(self):
        """[H, W] of the decoded pictures in px."""
        return list(self.sources[0].images.shape[1:3])

    def path(self, i):
        """Where picture i lies, from its folder's name on: train/good/17.jpg."""
        source = self.sources[self.source_of[i]]
        return f"{source.folder.name}/{source.paths[self.row_of[i]]}"

    def paths(self):
        """`path` of every picture."""
        return [self.path(i) for i in range(len(self))]

    def digests(self):
        """sha256 of each picture's file."""
        return [self.sources[p].digests[row] for p, row in zip(self.source_of, self.row_of)]

    def pixel_digests(self):
        """sha256 of each picture's decoded pixels: equal for the same pixels in another file."""
        images = (self.sources[p].images[row] for p, row in zip(self.source_of, self.row_of))
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]

    def sizes(self):
        """(width, height, bytes) of each picture's file."""
        return [self.sources[p].sizes[row] for p, row in zip(self.source_of, self.row_of)]

    def fingerprint(self):
        """A hash of what the pictures are, in which order, and of their labels."""
        read = [source.fingerprint for source in self.sources]
        rows = [self.source_of.tolist(), self.row_of.tolist(), self.labels.tolist()]
        return hashlib.sha256(json.dumps([read, rows]).encode()).hexdigest()
