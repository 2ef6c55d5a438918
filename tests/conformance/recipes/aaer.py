"""AAER and RobustAccuracyMonitor: their card in the conformance tests."""

from __future__ import annotations

import functools
import math

from torch import nn
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import AAER, Mixup, RobustAccuracyMonitor
from lightning_recipes.core.recipe import StepRecipe
from tests.conformance.misuse import (
    Embeds,
    Hidden,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    TwoLosses,
    X,
    Y,
    argument,
    frozen,
    manual,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row
from tests.stock import Classifier, loader, mlp


def _monitor() -> RobustAccuracyMonitor:
    return RobustAccuracyMonitor("pgd", epsilon=0.1, steps=2, restarts=1)


ROWS = [
    Row("aaer_rs", lambda: [AAER(0.3)], lambda: [AAER(0.0)], couples=True),
    Row("aaer_n", lambda: [AAER(0.3, "n", lambda3=1.5)], lambda: [AAER(0.0, "n")], couples=True),
    Row("robust_accuracy", lambda: [_monitor()], monitors=True),
]
MEMBERS = {"AAER": lambda: AAER(0.1), "RobustAccuracyMonitor": _monitor}
AUTOMATIC = ["AAER"]
OTHER = {"AAER": {"lambda3": 0.25}, "RobustAccuracyMonitor": {"epsilon": 0.2}}


class Observes(StepRecipe):
    needs_criterion = True

    def __init__(self, criterion: int) -> None:
        self.criterion = criterion


def of_aaer() -> list[Misuse]:
    pixels = r"epsilon must be in \[0, 1\]: pixel units of a \[0, 1\] image, e\.g\. 8/255 .*; got "
    in_step = functools.partial(Misuse, "AAER", in_step=True)
    attack = lambda: [AAER(0.1)]  # noqa: E731
    images = lambda factor: lambda: loader(X.reshape(-1, 2, 3) * factor, Y)  # noqa: E731
    flat = with_net(lambda: nn.Sequential(nn.Flatten(), *mlp()))
    return [
        argument(AAER, pixels + "8", epsilon=8),
        argument(AAER, pixels + "8", epsilon=8, mean=[0.5], std=[0.5]),
        argument(AAER, pixels + r"-0\.1", epsilon=-0.1),
        argument(AAER, pixels + "nan", epsilon=math.nan),
        argument(AAER, "variant must be 'rs', 'n' or 'zero'; got 'fgsm'", variant="fgsm"),
        argument(AAER, "alpha must be positive, a multiple of epsilon; got 0", alpha=0),
        argument(AAER, "lambda1 must be at least 0; got -1", lambda1=-1),
        argument(AAER, "lambda2 must be at least 0; got -1", lambda2=-1),
        argument(AAER, "lambda3 must be at least 0; got -1", lambda3=-1),
        argument(AAER, r"mean and std go together; got mean=None, std=\(0\.5,\)", std=[0.5]),
        argument(AAER, r"mean and std go together; got mean=\(0\.5,\), std=None", mean=[0.5]),
        argument(AAER, r"std must be positive in every channel; got \[0\.5, 0\.0\]", mean=[0.5] * 2, std=[0.5, 0.0]),
        argument(AAER, "need one value a channel; got 2 and 1", mean=[0.5] * 2, std=[0.5]),
        argument(AAER, r"input_range must be .* low < high; got \(1\.0, 0\.0\)", input_range=(1.0, 0.0)),
        argument(AAER, "attack_warmup_epochs must be at least 0; got -1", attack_warmup_epochs=-1),
        argument(AAER, "reg_warmup_epochs must be at least 0; got -1", reg_warmup_epochs=-1),
        argument(AAER, "attack_mode must be 'train' or 'eval'; got 'both'", attack_mode="both"),
        in_step(
            "normalised inputs without mean and std",
            r"inputs reach from -\S+ to \S+, outside the range .* normalised but mean and std were not given \(or give",
            attack,
            data=lambda: loader(3 * X - 1, Y),
        ),
        in_step(
            "inputs that are not normalised by the mean and std given",
            r"outside the range .* not normalised by mean and std",
            lambda: [AAER(0.1, mean=[0.5] * 2, std=[0.5] * 2)],
            flat,
            images(9),
        ),
        in_step(
            "another number of channels",
            r"mean and std have 1 channels; the batch has shape \(4, 2, 3\)",
            lambda: [AAER(0.1, mean=[0.5], std=[0.5])],
            flat,
            images(1),
        ),
        in_step(
            "integer inputs",
            "the batch's input is torch.int64, not floating point",
            attack,
            Embeds,
            lambda: loader((X > 0.5).long(), Y),
        ),
        in_step(
            "boolean inputs",
            "the batch's input is torch.bool, not floating point",
            attack,
            Embeds,
            lambda: loader(X > 0.5, Y),
        ),
        in_step(
            "a dict without an input",
            r"no input tensor in a batch with keys \['a', 'b'\]; looked for \('pixel_values', 'image'",
            attack,
            data=lambda: DataLoader([{"a": X[:4], "b": Y[:4]}], batch_size=None),
        ),
        in_step(
            "a batch that is no tensor",
            r"the batch must be \(input, target\), a dict or a tensor; got str",
            attack,
            data=lambda: DataLoader(["a photograph"], batch_size=None),
        ),
        in_step("a loss that is not seen", r"no loss was seen .* name any other with criterion=", attack, Hidden),
        in_step(
            "a criterion of an index that does not come",
            r"no loss was seen .*\(criterion=1 was never called\)",
            lambda: [AAER(0.1, criterion=1)],
        ),
        in_step(
            "a criterion that is not called",
            r"no loss was seen .*\(criterion='unused' was never called\)",
            lambda: [AAER(0.1, criterion="unused")],
            Hidden,
        ),
        Misuse(
            "AAER",
            "a criterion that is not there",
            "criterion='nothing' is no submodule or method of Hidden",
            lambda: [AAER(0.1, criterion="nothing")],
            Hidden,
        ),
        Misuse(
            "AAER",
            "another recipe names another loss",
            "recipes name different losses: AAER criterion=0, Observes criterion=1",
            lambda: [AAER(0.1, criterion=0), Observes(1)],
            TwoLosses,
        ),
        in_step(
            "two losses to choose from",
            r"2 losses \(0: cross_entropy of \(4, 3\) and \(4,\); 1: mse_loss of .*choose with criterion=INDEX",
            attack,
            TwoLosses,
        ),
        in_step(
            "a regression",
            r"needs a classification loss of logits \[n, classes\]; the observed one got \(4, 3\) for 4 inputs",
            attack,
            Regression,
        ),
        in_step("several labels a sample", r"needs a classification loss of logits \[n, classes\]", attack, MultiLabel),
        in_step(
            "a segmentation",
            r"needs a classification loss of logits \[n, classes\]; the observed one got \(4, 3, 1\)",
            attack,
            Segmentation,
        ),
        in_step("a module with everything frozen", r"what needs no gradient: is everything frozen\?", attack, frozen()),
        Misuse(
            "AAER",
            "a mixing recipe after it",
            r"Mixup must stand before AAER in Trainer\(callbacks=\[\.\.\.\]\): the attack must start from the mixed",
            lambda: [AAER(0.1), Mixup()],
        ),
    ]


def of_monitor() -> list[Misuse]:
    monitor = RobustAccuracyMonitor
    fgsm = lambda: [monitor("fgsm", 0.1)]  # noqa: E731
    # What only a batch can show comes in Lightning's check before the training.
    batch = functools.partial(
        Misuse, "RobustAccuracyMonitor", validation=lambda: loader(X, Y), trainer={"num_sanity_val_steps": 1}
    )
    return [
        argument(monitor, "attack must be one of 'fgsm', 'pgd', 'apgd', 'apgd-t', 'autoattack'; got 'cw'", attack="cw"),
        argument(monitor, r"epsilon must be in \(0, 1\] pixel units; got 0\.0", epsilon=0.0),
        argument(monitor, r"epsilon must be in \(0, 1\] pixel units; got 8", epsilon=8, mean=[0.5], std=[0.5]),
        argument(monitor, "steps must be at least 1; got 0", steps=0),
        argument(monitor, "restarts must be at least 1; got 0", restarts=0),
        argument(monitor, "step_size must be None or at least 0; got -1", step_size=-1),
        argument(monitor, "every_n_epochs must be at least 1; got 0", every_n_epochs=0),
        argument(monitor, "limit_batches must be at least 1; got 0", limit_batches=0),
        argument(monitor, r"mean and std go together; got mean=\(0\.5,\), std=None", mean=[0.5]),
        batch(
            "normalised inputs without mean and std",
            "outside the range .* normalised but mean and std were not given",
            fgsm,
            validation=lambda: loader(3 * X - 1, Y),
        ),
        batch(
            "integer inputs",
            "the batch's input is torch.int64, not floating point",
            fgsm,
            Embeds,
            validation=lambda: loader((X > 0.5).long(), Y),
        ),
        batch(
            "another number of channels",
            r"mean and std have 1 channels; the batch has shape \(4, 6\)",
            lambda: [monitor("fgsm", 0.1, mean=[0.5], std=[0.5])],
        ),
        batch("a regression", r"needs a classification loss of logits \[n, classes\]", fgsm, Regression),
        batch(
            "a module that optimizes manually",
            "Classifier optimizes manually: its training step would train, so that it cannot be looked at",
            fgsm,
            manual(),
        ),
        batch(
            "a forward that gives no logits",
            r"forward='net\.0' gives no logits \[n, classes\] for the batch's input",
            lambda: [monitor("fgsm", 0.1, forward="net.0")],
            lambda: Classifier(nn.Sequential(nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), nn.Flatten())),
        ),
        Misuse(
            "RobustAccuracyMonitor",
            "a part that is not there",
            "forward must be 'forward' or the name of a submodule of Classifier",
            lambda: [monitor(forward="body")],
        ),
        Misuse(
            "RobustAccuracyMonitor",
            "AutoAttack without its package",
            r"attack='autoattack' needs pyautoattack: pip install 'lightning_recipes\[attacks\]'",
            lambda: [monitor("autoattack")],
            missing="pyautoattack",
        ),
    ]


def misuses() -> list[Misuse]:
    return of_aaer() + of_monitor()


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=row.monitors)]
