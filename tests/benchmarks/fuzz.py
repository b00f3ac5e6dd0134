"""Damaged files: are they refused in words, at once, in bounded memory, and never believed?

    python tests/benchmarks/fuzz.py                              # 100,000 pictures, 20,000 others
    python tests/benchmarks/fuzz.py --pictures 2000 --files 1000 --keep findings

Pictures of every format are cut off, their bits flipped, sizes in their headers changed, parts of
them swapped, and go through infer.py's `try_to_read`, from a file, and common/pictures.py's
`decode_file`, from memory: both must end in pixels or an exception that they catch, and agree. A
picture has no checksum that its format's reader always compares, so another picture may come out.

Files that one stage writes and another reads go through their own loaders. Only UserError (or
infer.py's exit status 2) may come out of these, or the content of the undamaged file. The decoded
cache and the audit's are made again instead of refused. "An edit" is no damage: metadata.json, or
anything in student.onnx, changed and packed with right checksums, as a foreign program might; there
only the error counts.

Everything runs in processes of its own; one that dies or takes over LIMIT seconds over a file is
counted as uncaught, and replaced. So is a MemoryError, of 4 GiB asked for by a file of a kilobyte,
although the readers' callers catch it. Peak memory is beyond what the process had before the first
file.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench import call, machine, make_pictures, print_table, process_server
from PIL import Image
from torch import nn

import infer
from common import cli, export, export_onnx, models, splits
from common.audit import audit
from common.ensemble import CachedLogits, load_ensemble
from common.files import CHECKSUM, UserError
from common.pictures import WHITE_LEVEL, DecodedCache, decode_file, resize

ONNX = all(map(find_spec, export_onnx.PACKAGES))  # else its rows are left out
LIMIT = 30  # s over one file, after which its process is ended
MEMORY = 4 * 2**30  # bytes of address space that a process may take beyond its start
VIEW_SIZE = [32, 32]
SIZE = (37, 29)  # px; numbers that are easily found in a header
VALUES = (0, 1, 2, 255, 4096, 8900, 32767, 65535, 100_000, 2**31 - 1, 2**32 - 1)  # for a size
FOREIGN = (  # how files of other programs begin, which Pillow knows as well
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"\0\0\1\0", b"DDS |",
    b"SIMPLE  =", b"\x0a\x05\x01\x08", b"icns", b"\0\0\0\x0cjP  ", b"\0\0\0 ftypavif", b"PK\3\4",
    b"\x59\xa6\x6a\x95", b"P6 9 9 255\n", b"Pf 9 9 -1\n", b"qoif", b"BLP2", b"FWS",
)
GOOD = ("refused", "as the original")
OUTCOMES = (*GOOD, "as something else", "readers differ", "uncaught")


# ------------------------------------------------------------------------------------- mutations


def mutate(content, others, rng):
    """A damaged copy of some bytes, different from them; others: files to take parts from."""
    while True:
        kind = MUTATIONS[rng.integers(len(MUTATIONS))]
        damaged = bytes(kind(bytearray(content), others, rng))
        if damaged.startswith(b"\x89PNG") and rng.random() < 0.5:
            damaged = with_right_sums(damaged)
        if damaged != content:
            return damaged


def place(size, rng):
    """A position in a file: a third of them anywhere, the others near its two ends."""
    near = int(np.exp(rng.uniform(0, np.log(size)))) - 1
    return (int(rng.integers(size)), near, size - 1 - near)[rng.integers(3)]


def cut_off(content, others, rng):
    return content[: place(len(content), rng)]


def flip_bits(content, others, rng):
    for _ in range(rng.integers(1, 9)):
        content[place(len(content), rng)] ^= 1 << int(rng.integers(8))
    return content


def overwrite(content, others, rng):
    start = place(len(content), rng)
    content[start:start + 16] = rng.bytes(min(len(content) - start, int(rng.integers(1, 17))))
    return content


def change_number(content, others, rng):
    """Two or four bytes of the first hundred become an extreme number."""
    start = int(rng.integers(min(100, len(content))))
    form = ("<H", ">H", "<I", ">I")[rng.integers(4)]
    return put(content, start, form, VALUES[rng.integers(len(VALUES))])


def change_size(content, others, rng):
    """Width or height, wherever it stands in the header, becomes another one."""
    places = []
    for form in ("<H", ">H", "<I", ">I"):
        for side in SIZE:
            start = content[:400].find(struct.pack(form, side))
            places += [(start, form)] if start >= 0 else []
    for side in SIZE:
        start = content[:20].find(str(side).encode())
        if start >= 0:  # in text, as in a PGM
            number = str(VALUES[rng.integers(len(VALUES))]).encode()
            return content[:start] + number + content[start + 2:]
    if not places:
        return change_number(content, others, rng)
    for _ in range(rng.integers(1, 3)):
        start, form = places[rng.integers(len(places))]
        content = put(content, start, form, VALUES[rng.integers(len(VALUES))])
    return content


def put(content, start, form, number):
    packed = struct.pack(form, number % 256 ** struct.calcsize(form))
    content[start:start + len(packed)] = packed
    return content


def splice(content, others, rng):
    """The head of one file before the tail of another."""
    other = others[rng.integers(len(others))]
    one, two = (content, other) if rng.random() < 0.5 else (other, content)
    return bytearray(one[: place(len(one), rng)]) + two[place(len(two), rng):]


def foreign_head(content, others, rng):
    head = FOREIGN[rng.integers(len(FOREIGN))]
    return bytearray(head) + content[len(head) * int(rng.integers(2)):]


def move_piece(content, others, rng):
    """A piece is taken out, doubled or put elsewhere."""
    start, length = place(len(content), rng), int(rng.integers(1, 65))
    piece, rest = content[start:start + length], content[:start] + content[start + length:]
    where, times = place(len(content), rng), int(rng.integers(3))
    return rest[:where] + piece * times + rest[where:]


MUTATIONS = (cut_off, flip_bits, overwrite, change_number, change_size, splice, foreign_head,
             move_piece)


def with_right_sums(png):
    """A PNG whose chunks have the checksums of what is in them, so that a reader goes on."""
    content, start = bytearray(png), 8
    while start + 12 <= len(content):
        length = struct.unpack(">I", content[start:start + 4])[0]
        end = start + 8 + length
        if end + 4 > len(content):
            break
        content[end:end + 4] = struct.pack(">I", zlib.crc32(content[start + 4:end]))
        start = end + 4
    return bytes(content)


def mutate_json(content, others, rng):
    """As `mutate`, or with a value of the JSON replaced or left out."""
    if rng.random() < 0.5:
        return mutate(content, others, rng)
    value = json.loads(content)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
            break
        at = at[key]
    number = at[key] if isinstance(at[key], int | float) else 1
    values = (None, [], {}, -1, "x", 1e308, float("nan"), True, [[]], number * 1.001, number + 1)
    if rng.random() < 0.3:
        del at[key]
    else:
        at[key] = values[rng.integers(len(values))]
    damaged = json.dumps(value, indent=1).encode() + b"\n"
    return damaged if damaged != content else mutate_json(content, others, rng)


# -------------------------------------------------------------------------------------- pictures


def drawn_pictures():
    """{format: bytes} of one small drawing."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    grey = (60 + 4 * x + 2 * y).astype(np.uint8)
    colour = Image.fromarray(np.stack([grey, 255 - grey, (x * y % 251).astype(np.uint8)], 2))
    deep = Image.fromarray(grey.astype(np.uint16) * 200 + 7)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "PNG": (colour, {}),
        "PNG, palette": (colour.convert("P"), {}),
        "PNG, 16 bits": (deep, {}),
        "JPEG": (colour, {"quality": 90}),
        "JPEG, progressive, turned": (colour, {"progressive": True, "exif": turned}),
        "BMP": (colour, {}),
        "TIFF": (colour, {}),
        "TIFF, LZW": (colour, {"compression": "tiff_lzw"}),
        "TIFF, deflate, 16 bits": (deep, {"compression": "tiff_adobe_deflate"}),
        "TIFF, 16 bits": (deep, {}),
        "GIF": (colour.convert("P"), {}),
        "WEBP": (colour, {"quality": 80}),
        "WEBP, lossless": (colour, {"lossless": True}),
        "PGM": (colour.convert("L"), {}),
    }
    drawn = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, "PPM" if name == "PGM" else name.split(",")[0], **options)
        drawn[name] = file.getvalue()
    return drawn


