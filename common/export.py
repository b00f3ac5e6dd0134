"""The exported student: one TorchScript file, uint8 pictures in, probabilities out.

TorchScript is deprecated upstream (torch.jit raises a FutureWarning), so all of it lives here.
"""

import json
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import SCHEMA, atomic_path, versions
from common.cli import UserError

TOLERANCE = 1e-4


class Deployed(nn.Module):
    """Camera pictures -> class probabilities: resize, normalisation, calibration and softmax inside.

    forward: uint8 [H, W, 3], [B, H, W, 3] or [B, 3, H, W], any H and W -> float32 [B, classes]. The
    resize repeats common.data.resize, operator for operator, so that a device sees what training saw.
    """

    def __init__(self, traced, view_size: int, temperature: float):
        super().__init__()
        self.traced, self.view_size, self.temperature = traced, view_size, temperature

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.dim() == 3:
            pictures = pictures.unsqueeze(0)
        if pictures.size(3) == 3:
            pictures = pictures.permute(0, 3, 1, 2)
        pixels = pictures.float()
        if pixels.size(2) != self.view_size or pixels.size(3) != self.view_size:
            pixels = F.interpolate(pixels, size=[self.view_size, self.view_size], mode="bilinear", antialias=True)
            pixels = pixels.round().clamp(0.0, 255.0)
        return F.softmax(self.traced(pixels) / self.temperature, dim=1)


def export(model, view_size, temperature, metadata, path):
    """Write `model` (a Classifier) as TorchScript with metadata.json inside.

    Refuses (RuntimeError, no file) when the file, loaded again, differs from the eager model by more
    than 1e-4 in any probability on pictures of three shapes.
    """
    model = model.cpu().eval()
    metadata = {"schema": SCHEMA, **metadata, "view_size": view_size, "temperature": temperature, "versions": versions()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are fixed in an exported file
        example = torch.zeros(1, 3, view_size, view_size)
        scripted = torch.jit.script(Deployed(torch.jit.trace(model, example), view_size, temperature).eval())
        frozen = torch.jit.freeze(scripted)
        with atomic_path(path) as temporary:
            torch.jit.save(frozen, str(temporary), _extra_files={"metadata.json": json.dumps(metadata, indent=1)})
            _check_parity(Deployed(model, view_size, temperature), torch.jit.load(str(temporary)), view_size)


def _check_parity(eager, exported, view_size):
    generator = torch.Generator().manual_seed(0)
    for shape in ((view_size, view_size, 3), (2, 3 * view_size // 2, view_size + 5, 3), (2, 3, view_size - 7, 2 * view_size)):
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        gap = float((eager(pictures) - exported(pictures)).abs().max())
        if not gap <= TOLERANCE:
            raise RuntimeError(f"the exported model differs from the eager one by {gap:.1e} on {list(shape)}; nothing was written")


def load_exported(path):
    """(TorchScript module, metadata dict) of an exported file. Raises UserError for a foreign one."""
    extra = {"metadata.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return module, json.loads(extra["metadata.json"])
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or "no metadata").splitlines()[0][:120]
        raise UserError(f"{path}: not a student.ts of this project ({reason}); export it with distill.py")
