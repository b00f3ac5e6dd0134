"""Does infer.py decide on ARM as on x86? The four exported files on test pictures, by emulation.

    sudo apt install qemu-user-static mmdebstrap     # Debian 12 or 13 on x86
    python distill.py --resume --onnx
    python tests/benchmarks/arm.py                   # half an hour, 1 GB below runs/arm

Unpacks Debian's Python for arm64 and wheels for aarch64 below runs/arm, once and without root. Then
infer.py judges the same pictures with this Python and, on emulated processors, with that one, each
on one thread. cortex-a72 is the processor of a Raspberry Pi 4, cortex-a76 that of a Pi 5, which has
instructions for int8. Seconds are the emulator's and say nothing of a real ARM.

numpy, Pillow and onnxruntime are of the versions that are installed here. torch is 2.9.1, which
loads what a newer one has exported: the wheel of 2.10 crashes on a Pi 4, and later ones need CUDA.
"""

import json
import os
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bench import ROOT, print_table, processor
from devices import run

from common import cli
from common.files import UserError
from infer import EXTENSIONS

NAMES = ("student.onnx", "student.int8.onnx", "student.ts", "student.int8.ts")
HOME, QEMU, DEBIAN, PYTHON = ROOT / "runs" / "arm", "qemu-aarch64-static", "trixie", "3.13"
UNPACK = "mmdebstrap --mode=chrootless --variant=extract --architectures=arm64 " \
    "--include=base-files,python3,libstdc++6".split()
INSTALL = "-m pip install --disable-pip-version-check --no-deps --no-compile --only-binary=:all: " \
    "--platform=manylinux_2_28_aarch64 --platform=manylinux2014_aarch64".split()
TORCH = "torch==2.9.1 filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions"
AS_HERE = ("numpy", "pillow", "onnxruntime")
CPUS = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b"}  # and their numbers in /proc/cpuinfo


def output(*words):
    """What a command prints; a UserError with the last line of its errors where it fails."""
    printed, problem = run(*words)
    if problem:
        raise UserError(problem.removeprefix("error: "))
    return printed


def filled(folder, *words):
    """The folder, once a command has filled it, or an earlier start; its name is the last word."""
    if not folder.is_dir():
        print(f"filling {folder}", flush=True)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        output(*words, part)
        part.rename(folder)
    return folder


def install():
    """(root, packages): folders with Debian's Python for arm64 and with what infer.py imports."""
    if not shutil.which(QEMU) or not shutil.which(UNPACK[0]):
        raise UserError(f"needs {QEMU} and {UNPACK[0]}; apt install qemu-user-static mmdebstrap")
    if not find_spec("onnxruntime"):
        raise UserError("needs onnxruntime; pip install onnxruntime")
    packages = TORCH.split() + [f"{name}=={version(name)}" for name in AS_HERE]
    pip = [sys.executable, *INSTALL, f"--python-version={PYTHON}", *packages, "--target"]
    return filled(HOME / "root", *UNPACK, DEBIAN), filled(HOME / "packages", *pip)


def emulated(cpu, root, packages):
    """The words that start the arm64 Python on a processor.

    Before version 8.2 QEMU shows the /proc/cpuinfo of the x86, at which onnxruntime 1.28 and later
    crash. What lies below `root` is seen first, so the processor's own is written there.
    """
    about = f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {CPUS[cpu]}\n"
    cores = (f"processor\t: {core}\n{about}" for core in range(os.cpu_count()))
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text("\n".join(cores))
    path = f"PYTHONPATH={packages}"
    return QEMU, "-cpu", cpu, "-E", path, "-L", root, root / "usr" / "bin" / "python3"


def judge(python, model, pictures):
    """(runtime, {path: verdict}, seconds) of infer.py under the Python that these words start."""
    words = [*python, ROOT / "infer.py", "--threads", 1, "--model", model]
    runtime = json.loads(output(*words, "--info"))["runtime"]
    before = os.times()
    lines = output(*words, "--json", "--", *pictures).splitlines()
    seconds = os.times().children_user - before.children_user
    verdicts = {verdict["path"]: verdict for verdict in map(json.loads, lines)}
    return runtime.replace(", 1 threads", ""), verdicts, seconds


def compared(here, there):
    """Cells: pictures, equal decisions, equal classes, how far apart probabilities are at most."""
    pairs = [(verdict, there[path]) for path, verdict in here.items()]
    equal = [sum(a.get(what) == b.get(what) for a, b in pairs) for what in ("decision", "class")]
    gaps = [abs(p - b["probabilities"][k]) for a, b in pairs for k, p in a["probabilities"].items()]
    return [f"{len(pairs)}", *map(str, equal), f"{max(gaps):.0e}"]


def rows_of(model, pictures, folders):
    """A row per processor."""
    x86, here, _ = judge([sys.executable], model, pictures)
    for cpu in CPUS:
        try:
            arm, there, seconds = judge(emulated(cpu, *folders), model, pictures)
            cells = [arm, *compared(here, there), f"{seconds:.0f}"]
        except UserError as error:
            cells = [f"does not run: {error}", *[""] * 5]
        yield [model.name, x86, cpu, *cells]


def main():
    p = cli.parser(__doc__)
    p.add_argument("folder", nargs="?", default="runs/student", type=Path,
                   help="run folder of distill.py with the four files (default: %(default)s)")
    p.add_argument("--pictures", default="data/fasteners/test", type=Path, metavar="DIR",
                   help="a folder of classes (default: %(default)s)")
    p.add_argument("--number", default=300, type=cli.positive_int, metavar="N",
                   help="how many of them, evenly chosen (default: %(default)s)")
    args = p.parse_args()
    models = [args.folder / name for name in NAMES]
    for model in models:
        if not model.is_file():
            raise UserError(f"{model}: no such file; python distill.py --resume --onnx writes it")
    files = [f for f in sorted(args.pictures.glob("*/*")) if f.suffix.lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{args.pictures}: no pictures in folders of classes")
    chosen = sorted({k * len(files) // args.number for k in range(args.number)})
    pictures, folders = [files[k] for k in chosen], install()
    print(f"\nx86: {processor()}; {output(QEMU, '--version').splitlines()[0]}\n")
    rows = (row for model in models for row in rows_of(model, pictures, folders))
    print_table([
        "file", "x86", "processor", "ARM", "pictures", "equal decisions", "equal classes",
        "largest difference of a probability", "s, emulated",
    ], rows)


if __name__ == "__main__":
    cli.run(main)