def picture_checker(name):
    """(bytes, other files, mutation, check) of a picture format."""
    drawn, path = drawn_pictures(), Path("picture")

    def read(content):
        """(pixels or None, the same resized by either reader, s of the slower one)."""
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            ours = infer.decode(content, WHITE_LEVEL)[0]
        except MemoryError:
            raise
        except Exception:
            ours = None
        middle = time.perf_counter()
        theirs = decode_file(path, hashlib.sha256(content).hexdigest(), VIEW_SIZE, WHITE_LEVEL)[0]
        seconds = max(middle - start, time.perf_counter() - middle)
        if ours is None:
            return None, None, theirs, seconds
        return ours, resize(torch.from_numpy(ours), VIEW_SIZE), theirs, seconds

    original = read(drawn[name])[0]

    def check(content):
        ours, small, theirs, seconds = read(content)
        if (small is None) != (theirs is None):
            return "readers differ", seconds
        if ours is None:
            return "refused", seconds
        if not torch.equal(small, theirs):
            return "readers differ", seconds
        same = np.array_equal(ours, original)
        return "as the original" if same else "as something else", seconds

    return drawn[name], list(drawn.values()), mutate, check


# ----------------------------------------------------------------------------- the project's files


def make_files():
    """A tiny chain's files in the working directory, and exported files with a tiny network."""
    make_pictures(Path("parts"), {"train": 8, "test": 4})
    call("train_teacher.py", "--data-dir", "parts", "--view-size", 32, "--model", "test_resnet",
         "--steps", 1, "--device", "cpu")
    call("build_ensemble.py", "--views", 2, "--device", "cpu")
    normal = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "img_size": VIEW_SIZE}
    network = SimpleNamespace(backbone=SimpleNamespace(fc=nn.Linear(4, 3)), **normal)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    deployed = export.Deployed(network, trunk, view_size=VIEW_SIZE)
    metadata = {
        "schema": export.SCHEMA, "classes": ["good", "hole", "scratch"], "good_classes": ["good"],
        "view_size": VIEW_SIZE, "img_size": VIEW_SIZE, "white_level": WHITE_LEVEL,
        "precision": "float32",
        "operating_point": {"threshold": 0.5, "target": {"max_miss_rate": 0.05}},
        "temperature": 1.0, "parameters": 127,
    }
    export.TorchScript(deployed).save(metadata, Path("student.ts"))
    if ONNX:
        export_onnx.Graph.of(deployed).save(metadata, Path("student.onnx"))


