"""A model under test: what it is, what it says of test pictures, what it costs.

A checkpoint, an exported file or an ensemble, behind one description.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import export, models
from common.checkpoints import peek
from common.ensemble import load_ensemble
from common.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """One model, before it is loaded.

    kind: teacher, student, ensemble or exported. An ensemble has one file per teacher, with
    temperatures and weights; any other model is one file. record: what it says of itself; data: the
    data record of its training, None where it is not known.
    """

    kind: str
    files: list
    record: dict
    data: dict | None
    temperatures: list
    weights: list

    @property
    def pictures(self):
        """The record that says which pictures it wants: classes, view_size, white_level."""
        return self.data or self.record


@dataclass(frozen=True)
class Measured:
    """What one file says of the test sets, and what it costs.

    logits: {set: float32 [N, K]}; latency_ms: for one picture, on `device`.
    """

    logits: dict
    parameters: int
    bytes: int
    latency_ms: float
    device: str


def find_models():
    """Everything under runs/ worth comparing: teachers, ensembles, students, exported files."""
    records = {path: peek(path) for path in sorted(Path("runs").glob("*/best.pt"))}
    students = [path for path, record in records.items() if record["kind"] == "student"]
    found = [path for path in records if path not in students]
    found += [path.parent for path in sorted(Path("runs").glob("*/ensemble.json"))]
    found += students
    for path in students:
        if records[path]["args"]["alpha"]:  # a stand-alone student is a baseline; nobody ships it
            found += sorted(path.parent.glob("*.ts")) + sorted(path.parent.glob("*.onnx"))
    if not found:
        raise UserError("no models under runs/; train some or name their paths")
    return [path.as_posix() for path in found]


def open_subject(name):
    """The `Subject` at a path. Raises UserError for what is no model of this project."""
    path = Path(name)
    if path.is_dir():
        record = load_ensemble(path)
        files = [Path(teacher["path"]) for teacher in record["teachers"]]
        for file, teacher in zip(files, record["teachers"]):
            if not file.is_file() or peek(file)["weights_sha256"] != teacher["weights_sha256"]:
                raise UserError(
                    f"{name}: its teacher {file} is missing or was trained again; "
                    "build the ensemble again"
                )
        temperatures, weights = record["temperatures"], record["weights"]
        return Subject("ensemble", files, record, record["data"], temperatures, weights)
    if not path.is_file():
        raise UserError(f"{name}: no such file or folder")
    if path.suffix in (".ts", ".onnx"):  # it does not say where its pictures were
        return Subject("exported", [path], export.load_exported(path)[1], None, [1.0], [1.0])
    record = peek(path)
    return Subject(record["kind"], [path], record, record["data"], [1.0], [1.0])


def measure(file, subject, sets, device, batch_size):
    """Run one file of a subject over the test sets, {set: Pictures}, and time it."""
    if subject.kind == "exported":  # a constant of the file, and made for a CPU
        parameters, device = subject.record["parameters"], CPU
        module = export.load_exported(file)[0]

        def network(pixels):
            with torch.autocast("cpu", enabled=False):  # as a device runs it
                frames = pixels.to(torch.uint8).permute(0, 2, 3, 1)
                return module(frames).clamp(min=1e-12).log()
    else:
        network = models.load_model(file, device)[0]
        parameters = sum(p.numel() for p in network.parameters())
    logits = {}
    for name, pictures in sets.items():
        logits[name] = models.predict(network, pictures, device, batch_size)
    milliseconds = latency(network, subject.pictures["view_size"], device)
    return Measured(logits, parameters, file.stat().st_size, milliseconds, str(device))


@torch.inference_mode()
def latency(network, side, device, times=25, warm_up=5):
    """Median milliseconds for one picture of side px, in the device's precision."""
    pixels, seconds = torch.zeros(1, 3, side, side, device=device), []
    with models.autocast(device):
        for _ in range(times):
            start = time.perf_counter()
            network(pixels).sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[warm_up:])
