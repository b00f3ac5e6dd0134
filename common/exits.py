"""Exits: a classifier after each early stage of the student, taught with it, left out at export."""

import torch
from torch import nn

from common.models import autocast

EXIT_SHARE = 0.5  # of an exit's loss, beside the student's own


class Exits(nn.Module):
    """Classifiers on layer1 to layer3 of a torchvision ResNet (OFA-KD, Hao et al. 2023)."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.maps, self.heads = {}, nn.ModuleList()
        for number, channels in ((1, 64), (2, 128), (3, 256)):
            stage = getattr(backbone, f"layer{number}")
            stage.register_forward_hook(self.keep(number))
            self.heads.append(nn.Sequential(
                nn.Conv2d(channels, 256, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(256), nn.ReLU(),
                nn.Conv2d(256, 512, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(512), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes),
            ))

    def keep(self, number):
        """A forward hook that keeps the output of stage `number`."""

        def hook(module, inputs, output):
            if module.training:
                self.maps[number] = output

        return hook

    def forward(self, device):
        """Logits of the exits for the last batch the student saw: float32 [B, classes] each."""
        with autocast(torch.device(device)):
            logits = [head(self.maps[n]) for n, head in enumerate(self.heads, start=1)]
        self.maps.clear()
        return [each.float() for each in logits]
