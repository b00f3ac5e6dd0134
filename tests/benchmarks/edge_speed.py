"""Frame to probabilities on this machine: the exported files beside what else people would use.

    pip install onnx onnxscript onnxruntime openvino     # for the other rows
    python tests/benchmarks/edge_speed.py --turns 10     # 4 minutes on two idle cores
    python tests/benchmarks/edge_speed.py --sizes 96x240 152   # int8 alone, a thread, a row each

A ResNet18 at 224 px (weights do not matter for time, so it is untrained), batch 1, a 640x480 uint8
frame in, probabilities out, with 2 threads and with 1. All contenders take turns in one process per
thread count; medians over all turns. The last column repeats torch's own rows with the instruction
set capped to AVX2, as a stand-in for a small x86 box (the other runtimes do not obey that). Needs
an idle machine: where another process takes a core, two threads wait for each other.

A second table is of whole processes: from the start of infer.py to its first verdict, its largest
memory, and the size of all packages that it needs, as they are installed here.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
from bench import ROOT, machine, print_table
from PIL import Image
from torch import nn
from torchvision import transforms

from common import cli, export, export_onnx, models
from common.files import px
from infer import load_student, resize

SIZE, CLASSES = [224, 224], 6
FRAME = (480, 640, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAPPED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TORCHSCRIPT, ONNX = ("student.ts", "student.int8.ts"), ("student.onnx", "student.int8.onnx")
NEEDS = {".ts": ("torch", "numpy", "pillow"), ".onnx": ("onnxruntime", "numpy", "pillow")}
PACKAGES = (*export_onnx.PACKAGES, "openvino")
REFERENCE = "student.int8.ts"
FRAMES_PER_TURN = 4  # the first of which finds cold caches, and is not counted


# --------------------------------------------------------------------------------------- files


def untrained_student(size=(224, 224)):
    """A ResNet18 `Classifier` whose norms have seen pictures: else activations would explode."""
    torch.manual_seed(0)
    student = models.create_student(CLASSES, size).train()
    with torch.no_grad():
        for _ in range(4):
            student(torch.rand(8, 3, *size) * 255)
    return student.eval()


def write_files(student, folder, onnx):
    """The product's own files: two of TorchScript and, where wanted, two of ONNX."""
    views = [torch.rand(8, 3, *student.img_size) * 255 for _ in range(4)]
    about = {
        "schema": export.SCHEMA,
        "classes": [str(k) for k in range(CLASSES)],
        "good_classes": [],
        "operating_point": None,
        "view_size": student.img_size,
        "white_level": 65535,
        "temperature": 1.0,
    }
    plain = export.Deployed(student, export.float_trunk(student), student.img_size)
    for name, network in export.networks_of(student, plain, lambda: views, onnx):
        precision = "int8" if ".int8" in name else "float32"
        network.save({**about, "precision": precision}, folder / name)


def onnx_is_here():
    """Whether the packages are installed that the ONNX files need."""
    return all(map(find_spec, export_onnx.PACKAGES))


# ---------------------------------------------------------------------------------- contenders


def eager(student):
    """{name: function} of the model as a training script leaves it."""
    transform = transforms.Compose([
        transforms.ToPILImage(),
        transforms.Resize(SIZE),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])

    def run(frame):
        return torch.softmax(student.backbone(transform(frame)[None]), 1)

    return {"eager float32, torchvision": torch.inference_mode()(run)}


class Nothing(nn.Module):
    """In place of the network: all else that a student.ts does."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.new_zeros([1, 512, 1, 1])


def all_but_the_network(student):
    """A student.ts without its network."""
    empty = export.Deployed(student, Nothing(), SIZE).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        module = torch.jit.freeze(torch.jit.script(empty))
    return torch.inference_mode()(lambda frame: module(torch.from_numpy(frame)))


def openvino_runtime(folder, threads):
    """{name: function} of OpenVINO, on the product's ONNX files."""
    import openvino

    core, functions = openvino.Core(), {}
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    for name in ONNX:
        model = core.read_model(folder / name)
        model.reshape([1, *SIZE, 3])
        compiled = core.compile_model(model, "CPU", config)
        functions[f"OpenVINO, {name}"] = partial(run_compiled, compiled)
    return functions


def run_compiled(compiled, frame):
    return compiled([resize(frame, SIZE)[None]])[0]


def contenders(folder, threads, own_only):
    """{name: function from a uint8 frame to probabilities}, as far as packages are there."""
    student = untrained_student()
    onnx = not own_only and onnx_is_here()
    write_files(student, folder, onnx)
    functions = eager(student)
    for name in TORCHSCRIPT + ONNX * onnx:
        functions[name] = load_student(folder / name, threads=threads)[0]
    functions["student.ts, all but the network"] = all_but_the_network(student)
    if onnx:
        functions["resize of infer.py, for student.onnx"] = partial(resize, view_size=SIZE)
        if find_spec("openvino"):
            functions |= openvino_runtime(folder, threads)
    return functions


# ----------------------------------------------------------------------------- whole processes


