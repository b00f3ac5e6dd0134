"""The exported student: one TorchScript file, uint8 pictures in, probabilities out.

TorchScript and FX quantisation are deprecated upstream (both warn), so all of it lives here.
"""

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from common import onnx_file
from common.calibration import fit_temperature
from common.errors import UserError, first_line
from common.files import EXPORTED, check_seal, file_sha256, sealed, versions
from common.metrics import score
from common.threshold import choose_threshold, describe

SCHEMA = 4
TOLERANCE = 1e-4  # of a probability, between the eager model and the file
BATCH = 64


class Deployed(nn.Module):
    """Camera pictures -> class probabilities, with resize, normalisation and calibration inside.

    Pictures are uint8 [H, W, 3], [B, H, W, 3] or [B, 3, H, W], any H and W. The resize repeats
    common.images.resize, operator for operator, so that a device sees what training saw.
    """

    def __init__(self, classifier, trunk, view_size: int, temperature: float = 1.0):
        """trunk: normalised pixels -> features [B, C, h, w]; it alone may compute in int8."""
        super().__init__()
        self.trunk, self.view_size, self.img_size = trunk, view_size, classifier.img_size
        head = classifier.backbone.fc
        self.register_buffer("mean", classifier.mean.clone())
        self.register_buffer("std", classifier.std.clone())
        self.register_buffer("weight", head.weight.detach().clone() / temperature)
        self.register_buffer("bias", head.bias.detach().clone() / temperature)

    def frames(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] at the view size."""
        if pictures.dim() == 3:
            pictures = pictures.unsqueeze(0)
        if pictures.size(3) == 3:
            pictures = pictures.permute(0, 3, 1, 2)
        size = [self.view_size, self.view_size]
        if pictures.size(2) != size[0] or pictures.size(3) != size[1]:
            pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
        return pictures

    def logits(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], calibrated."""
        pixels = self.frames(pictures).float()
        if self.img_size != self.view_size:
            size = [self.img_size, self.img_size]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        normalised = (pixels - self.mean) / self.std
        features = self.trunk(normalised.contiguous(memory_format=torch.channels_last))
        return F.linear(features.mean([2, 3]), self.weight, self.bias)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], rows summing to 1."""
        return F.softmax(self.logits(pictures), dim=1)


def float_trunk(classifier):
    """The layers of a ResNet18 `Classifier` up to its last features."""
    return nn.Sequential(*list(classifier.backbone.children())[:-2])


def int8_trunk(classifier, batches):
    """`float_trunk` after static quantisation: 8-bit weights per channel, calibrated activations.

    batches: iterable of float [B, 3, S, S] in [0, 255] that the ranges are measured on. Activations
    use 7 of 8 bits ("reduce_range"): processors without VNNI add pairs of products in 16 bits,
    which 8 would overflow.
    """
    trunk = copy.deepcopy(float_trunk(classifier)).cpu().eval()
    example = torch.zeros(1, 3, classifier.img_size, classifier.img_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(trunk, get_default_qconfig_mapping("x86"), (example,))
        for pixels in batches:
            prepared(classifier.normalise(pixels))
        return convert_fx(prepared)


@dataclass(frozen=True)
class Limits:
    """What the exported files must keep; exactly one of the two rates, the other None.

    max_miss_rate, max_false_alarm_rate: shares, for the threshold; max_int8_drop: points of
    validation accuracy that the int8 file may lose, or one picture.
    """

    max_miss_rate: float | None
    max_false_alarm_rate: float | None
    max_int8_drop: float


def export_student(student, val, views, facts, limits, folder, onnx=False):
    """Write student.ts and, where that loses little, student.int8.ts: each calibrated on val.

    student: a ResNet18 `Classifier` on the CPU, in evaluation mode; val: pictures with `labels`
    int64 [N] and `batch(indices)` -> uint8 [B, S, S, 3]; views: function that yields training
    views, float [B, 3, S, S] in [0, 255], that int8 ranges are measured on; facts: what the
    metadata says beside measurements, with view_size, classes and good_class (or None); limits:
    `Limits`; onnx: whether to write student.onnx and student.int8.onnx too.
    """
    for name in EXPORTED:  # so that all are always of one export
        (folder / name).unlink(missing_ok=True)
    side, labels = facts["view_size"], val.labels
    facts = {
        **facts,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        "img_size": student.img_size,
    }

    trunk = float_trunk(student)
    plain = Deployed(student, trunk, side)
    float_logits = logits_of(plain.logits, val)
    floats = measured(float_logits, labels, {**facts, "precision": "float32"}, limits)
    calibrated = Deployed(student, trunk, side, floats["temperature"])
    save_torchscript(calibrated, floats, folder / "student.ts")
    announce(folder / "student.ts", floats)

    path, trunk = folder / "student.int8.ts", int8_trunk(student, views())
    logits = logits_of(Deployed(student, trunk, side).logits, val)
    metadata = measured_int8(path, logits, float_logits, labels, facts, limits)
    if metadata:
        save_torchscript(Deployed(student, trunk, side, metadata["temperature"]), metadata, path)
        announce(path, metadata)
    if not onnx:
        return

    graph = onnx_file.graph_of(plain)
    int8_graph = onnx_file.quantised(graph, views())
    onnx_file.set_temperature(graph, floats["temperature"])
    onnx_file.save(graph, floats, folder / "student.onnx", calibrated)
    announce(folder / "student.onnx", floats)

    path, logits = folder / "student.int8.onnx", logits_of(onnx_file.logits_by(int8_graph), val)
    metadata = measured_int8(path, logits, float_logits, labels, facts, limits)
    if metadata:
        onnx_file.set_temperature(int8_graph, metadata["temperature"])
        onnx_file.save(int8_graph, metadata, path)
        announce(path, metadata)


def measured_int8(path, logits, float_logits, labels, facts, limits):
    """Print what an int8 file loses on validation; `measured`, or None where it is too much."""
    decisions, its_own = float_logits.argmax(1), logits.argmax(1)
    lost = int((decisions == labels).sum() - (its_own == labels).sum())
    drop, differ = 100 * lost / len(labels), float((decisions != its_own).float().mean())
    print(
        f"{path}: {drop:+.1f} points of val accuracy lost ({lost} of {len(labels)} pictures), "
        f"{100 * differ:.1f} % of val decisions differ from float32's"
    )
    if lost > 1 and drop > limits.max_int8_drop:  # a single picture is chance
        print(
            f"{path} not written: more than --max-int8-drop {limits.max_int8_drop} points; "
            "use the float32 file or allow a larger drop"
        )
        return None
    facts = {**facts, "precision": "int8", "int8_drop": drop, "int8_disagreement": differ}
    return measured(logits, labels, facts, limits)


@torch.inference_mode()
def logits_of(network, pictures):
    """float32 [N, K]; network: uint8 [B, S, S, 3] -> float32 [B, K]."""
    rows = np.arange(len(pictures.labels))
    batches = np.split(rows, range(BATCH, len(rows), BATCH))
    return torch.cat([network(pictures.batch(batch)) for batch in batches])


def measured(logits, labels, facts, limits):
    """The metadata of a file: facts, and temperature, threshold and accuracy on validation.

    logits: float [N, K], what the file says before calibration; labels: int64 [N].
    """
    temperature = fit_temperature(logits, labels)
    probabilities = torch.softmax(logits / temperature, dim=1)
    metrics = score(probabilities, labels)
    good = facts["classes"].index(facts["good_class"]) if facts["good_class"] else -1
    kept = ("accuracy", "accuracy_interval", "balanced_accuracy", "nll", "ece", "n")
    return {
        "schema": SCHEMA,
        **facts,
        "temperature": temperature,
        "operating_point": operating_point(probabilities, labels, good, limits),
        "validation": {key: metrics[key] for key in kept},
        "versions": versions(),
    }


def announce(path, metadata):
    """Say of a file that was written what it does on validation."""
    metrics, point = metadata["validation"], metadata["operating_point"]
    print(
        f"{path}: val accuracy {metrics['accuracy']:.3f}, balanced "
        f"{metrics['balanced_accuracy']:.3f}, NLL {metrics['nll']:.3f}, "
        f"temperature {metadata['temperature']:.2f}, {path.stat().st_size / 1e6:.1f} MB"
    )
    print(f"{path}: sha256 {file_sha256(path)}")
    if point:
        print(describe(point, metadata["good_class"]))


def operating_point(probabilities, labels, good, limits):
    """The threshold for the target, or None without a good class, good or defective pictures."""
    defective = (labels != good).numpy()
    if good < 0 or defective.all() or not defective.any():
        return None
    scores = 1 - probabilities[:, good].numpy()
    return choose_threshold(scores, defective, limits.max_miss_rate, limits.max_false_alarm_rate)


def save_torchscript(deployed, metadata, path):
    """Write a `Deployed` as TorchScript with metadata.json inside.

    Refuses (RuntimeError, no file) when the file, loaded again, differs from the eager model by
    more than TOLERANCE in a probability, on pictures of three shapes.
    """
    side = deployed.img_size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are fixed here
        traced = copy.deepcopy(deployed).eval()
        traced.trunk = torch.jit.trace(deployed.trunk, torch.zeros(1, 3, side, side))
        scripted = torch.jit.script(traced)
        frozen = torch.jit.freeze(scripted)
        extra = {"metadata.json": json.dumps(metadata, indent=1)}
        with sealed(path) as file:
            torch.jit.save(frozen, file, _extra_files=extra)
            file.flush()
            check_parity(deployed, torch.jit.load(file.name))


def check_parity(eager, exported):
    """Raise RuntimeError where the exported model answers otherwise than the eager one."""
    generator = torch.Generator().manual_seed(0)
    side = eager.view_size
    for shape in ((side, side, 3), (2, 3 * side // 2, side + 5, 3), (2, 3, side - 7, 2 * side)):
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        gap = float((eager(pictures) - exported(pictures)).abs().max())
        if not gap <= TOLERANCE:
            raise RuntimeError(
                f"the exported model differs from the eager one by {gap:.1e} on {list(shape)}; "
                "nothing was written"
            )


def load_exported(path):
    """(student, metadata) of an exported file. Raises UserError for a foreign or damaged one.

    student: uint8 tensor [B, S, S, 3] at the view size -> probabilities, float32 [B, K].
    """
    onnx = Path(path).suffix == ".onnx"
    if onnx:
        onnx_file.require_packages(["onnxruntime"])
    try:
        student, text = onnx_file.load(path) if onnx else load_torchscript(path)
        metadata = json.loads(text)
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"schema {metadata.get('schema')} instead of {SCHEMA}")
    except Exception as error:  # of many kinds
        reason = first_line(error, 300).removeprefix(f"{path}: ").removesuffix("; make it again")
        kind = "student.onnx" if onnx else "student.ts"
        message = f"{path}: not a {kind} of this project ({reason}); export it with distill.py"
        raise UserError(message) from None
    return student, metadata


def load_torchscript(path):
    """(TorchScript module, metadata as text) of a .ts file."""
    check_seal(path)
    extra = {"metadata.json": ""}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    return module, extra["metadata.json"]
