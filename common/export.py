"""The exported student: one TorchScript file, uint8 pictures in, probabilities and heatmaps out.

TorchScript and FX quantisation are deprecated upstream (both warn), so all of it lives here.
"""

import copy
import json
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.optimization import fuse

from common.checkpoints import SCHEMA, atomic_path, versions
from common.cli import UserError

TOLERANCE = 1e-4


class Deployed(nn.Module):
    """Camera pictures -> class probabilities: resize, normalisation, calibration and softmax inside.

    trunk: normalised pixels [B, 3, S, S] -> features [B, C, h, w], in float32 or int8; the head stays in float32.
    Pictures are uint8 [H, W, 3], [B, H, W, 3] or [B, 3, H, W], any H and W. The resize repeats
    common.data.resize, operator for operator, so that a device sees what training saw.
    """

    def __init__(self, classifier, trunk, view_size: int, temperature: float):
        super().__init__()
        self.trunk, self.view_size, self.img_size = trunk, view_size, classifier.img_size
        head = classifier.backbone.fc
        self.register_buffer("mean", classifier.mean.clone())
        self.register_buffer("std", classifier.std.clone())
        self.register_buffer("weight", head.weight.detach().clone() / temperature)
        self.register_buffer("bias", head.bias.detach().clone() / temperature)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.dim() == 3:
            pictures = pictures.unsqueeze(0)
        if pictures.size(3) == 3:
            pictures = pictures.permute(0, 3, 1, 2)
        if pictures.size(2) != self.view_size or pictures.size(3) != self.view_size:
            pictures = F.interpolate(pictures, size=[self.view_size, self.view_size], mode="bilinear", antialias=True)
        pixels = pictures.float()
        if self.img_size != self.view_size:
            pixels = F.interpolate(pixels, size=[self.img_size, self.img_size], mode="bilinear", antialias=True)
        normalised = (pixels - self.mean) / self.std
        return self.trunk(normalised.contiguous(memory_format=torch.channels_last))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, K], rows summing to 1."""
        return F.softmax(F.linear(self.features(pictures).mean([2, 3]), self.weight, self.bias), dim=1)

    @torch.jit.export
    def explain(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities [B, K], class activation maps [B, K, h, w]) in one pass   (Zhou et al. 2016).

        The mean of map k over its positions is the calibrated logit of class k, less the bias.
        """
        features = self.features(pictures)
        maps = F.conv2d(features, self.weight[:, :, None, None])
        return F.softmax(maps.mean([2, 3]) + self.bias, dim=1), maps


def float_trunk(classifier):
    """The layers of a ResNet18 `Classifier` up to its last features."""
    return nn.Sequential(*list(classifier.backbone.children())[:-2])


class Bfloat16Trunk(nn.Module):
    """`float_trunk` in bfloat16: half the size; fast where the processor computes in it (AMX, AVX512-BF16, newer ARM)."""

    def __init__(self, classifier):
        super().__init__()
        # Norms go into the convolutions first, in float32: bfloat16 has 8 bits of precision to lose only once.
        self.layers = fuse(float_trunk(classifier).cpu().eval()).bfloat16()

    def forward(self, pixels):
        return self.layers(pixels.bfloat16()).float()


def int8_trunk(classifier, batches):
    """`float_trunk` after static post-training quantisation: 8-bit weights per channel, activations calibrated on `batches`.

    batches: iterable of float [B, 3, S, S] in [0, 255]. Activations use 7 of 8 bits ("reduce_range"):
    processors without VNNI add pairs of products in 16 bits, which 8 would overflow.
    """
    trunk = copy.deepcopy(float_trunk(classifier)).cpu().eval()
    example = torch.zeros(1, 3, classifier.img_size, classifier.img_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(trunk, get_default_qconfig_mapping("x86"), (example,))
        for pixels in batches:
            prepared(classifier.normalise(pixels))
        return convert_fx(prepared)


def correct_head(classifier, trunk, batches):
    """A copy of the classifier whose head's bias makes up for what the int8 trunk shifts its logits by on average.

    Bias correction (Nagel et al. 2019) at the last layer, which stays in float32. batches: as for `int8_trunk`.
    """
    before, shift, n = float_trunk(classifier), 0.0, 0
    with torch.no_grad():
        for pixels in batches:
            normalised = classifier.normalise(pixels)
            shift = shift + (before(normalised) - trunk(normalised)).mean((2, 3)).sum(0)
            n += len(pixels)
    corrected = copy.deepcopy(classifier)
    corrected.backbone.fc.bias.data += classifier.backbone.fc.weight.detach() @ (shift / n)
    return corrected


def export(classifier, trunk, view_size, temperature, metadata, path):
    """Write a `Deployed` of these parts as TorchScript with metadata.json inside.

    Refuses (RuntimeError, no file) when the file, loaded again, differs from the eager model by more
    than 1e-4 in any probability on pictures of three shapes.
    """
    metadata = {"schema": SCHEMA, **metadata, "view_size": view_size, "temperature": temperature, "versions": versions()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are fixed in an exported file
        traced = torch.jit.trace(trunk, torch.zeros(1, 3, classifier.img_size, classifier.img_size))
        scripted = torch.jit.script(Deployed(classifier, traced, view_size, temperature).eval())
        frozen = torch.jit.freeze(scripted, preserved_attrs=["explain"])
        with atomic_path(path) as temporary:
            torch.jit.save(frozen, str(temporary), _extra_files={"metadata.json": json.dumps(metadata, indent=1)})
            _check_parity(Deployed(classifier, trunk, view_size, temperature), torch.jit.load(str(temporary)), view_size)


def _check_parity(eager, exported, view_size):
    generator = torch.Generator().manual_seed(0)
    for shape in ((view_size, view_size, 3), (2, 3 * view_size // 2, view_size + 5, 3), (2, 3, view_size - 7, 2 * view_size)):
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected = eager(pictures)
        for found in (exported(pictures), exported.explain(pictures)[0]):
            gap = float((expected - found).abs().max())
            if not gap <= TOLERANCE:
                raise RuntimeError(f"the exported model differs from the eager one by {gap:.1e} on {list(shape)}; nothing was written")


def load_exported(path):
    """(TorchScript module, metadata dict) of an exported file. Raises UserError for a foreign one."""
    extra = {"metadata.json": ""}
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return module, json.loads(extra["metadata.json"])
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or "no metadata").splitlines()[0][:120]
        raise UserError(f"{path}: not a student.ts of this project ({reason}); export it with distill.py")