def same(a, b):
    """Whether two plain values with tensors and arrays in them are equal, NaN unequal to all."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def ensemble():
    return load_ensemble("runs/ensemble")


def logits():
    return [np.array(view) for view in CachedLogits("runs/ensemble", ensemble()).logits]


def ensemble_and_logits():
    """ensemble.json, and what it lets through to the logits."""
    spec = ensemble()
    CachedLogits("runs/ensemble", spec).targets([0, 1], [0, 1], 2.0)
    return spec


def decoded():
    """The decoded training pictures; UserError where they had to be made again."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train = DecodedCache(cli.CACHE).open(Path("parts/train"), VIEW_SIZE)
    content = [np.array(train.images), train.paths, train.digests, train.sizes, train.bad]
    return remade(content, "decoded" in said.getvalue())


def audited():
    """What the audit says; UserError where the pictures had to be looked at again."""
    cache, dataset = DecodedCache(cli.CACHE), header()["dataset"]
    train, val, dataset = splits.open_training(cache, dataset)
    sets = {"train": train, "val": val, **splits.open_tests(cache, ["parts/test"], dataset)}
    before = [file.stat().st_ino for file in Path(cli.CACHE).glob("audit-*.json")]
    findings = audit.audit(cache, dataset, sets)
    after = [file.stat().st_ino for file in Path(cli.CACHE).glob("audit-*.json")]
    return remade(findings, before != after)


ORIGINAL = {}  # what a cache holds, as first read in this process


def remade(content, again):
    """The content of a cache; UserError where it was made again, and is as it was."""
    key = str(type(content))
    if not again:
        return content
    if same(content, ORIGINAL.setdefault(key, content)):
        raise UserError("made again")
    return content


def checkpoint():
    return models.load_checkpoint("runs/test_resnet/model.pt")


