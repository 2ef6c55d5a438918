"""AdaptiveSmoothing: an accurate and a robust classifier predict as one.

Bai, Anderson, Kim, Sojoudi, "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing", 2023
(https://arxiv.org/abs/2301.12554; code https://github.com/Bai-YT/AdaptiveSmoothing, commit 51f0198).

With logits g of the standard network and h of the robust one:

    out = log((1 - a) softmax(s_g g) + a softmax(s_h h))

a is a number, sigmoid of a number gamma, or for each input what a trained mixing network says (see
``modules/mixer.py``, which holds the maths, and ``AdaptiveSmoothingModule``, which trains it). A robust network is
surer of what it gets right than of what it gets wrong, so that the standard one can correct its mistakes and hardly
spoils its robustness. What is mixed are probabilities, never logits. How far the mixture is certain to say what the
robust network says: ``certified``, ``lipschitz_radius`` and ``smoothed_radius`` in ``modules/mixer.py``.

The paper's settings at evaluation:

    ================ ======== =========== ==========
    bases            c, b     alpha_range s_g, s_h
    CIFAR-10, EDM    2, 1.05  .96 - 1     1.2, 0.3
    CIFAR-100, EDM   2, 1.3   .84 - .99   2, 1
    CIFAR-100 TRADES 2, 1.0   .815 - .915 2, 1
    ================ ======== =========== ==========

(The official YAML files name the scales in a way that the code never reads; the published numbers set them.) Costs one
forward pass of the partner, and of the small mixing network, while it evaluates; nothing in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core.batch import describe
from lightning_recipes.core.companion import Companion, fingerprint, of_import
from lightning_recipes.core.distributed import all_sum, check_strategy
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Taps, named_part
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.outputs import logits_in, part_of, replace_outputs, with_logits
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.modules.mixer import (
    PAPER,
    Mixer,
    alpha_of,
    check_maps,
    map_points,
    maps_of,
    mixture,
    scaled,
)

STAGES = ("validate", "test", "predict")


class AdaptiveSmoothing(Recipe):
    """Validate, test and predict by the mixture of this module with a frozen partner, one accurate and one robust.

    While it evaluates, the logits ``[n, classes]`` that come out of the module are the mixture's, for the module's own
    steps, metrics and predictions and for everybody beside it: RobustAccuracyMonitor attacks the whole mixture, its
    mixing network included. (An attack on one of the two networks alone over-states the robustness.) Logs, for
    validate and test, ``adaptive_smoothing/acc_standard``, ``acc_robust`` and ``acc`` on clean inputs, and
    ``alpha_mean``. A fit, its validations included, is left alone. A robust accuracy of one of the networks alone is
    had by leaving this away.

    Args:
        partner: the other network: a module, which is used with the weights that it has, frozen and in eval mode while
            it evaluates; what makes one, as 'package.module:Class' (with the weights that this gives it, or those of
            `partner_checkpoint`); or a timm name. Its classes must stand in the same order, and it gets what the
            module gets.
        role: what the partner is, 'robust' or 'standard'; the module is the other one.
        alpha: weight of the robust network, 1/2 or more to have any certainty. 0 and 1 are one network alone; the
            other one does not run.
        gamma: in its place, alpha = sigmoid(gamma).
        std_scale, rob_scale: factors on the logits of the standard and the robust network.
        mixer: in their place, a trained mixing network: the file that `Mixer.save` wrote, a checkpoint of
            AdaptiveSmoothingModule, or a `Mixer` (``module.to_callback()``). It must have been trained with this
            partner.
        eval_affine, alpha_range: of the mixer, (c, b) and range of the weight; None for what it was saved with.
        stages: of 'validate', 'test', 'predict'.
        partner_input_transform: what the first argument goes through before the partner: another normalisation or size.
        partner_checkpoint: a .safetensors, .pt, .pth or .ckpt file with the partner's weights.
        partner_args: what a class or timm's model is built with.
        forward: where the module's logits come out: 'forward' for itself, or the name of a submodule that takes the
            batch's inputs.

    Raises:
        RecipeError: for bad arguments; before it evaluates (and before a fit) for a partner or mixer that cannot be
            built, shares weights with the module or is another one than when the mixer was trained; in the first batch
            for outputs that are no logits, other classes, and feature maps that are not those of the mixer.
    """

    paper = PAPER
    does = "Evaluates by a mixture of an accurate and a robust classifier, and keeps most of both."
    use_when = "You have a robust classifier whose clean accuracy is too low, and an accurate one."
    costs = "Nothing in training; one forward pass of the partner at test time."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("BackdoorAdjustment", "EnsembleEvaluation", "LangevinMixture"), "both replace the outputs at evaluation"
    )
    free_on_resume = frozenset({"partner", "partner_checkpoint", "mixer"})

    def __init__(
        self,
        partner: nn.Module | str,
        role: Literal["robust", "standard"] = "robust",
        alpha: float | None = 0.9,
        gamma: float | None = None,
        std_scale: float = 1.0,
        rob_scale: float = 1.0,
        mixer: str | nn.Module | None = None,
        eval_affine: Sequence[float] | None = None,
        alpha_range: Sequence[float] | None = None,
        stages: Sequence[str] = STAGES,
        partner_input_transform: Callable | None = None,
        partner_checkpoint: str | None = None,
        partner_args: dict[str, Any] | None = None,
        forward: str = "forward",
    ) -> None:
        super().__init__()
        named = isinstance(partner, str) and bool(partner)
        kinds = "a module, 'package.module:Class' or a timm name"
        check_argument(named or isinstance(partner, nn.Module), self, "partner", partner, kinds)
        check_argument(
            named or partner_args is None, self, "partner_args", partner_args, "None when partner is a module"
        )
        check_argument(role in ("robust", "standard"), self, "role", role, "'robust' or 'standard'")
        given = [name for name, value in (("alpha", alpha), ("gamma", gamma), ("mixer", mixer)) if value is not None]
        if len(given) != 1:
            raise RecipeError(f"AdaptiveSmoothing: give one of alpha, gamma and mixer, the others None; got {given}")
        check_argument(alpha is None or 0 <= alpha <= 1, self, "alpha", alpha, "in [0, 1]")
        check_argument(gamma is None or not math.isnan(gamma), self, "gamma", gamma, "a number")
        for name, value in (("std_scale", std_scale), ("rob_scale", rob_scale)):
            check_argument(value > 0, self, name, value, "positive")
        check_argument(mixer is None or isinstance(mixer, (str, Mixer)), self, "mixer", mixer, "a file or a Mixer")
        for name, value in (("eval_affine", eval_affine), ("alpha_range", alpha_range)):
            check_argument(value is None or mixer is not None, self, name, value, "None without a mixer")
        fits = eval_affine is None or (len(eval_affine) == 2 and eval_affine[0] > 0)
        check_argument(fits, self, "eval_affine", eval_affine, "None or (c, b) with c > 0")
        fits = alpha_range is None or (len(alpha_range) == 2 and 0 <= alpha_range[0] <= alpha_range[1] <= 1)
        check_argument(fits, self, "alpha_range", alpha_range, "None or (low, high) with 0 <= low <= high <= 1")
        fits = not isinstance(stages, str) and len(stages) > 0 and set(stages) <= set(STAGES)
        check_argument(fits, self, "stages", stages, "a list of 'validate', 'test' and 'predict'")
        fits = partner_input_transform is None or callable(partner_input_transform)
        check_argument(fits, self, "partner_input_transform", partner_input_transform, "None or a function")
        self.partner, self.role, self.alpha, self.gamma, self.mixer = partner, role, alpha, gamma, mixer
        self.std_scale, self.rob_scale = std_scale, rob_scale
        self.eval_affine, self.alpha_range, self.stages = eval_affine, alpha_range, tuple(stages)
        self.partner_input_transform, self.forward = partner_input_transform, forward
        self.partner_checkpoint, self.partner_args = partner_checkpoint, partner_args
        self._hash = ""
        self._companion: Companion | None = None
        self._mixer: Mixer | None = None
        self._taps: dict[str, Taps] = {}
        self._undo = ExitStack()
        self._begin_batch()
        self._sums: Tensor | None = None
        self._names: list[str] = []
        self._checked = False

    @property
    def arguments(self) -> dict[str, Any]:
        modules = {name: value for name in ("partner", "mixer") if isinstance(value := getattr(self, name), nn.Module)}
        return {**super().arguments, **{name: type(value).__name__ for name, value in modules.items()}}

    @property
    def weight(self) -> float | None:
        """Weight of the robust network; None where a mixer decides it."""
        return self.alpha if self.gamma is None else alpha_of(self.gamma)

    @property
    def _own_weight(self) -> float | None:
        """Weight of the module."""
        weight = self.weight
        return weight if weight is None or self.role == "standard" else 1 - weight

    @property
    def _scales(self) -> tuple[float, float]:
        """Of the module's and of the partner's logits."""
        scales = self.std_scale, self.rob_scale
        return scales if self.role == "robust" else scales[::-1]

    @property
    def neutral(self) -> bool:
        return self._own_weight == 1 and self._scales[0] == 1

    # -- before it evaluates -----------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        part_of(plan.module, self.forward)
        if self.weight is not None and 0 < self.weight < 0.5:
            rank_zero_warn(f"AdaptiveSmoothing: alpha is {self.weight:.3g}; no robustness can be certified below 0.5")
        undo = ExitStack()
        plan.at_end(undo.close)
        undo.callback(self._forget)
        companion = Companion(
            self.partner, not of_import(self.partner), self.partner_checkpoint, self.partner_args, called="partner"
        )
        companion.build(plan.trainer)
        companion.check_apart(plan.module)
        self._hash = companion.hash
        mixer = Mixer.load(self.mixer) if isinstance(self.mixer, str) else self.mixer
        if mixer is not None:
            self._check_mixer(mixer, companion)
        if plan.fitting:
            companion.network = None  # all is well; it is not needed before the fit is over
            return
        stored = ((plan.section or {}).get("state") or {}).get("partner")
        if stored is not None and stored != self._hash:
            rank_zero_warn("AdaptiveSmoothing: the partner is another one than when the checkpoint was written")
        check_strategy(plan.trainer)
        undo.enter_context(companion.held())
        self._companion, self._mixer = companion, mixer
        if mixer is not None:
            other = "standard" if self.role == "robust" else "robust"
            features = mixer.structure["features"]
            own = [named_part(plan.module, name) for name in features[other]]
            self._base = own[0].removesuffix(features[other][0]).rstrip(".")
            self._checked = False
            self._taps = {
                other: Taps(plan.module, map_points(own)),
                self.role: Taps(companion.network, map_points(features[self.role])),
            }
            for taps in self._taps.values():
                taps.install(undo)

    def _check_mixer(self, mixer: Mixer, companion: Companion) -> None:
        trained_with = mixer.structure["bases"][self.role]
        if trained_with != companion.hash:
            raise RecipeError(
                f"the partner is not the {self.role} network that the mixer was trained with: its weights have the hash"
                f" {companion.hash[:12]}, the mixer names {trained_with[:12]}"
            )

    def _check_own_network(self, module: pl.LightningModule) -> None:
        other = "standard" if self.role == "robust" else "robust"
        here = fingerprint(module.get_submodule(self._base))
        if here != self._mixer.structure["bases"][other]:
            rank_zero_warn(
                f"AdaptiveSmoothing: the network is not the {other} one that the mixer was trained with, or has"
                " other weights by now; how it mixes may be far from good"
            )

    def _forget(self) -> None:
        self._stop()
        self._companion = self._mixer = None
        self._taps = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._companion is None or trainer.state.fn not in self.stages:  # None in a fit, or where it is neutral
            return
        self._stop()
        # Evaluation loops run under inference_mode, whose tensors could never be attacked or trained.
        with speaking_for(self), torch.inference_mode(False):
            self._companion.to(pl_module.device)
            if self._mixer is not None:
                self._undo.enter_context(modes_kept(self._mixer, training=False))
                self._mixer.to(pl_module.device)
            alone = self._partner_alone if self._own_weight == 0 else None
            replace = None if alone else self._mixture
            part = part_of(pl_module, self.forward)
            self._undo.callback(replace_outputs(part, "AdaptiveSmoothing", replace, instead=alone))
            if self._mixer is not None:
                self._check_own_network(pl_module)
        self._sums = None
        self._begin_batch()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    on_test_end = on_predict_end = on_validation_end

    def _stop(self) -> None:
        """Give the module its own outputs back."""
        self._undo.close()

    # -- batches -----------------------------------------------------------------------------------------------------

    def _ask_partner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            raise RecipeError("the partner gets the first positional argument of forward, and it has none")
        x = args[0] if self.partner_input_transform is None else self.partner_input_transform(args[0])
        output = self._companion.attend(x, *args[1:], **kwargs)
        if logits_in(output) is None:
            raise RecipeError(f"the partner gives {describe(output)} and no logits [n, classes]")
        return output

    def _partner_alone(self, *args: Any, **kwargs: Any) -> Any:
        with speaking_for(self):
            output = self._ask_partner(args, kwargs)
            logits = scaled(logits_in(output), self._scales[1])
            self._see({self.role: logits}, logits, None)
            return with_logits(output, logits)

    def _mixture(self, logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._own_weight == 1:
            return scaled(logits, self._scales[0])
        with speaking_for(self):
            theirs = logits_in(self._ask_partner(args, kwargs))
            if theirs.shape != logits.shape:
                raise RecipeError(
                    f"the module has {logits.shape[1]} outputs and the partner {theirs.shape[1]}; both must have the"
                    " same classes in the same order"
                )
            g, h = (logits, theirs) if self.role == "robust" else (theirs, logits)
            alpha = self.weight if self._mixer is None else self._mixed()
            out = mixture(g, h, alpha, self.std_scale, self.rob_scale)
        self._see({"standard": g, "robust": h}, out, alpha)
        return out

    def _mixed(self) -> Tensor:
        """The mixing network's weight of the robust network, from the maps of the calls that just were."""
        structure = self._mixer.structure
        maps = {who: maps_of(self._taps[who]) for who in ("standard", "robust")}
        if not self._checked:
            check_maps(maps, {who: [path for path, _ in self._taps[who].points.values()] for who in maps})
            found = {who: [m.shape[1] for m in each] for who, each in maps.items()}
            if found != {who: list(structure["channels"][who]) for who in found}:
                raise RecipeError(
                    f"the mixer was trained on maps of {structure['channels']} channels; here are {found}"
                )
            self._checked = True
        return self._mixer.alpha(list(maps.values()), self.eval_affine, self.alpha_range)

    def _begin_batch(self, *args: Any) -> None:
        self._choices: dict[str, Tensor] | None = None
        self._alpha: Tensor | float | None = None

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch

    def _see(self, logits: Mapping[str, Tensor], out: Tensor, alpha: Tensor | float | None) -> None:
        """Remember what the step itself got; an attack that measures the same batch asks many times more."""
        if self._choices is None:
            self._choices = {f"acc_{who}": z.detach().argmax(1) for who, z in logits.items()}
            self._choices["acc"] = out.detach().argmax(1)
            self._alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        if self._companion is None or trainer.state.fn not in self.stages:
            return
        if self._choices is None:
            if self._own_weight == 1:  # the partner has no part in it
                return
            where = "the module" if self.forward == "forward" else repr(self.forward)
            raise RecipeError(
                f"AdaptiveSmoothing: no logits [n, classes] came out of {where} in the evaluation step; name the"
                " submodule that it calls on its inputs with forward='NAME'"
            )
        labels = labels_in(batch)
        choices = torch.stack(list(self._choices.values()))
        known = isinstance(labels, Tensor) and labels.shape == choices.shape[1:]
        right = (choices == labels).sum(1) if known else choices.new_zeros(len(choices))
        alpha = self._alpha if isinstance(self._alpha, Tensor) else choices.new_zeros(1).float() + (self._alpha or 0.0)
        count = choices.shape[1]
        sums = torch.cat(
            [right.double(), right.new_tensor([count, known * count]).double(), alpha.mean()[None] * count]
        )
        self._names = list(self._choices)
        self._sums = sums if self._sums is None else self._sums + sums

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        *right, count, labelled, alpha = all_sum(self._sums).unbind()
        values = {"alpha_mean": alpha / count} if self._mixer is not None else {}
        if labelled:
            values |= {name: each / labelled for name, each in zip(self._names, right)}
        self.log_dict({f"adaptive_smoothing/{k}": v.float() for k, v in values.items()}, rank_zero_only=False)
        self._sums = None

    on_test_epoch_end = on_validation_epoch_end

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"partner": self._hash}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint holds is compared, not taken."""
