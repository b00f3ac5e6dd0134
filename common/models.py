"""Networks: any timm classifier as a teacher, torchvision's ResNet18 as the student."""

import difflib

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from common.checkpoints import load
from common.errors import UserError, first_line


class Classifier(nn.Module):
    """A backbone with its own input size and normalisation in front.

    forward: float [B, 3, S, S] in [0, 255], any S -> logits [B, classes].
    """

    def __init__(self, backbone, img_size, mean, std):
        super().__init__()
        self.backbone, self.img_size = backbone, img_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None] * 255, persistent=False)

    def normalise(self, pixels):
        """What the backbone sees: pixels at its size, with its mean and spread."""
        if pixels.shape[-1] != self.img_size:
            size = (self.img_size, self.img_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return (pixels - self.mean) / self.std

    def forward(self, pixels):
        return self.backbone(self.normalise(pixels))


def check_name(name):
    """Raise UserError, with near names, when timm knows no such architecture."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UserError(f"--model {name}: timm has no such model{hint}")


def create_teacher(name, classes, img_size, pretrained=False, weights=None):
    """A timm classifier as a `Classifier`, from scratch, from timm's hub or from a weight file.

    classes: their number; img_size: px, raised to whole patches where the model cuts pictures into
    patches; weights: path of a file in timm's key names. Raises UserError when the weights cannot
    be had or do not fit, or the model does not take img_size.
    """
    check_name(name)
    source = {"pretrained": pretrained or weights is not None}
    if weights is not None:
        source["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        backbone, img_size = build_backbone(name, classes, img_size, source)
        config = backbone.pretrained_cfg
        model = Classifier(backbone, img_size, config["mean"], config["std"])
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
    except Exception as error:  # timm and the hub raise many kinds
        reason = first_line(error, 160)
        if weights is not None:
            message = f"--weights {weights} does not load into {name} at {img_size} px: {reason}"
        elif pretrained:
            message = (
                f"--pretrained: no weights for {name} ({reason}); without a network, "
                "download them elsewhere and give --weights FILE"
            )
        else:
            message = f"--model {name} at {img_size} px: {reason}; try another --img-size"
        raise UserError(message) from None
    return model


def build_backbone(name, classes, img_size, source):
    """(timm model, the side in px it takes): whole patches, since timm leaves out what remains."""
    try:
        backbone = timm.create_model(name, num_classes=classes, img_size=img_size, **source)
    except TypeError:  # most CNNs take any size and have no such argument
        backbone = timm.create_model(name, num_classes=classes, **source)
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    if img_size % patch:
        return build_backbone(name, classes, -(-img_size // patch) * patch, source)
    if not source["pretrained"] and isinstance(backbone, timm.models.ResNet):
        wake_residual_branches(backbone)
    return backbone, img_size


def wake_residual_branches(backbone):
    """Let every residual branch take part from the first step.

    timm starts the last norm of each branch at weight zero (Goyal et al. 2017), which steadies long
    schedules; a run from scratch of a few hundred steps is half over before they have grown.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)


class ResNet18(torchvision.models.ResNet):
    """torchvision's ResNet18, with the two methods that timm asks for to find layers."""

    def __init__(self, classes):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=classes)

    def get_classifier(self):
        """The head."""
        return self.fc

    def group_matcher(self, coarse=False):
        """Patterns that tell stem and blocks by the names of parameters."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)\.(\d+)"}


def create_student(classes, img_size, pretrained=False, weights=None):
    """torchvision's ResNet18 as a `Classifier`, from scratch or from weights without their head.

    classes: their number; img_size: px; weights: path of a state dict in torchvision's key names,
    .safetensors or torch's format. Raises UserError when weights cannot be had or do not fit.
    """
    backbone = ResNet18(classes)
    if weights is not None:
        fill(backbone, read_state_dict(weights), f"--weights {weights}")
    elif pretrained:
        fill(backbone, download_resnet18(), "--pretrained")
    return Classifier(backbone, img_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def read_state_dict(path):
    """The state dict in a .safetensors file or one of torch's; nothing in it can run."""
    try:
        return timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise UserError(
            f"--weights {path}: not a readable state dict ({first_line(error)})"
        ) from None