def header():
    return models.read_header("runs/test_resnet/model.pt")


def exported(path):
    """Metadata, and what the network says of a grey frame."""
    student, metadata = export.load_exported(path)
    return [metadata, student(torch.full((1, 32, 32, 3), 90, dtype=torch.uint8))]


def verdict(path):
    """Metadata, and what infer.py would say of a grey picture."""
    student, metadata = infer.load_student(path)
    judge = infer.Judge(student, metadata)
    return [metadata, judge(Path("grey.png"), np.full((32, 32, 3), 90, np.uint8))]


def file_checker(name):
    """(bytes, other files, mutation, check) of a kind of file."""
    pattern, load, mutation, _ = FILES[name]
    shutil.rmtree(cli.CACHE)  # that of another folder
    with contextlib.suppress(UserError):  # a cache of this folder is made by a first reading
        load()
    original = load()
    path = next(Path().glob(pattern))
    content = path.read_bytes()
    others = [file.read_bytes() for file in Path("runs").rglob("*.*") if file.is_file()]

    def check(damaged):
        path.unlink()  # it may be mapped into memory
        path.write_bytes(damaged)
        start = time.perf_counter()
        try:
            outcome = "as the original" if same(load(), original) else "as something else"
        except (UserError, infer.Refused):
            outcome = "refused"
        seconds = time.perf_counter() - start
        path.unlink()
        path.write_bytes(content)
        return outcome, seconds

    return content, others, mutation, check


