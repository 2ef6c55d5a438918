"""GLAD: LoRA whose gradient is mixed with the sharpness-aware gradient.

Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", ICCV 2025 Workshops
(https://arxiv.org/abs/2507.13089). The released repository holds no code and the method's text could not be read; what
the abstract and the first figure fix is: train LoRA factors; take the ordinary gradient g and the SAM gradient g' at
the current point; step along g_f, which lies on the segment between them, near its middle. OURS are: the constants c
and rho, one norm over everything trained, the same mini-batch for both gradients, and no condition on their angle.

    e   = rho g / (||g||_2 + 1e-12),   g' = grad L(theta + e),   g_f = (1 - c) g + c g'

To first order in rho, g_f is the gradient of L + c rho ||grad L||. c = 0 is plain LoRA, c = 1 is SAM.

Costs a second forward and backward over the window, and one more copy of what trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_recipes.core.adapters import AdapterRecipe, AdapterSpec
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.gradients import Window, global_norm, optimized, skip_if_nonfinite
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper


def ascent(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """e = rho g / (||g|| + 1e-12) with one norm over all tensors, in their dtypes."""
    scale = rho / (global_norm(gradients) + 1e-12)
    return list(torch._foreach_mul(list(gradients), scale))


def mixed(gradients: Sequence[Tensor], sharp: Sequence[Tensor], mix: float) -> list[Tensor]:
    """g_f = (1 - c) g + c g'; exactly g' at c = 1."""
    return list(torch._foreach_lerp(list(gradients), list(sharp), mix))


def measures(gradients: Sequence[Tensor], sharp: Sequence[Tensor], rise: Tensor) -> dict[str, Tensor]:
    """What to log: both norms, the cosine between the gradients, and the rise L(theta + e) - L(theta)."""
    plain, sam, apart = (global_norm(each) for each in (gradients, sharp, torch._foreach_sub(sharp, gradients)))
    cosine = (plain.square() + sam.square() - apart.square()) / (2 * plain * sam + 1e-12)
    return {"glad/grad_norm": plain, "glad/sam_grad_norm": sam, "glad/cosine": cosine, "glad/sharpness": rise}


class GLAD(AdapterRecipe):
    """LoRA adapters trained along a mixture of the ordinary and the sharpness-aware gradient.

    Args:
        mix: c, the share of the SAM gradient; 0 skips the second pass (ours, as drawn in the paper's figure).
        rho: radius of the perturbation, an L2 norm over all that is perturbed (ours, SAM's default).
        rank: of the LoRA adapters; None injects none and regularises what is trainable already.
        lora_alpha, lora_dropout: of the adapters; the update is scaled by lora_alpha / rank.
        target_modules: names of modules, 'all-linear', or roles as one word; None is 'qkv', the query, key and value
            projections of every attention block.
        params: perturb and mix everything that trains ('trainable'), or the adapters alone ('adapters').
        train_fully: what trains beside the adapters; 'head' finds the head.
        replay: name of a method of the module from batch to loss, for a ``training_step`` that cannot be run twice
            (queues, momentum encoders, fresh draws); None runs the step again.
        merge_on_end: fold the adapters into the stock weights when the fit ends; False keeps them in the module.
        adapter_dir: folder that gets the adapters in peft's format when the fit ends; None writes none.
        seed: of the adapters' first values.

    Raises:
        RecipeError: for bad arguments; in setup for manual optimization, an optimizer that calls its closure
            repeatedly or steps in backward, nothing that trains, a missing head or target, and a second recipe with a
            second pass.
    """

    paper = Paper(
        "GLAD: Generalizable Tuning for Vision-Language Models",
        "Y. Peng, P. Wang, J. Liu, S. Chen",
        2025,
        "https://arxiv.org/abs/2507.13089",
        "https://github.com/YuqiPeng77/GLAD",
    )
    does = "Trains LoRA along a mixture of the plain and the sharpness-aware gradient."
    use_when = "You adapt a pre-trained model from a few examples and want a flat, robust solution."
    costs = "A second forward and backward over the window; one copy of what trains (small with LoRA)."
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("PEGO", "SVFit", "SaRA", "LoRA", "MakeElastic"), "both adapt the layers' weights"),
        "ProgressiveShrinking": "both run further passes in a step",
        "NormalizedGD": "its factor assumes the plain gradient",
    }

    def __init__(
        self,
        mix: float = 0.5,
        rho: float = 0.05,
        rank: int | None = 4,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] | None = None,
        params: Literal["trainable", "adapters"] = "trainable",
        train_fully: Sequence[str] = ("head",),
        replay: str | None = None,
        merge_on_end: bool = True,
        adapter_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(0 <= mix <= 1, self, "mix", mix, "in [0, 1]")
        check_argument(rho > 0, self, "rho", rho, "positive")
        check_argument(rank is None or rank >= 1, self, "rank", rank, "None or at least 1")
        check_argument(lora_alpha > 0, self, "lora_alpha", lora_alpha, "positive")
        check_argument(0 <= lora_dropout < 1, self, "lora_dropout", lora_dropout, "in [0, 1)")
        check_argument(params in ("trainable", "adapters"), self, "params", params, "'trainable' or 'adapters'")
        check_argument(
            params == "trainable" or rank is not None, self, "params", params, "'trainable' when rank is None"
        )
        some = target_modules is None or len(target_modules) > 0
        check_argument(some, self, "target_modules", target_modules, "None or names of at least one module")
        check_argument(not isinstance(train_fully, str), self, "train_fully", train_fully, "a list of names")
        check_argument(
            adapter_dir is None or rank is not None, self, "adapter_dir", adapter_dir, "None when rank is None"
        )
        self.mix, self.rho, self.rank, self.lora_alpha, self.lora_dropout = mix, rho, rank, lora_alpha, lora_dropout
        self.target_modules, self.params, self.train_fully = target_modules, params, train_fully
        self.replay, self.merge_on_end, self.adapter_dir, self.seed = replay, merge_on_end, adapter_dir, seed

    @property
    def neutral(self) -> bool:
        return self.rank is None and self.mix == 0

    @property
    def owns_training_set(self) -> bool:
        """With adapters everything else is frozen but what trains fully."""
        return self.rank is not None

    def declare(self, plan: Plan) -> None:
        if self.rank is not None:
            target = "qkv" if self.target_modules is None else self.target_modules
            plan.surgery(
                AdapterSpec(
                    ["glad"], self.rank, self.lora_alpha, self.lora_dropout, target, self.train_fully, self.seed
                )
            )
        if self.mix > 0 and plan.fitting:
            plan.replay_window(self._edit, self._named_loss(plan.module))

    def _named_loss(self, module: pl.LightningModule) -> Any:
        if self.replay is None:
            return None
        run = getattr(module, self.replay, None)
        if not callable(run):
            raise RecipeError(f"GLAD: replay={self.replay!r} is no method of {type(module).__name__}")
        return run

    def _edit(self, optimizer: Optimizer, window: Window) -> None:
        """Replace the finished gradient by the mixture; clipping and the update see that."""
        parameters = optimized(optimizer)
        if self.params == "adapters":
            made = {id(p) for p in self.operation.made.values()}
            parameters = [p for p in parameters if id(p) in made]
        if not parameters:
            return
        with torch.no_grad():
            gradients = [p.grad for p in parameters]
            at = [p.detach().clone() for p in parameters]
            torch._foreach_add_(parameters, ascent(gradients, self.rho))
            try:
                sharp, loss = window.gradients(parameters)
            finally:
                torch._foreach_copy_(parameters, at)  # subtracting e again would not be exact
            # Allowed here: the edit runs inside the hook `configure_gradient_clipping`.
            window.module.log_dict(measures(gradients, sharp, loss - window.loss))
            skip_if_nonfinite(window.trainer, optimizer, sharp)
            torch._foreach_copy_(gradients, mixed(gradients, sharp, self.mix))