def print_processes(turns):
    """The table of whole processes, one thread, medians."""
    rows = []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write_files(untrained_student(), home, onnx_is_here())
        picture = home / "frame.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(FRAME[1::-1]).save(picture)
        for name in TORCHSCRIPT + ONNX:
            if (home / name).is_file():
                runs = [first_verdict(home / name, picture) for _ in range(turns)]
                seconds, memory = (statistics.median(values) for values in zip(*runs))
                size = installed_bytes(NEEDS[Path(name).suffix])
                rows.append([name, f"{seconds:.2f}", f"{memory / 1e6:.0f}", f"{size / 1e6:.0f}"])
    print()
    print_table(["file", "s to the first verdict", "memory, MB", "packages, MB"], rows)


def first_verdict(model, picture):
    """(seconds from start to the first line, bytes of memory at most) of an infer.py process."""
    command = [sys.executable, ROOT / "infer.py", "--model", model, "--threads", "1"]
    command += [picture] * 9
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        seconds = time.perf_counter() - start
        status = Path(f"/proc/{process.pid}/status").read_text()  # it is at the next pictures
        process.stdout.read()
    return seconds, 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def installed_bytes(names):
    """Bytes of installed packages and of all that they require, without extras."""
    seen, left = {}, list(names)
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0].lower()
        try:
            package = distribution(name)
        except PackageNotFoundError:  # not wanted on this system
            continue
        if name not in seen:
            files = [file.locate() for file in package.files or []]
            seen[name] = sum(file.stat().st_size for file in files if file.is_file())
            left += [each for each in package.requires or [] if "extra ==" not in each]
    return sum(seen.values())


# ------------------------------------------------------------------------------------- measure


def measure(threads, turns, own_only):
    """Median milliseconds per contender, all taking turns, and the int8 engine that was taken."""
    torch.set_num_threads(threads)
    frame = np.random.default_rng(0).integers(0, 256, FRAME, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        functions = contenders(Path(folder), threads, own_only)
    times = {name: [] for name in functions}
    for turn in range(1 + turns):  # the first is not counted
        for name, run in functions.items():
            for number in range(FRAMES_PER_TURN):
                start = time.perf_counter()
                run(frame)
                if turn and number:
                    times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"ms": medians, "engine": torch.backends.quantized.engine}


def print_sizes(sizes, turns):
    """The int8 file at several sizes in turns, one thread."""
    torch.set_num_threads(1)
    frame, students = np.random.default_rng(0).integers(0, 256, FRAME, dtype=np.uint8), {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            write_files(untrained_student(size), Path(folder), False)
            students[px(size)] = load_student(Path(folder) / REFERENCE, threads=1)[0]
    times = {name: [] for name in students}
    for _ in range(turns):
        for name, run in students.items():
            run(frame)  # finds cold caches
            times[name] += repeat(lambda run=run: run(frame), number=1, repeat=FRAMES_PER_TURN - 1)
    rows = []
    for name, size in zip(times, sizes):
        ms = 1e3 * statistics.median(times[name])
        rows.append([name, f"{np.prod(size)}", f"{ms:.2f}"])
    print_table(["view size", "pixels", f"{REFERENCE}, 1 thread, ms"], rows)
    print(f"\nmedians of {len(times[name])} frames of 640x480; {machine()}")


def measure_apart(threads, turns, own_only, environment):
    """`measure` in a process of its own, since instruction sets are chosen at its start."""
    words = [sys.executable, __file__, "--turns", turns, "--part", threads, int(own_only)]
    environment = {**os.environ, **environment}
    process = subprocess.run(
        list(map(str, words)), env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def main():
    p = cli.parser(__doc__)
    p.add_argument("--turns", type=cli.positive_int, default=20,
                   help=f"times each contender gets its turn of {FRAMES_PER_TURN} frames")
    p.add_argument("--sizes", type=cli.picture_size, nargs="+", metavar="HxW",
                   help="instead, compare the int8 file at these sizes")
    p.add_argument("--part", nargs=2, type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        threads, own_only = args.part
        print(json.dumps(measure(threads, args.turns, own_only)))
        return

    if args.sizes:
        print_sizes(args.sizes, args.turns)
        return

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        print(f"not installed, so their rows are left out: {', '.join(missing)}")
    columns = {
        "2 threads": measure_apart(2, args.turns, False, {}),
        "1 thread": measure_apart(1, args.turns, False, {}),
        "1 thread, AVX2": measure_apart(1, args.turns, True, CAPPED),
    }
    rows = []
    for name in columns["2 threads"]["ms"]:
        row = [name]
        for column in columns.values():
            ms = column["ms"]
            row.append(f"{ms[name]:.2f} ({ms[name] / ms[REFERENCE]:.2f} x)" if name in ms else "")
        rows.append(row)
    print(f"\nms, medians of {3 * args.turns} frames, and as a multiple of int8's:\n")
    print_table(["", *columns], rows)
    engines = ", ".join(f"{column['engine']} ({name})" for name, column in columns.items())
    print(f"\nint8 engine taken: {engines}")
    torch.set_num_threads(2)  # as in the first column
    print(machine(*(name for name in PACKAGES if name not in missing)))
    print_processes(5)


if __name__ == "__main__":
    cli.run(main)
