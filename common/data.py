"""Pictures on disk -> packs: decoded once, resized, stored as one uint8 array that is memory-mapped.

A pack holds one folder of pictures (train, val, a test set, an unlabelled pool) at one side length:

    <cache-dir>/<folder>-<side>-<hash of its path>/images.npy   uint8 [N, S, S, 3], RGB
                                                  /index.json   relative path, label, sha256 and dimensions of each

It is rebuilt when the names or the bytes of the files changed: every opening hashes all bytes
(about a second per GB), since sizes and time stamps can stay while the contents change.
"""

import hashlib
import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import synthetic
from common.checkpoints import atomic_path, load_json, require_same, save_json
from common.cli import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
MAX_PIXELS = 80_000_000
EMBEDDED = "data/fasteners"
PACK_VERSION = 3  # raise it when decoding or resizing changes
UNLABELLED = -1


def read_picture(file):
    """Decode a picture (path or binary file) to uint8 RGB [H, W, 3], upright.

    EXIF orientation is applied; grey, palette, RGBA, CMYK and 16-bit pictures are converted. Raises
    an exception of Pillow's, or ValueError for more than MAX_PIXELS pixels. infer.py holds the same
    lines, because it travels alone; a test keeps the two equal.
    """
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels is over the limit of {MAX_PIXELS}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 bits per pixel; convert("RGB") would clip at 255
            values = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((values / (257.0 if values.max() > 255 else 1.0)).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def resize(picture, side):
    """uint8 tensor [H, W, 3] -> uint8 [side, side, 3]: antialiased bilinear, squeezed, never cropped.

    torch's operator in integers, which gives the same bytes on every processor; the exported model
    carries the same operator.
    """
    pixels = F.interpolate(picture.permute(2, 0, 1)[None], size=(side, side), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0)


@dataclass(frozen=True)
class Pack:
    """One folder of decoded pictures.

    images: uint8 memory map [N, S, S, 3]; labels: int64 [N], -1 for none; digests: sha256 of each file;
    facts: (width, height, bytes) of each file.
    """

    folder: Path
    images: np.ndarray
    paths: list
    labels: np.ndarray
    classes: list
    fingerprint: str
    digests: list
    facts: list


def list_pictures(folder, labelled):
    """(classes, relative paths, labels) of a folder; classes are the sorted names of its sub-folders.

    Raises UserError for a missing folder, no or one class folder, an empty class, or no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")

    def pictures(below):
        found = (p for p in below.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        return sorted(p.relative_to(folder).as_posix() for p in found if not p.name.startswith("."))

    if not labelled:
        paths = pictures(folder)
        if not paths:
            raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        return [], paths, [UNLABELLED] * len(paths)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder}: {len(classes)} class folders found, at least two are needed: {folder}/<class>/<picture>")
    paths, labels = [], []
    for label, name in enumerate(classes):
        of_class = pictures(folder / name)
        if not of_class:
            raise UserError(f"{folder / name}: this class has no pictures; add some or remove the folder")
        paths += of_class
        labels += [label] * len(of_class)
    return classes, paths, labels


def open_pack(folder, side, args, labelled=True):
    """The pack of a folder, built or rebuilt if need be.

    side: pixels; args: the flags of `cli.add_data_flags`. Raises UserError with every picture that
    cannot be read, unless --skip-bad. Costs a decoding per picture once, a hashing at each opening.
    """
    folder = Path(folder)
    classes, paths, labels = list_pictures(folder, labelled)
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    home = Path(args.cache_dir) / f"{folder.name}-{side}-{key}"
    with ThreadPoolExecutor(args.workers) as pool:
        digests = list(pool.map(lambda p: hashlib.sha256((folder / p).read_bytes()).hexdigest(), paths))
        files = [list(row) for row in zip(paths, labels, digests)]
        wanted = {"version": PACK_VERSION, "side": side, "classes": classes, "files": files}
        index = _index_if_current(home, wanted)
        if index is None:
            index = _build(home, folder, wanted, pool)
    if index["bad"]:
        rows = "\n".join(f"  {folder / path}: {reason}" for path, reason in index["bad"].items())
        if not args.skip_bad:
            raise UserError(f"{folder}: {len(index['bad'])} pictures cannot be read; mend them or use --skip-bad\n{rows}")
        print(f"{folder}: left out {len(index['bad'])} pictures that cannot be read\n{rows}")
    kept = [row for row in files if row[0] not in index["bad"]]
    labels = np.array([label for _, label, _ in kept], np.int64)
    for label, name in enumerate(classes):
        if not (labels == label).any():
            raise UserError(f"{folder / name}: no picture of this class can be read; mend them or remove the folder")
    content = json.dumps([PACK_VERSION, side, classes, kept])
    return Pack(folder, np.load(home / "images.npy", mmap_mode="r"), [row[0] for row in kept],
                labels, classes, hashlib.sha256(content.encode()).hexdigest(), [row[2] for row in kept], index["facts"])


def _index_if_current(home, wanted):
    """The stored index when it matches `wanted` and its array is whole, else None."""
    try:
        index = load_json(home / "index.json")
        images = np.load(home / "images.npy", mmap_mode="r")
    except (UserError, OSError, ValueError):
        return None
    same = all(index.get(name) == value for name, value in wanted.items())
    return index if same and len(images) == len(wanted["files"]) - len(index["bad"]) else None


def _build(home, folder, wanted, pool):
    """Decode every picture of `wanted` into home/images.npy; returns the index written beside it."""
    side, files = wanted["side"], wanted["files"]
    (home / "index.json").unlink(missing_ok=True)  # an array is valid only with the index written after it
    start = time.perf_counter()

    def decode(row):
        path, _, digest = row
        data = None
        try:
            data = (folder / path).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("changed while it was read")
            picture = read_picture(io.BytesIO(data))
            return resize(torch.from_numpy(picture), side), (picture.shape[1], picture.shape[0], len(data))
        except Exception as error:  # Pillow raises many kinds for damaged files
            return None, "the file is empty" if data == b"" else f"{type(error).__name__}: {error}"

    bad, facts = {}, []
    with atomic_path(home / "images.npy") as temporary:
        images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(files), side, side, 3))
        rows = pool.map(decode, files)
        for row, (picture, told) in zip(files, tqdm(rows, f"packing {folder}", len(files), disable=None, leave=False)):
            if picture is None:
                bad[row[0]] = told
            else:
                images[len(facts)] = picture.numpy()
                facts.append(told)
        images.flush()
        if bad:  # the array was made for all files; keep the rows that were filled
            filled = np.lib.format.open_memmap(f"{temporary}.kept", "w+", np.uint8, (len(facts), side, side, 3))
            for row in range(len(facts)):
                filled[row] = images[row]
            filled.flush()
            del images, filled
            shutil.move(f"{temporary}.kept", temporary)
    index = {**wanted, "bad": bad, "facts": facts}
    save_json(index, home / "index.json")
    print(f"packed {len(facts)} pictures of {folder} at {side} px in {time.perf_counter() - start:.1f} s")
    return index


class Pictures:
    """Rows of packs behind one index: the labelled training pictures, then the unlabelled ones.

    A picture's number here is the `index` of its views, so teachers and student must build it alike.
    """

    def __init__(self, *parts):
        """parts: (pack, rows) pairs, rows an int array into the pack."""
        self.parts = parts
        self.packs = [pack for pack, _ in parts]
        self.rows = np.concatenate([rows for _, rows in parts])
        self.pack_of = np.concatenate([np.full(len(rows), k) for k, (_, rows) in enumerate(parts)])
        self.labels = torch.from_numpy(np.concatenate([pack.labels[rows] for pack, rows in parts]))

    def __len__(self):
        return len(self.rows)

    def path(self, i):
        """Where picture i lies, below its pack's folder's parent: train/good/17.jpg."""
        pack = self.packs[self.pack_of[i]]
        return f"{pack.folder.name}/{pack.paths[self.rows[i]]}"

    def digests(self):
        """sha256 of each picture's file."""
        return [self.packs[k].digests[row] for k, row in zip(self.pack_of, self.rows)]

    def pixel_digests(self):
        """sha256 of each picture's packed pixels: equal for the same pixels in another file."""
        return [hashlib.sha256(self.packs[k].images[row].tobytes()).hexdigest() for k, row in zip(self.pack_of, self.rows)]

    def facts(self):
        """(width, height, bytes) of each picture's file."""
        return [self.packs[k].facts[row] for k, row in zip(self.pack_of, self.rows)]

    def batch(self, indices, device="cpu"):
        """uint8 [B, S, S, 3] on the device."""
        batch = np.stack([self.packs[self.pack_of[i]].images[self.rows[i]] for i in indices])
        return torch.from_numpy(batch).to(device)


def whole(pack):
    """All pictures of one pack."""
    return Pictures((pack, np.arange(len(pack.labels))))


def with_pool(train, pack):
    """The training pictures with an unlabelled pack behind them."""
    return Pictures(*train.parts, (pack, np.arange(len(pack.labels))))


def hold_out(labels, groups, share, seed):
    """Split rows into (train, val), whole groups at a time, each class near its share.

    labels: int [N]; groups: N names; share: of each class to hold out. Groups are visited in an
    order drawn from the seed and held out when that brings the class counts nearer to their
    targets. Returns two sorted int arrays. Raises UserError when a class is left without a picture.
    """
    labels = np.asarray(labels)
    classes = labels.max() + 1
    rows_of = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    total = np.bincount(labels, minlength=classes)
    target = np.maximum(1, np.round(share * total))
    held, val = np.zeros(classes), []
    names = sorted(rows_of)
    for position in np.random.default_rng([seed, 0]).permutation(len(names)):
        rows = rows_of[names[position]]
        counts = np.bincount(labels[rows], minlength=classes)
        if np.abs(target - held - counts).sum() < np.abs(target - held).sum():
            held += counts
            val += rows
    if (held == 0).any() or (held == total).any():
        raise UserError(f"class number {int(np.argmax((held == 0) | (held == total)))} cannot be split into train and val "
                        "(too few pictures or groups); give a val/ folder")
    val = np.sort(np.array(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def groups_of(paths, pattern):
    """A group name per path: the first match group of the pattern, or the path itself."""
    if pattern is None:
        return paths
    matches = [re.search(pattern, path) for path in paths]
    if not any(matches):
        raise UserError(f"--group-regex {pattern!r} matches no path; one of them is {paths[0]!r}")
    return [match.group(1) or path if match else path for match, path in zip(matches, paths)]


def default_view_size(folder):
    """224 px, or less where the pictures are smaller: their median longer side, to a multiple of 32.

    64 px for the embedded set, whose defects are large, so that its chain takes minutes on two cores.
    """
    if Path(folder) == Path(EMBEDDED):
        return 64
    _, paths, _ = list_pictures(Path(folder) / "train", labelled=True)
    sides = []
    for path in paths[:: max(1, len(paths) // 100)]:
        try:
            with Image.open(Path(folder) / "train" / path) as image:
                sides.append(max(image.size))
        except Exception:  # open_pack lists what cannot be read
            continue
    median = float(np.median(sides)) if sides else 224.0
    return int(min(224, max(32, 32 * round(median / 32))))


def data_folder(data_dir):
    """The data folder as a Path; the embedded set is drawn first when it is asked for and missing."""
    folder = Path(data_dir)
    if folder == Path(EMBEDDED):
        try:
            synthetic.make_dataset(folder)
        except ValueError as error:
            raise UserError(str(error))
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    return folder


def open_training_data(record, args):
    """(train, val, record) for a record with dir, view_size, val_fraction, split_seed, group_regex and drop_leaks.

    train and val are `Pictures`. The returned record adds classes, fingerprint and, with drop_leaks, the paths that were left
    out because a test picture has the same bytes or pixels; a record that has these already is checked, and a UserError
    names what differs. Every stage calls this with the same record, hence sees the same split.
    """
    folder = data_folder(record["dir"])
    pack = open_pack(folder / "train", record["view_size"], args)
    if (folder / "val").is_dir():
        val_pack = open_pack(folder / "val", record["view_size"], args)
        require_same({"classes": pack.classes}, {"classes": val_pack.classes}, f"{folder / 'val'} against train",
                     "both need the same class folders")
        train, val = whole(pack), whole(val_pack)
        fingerprint = f"{pack.fingerprint}+{val_pack.fingerprint}"
    else:
        groups = groups_of(pack.paths, record["group_regex"])
        train_rows, val_rows = hold_out(pack.labels, groups, record["val_fraction"], record["split_seed"])
        train, val = Pictures((pack, train_rows)), Pictures((pack, val_rows))
        fingerprint = pack.fingerprint
    found = {**record, "dir": folder.as_posix(), "classes": pack.classes, "fingerprint": fingerprint}
    if record.get("drop_leaks"):  # artefacts from before the audit say nothing
        train, val, found["dropped"] = without_leaks(train, val, open_test_sets(test_folders(folder), record["view_size"], pack.classes, args))
    if "fingerprint" in record:
        require_same({**record, "dir": found["dir"]}, found, f"the pictures in {folder}",
                     "give the --data-dir that the earlier stage was made from, or make that stage again")
    return train, val, found


def without_leaks(train, val, tests):
    """(train, val, paths left out): without the pictures that have the bytes or the pixels of one in tests {name: Pictures}."""
    known = {digest for pictures in tests.values() for digest in (*pictures.digests(), *pictures.pixel_digests())}
    dropped, kept = [], []
    for pictures in (train, val):
        leak = np.array([not known.isdisjoint(digests) for digests in zip(pictures.digests(), pictures.pixel_digests())])
        dropped += [pictures.path(i) for i in np.flatnonzero(leak)]
        (pack, rows), = pictures.parts
        kept.append(Pictures((pack, rows[~leak])))
        if len(np.unique(kept[-1].labels)) < len(pack.classes):
            raise UserError(f"--drop-leaks: leaves a class of {pack.folder} without a picture; remove the copies from the test set instead")
    return *kept, dropped


def test_folders(data_dir):
    """The test* folders of a data folder, sorted."""
    return sorted(path for path in Path(data_dir).glob("test*") if path.is_dir())


def open_test_sets(folders, side, classes, args):
    """{name: Pictures} of test folders; a name is the folder's, or its path where names collide."""
    names = [Path(folder).name for folder in folders]
    sets = {}
    for folder, name in zip(folders, names):
        pack = open_pack(folder, side, args)
        require_same({"classes": classes}, {"classes": pack.classes}, f"{folder} against the models",
                     "a test set needs one folder for each class the models know")
        sets[name if names.count(name) == 1 else Path(folder).as_posix()] = whole(pack)
    return sets
