"""DropBlock: whole squares of a feature map are left out, for all channels alike, and more of them in deeper layers.

Ghiasi, Lin, Le, "DropBlock: A regularization method for convolutional networks", NeurIPS 2018
(https://arxiv.org/abs/1810.12890), as in Vir, "Balanced Multi-Task Attention for Satellite Image Classification", 2025
(https://arxiv.org/abs/2510.15527; code https://github.com/virAditya/satellite-image-classification-eurosat, commit
a01ffe4). For maps x [B, C, H, W], rate p and odd block size b:

    gamma = p / b^2                                            ('paper_code')
    gamma = p / b^2  HW / ((H - b + 1) (W - b + 1))            ('dropblock', the original)
    keep  = 1 - maxpool_b(seeds),   seeds ~ Bernoulli(gamma), [B, 1, H, W]
    y     = x keep numel(keep) / sum(keep)

Blocks overlap and stand over the border, so less than p is dropped: by the paper's code 4.6, 8.6, 11.3 and 11.6 % for
its p of 5, 10, 15 and 20 % on maps of 64, 32, 16 and 8 pixels. The sum runs over the whole batch, so the mean of y over
a batch of ones is exactly 1. Counts are taken in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

Gamma = Literal["paper_code", "dropblock"]
GAMMAS: tuple[Gamma, ...] = ("paper_code", "dropblock")


def fitting_block(block_size: int, height: int, width: int) -> int:
    """The largest odd block size up to `block_size` that fits on the map."""
    largest = min(block_size, height, width)
    return largest - (largest % 2 == 0)


def seed_rate(p: float, block_size: int, height: int, width: int, gamma: Gamma = "paper_code") -> float:
    """gamma, the probability that a pixel is the middle of a dropped block; at most 1."""
    rate = p / block_size**2
    if gamma == "dropblock":
        rate *= height * width / ((height - block_size + 1) * (width - block_size + 1))
    return min(rate, 1.0)


def kept(seeds: Tensor, block_size: int) -> Tensor:
    """1 where no block covers a pixel.

    Args:
        seeds: 0 or 1, ``[B, 1, H, W]``, the middles of blocks.
        block_size: odd.

    Returns:
        of the shape and dtype of the seeds.
    """
    return 1 - F.max_pool2d(seeds, block_size, stride=1, padding=block_size // 2)


def rates(drop_prob: float | Sequence[float], depths: int) -> list[float]:
    """p by depth: linear from the first to the last of a pair, both ends included; one number is the same at all."""
    if isinstance(drop_prob, (int, float)):
        return [float(drop_prob)] * depths
    first, last = drop_prob
    return [first + (last - first) * i / max(depths - 1, 1) for i in range(depths)]


class DropBlock2d(nn.Module):
    """DropBlock as a layer, in training only; draws from torch's global generator, as dropout does.

    Args:
        drop_prob: p; 0 does nothing.
        block_size: b, odd; a smaller map has blocks of its own size, which is warned of once.
        gamma: 'paper_code' or 'dropblock'.

    Raises:
        ValueError: for a p outside [0, 1), an even b or another gamma.
    """

    def __init__(self, drop_prob: float = 0.1, block_size: int = 7, gamma: Gamma = "paper_code") -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob={drop_prob}: must be in [0, 1)")
        if block_size < 1 or block_size % 2 == 0:
            raise ValueError(f"block_size={block_size}: must be odd, or the blocks would not stand on their middles")
        if gamma not in GAMMAS:
            raise ValueError(f"gamma={gamma!r}: must be 'paper_code' or 'dropblock'")
        self.drop_prob, self.block_size, self.gamma = drop_prob, block_size, gamma
        self._warned = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        height, width = x.shape[2:]
        block = fitting_block(self.block_size, height, width)
        if block < self.block_size and not self._warned:
            self._warned = True
            warn_of_small_map("DropBlock2d", self.block_size, height, width, block)
        rate = seed_rate(self.drop_prob, block, height, width, self.gamma)
        uniform = torch.rand(len(x), 1, height, width, device=x.device)
        keep = kept((uniform < rate).float(), block)
        return x * (keep * (keep.numel() / keep.sum().clamp_min(1))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}, block_size={self.block_size}, gamma={self.gamma!r}"


def warn_of_small_map(where: str, block_size: int, height: int, width: int, block: int) -> None:
    """Say that a map is smaller than the blocks that were asked for."""
    rank_zero_warn(
        f"{where}: block_size={block_size} is more than a map of {height}x{width} pixels has; its blocks are"
        f" {block}x{block}"
    )
