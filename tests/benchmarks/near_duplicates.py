"""Near copies: what the search finds of planted ones, how often it cries wolf, and what it costs.

    python tests/benchmarks/near_duplicates.py --sets DIR [DIR ...]    # ImageFolders with train/ and test/
    python tests/benchmarks/near_duplicates.py --scale 1000 10000 100000
    pip install imagededup && python tests/benchmarks/near_duplicates.py --sets DIR --peer

Planted: a seventh of up to 210 training pictures each is mirrored, turned, brightened, encoded again (JPEG 50), shrunk to two
thirds, cropped to 95 % at a random place, or mirrored, brightened, cropped and encoded together. All training pictures are the earlier set; the real test pictures that are not
byte-equal to one of them show how often pictures that merely look alike are called copies (some do show the same part).
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common import data, duplicates  # noqa: E402



def encoded(image, quality=50):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image, rng, share=0.95):
    w, h = image.size
    x, y = rng.uniform(0, 1 - share, 2)
    return image.crop((round(x * w), round(y * h), round((x + share) * w), round((y + share) * h)))


CHANGES = {
    "mirrored": lambda im, rng: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda im, rng: im.transpose(Image.Transpose.ROTATE_90),
    "brightened": lambda im, rng: ImageEnhance.Contrast(ImageEnhance.Brightness(im).enhance(1.25)).enhance(0.9),
    "encoded again": lambda im, rng: encoded(im),
    "shrunk": lambda im, rng: im.resize((im.width * 2 // 3, im.height * 2 // 3), Image.Resampling.BILINEAR),
    "cropped": cropped,
    "all but turned": lambda im, rng: encoded(cropped(ImageEnhance.Brightness(im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).enhance(1.2), rng), 70),
}


def read(folder, limit=None):
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in data.EXTENSIONS)
    return [Image.fromarray(data.read_picture(file)) for file in files[:limit]], files


def pack(images, side):
    pixels = np.stack([data.resize(torch.from_numpy(np.array(image)), side).numpy() for image in images])
    n = len(pixels)
    return data.whole(data.Pack(Path("made"), pixels, [str(i) for i in range(n)], np.zeros(n, int), [], "", [""] * n, [None] * n))


def search(earlier, later, lowest):
    """({later picture: (its match, likeness)}, seconds) of matches that are at least so like."""
    pictures = data.Pictures(*earlier.parts, *later.parts)
    begin = np.repeat([0, len(earlier)], [len(earlier), len(later)])
    start = time.perf_counter()
    found = duplicates.near_copies(pictures, begin, lowest)
    return {i - len(earlier): (j, score) for i, j, score in found}, time.perf_counter() - start


def measure(folder, side, peer):
    train, files = read(folder / "train")
    test, _ = read(folder / "test")
    rng = np.random.default_rng(0)
    originals = rng.permutation(len(train))[:210]
    kinds = [list(CHANGES)[k % len(CHANGES)] for k in range(len(originals))]
    planted = [CHANGES[kind](train[i], rng) for kind, i in zip(kinds, originals)]
    known = set(duplicates.exact_copies([image.tobytes() for image in (*train, *test)], np.repeat([0, len(train)], [len(train), len(test)])))
    copied = {i - len(train) for i, _ in known}
    fresh = [image for i, image in enumerate(test) if i not in copied]
    in_use = duplicates.LIKENESS[duplicates.FINE if side >= duplicates.FINE else duplicates.ROUGH]
    thresholds = sorted({0.7, 0.75, 0.8, 0.85, 0.9, in_use})
    earlier, planted_pack, fresh_pack = (pack(images, side) for images in (train, planted, fresh))
    print(f"\n{folder.name}: {len(train)} earlier pictures, at {side} px, {len(planted)} planted copies, {len(fresh)} test pictures that are no exact copies")
    all_found, seconds = search(earlier, planted_pack, thresholds[0])
    all_alike, its_seconds = search(earlier, fresh_pack, thresholds[0])
    for threshold in thresholds:
        found, alike = ({k: pair for k, pair in each.items() if pair[1] >= threshold} for each in (all_found, all_alike))
        hit = np.array([found.get(k, (None,))[0] == i for k, i in enumerate(originals)])
        print(f"  threshold {threshold:.2f}{' (in use)' if threshold == in_use else ''}: recall {hit.mean():.3f} ("
              + ", ".join(f"{kind} {hit[[k == kind for k in kinds]].mean():.2f}" for kind in CHANGES)
              + f"), test pictures named {len(alike) / len(fresh):.3f}, {seconds + its_seconds:.1f} s")
    if peer:
        print_peer(train, planted, originals, fresh)


def print_peer(train, planted, originals, fresh):
    """The same through imagededup's perceptual hash at its default distance."""
    from imagededup.methods import PHash
    with tempfile.TemporaryDirectory() as home:
        for name, images in (("a", train), ("p", planted), ("t", fresh)):
            for number, image in enumerate(images):
                image.save(Path(home) / f"{name}{number}.png")
        start = time.perf_counter()
        found = PHash(verbose=False).find_duplicates(image_dir=home)
        seconds = time.perf_counter() - start
    hits = [f"a{i}.png" in found[f"p{k}.png"] for k, i in enumerate(originals)]
    cries = [any(name.startswith("a") for name in found[f"t{k}.png"]) for k in range(len(fresh))]
    print(f"  imagededup PHash: recall {np.mean(hits):.3f}, test pictures named {np.mean(cries):.3f}, {seconds:.1f} s (reading included)")


def scale(n):
    """Time and memory for n pictures, half of them earlier, made of random blobs."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        pixels = np.lib.format.open_memmap(Path(home) / "images.npy", "w+", np.uint8, (n, 64, 64, 3))
        for start in range(0, n, 1000):
            coarse = torch.from_numpy(rng.integers(0, 256, (min(1000, n - start), 3, 12, 12)).astype(np.float32))
            pixels[start:start + 1000] = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        pictures = data.whole(data.Pack(Path("made"), pixels, [""] * n, np.zeros(n, int), [], "", [], []))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        found = duplicates.near_copies(pictures, np.repeat([0, n // 2], [n // 2, n - n // 2]))
        seconds = time.perf_counter() - start
    print(f"{n} pictures: {seconds:.1f} s, peak memory {before / 1024:.0f} -> {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, {len(found)} named")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", type=Path, default=[], metavar="DIR")
    p.add_argument("--side", type=int, default=224, help="px of the packs (the embedded set's are 64 by default)")
    p.add_argument("--scale", nargs="+", type=int, default=[], metavar="N")
    p.add_argument("--peer", action="store_true", help="also imagededup, which must be installed")
    args = p.parse_args()
    for folder in args.sets:
        measure(folder, args.side, args.peer)
    for n in args.scale:
        scale(n)


if __name__ == "__main__":
    main()
