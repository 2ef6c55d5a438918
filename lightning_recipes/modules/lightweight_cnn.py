"""The small net that the lightweight-CNN paper trains twice."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LightweightCNN(nn.Module):
    """Two 3x3 convolutions, each with ReLU and a halving by maximum, then a linear head on all that is left.

    With its defaults it is what the paper's re-implementations build, without their hidden layer of 128, which alone
    has more weights than the paper's whole model: convolutions of 10 and 20 filters without padding, 500 features of a
    28x28 image. With one channel and ten classes that is 100 + 1,820 + 5,010 = 6,930 parameters.

    Args:
        num_classes: outputs.
        in_chans: channels of the input (N,C,size,size).
        size: edge length of the images.
        widths: filters of the two convolutions.
        padding: of both; 0 as the paper's, 1 keeps the size, for images as small as 8x8.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        size: int = 28,
        widths: tuple[int, int] = (10, 20),
        padding: int = 0,
    ) -> None:
        super().__init__()
        if len(widths) != 2 or min(widths) < 1:
            raise ValueError(f"widths={widths!r}: must be two numbers of at least 1")
        if padding not in (0, 1):
            raise ValueError(f"padding={padding!r}: must be 0 or 1")
        left = size
        for _ in range(2):
            left = (left - 2 + 2 * padding) // 2
        if left < 1:
            raise ValueError(f"size={size}: must be at least {4 if padding else 10} with padding={padding}")
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=padding)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=padding)
        self.head = nn.Linear(widths[1] * left * left, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # The maximum first: the same values as ReLU first, on a quarter of the numbers.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.head(x.flatten(1))
