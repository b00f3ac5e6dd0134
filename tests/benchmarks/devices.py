"""Which versions a device needs: infer.py and the exported files with old and new packages.

    pip install uv
    python distill.py --resume --onnx
    python tests/benchmarks/devices.py runs/student                     # downloads 20 GB for torch
    python tests/benchmarks/devices.py runs/student --only onnxruntime  # half a GB
    python tests/benchmarks/devices.py runs/student --only 3.8 3.9      # these Pythons
    UV_TORCH_BACKEND=cpu python tests/benchmarks/devices.py runs/student  # torch's small wheels

Each row of ROWS is a virtual environment with these packages, from wheels alone, which is removed
afterwards; uv takes its Python from PATH or downloads it. There infer.py judges the test pictures
with the float32 and the int8 file, and draws a heatmap of one. Decisions and probabilities are
compared with those of the first row of the same runtime where that file works.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from bench import ROOT, print_table, processor

from common import cli
from common.files import UserError

FILES = {  # {runtime: {precision: file}}
    "onnxruntime": {"float32": "student.onnx", "int8": "student.int8.onnx"},
    "torch": {"float32": "student.ts", "int8": "student.int8.ts"},
}
ROWS = (  # Python, Pillow, numpy, runtime, its version; the newest of each runtime comes first
    ("3.14", "13.0.0", "2.5.5", "onnxruntime", "1.32.0"),
    ("3.14", "11.3.0", "2.3.2", "onnxruntime", "1.24.1"),  # the oldest wheels of this Python
    ("3.13", "10.4.0", "2.1.0", "onnxruntime", "1.20.0"),  # likewise
    ("3.12", "10.0.0", "1.26.0", "onnxruntime", "1.17.0"),  # likewise
    ("3.11", "9.4.0", "1.24.2", "onnxruntime", "1.32.0"),  # Python and packages of Debian 12
    ("3.10", "12.3.0", "2.2.6", "onnxruntime", "1.23.2"),  # the newest wheels of this Python
    ("3.10", "9.0.1", "1.21.6", "onnxruntime", "1.14.1"),  # Pillow of Ubuntu 22.04
    ("3.10", "9.0.1", "1.21.6", "onnxruntime", "1.13.1"),
    ("3.10", "8.4.0", "1.21.6", "onnxruntime", "1.14.1"),
    ("3.9", "11.3.0", "2.0.2", "onnxruntime", "1.19.2"),
    ("3.8", "9.0.1", "1.21.6", "onnxruntime", "1.14.0"),  # all of them the oldest
    ("3.14", "13.0.0", "2.5.5", "torch", "2.15.0"),
    ("3.14", "11.3.0", "2.3.2", "torch", "2.9.0"),
    ("3.13", "10.4.0", "2.1.0", "torch", "2.5.0"),
    ("3.11", "9.4.0", "1.24.2", "torch", "1.13.1"),  # all of Debian 12
    ("3.10", "12.3.0", "2.2.6", "torch", "2.14.1"),
    ("3.8", "9.0.1", "1.21.6", "torch", "2.0.0"),  # all of them the oldest
)
COLUMNS = (
    "Python", "Pillow", "numpy", "runtime", "files that work", "decisions equal",
    "largest difference of a probability", "what failed",
)
LONGEST = 200  # characters of what failed


def uv_command():
    """How uv is called here."""
    found = shutil.which("uv")
    if not found and not find_spec("uv"):
        raise UserError("needs uv, which makes environments of any Python: pip install uv")
    return [found] if found else [sys.executable, "-m", "uv"]


def run(*words):
    """(output, problem) of a command; problem: the last line of its errors, None if it worked."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return done.stdout, lines[-1].strip() if done.returncode else None


def make_environment(home, python, packages):
    """(its interpreter, problem) of a new virtual environment."""
    uv, interpreter = uv_command(), home / "bin" / "python"
    _, problem = run(*uv, "venv", "--quiet", "--python", python, home)
    if not problem:
        install = (*uv, "pip", "install", "--quiet", "--only-binary", ":all:")
        _, problem = run(*install, "--python", interpreter, *packages)
    return interpreter, problem


def judge(interpreter, model, pictures, *more):
    """({path: verdict}, problem) of infer.py."""
    words = ("--model", model, "--json", "--threads", 1, *more, "--", *pictures)
    output, problem = run(interpreter, ROOT / "infer.py", *words)
    verdicts = map(json.loads, output.splitlines())
    problem = problem and problem.removeprefix(f"error: {model}: ")
    return {verdict["path"]: verdict for verdict in verdicts}, problem


def try_row(python, packages, files, pictures):
    """({precision: verdicts} of the files that work, {problem: [what had it]})."""
    answers, problems = {}, {}
    with tempfile.TemporaryDirectory() as home:
        interpreter, problem = make_environment(Path(home, "env"), python, packages)
        if problem:
            return {}, {problem: ["installation"]}
        for precision, file in files.items():
            verdicts, problem = judge(interpreter, file, pictures)
            what = precision
            if not problem:
                answers[precision] = verdicts
                shown = [path for path in verdicts if verdicts[path].get("decision") != "PASS"]
                maps = ("--heatmap", Path(home, "maps"))
                _, problem = judge(interpreter, file, shown[:1], *maps)
                what = f"{precision} --heatmap"
            if problem:
                problems.setdefault(problem, []).append(what)
    return answers, problems


def compare(verdicts, newest):
    """(equal decisions, largest difference of a probability) of {path: verdict} of two rows."""
    pairs = [(verdict, newest[path]) for path, verdict in verdicts.items()]
    equal = sum(a.get("decision") == b.get("decision") and a["class"] == b["class"]
                for a, b in pairs)
    both = [(a["probabilities"], b["probabilities"]) for a, b in pairs]
    return equal, max(abs(a[name] - b[name]) for a, b in both for name in a)


def shortened(problems):
    """What `try_row` calls problems, as one cell of a Markdown table."""
    cells = []
    for problem, names in problems.items():
        if len(problem) > LONGEST:
            problem = f"{problem[:LONGEST // 2]} ... {problem[-LONGEST // 2:]}"
        cells.append(f"{', '.join(names)}: {problem}".replace("|", "/"))
    return "; ".join(cells)


def rows_of(folder, pictures, only):
    """The rows of the table, each when it is known."""
    newest = {}
    for python, pillow, numpy, runtime, version in ROWS:
        if not only or runtime in only or python in only:
            packages = (f"pillow=={pillow}", f"numpy=={numpy}", f"{runtime}=={version}")
            files = {precision: folder / name for precision, name in FILES[runtime].items()}
            answers, problems = try_row(python, packages, files, pictures)
            found = []
            for name, verdicts in answers.items():
                first = newest.setdefault((runtime, name), verdicts)
                found.append((len(verdicts), *compare(verdicts, first)))
            yield [
                python, pillow, numpy, f"{runtime} {version}", ", ".join(answers),
                ", ".join(f"{equal} of {n}" for n, equal, _ in found),
                ", ".join(f"{gap:.0e}" for _, _, gap in found), shortened(problems),
            ]


def main():
    p = cli.parser(__doc__)
    p.add_argument("folder", type=Path, help="a run folder with the four files")
    p.add_argument("--pictures", nargs="+", default=["data/fasteners/test"],
                   help="files, patterns or folders (default: %(default)s)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="the rows of a runtime or Python")
    args = p.parse_args()
    uv_command()  # or end here
    print_table(COLUMNS, rows_of(args.folder, args.pictures, args.only))
    print(f"\n{processor()}")


if __name__ == "__main__":
    cli.run(main)
