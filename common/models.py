"""Networks and their checkpoints: any timm classifier as a teacher, torchvision's ResNet18.

A checkpoint is a dict of plain data and tensors in torch's format, checked when read. It cannot run
code: only plain data is stored, and `weights_only=True` reads it.
"""

import hashlib
import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import nn

from common.files import (
    UserError,
    check_checksum,
    checksummed,
    first_line,
    px,
    some_of,
    versions,
)

SCHEMA = 7
logging.getLogger("timm").setLevel(logging.ERROR)  # what does not load is told in one line here
# Where a student may start: accuracy on ImageNet 69.8 and 71.5 %, as both projects state it.
RESNET18 = {"torchvision": "resnet18-f37072fd.pth", "timm": "resnet18.a1_in1k"}
PLAIN_ATTENTION = 256**2  # px of the largest picture for it: memory grows with their square


# -------------------------------------------------------------------------------------- networks


class Classifier(nn.Module):
    """A backbone with its own input size and normalisation in front.

    forward: float [B, 3, H, W] in [0, 255], any H and W -> logits [B, classes].
    """

    def __init__(self, backbone, img_size, mean, std):
        """img_size: [H, W] in px; mean, std: of the backbone's training pictures, in 0..1."""
        super().__init__()
        self.backbone, self.img_size = backbone, list(img_size)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None] * 255, persistent=False)

    def normalise(self, pixels):
        """What the backbone sees: pixels at its size, with its mean and standard deviation."""
        if list(pixels.shape[-2:]) != self.img_size:
            pixels = F.interpolate(pixels, size=self.img_size, mode="bilinear", antialias=True)
        return (pixels - self.mean) / self.std

    def forward(self, pixels):
        return self.backbone(self.normalise(pixels))


def starts_warm(flags):
    """Whether the flags of a training, a dict, name weights to start from."""
    return bool(flags.get("weights") or flags.get("pretrained"))


def create_teacher(name, classes, img_size, pretrained=False, weights=None):
    """A timm classifier as a `Classifier`, from scratch, from timm's hub or from a weight file.

    classes: their number; img_size: [H, W] in px, raised to whole patches where the model cuts
    pictures into patches; weights: path of a file in timm's key names, with or without a prefix, or
    of a model.pt. Raises UserError when the weights cannot be had or any but the classifier's are
    missing, or the model does not take img_size (`size_that_fits` finds one that it takes).
    """
    try:
        return build_teacher(name, classes, img_size, pretrained, weights)
    except UserError:
        raise
    except Exception as error:  # timm and the hub raise many kinds
        reason, misfit = first_line(error, 160), "size mismatch" in str(error)
    hint, own = "", own_size(name)
    if misfit and own != list(img_size) and builds(name, classes, own, pretrained, weights):
        side = px(own).removesuffix(" px")
        hint = f"; its own are for {side} px, so try --img-size {side}"
    if weights:
        raise UserError(f"--weights {weights} does not load into {name}: {reason}{hint}")
    if pretrained and hint:
        raise UserError(f"--pretrained: the weights of {name} do not fit {px(img_size)}{hint}")
    if pretrained:
        raise UserError(
            f"--pretrained: no weights for {name} ({reason}); without a network, "
            "download them elsewhere and give --weights FILE"
        )
    raise UserError(f"--model {name} at {px(img_size)}: {reason}; try another --img-size")


def builds(*arguments):
    """Whether `build_teacher` takes these arguments."""
    with suppress(Exception):  # timm raises many kinds
        return bool(build_teacher(*arguments))
    return False


def build_teacher(name, classes, img_size, pretrained=False, weights=None):
    """`create_teacher`, with whatever timm and the hub raise."""
    options = {"num_classes": classes, "pretrained": pretrained or weights is not None}
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(weights), "custom_load": True}
        if not str(weights).endswith(".npz"):  # of JAX, which timm renames by itself
            state = read_teacher_weights(weights, name, classes, img_size)
            options["pretrained_cfg_overlay"] = {"state_dict": state}
    backbone = create_backbone(name, img_size, options)
    cut = getattr(backbone, "patch_embed", None)
    steps = getattr(getattr(cut, "proj", None), "stride", getattr(cut, "patch_size", 1))
    whole = [-(-side // step) * step for side, step in zip(img_size, to_2tuple(steps))]
    if whole != list(img_size):  # timm would leave out what remains
        backbone = create_backbone(name, whole, options)
    config = backbone.pretrained_cfg
    model = Classifier(backbone, whole, config["mean"], config["std"])
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, *whole))
    return model


def create_backbone(name, img_size, options):
    """A timm model for pictures of [H, W] px, which most CNNs have no argument for.

    Residual branches start awake: timm would start the last norm of each at weight zero (Goyal et
    al. 2017), and a run of a few hundred steps is half over before it has grown.
    """
    for more in ({"img_size": tuple(img_size)}, {"zero_init_last": False}):
        with suppress(TypeError):
            return timm.create_model(name, **options, **more)
    return timm.create_model(name, **options)


def own_size(name):
    """[H, W] in px of the pictures that a timm model was made for."""
    return list(timm.get_pretrained_cfg(name).input_size[-2:])


