"""A convolutional net that trains in seconds on a CPU, for images of 8x8 to 32x32."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with 1, 2 and 4 times ``width`` channels, halved twice, then a mean and a linear head.

    Args:
        num_classes: outputs.
        in_chans: channels of the input (N,C,H,W).
        width: channels of the first convolution.
        norm: after each convolution: "batch", "group" (8 channels a group; samples do not depend on one another) or
            "none".
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        width: int = 32,
        norm: Literal["batch", "group", "none"] = "batch",
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group", "none"):
            raise ValueError(f"norm={norm!r}: must be 'batch', 'group' or 'none'")
        if width < 8 or width % 8:
            raise ValueError(f"width={width}: must be a multiple of 8")
        widths = [in_chans, width, 2 * width, 4 * width]
        stages = []
        for stage in range(3):
            layers: list[nn.Module] = [nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=norm == "none")]
            if norm == "batch":
                layers.append(nn.BatchNorm2d(widths[stage + 1]))
            elif norm == "group":
                layers.append(nn.GroupNorm(widths[stage + 1] // 8, widths[stage + 1]))
            layers.append(nn.ReLU())
            if stage < 2:
                layers.append(nn.MaxPool2d(2))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))
