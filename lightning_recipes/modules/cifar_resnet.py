"""ResNet for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2).

Parameter-free shortcuts (option A) and the parameter names of github.com/akamaster/pytorch_resnet_cifar10, so that its
published weights load. Those take RGB in [0,1] normalised by mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """conv, norm, ReLU, conv, norm, plus shortcut, ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.grown = width - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.grown:
            # Option A: every second pixel, and zero channels half before and half after.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grown // 2, self.grown // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A ResNet of 6n+2 layers: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 6n+2: 20, 32, 44, 56, 110, ...
        num_classes: outputs.
        in_chans: channels of the input (N,C,32,32); other sizes work too.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: must be 6n+2 (20, 32, 44, 56, 110, ...)")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(width_in, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet18(num_classes: int = 10, in_chans: int = 3, **arguments: Any) -> nn.Module:
    """timm's ResNet-18 for 32x32 images, as most papers on CIFAR have it: a 3x3 convolution of stride 1 in the place of
    the 7x7 one of stride 2, and no pooling behind it; 11.2 M parameters at 10 classes."""
    import timm  # only here: importing the recipes imports this file

    net = timm.create_model("resnet18", num_classes=num_classes, in_chans=in_chans, **arguments)
    net.conv1 = nn.Conv2d(in_chans, net.conv1.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm draws convolutions
    net.maxpool = nn.Identity()
    return net
