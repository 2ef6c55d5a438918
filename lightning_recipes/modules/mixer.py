"""A standard and a robust classifier as one, and the small network that mixes them for each input.

Bai, Anderson, Kim, Sojoudi, "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing", 2023
(https://arxiv.org/abs/2301.12554; code https://github.com/Bai-YT/AdaptiveSmoothing, commit 51f0198).

With logits g of the standard network, h of the robust one, and a weight a in [0, 1]:

    out = log((1 - a) softmax(s_g g) + a softmax(s_h h)),    a = sigmoid(gamma)

gamma is a number, or comes from feature maps of both networks, u_k (early) and v_k (one stage later, half the size):

    r = linear(pool(L2(L1(L0(cat u) + conv1x1(cat v)))))     (network V4; L_j two pre-activation blocks, stride 2)
    gamma = c norm(r) + b                                    (in training r is first clamped to mean +- 0.6 std)
    at evaluation with other c, b, and a <- low + (high - low) a

Only this network trains. With t = 0 for clean and 1 for attacked inputs, B = BCE(gamma, t) and E = CE(out, y):

    loss = mean of c_b B + c_e E + c_p B E

If every class but y lies at least (1 - a) / a below y in the probabilities of h all over a ball, and a >= 1/2, then the
mixture says y all over it (:func:`certified`); below 1/2 nothing can be certified.

Costs: one forward pass of each network at evaluation. A batch of training is 20 small ones and ten attacks of about 75
forward and backward passes through the whole mixture: hundreds of times an ordinary step. ``attack='pgd'`` is cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core import random
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.features import Taps
from lightning_recipes.core.gather import gather
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.weights import part_of_state
from lightning_recipes.modules.preact_resnet import PreActBlock

PAPER = Paper(
    "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing",
    "Y. Bai, B. G. Anderson, A. Kim, S. Sojoudi",
    2023,
    "https://arxiv.org/abs/2301.12554",
    "https://github.com/Bai-YT/AdaptiveSmoothing",
)
WIDTHS = {64: (64, 128, 256, 512), 160: (160, 320, 512, 768), 256: (256, 256, 384, 512), 512: (512, 256, 384, 512)}
"""Widths of the mixing network that a network's first width stands for, in the official code."""
SECTION = "adaptive_smoothing"  # of a checkpoint

# -- the mixture -------------------------------------------------------------------------------------------------------


def mixture(g: Tensor, h: Tensor, alpha: float | Tensor, std_scale: float = 1.0, rob_scale: float = 1.0) -> Tensor:
    """The mixture as logits, in fp32 at least: softmax(out) = (1 - a) softmax(s_g g) + a softmax(s_h h).

    Args:
        g, h: logits of the standard and of the robust network, ``[n, classes]``.
        alpha: weight of the robust one: a number, or one for each sample, ``[n, 1]``. At the numbers 0 and 1 the logits
            of one network come back, times its scale.
        std_scale, rob_scale: factors s_g, s_h on the logits.
    """
    if not isinstance(alpha, Tensor) and alpha in (0, 1):
        return scaled(h, rob_scale) if alpha else scaled(g, std_scale)
    with torch.autocast(g.device.type, enabled=False):  # a probability of 1e-8 is 0 in fp16
        g, h = (z if z.dtype == torch.float64 else z.float() for z in (g, h))
        a = alpha if isinstance(alpha, Tensor) else torch.full((), alpha, dtype=g.dtype, device=g.device)
        kind = torch.finfo(a.dtype)
        a = a.clamp(kind.tiny, 1 - kind.eps / 2)  # log 0 has no gradient
        return torch.logaddexp(
            torch.log1p(-a) + (std_scale * g).log_softmax(1), a.log() + (rob_scale * h).log_softmax(1)
        )


def scaled(z: Tensor, scale: float) -> Tensor:
    """Logits times a factor; themselves where it is 1."""
    return z if scale == 1 else scale * z


def alpha_of(gamma: float) -> float:
    """sigmoid(gamma); minus and plus infinity are 0 and 1."""
    return torch.tensor(gamma, dtype=torch.float64).sigmoid().item()


def squeezed(alpha: Tensor, low: float, high: float) -> Tensor:
    """low + (high - low) a."""
    return low + (high - low) * alpha


def clamped(r: Tensor, spread: float = 0.6) -> Tensor:
    """Outputs ``[n, 1]`` of the mixing network, kept within `spread` standard deviations of their mean over the samples
    of all ranks; mean and deviation have no gradient. A single sample comes back as it is."""
    every = gather(r.detach())
    if len(every) < 2:
        return r
    mean, reach = every.mean(), spread * every.std()
    return r.clamp(mean - reach, mean + reach)