def download_resnet18():
    """torchvision's ImageNet weights, downloaded once."""
    try:
        return torchvision.models.ResNet18_Weights.DEFAULT.get_state_dict(progress=True)
    except Exception as error:
        raise UserError(
            f"--pretrained: cannot download resnet18-f37072fd.pth ({first_line(error)}); "
            "download it elsewhere and give --weights FILE"
        ) from None


def fill(backbone, state, source):
    """Load all but the head of a ResNet18's state dict. source: for the UserError's message."""
    try:
        body = {name: value for name, value in state.items() if not name.startswith("fc.")}
        missing, unexpected = backbone.load_state_dict(body, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{source}: not a ResNet18 ({first_line(error)})") from None
    if unexpected or any(not name.startswith("fc.") for name in missing):
        raise UserError(f"{source}: not torchvision's ResNet18 (key names differ)")


def load_model(path, device):
    """(Classifier in evaluation mode, its checkpoint without the tensors) from a best.pt."""
    state = load(path)
    if state["kind"] == "student":
        model = create_student(len(state["classes"]), state["img_size"])
    else:
        model = create_teacher(state["model"], len(state["classes"]), state["img_size"])
    model.load_state_dict(state.pop("state_dict"))
    return model.to(device, memory_format=torch.channels_last).eval(), state


def parameter_groups(model, weight_decay, layer_decay=None, backbone_lr=None):
    """AdamW groups with timm's `lr_scale`, which its schedulers multiply the learning rate by.

    From scratch (layer_decay None) all layers share one rate. For a pretrained backbone the last
    block gets backbone_lr, each earlier one layer_decay times the next (ELECTRA, Clark et al.
    2020), and the new head 1. Biases and norms have no weight decay.
    """
    backbone = model.backbone
    skip = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    if layer_decay is None:
        return param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=skip)
    head = {id(p) for p in backbone.get_classifier().parameters()}
    groups = param_groups_layer_decay(
        backbone, weight_decay, no_weight_decay_list=skip, layer_decay=layer_decay
    )
    result = []
    for group in groups:
        scale = min(1.0, group["lr_scale"] / layer_decay) * backbone_lr
        body = [p for p in group["params"] if id(p) not in head]
        new = [p for p in group["params"] if id(p) in head]
        for params, lr_scale in ((body, scale), (new, 1.0)):
            if params:
                decay = group["weight_decay"]
                result.append({"params": params, "weight_decay": decay, "lr_scale": lr_scale})
    return result


def fine_tuning_rates(backbone):
    """(backbone_lr, layer_decay) for `parameter_groups`: steep for transformers, flat for CNNs.

    A CNN has more blocks, so a transformer's decay would freeze its early ones.
    """
    attends = any("attn" in name for name, _ in backbone.named_modules())
    return (0.1, 0.75) if attends else (1.0, 0.95)


def precision(device):
    """The dtype for mixed precision where the hardware computes in it, else None (float32).

    bfloat16 or float16 on cuda, bfloat16 on CPUs with AVX512-BF16 or AMX (elsewhere it is emulated,
    and many times slower than float32). On mps none: untried.
    """
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
        if any(getattr(torch.cpu, probe, bool)() for probe in probes):
            return torch.bfloat16
    return None


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


def features(model, pictures, device):
    """What a teacher's last layer sees of the plain pictures: float32 [N, D] on the CPU."""

    def before_the_head(pixels):
        maps = model.backbone.forward_features(model.normalise(pixels))
        return model.backbone.forward_head(maps, pre_logits=True)

    return predict(before_the_head, pictures, device)
