"""The exported student: one TorchScript file, uint8 pictures in, probabilities and evidence out.

TorchScript and FX quantisation are deprecated upstream (both warn), so all of it lives here.
"""

import copy
import json
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from common.calibration import fit_temperature
from common.errors import UserError, first_line
from common.files import check_seal, file_sha256, sealed, versions
from common.metrics import score
from common.threshold import choose_threshold, describe

SCHEMA = 3
TOLERANCE = 1e-4  # of a probability, between the eager model and the file
BATCH = 64


class Deployed(nn.Module):
    """Camera pictures -> class probabilities, with resize, normalisation and calibration inside.

    Pictures are uint8 [H, W, 3], [B, H, W, 3] or [B, 3, H, W], any H and W. The resize repeats
    common.images.resize, operator for operator, so that a device sees what training saw.
    """

    # Of `explain`.
    places: Final[int] = 8  # per side that are covered in turn
    cover: Final[float] = 0.3  # radius of a cover, as a share of half the side
    blur: Final[int] = 4  # px per side that what is under a cover is reduced to
    at_once: Final[int] = 16  # covered pictures in one pass
    full_heat: Final[float] = 2.0  # nats that a cover must take from the defect to count as 1

    def __init__(self, classifier, trunk, view_size: int, temperature: float, good: int):
        """trunk: normalised pixels -> features [B, C, h, w], in float32 or int8; the head stays in
        float32. good: number of the class that is no defect, -1 for none."""
        super().__init__()
        self.trunk, self.view_size, self.img_size = trunk, view_size, classifier.img_size
        self.good = good
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

    def logits(self, frames: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], calibrated; frames: uint8 [B, 3, S, S]."""
        pixels = frames.float()
        if self.img_size != self.view_size:
            size = [self.img_size, self.img_size]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        normalised = (pixels - self.mean) / self.std
        features = self.trunk(normalised.contiguous(memory_format=torch.channels_last))
        return F.linear(features.mean([2, 3]), self.weight, self.bias)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], rows summing to 1."""
        return F.softmax(self.logits(self.frames(pictures)), dim=1)

    @torch.jit.export
    def explain(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities [1, K], evidence [8, 8] in 0..1) of one picture.

        The evidence is how much covering each place weakens the likeliest defect, the likeliest
        class that is not the good one: each place in turn is blurred away, softly, and the change
        of log p(defect) - log p(good) counts (occlusion, Zeiler and Fergus 2014). Weak evidence
        stays below 1. Costs 64 more pictures through the student.
        """
        frame, side = self.frames(picture), [self.view_size, self.view_size]
        small = F.interpolate(frame.float(), size=[self.blur, self.blur], mode="area")
        blurred = F.interpolate(small, size=side, mode="bilinear")

        # Every cover is the product of a row's and a column's bell curve: [64, 1, S, S].
        pixel = (torch.arange(self.view_size) * 2 + 1) / self.view_size - 1
        place = (torch.arange(self.places) * 2 + 1) / self.places - 1
        near = torch.exp(-((pixel - place[:, None]) / self.cover).square())
        covers = (near[:, None, :, None] * near[None, :, None, :]).flatten(0, 1)[:, None]
        covered = (frame + covers * (blurred - frame)).round().to(torch.uint8)

        answers = [self.forward(frame)]
        for part in covered.split(self.at_once):
            answers.append(self.forward(part))
        log_p = torch.cat(answers).clamp(min=1e-9).log()
        candidates = log_p[0].clone()
        if self.good >= 0:
            candidates[self.good] = -float("inf")
        lead = log_p[:, int(candidates.argmax())]
        if self.good >= 0:
            lead = lead - log_p[:, self.good]
        weakened = (lead[0] - lead[1:]).clamp(min=0.0).view(self.places, self.places)
        return answers[0], weakened / weakened.max().clamp(min=self.full_heat)


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


def export_student(student, val, views, facts, limits, folder):
    """Write student.ts and, where that loses little, student.int8.ts: each calibrated on val.

    student: a ResNet18 `Classifier` on the CPU, in evaluation mode; val: pictures with `labels`
    int64 [N] and `batch(indices)` -> uint8 [B, S, S, 3]; views: iterable of training views, float
    [B, 3, S, S] in [0, 255], that int8 ranges are measured on; facts: what the metadata says beside
    measurements, with view_size, classes and good_class (or None); limits: `Limits`.
    """
    float_file, int8_file = folder / "student.ts", folder / "student.int8.ts"
    float_file.unlink(missing_ok=True)  # so that the two are always of one export
    int8_file.unlink(missing_ok=True)

    trunk = float_trunk(student)
    float_logits = logits_of(student, trunk, val, facts["view_size"])
    facts = {
        **facts,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        "img_size": student.img_size,
    }
    logits = (float_logits, val.labels)
    write(student, trunk, logits, {**facts, "precision": "float32"}, limits, float_file)

    trunk = int8_trunk(student, views)
    int8_logits = logits_of(student, trunk, val, facts["view_size"])
    decisions, its_own = float_logits.argmax(1), int8_logits.argmax(1)
    lost = int((decisions == val.labels).sum() - (its_own == val.labels).sum())
    drop, differ = 100 * lost / len(val.labels), float((decisions != its_own).float().mean())
    print(
        f"int8: {drop:+.1f} points of val accuracy lost ({lost} of {len(val.labels)} pictures), "
        f"{100 * differ:.1f} % of val decisions differ"
    )
    if lost > 1 and drop > limits.max_int8_drop:  # a single picture is chance
        print(
            f"{int8_file} not written: more than --max-int8-drop {limits.max_int8_drop} points; "
            f"use {float_file} or allow a larger drop"
        )
        return
    facts = {**facts, "precision": "int8", "int8_drop": drop, "int8_disagreement": differ}
    write(student, trunk, (int8_logits, val.labels), facts, limits, int8_file)


@torch.inference_mode()
def logits_of(student, trunk, pictures, view_size):
    """float32 [N, K]: what the file with this trunk will say of pictures, before calibration."""
    deployed = Deployed(student, trunk, view_size, temperature=1.0, good=-1)
    rows = np.arange(len(pictures.labels))
    batches = np.split(rows, range(BATCH, len(rows), BATCH))
    return torch.cat([deployed.logits(deployed.frames(pictures.batch(b))) for b in batches])


def write(student, trunk, validation, facts, limits, path):
    """Calibrate, choose a threshold, write one file and say what it does on validation.

    validation: (logits float [N, K], labels int64 [N]).
    """
    logits, labels = validation
    temperature = fit_temperature(logits, labels)
    probabilities = torch.softmax(logits / temperature, dim=1)
    metrics = score(probabilities, labels)
    good = facts["classes"].index(facts["good_class"]) if facts["good_class"] else -1
    point = operating_point(probabilities, labels, good, limits)
    kept = ("accuracy", "accuracy_interval", "balanced_accuracy", "nll", "ece", "n")
    metadata = {
        "schema": SCHEMA,
        **facts,
        "temperature": temperature,
        "operating_point": point,
        "validation": {key: metrics[key] for key in kept},
        "versions": versions(),
    }
    save_torchscript(
        Deployed(student, trunk, facts["view_size"], temperature, good), metadata, path
    )
    print(
        f"{path}: val accuracy {metrics['accuracy']:.3f}, balanced "
        f"{metrics['balanced_accuracy']:.3f}, NLL {metrics['nll']:.3f}, "
        f"temperature {temperature:.2f}, {path.stat().st_size / 1e6:.1f} MB"
    )
    print(f"{path}: sha256 {file_sha256(path)}")
    if point:
        print(describe(point, facts["good_class"]))


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
    more than TOLERANCE in a probability, on pictures of three shapes, or in an explanation.
    """
    side = deployed.img_size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are fixed here
        traced = copy.deepcopy(deployed).eval()
        traced.trunk = torch.jit.trace(deployed.trunk, torch.zeros(1, 3, side, side))
        scripted = torch.jit.script(traced)
        frozen = torch.jit.freeze(scripted, preserved_attrs=["explain"])
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
        pairs = [(eager(pictures), exported(pictures))]
        if len(shape) == 3:
            pairs += zip(eager.explain(pictures), exported.explain(pictures))
        for expected, found in pairs:
            gap = float((expected - found).abs().max())
            if not gap <= TOLERANCE:
                raise RuntimeError(
                    f"the exported model differs from the eager one by {gap:.1e} on {list(shape)}; "
                    "nothing was written"
                )


def load_exported(path):
    """(TorchScript module, metadata) of an exported file. Raises UserError for a foreign one."""
    extra = {"metadata.json": ""}
    try:
        check_seal(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        metadata = json.loads(extra["metadata.json"])
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"schema {metadata.get('schema')} instead of {SCHEMA}")
    except (UserError, RuntimeError, ValueError, AttributeError) as error:
        reason = first_line(error, 300).removeprefix(f"{path}: ").removesuffix("; make it again")
        raise UserError(
            f"{path}: not a student.ts of this project ({reason}); export it with distill.py"
        ) from None
    return module, metadata