def normalised_otherwise(name):
    """Names with a tag, of weights of a timm model that want another mean and deviation than it."""
    def wanted(each):
        config = timm.get_pretrained_cfg(each)
        return config.mean, config.std
    tagged = timm.list_pretrained(f"{name.split('.')[0]}.*")
    return [each for each in tagged if wanted(each) != wanted(name)]


def heads(backbone):
    """The classifiers of a network: several of those that were made to be distilled (DeiT)."""
    found = backbone.get_classifier() if hasattr(backbone, "get_classifier") else backbone.fc
    return found if isinstance(found, tuple) else (found,)


@torch.no_grad()
def shift_logits(classifier, by):
    """Add float32 [K] to all logits of a `Classifier`, in the biases of its last layers."""
    for head in heads(classifier.backbone):  # one of which may hold several (RepViT)
        for name, parameter in head.named_parameters():
            if name.endswith("bias") and parameter.shape == by.shape:
                parameter += by.to(parameter.device)


def read_teacher_weights(path, name, classes, img_size):
    """The state dict in a file for a timm model, without a prefix such as `module.` or `backbone.`.

    timm leaves out in silence what does not fit. So of two models that start alike one loads the
    file: weights that are equal in both afterwards were not in it, and a UserError says how many.
    img_size: [H, W], see `require_places`.
    """
    state = timm.models.load_state_dict(str(path), weights_only=True)
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not state:  # timm would look for it in a network
        raise UserError(f"--weights {path}: holds no weights")
    seen = trained_at(path) or own_size(name)
    require_places(path, state, seen, img_size)
    fresh = fresh_model(name, classes, seen)
    before = dict(fresh.named_parameters())
    state = without_prefix(state, before)
    overlay = {"state_dict": state}
    loaded = fresh_model(name, classes, seen, pretrained=True, pretrained_cfg_overlay=overlay)
    after = dict(loaded.named_parameters())

    head = fresh.pretrained_cfg["classifier"]  # one name, or several
    of_head = tuple(f"{each}." for each in ([head] if isinstance(head, str) else head))
    body = [key for key in before if before[key].ndim > 1 and not key.startswith(of_head)]
    lacking = [key for key in body if key not in state and torch.equal(before[key], after[key])]
    if lacking:
        foreign = next((key for key in state if key not in before), "nothing else")
        raise UserError(
            f"--weights {path}: has {len(body) - len(lacking)} of {len(body)} weights of {name}; "
            f"it lacks {lacking[0]} and has {foreign}; is it another model's?"
        )
    return state


def require_places(path, state, seen, img_size):
    """Raise a UserError for weights of the places of patches that are those of another rectangle.

    timm takes them for a square's and would shuffle them in silence. seen: [H, W] that the weights
    in the file are for; img_size: that they are wanted for.
    """
    if seen[0] != seen[1] and seen != list(img_size) and any("pos" in key for key in state):
        raise UserError(
            f"--weights {path}: was trained at {px(seen)} and its patches fit no other size; "
            f"train at --img-size {seen[0]}x{seen[1]}"
        )


def trained_at(path):
    """[H, W] in px that the network of a model.pt saw; None of a file that is none."""
    with suppress(UserError):
        return read_header(path)["img_size"]


def fresh_model(name, classes, img_size, **options):
    """A timm model whose random weights are the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(name, img_size, {"num_classes": classes, **options})


def without_prefix(state, own):
    """A state dict with the keys of a model's parameters, `own`, where they stand behind a prefix.

    As it is where no prefix makes more of its keys fit.
    """
    prefixes = Counter(key.removesuffix(known) for key in state for known in own
                       if key.endswith(f".{known}"))
    prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
    if count <= len(own.keys() & state.keys()):
        return state
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def size_that_fits(name, sizes):
    """The first of some sizes [H, W] that a timm model takes, raised to its whole patches.

    Raises UserError where it takes none of them.
    """
    reasons = []
    for size in sizes:
        try:
            return build_teacher(name, 2, size).img_size
        except Exception as error:  # timm raises many kinds
            reasons.append(f"{name} at {px(size)}: {first_line(error, 160)}")
    raise UserError(f"--model {reasons[0]}; try another --img-size")


def create_student(classes, img_size, pretrained=None, weights=None):
    """torchvision's ResNet18 as a `Classifier`, from scratch or from weights without their head.

    classes: their number; img_size: [H, W]; pretrained: "torchvision" or "timm", see RESNET18;
    weights: path of a state dict in these two's key names, .safetensors or torch's format. Raises
    UserError when weights cannot be had or do not fit.
    """
    backbone = torchvision.models.resnet18(num_classes=classes)
    if pretrained or weights:
        state = read_resnet18(weights, pretrained)
        source = f"--weights {weights}" if weights else "--pretrained"
        try:
            body = {name: value for name, value in state.items() if not name.startswith("fc.")}
            missing, unexpected = backbone.load_state_dict(body, strict=False)
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"{source}: not a ResNet18 ({first_line(error)})") from None
        if unexpected or any(not name.startswith("fc.") for name in missing):
            raise UserError(f"{source}: not a ResNet18 of torchvision or timm (key names differ)")
    return Classifier(backbone, img_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def read_resnet18(path, hub):
    """The state dict in a file, whose code never runs; without a path a hub's, downloaded."""
    try:
        if path:
            return timm.models.load_state_dict(str(path), weights_only=True)
        if hub == "timm":
            return timm.create_model(RESNET18[hub], pretrained=True).state_dict()
        return torchvision.models.ResNet18_Weights.DEFAULT.get_state_dict(progress=True)
    except Exception as error:  # of many kinds
        reason = first_line(error)
    if path:
        raise UserError(f"--weights {path}: not a readable state dict ({reason})")
    raise UserError(
        f"--pretrained: cannot download {RESNET18[hub]} ({reason}); "
        "download it elsewhere and give --weights FILE"
    )


