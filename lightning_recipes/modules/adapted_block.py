"""timm's transformer block with AdaptFormer's branch beside its MLP. Imports timm, so only when it is put in."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ParallelAdapter(nn.Module):
    """s * up(relu(down(LN(z)))) on tokens ``[..., width]``; 0 at first, since `up` starts at 0.

    Args:
        width: of the tokens.
        bottleneck: width between `down` and `up`.
        like: a tensor of the block, for dtype and device.
    """

    def __init__(self, width: int, bottleneck: int, like: Tensor) -> None:
        super().__init__()
        where = {"dtype": like.dtype, "device": like.device}
        self.norm = nn.LayerNorm(width, **where)
        self.down = nn.Linear(width, bottleneck, **where)
        self.up = nn.Linear(bottleneck, width, **where)
        self.scale = nn.Parameter(torch.ones(1, **where))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.up(self.down(self.norm(z)).relu())


class AdaptedBlock(Block):
    """A block whose second half is z + MLP(LN2(z)) + adapter(z). Its own parts keep their names."""

    adapter: ParallelAdapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + self.adapter(x)