def mixing_loss(
    out: Tensor, y: Tensor, gamma: Tensor, attacked: Tensor, weights: Sequence[float] = (1.5, 0.0, 0.2)
) -> Tensor:
    """c_b B + c_e E + c_p B E of each sample, ``[n]``, in fp32.

    Args:
        out: the mixture's logits ``[n, classes]``.
        y: labels ``[n]``.
        gamma: ``[n, 1]`` or ``[n]``.
        attacked: 1 for attacked inputs and 0 for clean ones, ``[n]``.
        weights: c_b of the binary cross-entropy of gamma, c_e of the cross-entropy, c_p of their product.
    """
    binary, cross, product = weights
    with torch.autocast(out.device.type, enabled=False):
        b = F.binary_cross_entropy_with_logits(gamma.float().flatten(), attacked.float(), reduction="none")
        e = F.cross_entropy(out.float(), y, reduction="none")
        return binary * b + cross * e + product * b * e


# -- what is certain ---------------------------------------------------------------------------------------------------


def margin(probabilities: Tensor) -> Tensor:
    """How far the likeliest class is ahead of the next, ``[n]``; probabilities are ``[n, classes]``."""
    first, second = probabilities.topk(2, 1).values.unbind(1)
    return first - second


def certified(least_margin: Tensor, alpha: float | Tensor) -> Tensor:
    """Whether the mixture says what the robust network says, whatever the standard one says, bool ``[n]``.

    Args:
        least_margin: the least margin in probability (after s_h) by which the robust network's class is ahead, all over
            the set of inputs in question, ``[n]``.
        alpha: weight of the robust network, a number or ``[n]``.
    """
    a = torch.as_tensor(alpha, dtype=least_margin.dtype, device=least_margin.device)
    return (a >= 0.5) & (a * least_margin >= 1 - a)


def lipschitz_radius(h: Tensor, alpha: float | Tensor, constants: float | Tensor) -> Tensor:
    """Radius ``[n]`` in which the mixture keeps the robust network's class, for one whose probabilities are Lipschitz.

        r = min over i != y of (a (h_y - h_i) + a - 1) / (a (L_y + L_i)),    0 for a < 1/2 or where that is negative

    Args:
        h: probabilities of the robust network at the inputs, ``[n, classes]``.
        alpha: a number or ``[n]``.
        constants: L of each class's probability in the norm of the radius: a number, or ``[classes]``.
    """
    a = torch.as_tensor(alpha, dtype=h.dtype, device=h.device).reshape(-1, 1)
    steep = torch.as_tensor(constants, dtype=h.dtype, device=h.device).expand(h.shape[1])
    y = h.argmax(1, keepdim=True)
    radius = (a * (h.gather(1, y) - h) + a - 1) / (a * (steep[y] + steep))
    radius = radius.scatter(1, y, torch.inf).amin(1)
    return torch.where(a[:, 0] >= 0.5, radius.clamp_min(0), 0.0)


def smoothed_radius(h: Tensor, alpha: float | Tensor, sigma: float) -> Tensor:
    """Euclidean radius ``[n]`` for a robust network that is smoothed by Gaussian noise (Cohen et al. 2019), that is
    h(x) = E p(x + sigma N(0, 1)) with p in [0, 1].

        r = sigma / 2 (Phi^-1(a h_y) - Phi^-1(a h_i + 1 - a)),    i the next-likeliest; 0 where negative or a < 1/2

    Args:
        h: probabilities of the smoothed network, ``[n, classes]``: h_y no larger and h_i no smaller than they are.
        alpha: a number or ``[n]``.
        sigma: standard deviation of the noise.
    """
    a = torch.as_tensor(alpha, dtype=h.dtype, device=h.device).reshape(-1)
    first, second = h.topk(2, 1).values.unbind(1)
    radius = sigma / 2 * (torch.special.ndtri(a * first) - torch.special.ndtri(a * second + 1 - a))
    return torch.where(a >= 0.5, radius.clamp_min(0), 0.0)


# -- the mixing network ------------------------------------------------------------------------------------------------


def mixing_widths(first: int) -> tuple[int, int, int, int]:
    """What a network whose early feature map has so many channels adds to the widths of the mixing network: as in the
    official code where it knows the width; else doubled from stage to stage, up to 512."""
    return WIDTHS.get(first, (first, *(min(first * 2**stage, 512) for stage in (1, 2, 3))))


class MixingNetwork(nn.Module):
    """Feature maps of both networks to one number a sample: V4 of the official code.

    Args:
        early: channels of all early maps together.
        late: of all late ones.
        widths: three, of the stages.
    """

    def __init__(self, early: int, late: int, widths: Sequence[int]) -> None:
        super().__init__()
        stages, before = [], early
        for width in widths:
            stages.append(nn.Sequential(PreActBlock(before, width, 2), PreActBlock(width, width, 1)))
            before = width
        self.stages = nn.ModuleList(stages)
        self.conv = nn.Conv2d(late, widths[0], 1, bias=False)
        self.linear = nn.Linear(before, 1, bias=False)

    def forward(self, early: Sequence[Tensor], late: Sequence[Tensor]) -> Tensor:
        """Maps ``[n, channels, height, width]``, the late ones of half the size, to ``[n, 1]``."""
        first, *rest = self.stages
        x = first(torch.cat(list(early), 1)) + self.conv(torch.cat(list(late), 1))
        for stage in rest:
            x = stage(x)
        return self.linear(x.mean((2, 3)))


