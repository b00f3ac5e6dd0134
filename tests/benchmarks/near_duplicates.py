"""Near-duplicates: how many planted ones the audit finds, how often it is wrong, what it costs.

    python tests/benchmarks/near_duplicates.py --sets DIR [DIR ...]     # a minute a set
    python tests/benchmarks/near_duplicates.py --sets data/fasteners --view-size 64
    python tests/benchmarks/near_duplicates.py --clusters DIR [DIR ...] # half a minute a set
    python tests/benchmarks/near_duplicates.py --scale 1000 10000       # seconds; 100000 takes 10 s
    python tests/benchmarks/near_duplicates.py --sets DIR --imagededup  # beside that package

DIR is an ImageFolder with train/ and test/. Planted: up to 210 training pictures, a seventh each
mirrored, turned, brightened, encoded again (JPEG 50), shrunk to two thirds, cropped to 95 % at a
random place, or mirrored, brightened, cropped and encoded together. All training pictures are the
earlier set. The real test pictures show how often pictures that merely look alike are called
near-duplicates (some do show the same part); those with the pixels of another one are left out.
--clusters tells what hangs together within train/, and so is never split.
"""

import io
import resource
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench import machine, print_table
from PIL import Image, ImageEnhance

from common import cli, splits
from common.audit.near_duplicates import exact_copies, likeness_of_copies, near_duplicates
from common.files import UserError, px
from common.pictures import (
    WHITE_LEVEL,
    Decoded,
    DecodedCache,
    Pictures,
    list_pictures,
    resize,
)
from common.validation import joined
from infer import decode
from train_teacher import default_view_size

PLANTED = 210  # at most
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)  # of the likeness, beside the one in use


# ------------------------------------------------------------------------ planted near-duplicates


def mirror(image, rng):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def turn(image, rng):
    return image.transpose(Image.Transpose.ROTATE_90)


def brighten(image, rng):
    brighter = ImageEnhance.Brightness(image).enhance(1.25)
    return ImageEnhance.Contrast(brighter).enhance(0.9)


