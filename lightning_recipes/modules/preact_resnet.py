"""Pre-activation ResNet-18 for 32x32 images (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016): the
net of most papers on adversarial training on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, conv, plus shortcut (a 1x1 convolution of the activated input where it grows)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        grows = stride != 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if grows else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + kept


class PreActResNet18(nn.Module):
    """Four stages of two pre-activation blocks with 64, 128, 256 and 512 channels; 11.2 M parameters at 10 classes.

    Args:
        num_classes: outputs.
        in_chans: channels of the input (N,C,32,32); other sizes work too.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        widths = [64, 64, 128, 256, 512]
        for stage in range(4):
            first = PreActBlock(widths[stage], widths[stage + 1], 1 if stage == 0 else 2)
            blocks = nn.Sequential(first, PreActBlock(widths[stage + 1], widths[stage + 1], 1))
            self.add_module(f"layer{stage + 1}", blocks)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))
