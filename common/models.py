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
from common.cli import UserError

STUDENT = "resnet18"


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
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise UserError(f"--model {name}: timm has no such model" + (f"; near: {', '.join(near)}" if near else ""))


def create_teacher(name, classes, img_size, pretrained=False, weights=None):
    """A timm classifier as a `Classifier`, from scratch, from timm's hub or from a weight file.

    classes: their number; img_size: pixels, raised to a whole number of patches where the model cuts pictures into
    patches (timm would leave out the rest at the right and the bottom); weights: path of a file in timm's key names.
    Raises UserError when the weights cannot be had or do not fit, or the model does not take img_size.
    """
    check_name(name)
    source = dict(pretrained=pretrained or weights is not None)
    if weights is not None:
        source["pretrained_cfg_overlay"] = dict(file=str(weights))
    try:
        try:
            backbone = timm.create_model(name, num_classes=classes, img_size=img_size, **source)
        except TypeError:  # most CNNs take any size and have no such argument
            backbone = timm.create_model(name, num_classes=classes, **source)
        patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,))[0]
        if img_size % patch:
            return create_teacher(name, classes, -(-img_size // patch) * patch, pretrained, weights)
        if not source["pretrained"] and isinstance(backbone, timm.models.ResNet):
            wake_residual_branches(backbone)
        config = backbone.pretrained_cfg
        model = Classifier(backbone, img_size, config["mean"], config["std"])
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
    except UserError:  # of the call above
        raise
    except Exception as error:  # timm and the hub raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if weights is not None:
            raise UserError(f"--weights {weights} does not load into {name} at {img_size} px: {reason}")
        if pretrained:
            raise UserError(f"--pretrained: no weights for {name} ({reason}); without a network, "
                            "download them elsewhere and give --weights FILE")
        raise UserError(f"--model {name} at {img_size} px: {reason}; try another --img-size")
    return model


def wake_residual_branches(backbone):
    """Let every residual branch take part from the first step.

    timm starts the last norm of each branch at weight zero (Goyal et al. 2017), which steadies long
    schedules; a run from scratch of a few hundred steps is half over before the branches have grown.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)


def create_student(classes, img_size, pretrained=False, weights=None):
    """torchvision's ResNet18 as a `Classifier`; weights: a state dict file, its head is left out."""
    backbone = torchvision.models.resnet18(num_classes=classes)
    state = None
    if weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"--weights {weights}: not a readable state dict ({str(error).strip().splitlines()[0][:120]})")
    elif pretrained:
        try:
            state = torchvision.models.ResNet18_Weights.DEFAULT.get_state_dict(progress=True)
        except Exception as error:
            raise UserError(f"--pretrained: cannot download ResNet18 ({error}); download it elsewhere and give --weights FILE")
    if state is not None:
        try:
            missing, unexpected = backbone.load_state_dict(
                {name: value for name, value in state.items() if not name.startswith("fc.")}, strict=False)
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"--weights {weights}: not a ResNet18 ({str(error).splitlines()[0]})")
        if unexpected or any(not name.startswith("fc.") for name in missing):
            raise UserError(f"--weights {weights}: not torchvision's ResNet18 (key names differ)")
    return Classifier(backbone, img_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


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
    block gets backbone_lr, each earlier one layer_decay times the next (Clark et al. 2020, ELECTRA),
    and the new head 1. Biases and norms have no weight decay.
    """
    backbone = model.backbone
    skip = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    if layer_decay is None:
        return param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=skip)
    head = {id(p) for p in backbone.get_classifier().parameters()}
    groups = param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=skip, layer_decay=layer_decay)
    result = []
    for group in groups:
        scale = min(1.0, group["lr_scale"] / layer_decay) * backbone_lr
        body = [p for p in group["params"] if id(p) not in head]
        new = [p for p in group["params"] if id(p) in head]
        for params, lr_scale in ((body, scale), (new, 1.0)):
            if params:
                result.append({"params": params, "weight_decay": group["weight_decay"], "lr_scale": lr_scale})
    return result


def fine_tuning_rates(backbone):
    """(backbone_lr, layer_decay) for `parameter_groups`: low and steep for transformers, nearly one rate for CNNs.

    A CNN has more blocks, so a transformer's decay would freeze its early ones: EfficientNet-Lite0 on 60 pictures of steel
    reached 63 % on 30 validation pictures with (0.1, 0.75), 80 % with (0.5, 0.9) and 93 % with (1.0, 0.95), 120 steps, one seed.
    """
    return (0.1, 0.75) if any("attn" in name for name, _ in backbone.named_modules()) else (1.0, 0.95)


def autocast(device):
    """Mixed precision where the hardware computes in it: bfloat16 or float16 on cuda, bfloat16 on CPUs
    with AVX512-BF16 or AMX (elsewhere it is emulated, and many times slower than float32)."""
    dtype = None
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in
                                      ("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
        dtype = torch.bfloat16
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
    backbone = model.backbone
    return predict(lambda pixels: backbone.forward_head(backbone.forward_features(model.normalise(pixels)), pre_logits=True), pictures, device)