def encode(image, rng, quality=50):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def shrink(image, rng):
    size = (image.width * 2 // 3, image.height * 2 // 3)
    return image.resize(size, Image.Resampling.BILINEAR)


def crop(image, rng, share=0.95):
    w, h = image.size
    x, y = rng.uniform(0, 1 - share, 2)
    box = (x * w, y * h, (x + share) * w, (y + share) * h)
    return image.crop([round(edge) for edge in box])


def all_but_turn(image, rng):
    brighter = ImageEnhance.Brightness(mirror(image, rng)).enhance(1.2)
    return encode(crop(brighter, rng), rng, quality=70)


CHANGES = {
    "mirrored": mirror,
    "turned": turn,
    "brightened": brighten,
    "encoded again": encode,
    "shrunk": shrink,
    "cropped": crop,
    "all but turned": all_but_turn,
}


def plant(train, rng):
    """(numbers of the originals, what was done to each, the copies)."""
    originals = rng.permutation(len(train))[:PLANTED]
    names = list(CHANGES)
    kinds = [names[place % len(names)] for place in range(len(originals))]
    copies = [CHANGES[kind](train[i], rng) for kind, i in zip(kinds, originals)]
    return originals, np.array(kinds), copies


# ------------------------------------------------------------------------------------ pictures


def read(folder):
    """PIL images of all pictures below a folder."""
    files = (folder / path for path in list_pictures(folder))
    return [Image.fromarray(decode(file.read_bytes())[0]) for file in files]


def as_pictures(images, size):
    """PIL images as the decoded cache would hold them at [H, W]."""
    resized = [resize(torch.from_numpy(np.array(image)), size).numpy() for image in images]
    return in_memory(np.stack(resized))


def in_memory(pixels):
    """`Pictures` of an array uint8 [N, H, W, 3]."""
    return Pictures.of(Decoded(Path("made"), pixels, [""] * len(pixels), [], [], {}, ""))


def without_copies(train, test):
    """The test images that have not the pixels of an earlier one."""
    digests = [image.tobytes() for image in (*train, *test)]
    begin = np.repeat([0, len(train)], [len(train), len(test)])
    copies = {i - len(train) for i, _ in exact_copies(digests, begin)}
    return [image for i, image in enumerate(test) if i not in copies]


# ------------------------------------------------------------------------------------- measure


def search(earlier, later, lowest):
    """({later picture: (its match, likeness)}, seconds) of matches that are at least so like."""
    begin = np.repeat([0, len(earlier)], [len(earlier), len(later)])
    start = time.perf_counter()
    pairs = near_duplicates(earlier + later, begin, lowest)
    seconds = time.perf_counter() - start
    return {i - len(earlier): (j, likeness) for i, j, likeness in pairs}, seconds


def measure(folder, size, imagededup):
    """Print the table of one set, a row per threshold."""
    train, test = read(folder / "train"), read(folder / "test")
    originals, kinds, copies = plant(train, np.random.default_rng(0))
    fresh = without_copies(train, test)
    in_use = likeness_of_copies(size)
    thresholds = sorted({*THRESHOLDS, in_use})

    earlier = as_pictures(train, size)
    planted, seconds = search(earlier, as_pictures(copies, size), thresholds[0])
    alike, its_seconds = search(earlier, as_pictures(fresh, size), thresholds[0])

    rows = []
    for threshold in thresholds:
        matches = [planted.get(k, (None, 0.0)) for k in range(len(copies))]
        hits = [i == j and likeness >= threshold for i, (j, likeness) in zip(originals, matches)]
        hits = np.array(hits)
        named = sum(likeness >= threshold for _, likeness in alike.values())
        shares = [hits.mean(), *(hits[kinds == kind].mean() for kind in CHANGES)]
        title = f"{threshold:.2f}{' (in use)' if threshold == in_use else ''}"
        row = [title, *(f"{100 * share:.0f}" for share in shares)]
        rows.append([*row, f"{100 * named / len(fresh):.1f}"])
    print(
        f"\n{folder.name}: {len(train)} earlier pictures at {px(size)}, {len(copies)} planted "
        f"copies, {len(fresh)} test pictures; {seconds + its_seconds:.1f} s\n"
    )
    print_table(["found, %, by likeness", "all", *CHANGES, "test pictures named, %"], rows)
    if imagededup:
        measure_imagededup(train, originals, copies, fresh)


def measure_imagededup(train, originals, copies, fresh):
    """The same through imagededup's perceptual hash at its default distance."""
    from imagededup.methods import PHash

    with tempfile.TemporaryDirectory() as home:
        for letter, images in (("a", train), ("p", copies), ("t", fresh)):
            for number, image in enumerate(images):
                image.save(Path(home) / f"{letter}{number}.png")
        start = time.perf_counter()
        duplicates = PHash(verbose=False).find_duplicates(image_dir=home)
        seconds = time.perf_counter() - start
    hits = [f"a{i}.png" in duplicates[f"p{k}.png"] for k, i in enumerate(originals)]
    matches = [duplicates[f"t{k}.png"] for k in range(len(fresh))]
    named = [any(name.startswith("a") for name in of_one) for of_one in matches]
    print(
        f"\nimagededup PHash: {100 * np.mean(hits):.0f} % found, {100 * np.mean(named):.1f} % of "
        f"the test pictures named, {seconds:.1f} s with reading"
    )


def clusters(folder):
    """A row about the clusters of near-duplicates within a training folder."""
    cache = DecodedCache(cli.CACHE)
    dataset = {"view_size": default_view_size(folder), "white_level": WHITE_LEVEL}
    _, train = splits.open_labelled(cache, folder / "train", dataset)
    (train,) = splits.in_detail(cache, dataset, train)
    start = time.perf_counter()
    pairs = near_duplicates(train, np.arange(len(train)))
    seconds = time.perf_counter() - start
    members = {}
    for row, name in enumerate(joined(train.paths(), pairs)):
        members.setdefault(name, []).append(row)
    grown = [rows for rows in members.values() if len(rows) > 1]
    mixed = sum(len(set(train.labels[rows].tolist())) > 1 for rows in grown)
    counts = [len(train), sum(map(len, grown)), len(grown), max(map(len, members.values())), mixed]
    return [folder.name, px(train.view_size), *map(str, counts), f"{seconds:.0f}"]


def measure_scale(n, side=64):
    """Time and memory for n pictures of random blobs, half of them earlier."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        shape = (n, side, side, 3)
        pixels = np.memmap(Path(home) / "images.bin", np.uint8, "w+", shape=shape)
        for start in range(0, n, 1000):
            count = min(1000, n - start)
            coarse = rng.integers(0, 256, (count, 3, 12, 12)).astype(np.float32)
            blobs = F.interpolate(torch.from_numpy(coarse), size=(side, side), mode="bicubic")
            blobs = blobs.clamp(0, 255).to(torch.uint8)
            pixels[start:start + count] = blobs.permute(0, 2, 3, 1).numpy()
        pictures = in_memory(pixels)
        before = peak_memory()
        start = time.perf_counter()
        pairs = near_duplicates(pictures, np.repeat([0, n // 2], [n // 2, n - n // 2]))
        seconds = time.perf_counter() - start
    more = peak_memory() - before
    print(f"{n} pictures: {seconds:.1f} s, {more:.0f} MiB more memory, {len(pairs)} named")


def peak_memory():
    """The largest memory this process has used so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    p = cli.parser(__doc__)
    p.add_argument("--sets", nargs="+", type=Path, default=[], metavar="DIR",
                   help="ImageFolders with train/ and test/")
    p.add_argument("--view-size", type=cli.picture_size, default=[224, 224], metavar="HxW",
                   help="px at which pictures are compared (default: 224)")
    p.add_argument("--clusters", nargs="+", type=Path, default=[], metavar="DIR",
                   help="ImageFolders with train/")
    p.add_argument("--scale", nargs="+", type=cli.positive_int, default=[], metavar="N",
                   help="numbers of made pictures to measure time and memory with")
    p.add_argument("--imagededup", action="store_true", help="the package imagededup as well")
    args = p.parse_args()
    if args.imagededup and find_spec("imagededup") is None:
        raise UserError("--imagededup: the package imagededup is not installed")
    for folder in args.sets:
        measure(folder, args.view_size, args.imagededup)
    if args.clusters:
        head = ["set", "compared at", "pictures", "in clusters", "clusters", "largest"]
        rows = [clusters(folder) for folder in args.clusters]
        print_table([*head, "of several classes", "s"], rows)
    for n in args.scale:
        measure_scale(n)
    print(f"\n{machine()}")


if __name__ == "__main__":
    cli.run(main)
