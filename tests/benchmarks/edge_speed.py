"""Frame to probabilities on this machine: the exported files beside what else people would use.

    pip install onnx onnxruntime openvino           # for this benchmark alone; not needed
    python tests/benchmarks/edge_speed.py --turns 10     # 2 minutes on two idle cores

A ResNet18 at 224 px (weights do not matter for time, so it is untrained), batch 1, a 640x480 uint8
frame in, probabilities out, with 2 threads and with 1. All contenders take turns in one process per
thread count; medians over all turns. The last column repeats torch's own rows with the instruction
set capped to AVX2, as a stand-in for a small x86 box (the other runtimes do not obey that). Needs
an idle machine: where another process takes a core, two threads wait for each other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from bench import machine, print_table
from PIL import Image
from torch import nn
from torchvision import transforms

from common import cli, export, models
from infer import load_student

SIDE, CLASSES = 224, 6
FRAME = (480, 640, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAPPED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
FORMATS = {"float32": "model.onnx", "int8": "model.int8.onnx"}
PACKAGES = ("onnx", "onnxruntime", "openvino")
REFERENCE = "ours, student.int8.ts"
FRAMES_PER_TURN = 4  # the first of which finds cold caches, and is not counted


# --------------------------------------------------------------------------------------- files


def untrained_student():
    """A ResNet18 `Classifier` whose norms have seen pictures: else activations would explode."""
    torch.manual_seed(0)
    student = models.create_student(CLASSES, SIDE).train()
    with torch.no_grad():
        for _ in range(4):
            student(torch.rand(8, 3, SIDE, SIDE) * 255)
    return student.eval()


def export_ours(student, views, folder):
    """student.ts and student.int8.ts."""
    facts = {
        "classes": [str(k) for k in range(CLASSES)],
        "good_class": None,
        "operating_point": None,
        "view_size": SIDE,
        "white_level": 65535,
    }
    trunks = {
        "student.ts": ("float32", export.float_trunk(student)),
        "student.int8.ts": ("int8", export.int8_trunk(student, views)),
    }
    for name, (precision, trunk) in trunks.items():
        deployed = export.Deployed(student, trunk, SIDE, 1.0, -1)
        export.save_torchscript(deployed, {**facts, "precision": precision}, folder / name)


def export_onnx(student, views, folder):
    """model.onnx and model.int8.onnx, quantised by ONNX Runtime on the same views."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": student.normalise(view[:1]).numpy()} for view in views])

        def get_next(self):
            return next(self.batches, None)

    plain, quantised = (str(folder / name) for name in FORMATS.values())
    example = torch.zeros(1, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter by tracing is deprecated
        torch.onnx.export(student.backbone, example, plain, input_names=["x"], dynamo=False)
    qdq = QuantFormat.QDQ
    quantize_static(plain, quantised, Reader(), quant_format=qdq, per_channel=True)


# ---------------------------------------------------------------------------------- contenders


def prepare(frame):
    """What goes before a runtime, with Pillow and NumPy: frame -> float32 [1, 3, S, S]."""
    small = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32) / 255
    normalised = (pixels - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))[None]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def eager(student):
    """{name: function} of the model as a training script leaves it."""
    transform = transforms.Compose([
        transforms.ToPILImage(),
        transforms.Resize((SIDE, SIDE)),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])

    def run(frame):
        return torch.softmax(student.backbone(transform(frame)[None]), 1)

    return {"eager float32, torchvision": run}


class Nothing(nn.Module):
    """In place of the network: all else that a student.ts does."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.new_zeros([1, 512, 1, 1])


def ours(student, folder):
    """{name: function} of the exported files, and of one without the network."""
    found = {}
    for name in ("student.ts", "student.int8.ts"):
        module, _ = load_student(folder / name)
        found[f"ours, {name}"] = partial(run_module, module)
    empty = export.Deployed(student, Nothing(), SIDE, 1.0, -1).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        found["ours, all but the network"] = partial(run_module, torch.jit.script(empty))
    return found


def run_module(module, frame):
    return module(torch.from_numpy(frame))


def onnx_runtime(folder, threads):
    """{name: function} of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    found = {}
    for precision, file in FORMATS.items():
        session = onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
        found[f"ONNX Runtime, {precision}"] = partial(run_session, session)
    return found


def run_session(session, frame):
    return softmax(session.run(None, {"x": prepare(frame)})[0])


def openvino_runtime(folder, threads):
    """{name: function} of OpenVINO."""
    import openvino

    core, found = openvino.Core(), {}
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    for precision, file in FORMATS.items():
        compiled = core.compile_model(str(folder / file), "CPU", config)
        found[f"OpenVINO, {precision}"] = partial(run_compiled, compiled)
    return found


def run_compiled(compiled, frame):
    return softmax(compiled([prepare(frame)])[0])


def contenders(folder, threads, own_only):
    """{name: function from a uint8 frame to probabilities}, as far as packages are there."""
    student = untrained_student()
    views = [torch.rand(8, 3, SIDE, SIDE) * 255 for _ in range(4)]
    export_ours(student, views, folder)
    found = {**eager(student), **ours(student, folder)}
    if not own_only and find_spec("onnx") and find_spec("onnxruntime"):
        export_onnx(student, views, folder)
        found |= onnx_runtime(folder, threads)
        if find_spec("openvino"):
            found |= openvino_runtime(folder, threads)
    return found


# ------------------------------------------------------------------------------------- measure


@torch.inference_mode()
def measure(threads, turns, own_only):
    """Median milliseconds per contender, all taking turns, and the int8 engine that was taken."""
    torch.set_num_threads(threads)
    frame = np.random.default_rng(0).integers(0, 256, FRAME, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(Path(folder), threads, own_only)
    times = {name: [] for name in found}
    for turn in range(1 + turns):  # the first is not counted
        for name, run in found.items():
            for repeat in range(FRAMES_PER_TURN):
                start = time.perf_counter()
                run(frame)
                if turn and repeat:
                    times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"ms": medians, "engine": torch.backends.quantized.engine}


def measure_apart(threads, turns, own_only, environment):
    """`measure` in a process of its own, since instruction sets are chosen at its start."""
    words = [sys.executable, __file__, "--turns", turns, "--part", threads, int(own_only)]
    words = [str(word) for word in words]
    environment = {**os.environ, **environment}
    process = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def main():
    p = cli.parser(__doc__)
    p.add_argument("--turns", type=cli.positive_int, default=20,
                   help=f"times each contender gets its turn of {FRAMES_PER_TURN} frames")
    p.add_argument("--part", nargs=2, type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        threads, own_only = args.part
        print(json.dumps(measure(threads, args.turns, own_only)))
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
            cell = ""
            if name in ms:
                cell = f"{ms[name]:.2f} ({ms[name] / ms[REFERENCE]:.2f} x)"
            row.append(cell)
        rows.append(row)
    print(f"\nms, medians of {3 * args.turns} frames, and as a multiple of int8's:\n")
    print_table(["", *columns], rows)
    engines = ", ".join(f"{column['engine']} ({name})" for name, column in columns.items())
    print(f"\nint8 engine taken: {engines}")
    torch.set_num_threads(2)  # as in the first column
    print(machine(*(name for name in PACKAGES if name not in missing)))


if __name__ == "__main__":
    cli.run(main)