# ----------------------------------------------------------------------------- running a network


def precision(device):
    """The dtype for mixed precision where the hardware computes in it, else None (float32).

    On CPUs without AVX512-BF16 or AMX bfloat16 is emulated, many times slower than float32. On mps
    none: untried.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # which need not be the current one
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
        if any(getattr(torch.cpu, probe, bool)() for probe in probes):
            return torch.bfloat16
    return None


def on_device(model, device):
    """A `Classifier` on its device, in the layout and with the operations that are fast there.

    In bfloat16 on CPUs two backward passes of torch 2.14 are slow: that of fused attention, with
    which a step of DINOv2 ViT-S takes 1.6 times as long as with the plain one, and that of a
    depthwise convolution, 1.5 times of EfficientNet-Lite0 (tests/benchmarks/README.md, throughput).
    """
    if device.type == "cpu" and precision(device):
        small = model.img_size[0] * model.img_size[1] <= PLAIN_ATTENTION
        for module in model.modules():
            if small and hasattr(module, "fused_attn"):
                module.fused_attn = False
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.forward = partial(in_float32, module.forward)
    if any(p.dim() > 4 for p in model.parameters()):  # channels_last is of pictures alone
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)


def in_float32(forward, x):
    """A layer's output for an input in any precision, without autocast. CPU only."""
    with torch.autocast("cpu", enabled=False):
        return forward(x.float())


def autocast(device):
    """torch.autocast in the device's `precision`."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@torch.inference_mode()
def predict(model, pictures, device, batch_size=64):
    """Logits of the plain pictures: float32 [N, classes] on the CPU, for N = len(pictures)."""
    logits = []
    for start in range(0, len(pictures), batch_size):
        indices = range(start, min(start + batch_size, len(pictures)))
        pixels = pictures.batch(indices, device).permute(0, 3, 1, 2).float()
        with autocast(device):
            logits.append(model(pixels).float().cpu())
    return torch.cat(logits)


# ------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(state, path):
    """Write a dict of plain data and tensors; adds schema and versions."""
    with checksummed(path) as file:
        torch.save({"schema": SCHEMA, "versions": versions(), **state}, file)


def load_checkpoint(path, mmap=False):
    """Read what `save_checkpoint` wrote, tensors on the CPU; mmap: only when they are used.

    Raises UserError when it is not such a file or when any byte of it is not the one written.
    """
    check_checksum(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for foreign and truncated files
        raise UserError(
            f"{path}: not a readable checkpoint ({first_line(error)}); make it again"
        ) from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: not a checkpoint of this project (schema {SCHEMA}); make it with its scripts"
        )
    return state


def read_header(path):
    """What a checkpoint says beside its weights, which stay on disk; refused as by the above."""
    state = load_checkpoint(path, mmap=True)
    return {key: value for key, value in state.items() if key != "state_dict"}


def trained_runs(home="runs"):
    """{path: header} of every model.pt in runs/*/; a line names the runs that have not ended."""
    try:
        ended = {path: read_header(path) for path in sorted(Path(home).glob("*/model.pt"))}
    except UserError as error:
        raise UserError(f"{error}, or move it out of {home}/") from None
    begun = [path.parent for path in sorted(Path(home).glob("*/last.pt"))]
    if open_ := [str(run) for run in begun if run / "model.pt" not in ended]:
        print(f"left out {some_of(open_)}: not trained to the end; go on with --resume")
    return ended


def changed_teachers(spec):
    """Paths of an ensemble's teachers that are missing, damaged, or were trained again since."""
    for teacher in spec["teachers"]:
        file, found = Path(teacher["path"]), None
        with suppress(UserError, OSError):
            found = read_header(file)["weights_sha256"]
        if found != teacher["weights_sha256"]:
            yield file


def load_model(path, device):
    """(Classifier in evaluation mode, its checkpoint without the tensors) from a model.pt."""
    state = load_checkpoint(path)
    if state["kind"] == "student":
        model = create_student(len(state["classes"]), state["img_size"])
    else:
        model = create_teacher(state["model"], len(state["classes"]), state["img_size"])
    model.load_state_dict(state.pop("state_dict"))
    return on_device(model, device).eval(), state


def weights_sha256(state_dict):
    """sha256 over names, shapes and bytes of a state dict: what later stages know a model by."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