def edit_metadata(content, others, rng):
    """student.ts with a changed metadata.json and right checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            entry = old.read(name)
            if name.endswith("metadata.json"):
                entry = mutate_json(entry, others, rng)
            new.writestr(name, entry)
    return with_checksum(packed.getvalue(), CHECKSUM)


def edit_graph(content, others, rng):
    """student.onnx, mutated anywhere, with a right checksum."""
    size = len(export_onnx.CHECKSUM.format("0" * 64))
    return with_checksum(mutate(content[:-size], others, rng), export_onnx.CHECKSUM)


def with_checksum(content, ending):
    """Bytes with the checksum that fits them, as a foreign program might write it."""
    return content + ending.format(hashlib.sha256(content).hexdigest()).encode()


FILES = {  # what: (file, loader, mutation, share of the mutations)
    "ensemble.json": ("runs/ensemble/ensemble.json", ensemble_and_logits, mutate_json, 4),
    "view_001.npy": ("runs/ensemble/view_001.npy", logits, mutate, 3),
    "index.json": ("runs/decoded/train-*/index.json", decoded, mutate_json, 3),
    "images.bin": ("runs/decoded/train-*/images.bin", decoded, mutate, 1),
    "audit-*.json": ("runs/decoded/audit-*.json", audited, mutate_json, 1),
    "model.pt": ("runs/test_resnet/model.pt", checkpoint, mutate, 3),
    "model.pt, header": ("runs/test_resnet/model.pt", header, mutate, 2),
    "student.ts, infer.py": ("student.ts", partial(verdict, "student.ts"), mutate, 2),
    "student.ts, evaluate.py": ("student.ts", partial(exported, "student.ts"), mutate, 2),
    "student.ts, an edit": ("student.ts", partial(verdict, "student.ts"), edit_metadata, 1),
}
if ONNX:
    FILES |= {
        "student.onnx, infer.py": ("student.onnx", partial(verdict, "student.onnx"), mutate, 2),
        "student.onnx, evaluate.py": ("student.onnx", partial(exported, "student.onnx"), mutate, 2),
        "student.onnx, an edit": ("student.onnx", partial(verdict, "student.onnx"), edit_graph, 1),
    }


# ------------------------------------------------------------------------------------- processes

CONTEXT = process_server("infer", "common.audit.audit", "common.export", "common.splits", "bench")


def work(connection, home, name, numbers, seed, keep):
    """What a process does: mutate and check, and send (number, outcome, s, MB, words) of each."""
    os.chdir(home)
    for descriptor in (1, 2):  # decoders write to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=home) as own:
        shutil.copytree("original", f"{own}/w")
        os.chdir(f"{own}/w")
        checker = file_checker if name in FILES else picture_checker
        content, others, mutation, check = checker(name)
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = MEMORY + 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            damaged, words, start = mutation(content, others, rng), "", time.perf_counter()
            try:
                outcome, seconds = check(damaged)
            except BaseException as error:
                outcome, seconds = "uncaught", time.perf_counter() - start
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                words = f"{type(error).__name__}: {str(error)[:80]} ({where})"
            if keep and (outcome not in GOOD or seconds > 1):
                Path(keep, f"{name}-{number}").write_bytes(damaged)
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) / 1024
            connection.send((number, outcome, seconds, more, words))
        os.chdir(home)
    connection.close()


def outcomes(home, name, count, args):
    """(outcome, s, MB, words) of all mutations of a kind, by several processes."""
    pending = np.array_split(np.arange(count), args.jobs)
    running = {}

    def begin(numbers):
        if len(numbers):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            words = (theirs, home, name, numbers.tolist(), args.seed, args.keep)
            process = CONTEXT.Process(target=work, args=words)
            process.start()
            theirs.close()
            running[ours] = [process, numbers, time.monotonic() + 30]  # its start takes a while

    for numbers in pending:
        begin(numbers)
    while running:
        for connection in wait(list(running), timeout=1):
            state = running[connection]
            try:
                number, *told = connection.recv()
            except EOFError:
                process, numbers, _ = running.pop(connection)
                process.join()
                if len(numbers):
                    yield "uncaught", 0.0, 0.0, f"process ended with {process.exitcode}"
                    begin(numbers[1:])
                continue
            state[1], state[2] = numbers_after(state[1], number), time.monotonic()
            yield told
        for process, _, heard in running.values():
            if time.monotonic() - heard > LIMIT:
                process.kill()  # its connection ends, and the next one goes on behind this file


def numbers_after(numbers, number):
    return numbers[np.searchsorted(numbers, number) + 1:]


def measure(home, name, count, args):
    """The row of one kind of file, and the faults that were found."""
    counts, slowest, peak, faults = Counter(), 0.0, 0.0, Counter()
    late = 0
    for outcome, seconds, megabytes, words in outcomes(home, name, count, args):
        counts[outcome] += 1
        slowest, peak = max(slowest, seconds), max(peak, megabytes)
        late += seconds > 1
        faults[words or outcome] += outcome not in GOOD
    cells = [str(counts[outcome]) for outcome in OUTCOMES]
    numbers = [f"{1e3 * slowest:.0f}", str(late), f"{peak:.0f}"]
    return [name, str(sum(counts.values())), *cells, *numbers], +faults


def main():
    p = cli.parser(__doc__)
    p.add_argument("--pictures", type=cli.positive_int, default=100_000, help="mutated pictures")
    p.add_argument("--files", type=cli.positive_int, default=20_000, help="mutated other files")
    p.add_argument("--jobs", type=cli.positive_int, default=os.cpu_count(), help="processes")
    p.add_argument("--only", nargs="+", metavar="WHAT", help="rows of the table to be made")
    p.add_argument("--keep", metavar="DIR", help="write what was not refused or slow there")
    p.add_argument("--seed", type=cli.seed, default=0, help="of the mutations")
    args = p.parse_args()
    begin = time.perf_counter()
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        args.keep = str(Path(args.keep).resolve())

    formats, shares = list(drawn_pictures()), sum(share for *_, share in FILES.values())
    counts = dict.fromkeys(formats, -(-args.pictures // len(formats)))
    counts.update({name: -(-args.files * share // shares) for name, (*_, share) in FILES.items()})
    columns = ["what", "mutations", *OUTCOMES, "slowest, ms", "over 1 s", "peak MB"]
    rows, faults = [], {}
    with tempfile.TemporaryDirectory() as home:
        Path(home, "original").mkdir()
        with contextlib.chdir(f"{home}/original"):
            make_files()
        for name, count in counts.items():
            if not args.only or name in args.only:
                row, faults[name] = measure(home, name, count, args)
                rows.append(row)
                print(*row, sep="\t", file=sys.stderr, flush=True)
    print_table(columns, rows)
    for name, of_kind in faults.items():
        for words, count in of_kind.most_common():
            print(f"{name}: {count} x {words}")
    print(f"\n{time.perf_counter() - begin:.0f} s, {args.jobs} processes. {machine()}")


if __name__ == "__main__":
    cli.run(main)
