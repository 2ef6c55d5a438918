"""The LightningModule that trains adaptive smoothing's mixing network; the maths stand in ``mixer.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_recipes.core import random
from lightning_recipes.core.attacks import Box, Loss, auto_pgd, cross_entropy, momentum_pgd, runners_up, targeted_dlr
from lightning_recipes.core.batch import describe
from lightning_recipes.core.companion import Companion, of_import
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import Taps
from lightning_recipes.core.outputs import logits_in
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.modules.classifier import OfImages
from lightning_recipes.modules.mixer import (
    PAPER,
    SECTION,
    Mixer,
    check_maps,
    map_points,
    maps_of,
    mixing_loss,
    mixing_widths,
    mixture,
)

if TYPE_CHECKING:
    from lightning_recipes.callbacks.robustness.adaptive_smoothing import AdaptiveSmoothing


class _Base:
    """One of the two networks: frozen, outside the module's parameters, with its feature maps."""

    def __init__(self, companion: Companion, features: Sequence[str], transform: Callable | None) -> None:
        self.companion, self.features, self.transform = companion, tuple(features), transform
        self.network.requires_grad_(False).eval()
        self.listen()

    @property
    def network(self) -> nn.Module:
        return self.companion.network

    def listen(self) -> None:
        self.taps = Taps(self.network, map_points(self.features)).open()

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits ``[n, classes]`` and feature maps."""
        output = self.companion.attend(x if self.transform is None else self.transform(x))
        logits = logits_in(output)
        if logits is None:
            raise RecipeError(
                f"{self.companion.called} gives {describe(output)} and no logits [n, classes]; wrap it so that it gives"
                " them alone"
            )
        return logits, maps_of(self.taps)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "taps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.listen()  # a copy listens to its own network


class AdaptiveSmoothingModule(OfImages):
    """Train the mixing network of a standard and a robust classifier, both frozen; evaluate and predict by the mixture.

    A training batch of (images (N,C,H,W), labels (N,)) is cut in 1 + `further` parts. The first is attacked, once on
    the cross-entropy and once towards each of its `targets` next-likeliest classes, through the whole mixture as it
    stands; clean parts and attacked ones are shuffled together, cut into as many mini-batches, and every `accumulate`
    of them make an optimizer step: the paper's 20 and 4. The official loader draws the further clean images anew for
    every attacked part, so that one of its epochs attacks every image once; one of these goes through the data once
    and attacks 1 / (1 + `further`) of them: take 1 + `further` times as many epochs for as many attacks.

    All of that is one ``training_step`` under manual optimization. The attacked images belong to the weights before
    the batch, and only between two batches is nothing of them left; a loader that gave out the mini-batches one by
    one, under automatic optimization, would have to save them for a resume in mid-window, and could fetch the next
    ones before the last step. So every checkpoint falls between two batches and needs weights, optimizer and counters
    alone; random numbers hang on seed, epoch, batch and rank. Under DDP ranks reduce gradients once an optimizer step.

    Logs, in training, ``train/loss``, ``adaptive_smoothing/gamma_clean`` and ``gamma_attacked`` (means),
    ``clean_below`` and ``attacked_above`` (shares of gammas on the right side of b) and ``alpha_mean``; for val and
    test loss, acc and ece of the mixture, ``acc_standard`` and ``acc_robust`` of the two networks and ``alpha_mean``,
    all under ``val/`` or ``test/``. To attack it, put ``RobustAccuracyMonitor(forward='forward')`` beside it.

    Checkpoints hold the mixing network and hashes of the two networks, which are checked. The trained network goes over
    anybody's module: :meth:`to_callback`, or ``AdaptiveSmoothing(..., mixer='its.ckpt')``.

    Args:
        standard: the accurate network: a module, which is frozen and put in eval mode for good; what makes one, as
            'package.module:Class'; or a timm name. Both take the same images and have their classes in one order.
        robust: the robust network.
        standard_features: dotted names of the parts of `standard` that give the early and the late feature map, the
            late one of half the size (vectors count as maps of one pixel).
        robust_features: of `robust`; its maps must have the same sizes.
        input_shape: (C,H,W) of one image, for a dry run.
        standard_checkpoint, robust_checkpoint: files with their weights; None for published ones of a timm name.
        standard_args, robust_args: what a class or timm's model is built with.
        standard_input_transform, robust_input_transform: what images go through first: a normalisation, another size
            (the paper's BiT networks see 128x128).
        widths: four, of the mixing network, of which the first is what the early maps have together; None sums those
            that the official code takes for each network.
        train_affine, eval_affine: (c, b), from normalised output to gamma.
        alpha_range: of the weight at evaluation.
        std_scale, rob_scale: on the logits at evaluation; training goes without (as in the official code).
        loss_weights: (c_b, c_e, c_p).
        epsilon: radius of the attacks in pixel units, of which each sample gets a share U(0.4, 1.1).
        attack: 'apgd', or 'pgd' with momentum.
        iterations: mean number of iterations, drawn from chi^2 for every attack; None is 75 for 'apgd', 20 for 'pgd'.
        targets: attacks towards a class (there must be 4 classes), in all 1 + targets.
        further: clean parts of a batch beside the attacked one.
        accumulate: mini-batches an optimizer step.
        mean, std, input_range: where images live, as for AAER.
        lr, weight_decay: of AdamW; the rate warms up over a 25th of all steps and falls to 0 along a cosine.
        clip: norm that gradients are clipped to.
        seed: of first weights and attacks.

    Raises:
        RecipeError: for bad arguments, networks with other classes or without logits, feature maps that do not go
            together; for a checkpoint of other networks; in the first step for a batch too small to be cut.
    """

    paper = PAPER
    does = "Trains a small network that mixes a standard and a robust classifier for each input."
    use_when = "You have an accurate and a robust classifier, and want most of both."
    costs = "Ten attacks through both networks for every batch in training; two forward passes at test time."
    purpose = "modules"

    def __init__(
        self,
        standard: nn.Module | str,
        robust: nn.Module | str,
        standard_features: Sequence[str],
        robust_features: Sequence[str],
        input_shape: Sequence[int] = (3, 32, 32),
        standard_checkpoint: str | None = None,
        robust_checkpoint: str | None = None,
        standard_args: dict[str, Any] | None = None,
        robust_args: dict[str, Any] | None = None,
        standard_input_transform: Callable | None = None,
        robust_input_transform: Callable | None = None,
        widths: Sequence[int] | None = None,
        train_affine: Sequence[float] = (2.0, 0.4),
        eval_affine: Sequence[float] = (2.0, 1.3),
        alpha_range: Sequence[float] = (0.84, 0.99),
        std_scale: float = 1.0,
        rob_scale: float = 1.0,
        loss_weights: Sequence[float] = (1.5, 0.0, 0.2),
        epsilon: float = 8 / 255,
        attack: Literal["apgd", "pgd"] = "apgd",
        iterations: int | None = None,
        targets: int = 9,
        further: int = 9,
        accumulate: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_range: Sequence[float] = (0.0, 1.0),
        lr: float = 5e-5,
        weight_decay: float = 1e-5,
        clip: float = 10.0,
        seed: int = 20220304,
    ) -> None:
        for name, value in (("standard_features", standard_features), ("robust_features", robust_features)):
            pair = not isinstance(value, str) and len(value) == 2
            check_argument(pair, self, name, value, "the names of two parts, for the early and the late map")
        for name, value in (("train_affine", train_affine), ("eval_affine", eval_affine)):
            check_argument(len(value) == 2 and value[0] > 0, self, name, value, "(c, b) with c > 0")
        within = len(alpha_range) == 2 and 0 <= alpha_range[0] <= alpha_range[1] <= 1
        check_argument(within, self, "alpha_range", alpha_range, "(low, high) with 0 <= low <= high <= 1")
        for name, value in (("std_scale", std_scale), ("rob_scale", rob_scale), ("epsilon", epsilon), ("clip", clip)):
            check_argument(value > 0, self, name, value, "positive")
        weighed = len(loss_weights) == 3 and min(loss_weights) >= 0 and max(loss_weights) > 0
        check_argument(weighed, self, "loss_weights", loss_weights, "three numbers, at least 0 and one positive")
        check_argument(attack in ("apgd", "pgd"), self, "attack", attack, "'apgd' or 'pgd'")
        check_argument(iterations is None or iterations >= 1, self, "iterations", iterations, "None or at least 1")
        for name, value, least in (("targets", targets, 0), ("further", further, 0), ("accumulate", accumulate, 1)):
            check_argument(value >= least, self, name, value, f"at least {least}")
        bases = {
            who: _Base(_built(who, network, checkpoint, arguments), features, transform)
            for who, network, checkpoint, arguments, features, transform in (
                ("standard", standard, standard_checkpoint, standard_args, standard_features, standard_input_transform),
                ("robust", robust, robust_checkpoint, robust_args, robust_features, robust_input_transform),
            )
        }
        found = {who: _dry_run(base, input_shape) for who, base in bases.items()}
        classes = {who: logits.shape[1] for who, (logits, _) in found.items()}
        if len(set(classes.values())) > 1:
            listed = ", ".join(f"{who} has {count} outputs" for who, count in classes.items())
            raise RecipeError(f"{listed}: both networks must have the same classes in the same order")
        check_argument(targets == 0 or classes["robust"] >= 4, self, "targets", targets, "0 with fewer than 4 classes")
        maps = {who: each for who, (_, each) in found.items()}
        check_maps(maps, {who: base.features for who, base in bases.items()})
        channels = {who: [m.shape[1] for m in each] for who, each in maps.items()}
        if widths is None:
            widths = [sum(each) for each in zip(*(mixing_widths(early) for early, _ in channels.values()))]
        first = sum(early for early, _ in channels.values())
        usable = len(widths) == 4 and widths[0] == first and min(widths) >= 1
        check_argument(usable, self, "widths", widths, f"None or four widths, the first {first} as the early maps have")

        super().__init__(classes["robust"], optimizer=AdamW, lr_scheduler=None, lr_interval="step", monitor="val/loss")
        given = [who for who in bases if not isinstance(bases[who].companion.source, str)]
        self.save_hyperparameters(ignore=[*given, "standard_input_transform", "robust_input_transform"])
        self.automatic_optimization = False
        self._bases = bases
        self.std_scale, self.rob_scale, self.loss_weights = std_scale, rob_scale, tuple(loss_weights)
        self.train_affine, self.alpha_range, self.epsilon = tuple(train_affine), tuple(alpha_range), epsilon
        self.attack, self.iterations = attack, iterations or {"apgd": 75, "pgd": 20}[attack]
        self.targets, self.further, self.accumulate = min(targets, self.num_classes - 1), further, accumulate
        self.lr, self.weight_decay, self.clip, self.seed = lr, weight_decay, clip, seed
        self.box = Box(mean, std, tuple(input_range))
        structure = {
            "features": {who: list(base.features) for who, base in bases.items()},
            "channels": channels,
            "widths": list(widths)[1:],
            "train_affine": list(train_affine),
            "eval_affine": list(eval_affine),
            "alpha_range": list(alpha_range),
            "bases": {who: base.companion.hash for who, base in bases.items()},
        }
        with random.forked(torch.device("cpu"), random.key("mixer", seed)):
            self.mixer = Mixer(structure)

    @property
    def standard(self) -> nn.Module:
        """The standard network."""
        return self._bases["standard"].network

    @property
    def robust(self) -> nn.Module:
        """The robust network."""
        return self._bases["robust"].network

    @property
    def parts(self) -> int:
        """Mini-batches of a batch: clean parts and attacked ones."""
        return 1 + self.further + 1 + self.targets

    def _apply(self, fn: Callable, recurse: bool = True) -> AdaptiveSmoothingModule:
        for base in self.__dict__.get("_bases", {}).values():  # they are no submodules, and follow to the device
            base.network._apply(fn)
        return super()._apply(fn, recurse)

    # -- the mixture -------------------------------------------------------------------------------------------------

    def _ask(self, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        answers = [base(x) for base in self._bases.values()]
        return [logits for logits, _ in answers], [maps for _, maps in answers]

    def forward(self, x: Tensor) -> Tensor:
        """Images to the mixture's logits (N,num_classes), as it evaluates."""
        (g, h), maps = self._ask(x)
        return mixture(g, h, self.mixer.alpha(maps), self.std_scale, self.rob_scale)

    def as_trained(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to the mixture's logits and gamma (N,1) with what training has: its c and b, alpha not squeezed, the
        logits not scaled. Clamping and statistics go by the mixing network's mode."""
        (g, h), maps = self._ask(x)
        gamma = self.mixer.gamma(maps, self.train_affine)
        return mixture(g, h, gamma.sigmoid()), gamma

    # -- training ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        for who, base in self._bases.items():
            base.companion.agree(self.trainer)
            self.mixer.structure["bases"][who] = base.companion.hash

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self._images(batch)
        share = len(x) // (1 + self.further)
        if share < 2:
            if batch_idx == 0:
                raise RecipeError(
                    f"AdaptiveSmoothingModule: a batch of {len(x)} cannot be cut into {1 + self.further} parts of 2"
                    f" images or more; give batches of at least {2 * (1 + self.further)}, or a smaller further"
                )
            return  # the rest of an epoch
        x, y = x[: share * (1 + self.further)], y[: share * (1 + self.further)]
        epoch = self.current_epoch
        attacked = self.attacked(x[:share], y[:share], epoch, batch_idx)
        images = torch.cat([x, *attacked])
        labels = torch.cat([y, *[y[:share]] * len(attacked)])
        is_attacked = torch.zeros(len(images), device=x.device)
        is_attacked[len(x) :] = 1
        order = torch.randperm(
            len(images), generator=random.generator(self.seed, "order", epoch, batch_idx, self._rank)
        )
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        losses, gammas, alphas = [], [], []
        windows = order.to(x.device).split(share)
        for i, chosen in enumerate(windows):
            begins, ends = i % self.accumulate == 0, (i + 1) % self.accumulate == 0 or i + 1 == len(windows)
            if begins:
                optimizer.zero_grad()
                length = min(self.accumulate, len(windows) - i)
            with optimizer.toggle_model(sync_grad=ends):
                out, gamma = self.as_trained(images[chosen])
                loss = mixing_loss(out, labels[chosen], gamma, is_attacked[chosen], self.loss_weights).mean()
                self.manual_backward(loss / length)
                if ends:
                    optimizer.step()
                    scheduler.step()
            losses.append(loss.detach())
            gammas.append(gamma.detach().flatten())
            alphas.append(gamma.detach().sigmoid().mean())
        gamma, which = torch.cat(gammas), is_attacked[order.to(x.device)].bool()
        self.log("train/loss", torch.stack(losses).mean(), prog_bar=True, batch_size=len(x))
        self._log_gammas(gamma, which, torch.stack(alphas).mean(), len(x))

    def _log_gammas(self, gamma: Tensor, attacked: Tensor, alpha: Tensor, count: int) -> None:
        b = self.train_affine[1]
        values = {
            "gamma_clean": gamma[~attacked].mean(),
            "gamma_attacked": gamma[attacked].mean(),
            "clean_below": (gamma[~attacked] <= b).float().mean(),
            "attacked_above": (gamma[attacked] > b).float().mean(),
            "alpha_mean": alpha,
        }
        self.log_dict({f"adaptive_smoothing/{k}": v for k, v in values.items()}, batch_size=count)

    def attacked(self, x: Tensor, y: Tensor, *key: int | str) -> list[Tensor]:
        """1 + targets attacked copies of images (N,C,H,W): through the whole mixture as it stands, in eval mode and
        fp32.

        Args:
            key: decides the draws, together with seed and rank; what the iterations hang on has no rank.
        """
        self.box.check_inputs(x)
        with modes_kept(self.mixer, training=False), torch.autocast(x.device.type, enabled=False):
            objectives: list[Loss] = [cross_entropy]
            if self.targets:
                with torch.no_grad():
                    likely = runners_up(self.as_trained(x)[0], self.targets)
                objectives += [partial(targeted_dlr, target=target) for target in likely]
            return [self._attack(x, y, base, number, *key) for number, base in enumerate(objectives)]

    def _attack(self, x: Tensor, y: Tensor, base: Loss, number: int, *key: int | str) -> Tensor:
        steps = attack_iterations(self.iterations, random.generator(self.seed, "iterations", number, *key))
        own = random.generator(self.seed, "attack", number, self._rank, *key)
        radius, weight, decay = torch.rand(3, len(x), generator=own).to(x.device)
        radius, weight = self.epsilon * (0.4 + 0.7 * radius), 0.4 * weight

        def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            gamma = out[1].flatten()
            towards_robust = F.binary_cross_entropy_with_logits(gamma, torch.ones_like(gamma), reduction="none")
            return (1 - weight) * base(out, y) + weight * towards_robust

        if self.attack == "apgd":
            return auto_pgd(self.as_trained, x, y, radius, steps, loss, box=self.box, generator=own).fooling
        return momentum_pgd(self.as_trained, x, y, radius, steps, 5 * radius / steps, 0.9 * decay, loss, self.box, own)

    @property
    def _rank(self) -> int:
        return rank_and_world()[0]

    def _images(self, batch: Any) -> tuple[Tensor, Tensor]:
        fits = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)
        if not fits or batch[1].dim() != 1 or batch[1].is_floating_point() or len(batch[0]) != len(batch[1]):
            raise RecipeError(f"AdaptiveSmoothingModule: a batch must be (images, labels (N,)); got {describe(batch)}")
        return batch[0], batch[1]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradients are unscaled by now."""
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.mixer.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [optimizer], [LambdaLR(optimizer, partial(rate_at, total=self._steps()))]

    def _steps(self) -> int:
        """Optimizer steps of the fit."""
        trainer = self.trainer
        assert trainer.estimated_stepping_batches  # loads the data
        steps = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            steps = trainer.num_training_batches * trainer.max_epochs * -(-self.parts // self.accumulate)
        if trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps)
        if math.isinf(steps):
            raise RecipeError(
                "AdaptiveSmoothingModule: the schedule of the rate needs Trainer(max_steps=...) or max_epochs with a"
                " dataloader that has a length"
            )
        return int(steps)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step("test", batch, dataloader_idx)

    def _step(self, stage: Literal["val", "test"], batch: Any, loader: int) -> None:
        x, y = self._images(batch)
        (g, h), maps = self._ask(x)
        alpha = self.mixer.alpha(maps)
        self.evaluate(stage, loader, mixture(g, h, alpha, self.std_scale, self.rob_scale), y)
        values = {f"acc_{who}": (z.argmax(1) == y).float().mean() for who, z in zip(self._bases, (g, h))}
        values = {f"{stage}/{name}": value for name, value in (values | {"alpha_mean": alpha.mean()}).items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(y), sync_dist=True)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SECTION] = self.mixer.structure

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get(SECTION)
        if stored is None:
            raise RecipeError("AdaptiveSmoothingModule: this is no checkpoint of it")
        for who, here in self.mixer.structure["bases"].items():
            if stored["bases"][who] != here:
                raise RecipeError(
                    f"AdaptiveSmoothingModule: {who} is not the network that the checkpoint's mixing network was"
                    f" trained with: its weights have the hash {here[:12]}, in the checkpoint it is"
                    f" {stored['bases'][who][:12]}"
                )
        if stored["features"] != self.mixer.structure["features"]:
            raise RecipeError(
                f"AdaptiveSmoothingModule: the checkpoint's mixing network reads {stored['features']}, this one"
                f" {self.mixer.structure['features']}"
            )

    def to_callback(self, role: Literal["robust", "standard"] = "robust", **arguments: Any) -> AdaptiveSmoothing:
        """The trained mixture as a callback for a module whose network is the other one of the two.

        Args:
            role: which of the two the callback brings.
            arguments: further ones of the callback.
        """
        from lightning_recipes.callbacks.robustness.adaptive_smoothing import AdaptiveSmoothing

        base = self._bases[role]
        settings = {
            "partner_input_transform": base.transform,
            "std_scale": self.std_scale,
            "rob_scale": self.rob_scale,
            **arguments,
        }
        return AdaptiveSmoothing(base.network, role, alpha=None, mixer=self.mixer, **settings)


def _built(who: str, network: nn.Module | str, checkpoint: str | None, arguments: dict[str, Any] | None) -> Companion:
    named = isinstance(network, str) and bool(network)
    if not named and not isinstance(network, nn.Module):
        raise RecipeError(
            f"AdaptiveSmoothingModule: {who} must be a module, 'package.module:Class' or a timm name; got {network!r}"
        )
    companion = Companion(network, not of_import(network), checkpoint, arguments, called=who)
    companion.build()
    return companion


def _dry_run(base: _Base, shape: Sequence[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    where = next(base.network.parameters(), torch.zeros(())).device
    try:
        with torch.no_grad():
            return base(torch.zeros(2, *shape, device=where))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"AdaptiveSmoothingModule: {base.companion.describe()}, does not take images of input_shape={tuple(shape)}"
            f" ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def attack_iterations(mean: int, generator: torch.Generator) -> int:
    """A number of iterations from chi^2 with `mean` degrees of freedom, rounded, at least 1."""
    return max(1, round(torch.randn(mean, generator=generator, dtype=torch.float64).square().sum().item()))


def rate_at(step: int, total: int) -> float:
    """Share of the rate at an optimizer step: a cosine from 1 to 0 times an exponential warm-up over a 25th."""
    warm = 1 - math.exp(-(step + 1) / max(1, total // 25))
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / max(1, total))) * warm