class GammaNorm(nn.Module):
    """Batch norm of one feature, without weights, over the samples of all ranks; always in fp32.

    torch's SyncBatchNorm does the same, on GPUs only.
    """

    def __init__(self, momentum: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))

    def forward(self, r: Tensor) -> Tensor:
        """``[n, 1]``."""
        if not self.training:
            return (r - self.mean) / (self.var + self.eps).sqrt()
        every = gather(r)
        mean, var = every.mean(0), every.var(0, correction=0)
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
            unbiased = var * (len(every) / max(len(every) - 1, 1))
            self.var.lerp_(unbiased.to(self.var.dtype), self.momentum)
        return (r - mean) / (var + self.eps).sqrt()


class Mixer(nn.Module):
    """The mixing network with all that makes a weight of what comes out of it.

    Args:
        structure: plain values. ``features``: names of the early and the late map in the standard and in the robust
            network; ``channels``: those of each; ``widths``: of the mixing network; ``train_affine`` and
            ``eval_affine``: (c, b); ``alpha_range``; ``bases``: hashes of both networks.
    """

    def __init__(self, structure: Mapping[str, Any]) -> None:
        super().__init__()
        self.structure = dict(structure)
        early, late = (sum(channels) for channels in zip(*structure["channels"].values()))
        self.network = MixingNetwork(early, late, structure["widths"])
        self.norm = GammaNorm()

    def gamma(self, maps: Sequence[Sequence[Tensor]], affine: Sequence[float]) -> Tensor:
        """From (early, late) of the standard and of the robust network to gamma ``[n, 1]``, fp32."""
        early, late = zip(*maps)
        r = self.network(early, late)
        with torch.autocast(r.device.type, enabled=False):
            r = r.float()
            r = clamped(r) if self.training else r
            return affine[0] * self.norm(r) + affine[1]

    def alpha(
        self,
        maps: Sequence[Sequence[Tensor]],
        affine: Sequence[float] | None = None,
        within: Sequence[float] | None = None,
    ) -> Tensor:
        """The weight at evaluation, ``[n, 1]``; `affine` and `within` take the place of what the structure says."""
        gamma = self.gamma(maps, affine or self.structure["eval_affine"])
        return squeezed(gamma.sigmoid(), *(within or self.structure["alpha_range"]))

    def save(self, path: str | Path) -> None:
        """Write structure and weights to a file that loads with ``weights_only=True``."""
        torch.save({SECTION: self.structure, "state_dict": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Mixer:
        """Read what :meth:`save` wrote, or the mixing network in a checkpoint of :class:`AdaptiveSmoothingModule`.

        Raises:
            RecipeError: when there is none in the file.
        """
        if not Path(path).is_file():
            raise RecipeError(f"mixer={str(path)!r}: there is no such file")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            structure, state = saved[SECTION], saved["state_dict"]
        except Exception as error:  # another format, or no mixer
            raise RecipeError(
                f"mixer={str(path)!r} is neither a saved Mixer nor a checkpoint of AdaptiveSmoothingModule"
                f" ({type(error).__name__})"
            ) from error
        with random.forked(torch.device("cpu")):
            mixer = cls(structure)
        mixer.load_state_dict(part_of_state(state, mixer.state_dict()))
        return mixer.eval()


def map_points(features: Sequence[str]) -> dict[str, tuple[str, Literal["output"]]]:
    """What to tap for the early and the late map."""
    return {"early": (features[0], "output"), "late": (features[1], "output")}


def maps_of(taps: Taps) -> tuple[Tensor, Tensor]:
    """The early and the late map ``[n, channels, height, width]`` of the last call; vectors are maps of one pixel.

    Raises:
        RecipeError: for features of another shape.
    """
    found = []
    for name in ("early", "late"):
        value = taps[name]
        if value.dim() not in (2, 4):
            raise RecipeError(
                f"{taps.points[name][0]} gives features {list(value.shape)}; the mixing network takes maps"
                " [n, channels, height, width] or vectors [n, features]"
            )
        found.append(value if value.dim() == 4 else value[:, :, None, None])
    taps.values.clear()
    return found[0], found[1]


def check_maps(maps: Mapping[str, Sequence[Tensor]], names: Mapping[str, Sequence[str]]) -> None:
    """Refuse feature maps that cannot be put side by side.

    Args:
        maps: (early, late) of each network.
        names: of their layers.

    Raises:
        RecipeError: names layers and shapes.
    """
    shapes = {f"{who}'s {name!r}": list(each.shape[1:]) for who in maps for name, each in zip(names[who], maps[who])}
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    early, late = ({tuple(each[place].shape[2:]) for each in maps.values()} for place in (0, 1))
    if len(early) > 1 or len(late) > 1:
        raise RecipeError(
            f"the early maps of both networks must have one height and width, and the late ones: {listed}"
        )
    if tuple(-(-side // 2) for side in early.pop()) != late.pop():
        raise RecipeError(f"late maps must have half the height and width of early ones: {listed}")
