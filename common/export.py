"""The exported student: one TorchScript file, uint8 pictures in, probabilities out.

TorchScript and FX quantisation are deprecated upstream (both warn), so all of it lives here.
"""

import copy
import json
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from common import export_onnx
from common.files import (
    EXPORTED,
    UserError,
    checksummed,
    versions,
    written_together,
)
from common.losses import fit_temperature
from common.metrics import choose_threshold, defects, numbers_of, score

SCHEMA = 7
TOLERANCE = 1e-4  # of a probability, between a network and its file
BATCH = 64


class Deployed(nn.Module):
    """Camera pictures -> class probabilities, with resize, normalisation and calibration inside.

    Pictures are uint8 [H, W, 3], [B, H, W, 3] or [B, 3, H, W], any H and W. The resize repeats
    common.pictures.resize, operator for operator, so that a device sees what training saw.
    """

    view_size: list[int]
    img_size: list[int]

    def __init__(self, classifier, trunk, view_size):
        """trunk: normalised pixels -> features [B, C, h, w]; it alone may compute in int8.

        view_size: [H, W] in px.
        """
        super().__init__()
        self.trunk, self.view_size, self.img_size = trunk, view_size, classifier.img_size
        head = classifier.backbone.fc
        self.register_buffer("mean", classifier.mean.clone())
        self.register_buffer("std", classifier.std.clone())
        self.register_buffer("weight", head.weight.detach().clone())
        self.register_buffer("bias", head.bias.detach().clone())

    def frames(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] at the view size."""
        if pictures.dim() == 3:
            pictures = pictures.unsqueeze(0)
        if pictures.size(3) == 3:
            pictures = pictures.permute(0, 3, 1, 2)
        size = self.view_size
        if pictures.size(2) != size[0] or pictures.size(3) != size[1]:
            pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
        return pictures

    def logits(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], calibrated once weight and bias are divided by the temperature."""
        pixels = self.frames(pictures).float()
        if self.img_size != self.view_size:
            pixels = F.interpolate(pixels, size=self.img_size, mode="bilinear", antialias=True)
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

    batches: iterable of float [B, 3, H, W] in [0, 255] that the ranges are measured on. Activations
    use 7 of 8 bits ("reduce_range"): processors without VNNI add pairs of products in 16 bits,
    which 8 would overflow.
    """
    trunk = copy.deepcopy(float_trunk(classifier)).cpu().eval()
    example = torch.zeros(1, 3, *classifier.img_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(trunk, get_default_qconfig_mapping("x86"), (example,))
        for pixels in batches:
            prepared(classifier.normalise(pixels))
        return convert_fx(prepared)


@dataclass(frozen=True)
class Limits:
    """What the exported files must keep: a rate's target, see `choose_threshold`, and the points of
    validation accuracy, plain and balanced, that an int8 file may lose (or one picture).

    parts: what each validation picture shows, N names; see `of_parts`.
    """

    goal: str
    target: float
    max_int8_drop: float
    parts: list


def export_student(student, val, views, about, limits, folder, onnx=False):
    """Write student.ts and, where that loses little, student.int8.ts: each calibrated on val.

    student: a ResNet18 `Classifier` on the CPU, in evaluation mode; val: pictures with `labels`
    int64 [N] and `batch(indices)` -> uint8 [B, H, W, 3]; views: function that yields training
    views, float [B, 3, H, W] in [0, 255], that int8 ranges are measured on; about: what the
    metadata says beside measurements, with view_size, classes and good_classes; onnx: whether to
    write student.onnx and student.int8.onnx too. What `folder` held of an earlier export is
    replaced when all are written; until then, and after an error, it stays. Returns
    {name: metadata} of what was written.
    """
    about = {
        **about,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        "img_size": student.img_size,
    }
    plain, labels = Deployed(student, float_trunk(student), about["view_size"]), val.labels
    float_logits = logits_of(plain, val)
    floats = measured(float_logits, labels, {**about, "precision": "float32"}, limits)
    exported = {}
    with written_together(folder, EXPORTED) as home:
        for name, network in networks_of(student, plain, views, onnx):
            metadata = floats
            if ".int8" in name:
                logits = logits_of(network, val)
                loss = int8_loss(folder / name, logits, float_logits, labels, limits)
                if loss is None:
                    continue
                metadata = measured(logits, labels, {**about, **loss}, limits)
            elif name == "student.onnx":  # made of the network by another library
                logits = logits_of(network, val)
                require_near(name, F.softmax(float_logits, dim=1), F.softmax(logits, dim=1))
            network.save(metadata, home / name)
            check_parity(network, home / name)
            exported[name] = metadata
    return exported


def networks_of(student, plain, views, onnx):
    """Yield (name, network) of each file; plain: the `Deployed` of float32."""
    yield "student.ts", TorchScript(plain)
    yield "student.int8.ts", TorchScript(
        Deployed(student, int8_trunk(student, views()), plain.view_size)
    )
    if onnx:
        graph = export_onnx.Graph.of(plain)
        yield "student.onnx", graph
        yield "student.int8.onnx", graph.quantised(views())


def int8_loss(path, logits, float_logits, labels, limits):
    """What an int8 file loses on validation, printed and as plain data; None where too much."""
    decisions, float_decisions = logits.argmax(1), float_logits.argmax(1)
    change = (float_decisions == labels).long() - (decisions == labels).long()
    of_class = labels.bincount(minlength=logits.shape[1])
    lost = torch.zeros_like(of_class).index_add(0, labels, change)
    drop = 100 * int(lost.sum()) / len(labels)
    balanced = 100 * float((lost / of_class.clamp(min=1))[of_class > 0].mean())
    disagreement = float((decisions != float_decisions).float().mean())
    print(
        f"{path}: {drop:+.1f} points of val accuracy lost ({int(lost.sum())} of {len(labels)} "
        f"pictures), {balanced:+.1f} of balanced accuracy, {100 * disagreement:.1f} % of val "
        "decisions differ from float32's"
    )
    losses = (drop, lost.sum()), (balanced, lost.clamp(min=0).sum())  # of one picture chance
    if any(points > limits.max_int8_drop and count > 1 for points, count in losses):
        print(
            f"{path} not written: more than --max-int8-drop {limits.max_int8_drop} points of one; "
            "use the float32 file or allow a larger drop"
        )
        return None
    return {"precision": "int8", "int8_drop": drop, "int8_disagreement": disagreement}


@torch.inference_mode()
def logits_of(network, pictures):
    """float32 [N, K] of anything with `logits`, before calibration."""
    rows = np.arange(len(pictures.labels))
    batches = np.split(rows, range(BATCH, len(rows), BATCH))
    return torch.cat([network.logits(pictures.batch(batch)) for batch in batches])


def measured(logits, labels, about, limits):
    """The metadata of a file: `about`, and temperature, threshold and accuracy on validation.

    logits: float [N, K], what the file says before calibration; labels: int64 [N]. There is no
    threshold without good classes, or without good and defective pictures.
    """
    temperature = fit_temperature(logits, labels)
    probabilities = torch.softmax(logits / temperature, dim=1).numpy()
    metrics, point = score(probabilities, labels), None
    if about["good_classes"]:
        good = numbers_of(about["good_classes"], about["classes"])
        scores, defective = defects(probabilities, labels.numpy(), good, limits.parts)
        if defective.any() and not defective.all():
            point = choose_threshold(scores, defective, limits.goal, limits.target)
    kept = ("accuracy", "accuracy_interval", "balanced_accuracy", "nll", "ece", "n")
    return {
        "schema": SCHEMA,
        **about,
        "temperature": temperature,
        "operating_point": point,
        "validation": {key: metrics[key] for key in kept},
        "versions": versions(),
    }


class TorchScript:
    """A `Deployed` that is written as TorchScript."""

    def __init__(self, deployed):
        self.deployed, self.logits = deployed, deployed.logits

    def save(self, metadata, path):
        """Write it with its temperature, and metadata.json inside."""
        example = torch.zeros(1, 3, *self.deployed.img_size)
        traced = copy.deepcopy(self.deployed).eval()
        with warnings.catch_warnings(), torch.no_grad(), checksummed(path) as file:
            warnings.filterwarnings("ignore", message=".*torch.jit")
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are fixed
            traced.weight /= metadata["temperature"]
            traced.bias /= metadata["temperature"]
            traced.trunk = torch.jit.trace(traced.trunk, example)
            frozen = torch.jit.freeze(torch.jit.script(traced))
            extra = {"metadata.json": json.dumps(metadata, indent=1)}
            torch.jit.save(frozen, file, _extra_files=extra)


def check_parity(network, path):
    """Raise RuntimeError where the file at `path` does not answer as the network it was made of."""
    student, metadata = load_exported(path)
    shape = (3, *metadata["view_size"], 3)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        expected = torch.softmax(network.logits(frames) / metadata["temperature"], dim=1)
    require_near(path.name, expected, student(frames))


def require_near(name, expected, found):
    """Raise RuntimeError where probabilities [N, K] differ: a file's, and the trained network's."""
    gap = float((expected - found).abs().max())
    if not gap <= TOLERANCE:
        raise RuntimeError(
            f"{name}: its probabilities differ by {gap:.1e} from those of the network that was "
            "trained; nothing was written"
        )


def load_exported(path):
    """(student, metadata) of an exported file, loaded by infer.py's own lines as on a device.

    student: uint8 tensor [B, H, W, 3] at the view size -> probabilities, float32 [B, K]. Raises
    UserError for a foreign or damaged file, or where its runtime is not installed.
    """
    import infer

    try:
        student, metadata = infer.load_student(path)
    except infer.Refused as error:
        raise UserError(str(error)) from None
    del metadata["runtime"], metadata["sha256"]  # which the file does not hold
    return lambda frames: torch.from_numpy(student(frames.numpy())), metadata
