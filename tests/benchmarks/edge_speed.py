"""Frame to decision on this machine: the exported files against what people write and against the usual runtimes.

    pip install onnx onnxruntime openvino            # for this benchmark only; missing ones are left out
    python tests/benchmarks/edge_speed.py            # a few minutes

A ResNet18 at 224 px (weights do not matter for time, so it is untrained), batch 1, a 640x480 uint8 frame in, probabilities out, 1 and
2 threads; all contenders take turns in one process per thread count, medians over all turns. The last part repeats torch's own rows with the
instruction set capped to AVX2, as a stand-in for a small x86 box (the other runtimes do not obey those switches).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

import infer  # noqa: E402
from common import export, models  # noqa: E402

SIDE, CLASSES = 224, 6
CAPPED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
MEAN, STD = (np.array(v, np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def make_files(folder):
    """student.ts, student.int8.ts, model.onnx and model.int8.onnx of one untrained ResNet18; the eager model."""
    torch.manual_seed(0)
    student = models.create_student(CLASSES, SIDE).eval()
    with torch.no_grad():  # untrained norms would let activations explode or vanish
        student.train()
        for _ in range(4):
            student(torch.rand(8, 3, SIDE, SIDE) * 255)
        student.eval()
    views = [torch.rand(8, 3, SIDE, SIDE) * 255 for _ in range(4)]
    metadata = {"classes": [str(k) for k in range(CLASSES)]}
    export.export(student, export.float_trunk(student), SIDE, 1.0, {**metadata, "precision": "float32"}, folder / "student.ts")
    export.export(student, export.int8_trunk(student, views), SIDE, 1.0, {**metadata, "precision": "int8"}, folder / "student.int8.ts")
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    except ImportError:
        return student

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": student.normalise(v[:1]).numpy()} for v in views])

        def get_next(self):
            return next(self.batches, None)

    torch.onnx.export(student.backbone, torch.zeros(1, 3, SIDE, SIDE), str(folder / "model.onnx"), input_names=["x"], dynamo=False)
    quantize_static(str(folder / "model.onnx"), str(folder / "model.int8.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return student


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def prepare(frame):
    """What goes before a runtime, with Pillow and NumPy: frame -> float32 [1, 3, S, S]."""
    pixels = np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return ((pixels.transpose(2, 0, 1) / 255 - MEAN) / STD)[None]


def contenders(folder, student, threads):
    """{name: function from a uint8 frame to probabilities}."""
    transform = torchvision.transforms.Compose([
        torchvision.transforms.ToPILImage(), torchvision.transforms.Resize((SIDE, SIDE)), torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(MEAN.ravel().tolist(), STD.ravel().tolist())])
    network = student.backbone
    found = {"eager float32, torchvision": lambda frame: torch.softmax(network(transform(frame)[None]), 1)}
    exported = {name: infer.load_student(folder / name)[0] for name in ("student.ts", "student.int8.ts")}
    for name, module in exported.items():
        found[f"ours {name}"] = lambda frame, module=module: module(torch.from_numpy(frame))
    try:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        for title, file in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
            session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
            found[f"ONNX Runtime {title}"] = lambda frame, session=session: softmax(session.run(None, {"x": prepare(frame)})[0])
    except ImportError:
        print("onnxruntime is not installed: left out")
    try:
        import openvino
        core = openvino.Core()
        for title, file in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
            config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            compiled = core.compile_model(str(folder / file), "CPU", config)
            found[f"OpenVINO {title}"] = lambda frame, compiled=compiled: softmax(compiled([prepare(frame)])[0])
    except ImportError:
        print("openvino is not installed: left out")
    return found


@torch.inference_mode()
def measure(folder, threads, turns, own_only):
    """Median milliseconds per contender, all taking turns; and those of our resizing and normalising alone."""
    torch.set_num_threads(threads)
    student = make_files(folder)
    found = contenders(folder, student, threads)
    if own_only:
        found = {name: run for name, run in found.items() if not name.startswith(("ONNX", "Open"))}
    before = torch.jit.script(export.Deployed(student, torch.nn.Identity(), SIDE, 1.0).eval())
    found["our preprocessing alone"] = lambda frame: before.features(torch.from_numpy(frame))
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    times = {name: [] for name in found}
    for turn in range(turns):
        for name, run in found.items():
            for repeat in range(4):
                start = time.perf_counter()
                run(frame)
                if turn and repeat:  # the first of each turn finds cold caches
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--turns", type=int, default=20, help="times each contender gets its turn of four frames (default: %(default)s)")
    p.add_argument("--part", nargs=2, metavar=("THREADS", "OWN"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), int(args.part[0]), args.turns, args.part[1] == "own")))
        return
    columns = {}
    for title, threads, own, extra in (("2 threads", 2, "all", {}), ("1 thread", 1, "all", {}), ("1 thread, AVX2", 1, "own", CAPPED)):
        run = subprocess.run([sys.executable, __file__, "--turns", str(args.turns), "--part", str(threads), own],
                             env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True, check=True)
        columns[title] = json.loads(run.stdout.splitlines()[-1])
    names = columns["2 threads"]
    print(f"\n| ms, and as a multiple of int8's | {' | '.join(columns)} |\n|---|" + "---|" * len(columns))
    for name in names:
        cells = [f"{c[name]:.2f} ({c[name] / c['ours student.int8.ts']:.2f} x)" if name in c else "" for c in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
