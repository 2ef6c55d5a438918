"""DropBlock in a stock network: where it drops, how much, from which random numbers, and that it leaves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_recipes.callbacks import AAER, DropBlock
from lightning_recipes.callbacks.regularization.drop_block import ramp
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.modules import BalancedNet, CifarResNet, SmallCNN
from tests.stock import Classifier, Watch, loader, quiet, same, weights

X = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


class Body(nn.Module):
    """One residual block and a head. Keeps what its second convolution is given."""

    def __init__(self, again: int = 1, saving: bool = False) -> None:
        super().__init__()
        self.block, self.head, self.again, self.saving = Block(), nn.Linear(4, 3), again, saving

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.again):
            y = checkpoint(self.block, x, use_reentrant=False) if self.saving else self.block(x)
        return self.head(y.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu() + 1)  # never 0, so that a 0 is a dropped pixel


def fit(module: Any, *callbacks: Any, size: int = 4, **kwargs: Any) -> Any:
    trainer = quiet(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, loader(X, Y, size=size))
    return trainer


def body(seed: int = 0, **arguments: Any) -> tuple[Classifier, list[Tensor]]:
    """A module, and what its second convolution will be given, call by call."""
    torch.manual_seed(seed)
    module, given = Classifier(Body(**arguments)), []
    # a hook of the user's own, on the convolution itself: it sees what the hooks before it made
    conv = module.net.block.conv2
    forward = conv.forward
    conv.forward = lambda x: given.append(x.detach().clone()) or forward(x)
    return module, given


def dropped(x: Tensor) -> Tensor:
    """Where pixels are left out, [n, H, W]; the same for all channels."""
    zeros = x == 0
    assert torch.equal(zeros.all(1), zeros.any(1))
    return zeros.all(1)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_squares_are_left_out_between_the_convolutions_of_a_block_and_the_mean_is_kept() -> None:
    module, given = body()
    run = fit(module, DropBlock(0.3, 3))
    shares = []
    for x in given:
        mask = dropped(x)
        assert mask.any() and not torch.equal(mask[0], mask[1]), "every sample has its own"
        middles = nn.functional.avg_pool2d(mask.float()[:, None], 3, 1) == 1
        assert middles.any(), "whole squares"
        shares.append(1 - mask.float().mean())
    plain = module.net.block.conv1(X[:4]).relu() + 1  # after training; before the first step below
    assert plain.shape == given[0].shape
    assert run.callback_metrics["dropblock/kept"].item() == pytest.approx(shares[-1].item(), abs=1e-6)


def test_what_is_left_is_scaled_by_the_share_that_is_left_of_the_whole_batch() -> None:
    module, given = body()
    with torch.no_grad():
        plain = module.net.block.conv1(X[:4]).relu() + 1
    fit(module, DropBlock(0.3, 3), limit_train_batches=1)
    left = ~dropped(given[0])
    assert torch.allclose(given[0], plain * (left[:, None] * (left.numel() / left.sum())), atol=1e-6)


def test_masks_belong_to_the_samples_place_and_not_to_micro_batches_or_the_global_state() -> None:
    masks = {}
    for size, seed in ((4, 0), (2, 1)):
        module, given = body(seed)
        torch.manual_seed(seed)
        fit(module, DropBlock(0.3, 3), size=size)
        masks[size] = dropped(torch.cat(given))
    assert torch.equal(masks[4], masks[2])
    other, given = body()
    fit(other, DropBlock(0.3, 3, seed=1))
    assert not torch.equal(dropped(torch.cat(given)), masks[4])


def test_masks_differ_from_epoch_to_epoch_and_between_two_calls_in_a_step() -> None:
    module, given = body()
    fit(module, DropBlock(0.3, 3), max_epochs=2)
    assert not torch.equal(dropped(given[0]), dropped(given[4]))
    module, given = body(again=2)
    fit(module, DropBlock(0.3, 3), limit_train_batches=1)
    assert len(given) == 2 and not torch.equal(dropped(given[0]), dropped(given[1]))


def test_a_replay_of_the_step_meets_the_steps_own_masks() -> None:
    module, given = body()
    fit(module, AAER(0.1), DropBlock(0.3, 3), limit_train_batches=1)
    assert len(given) > 1
    assert all(torch.equal(dropped(x), dropped(given[-1])) for x in given)


def test_activation_checkpointing_runs_a_block_again_with_the_same_mask() -> None:
    found = []
    for saving in (False, True):
        module, given = body(saving=saving)
        fit(module, DropBlock(0.3, 3))
        found.append(weights(module))
        assert len(given) == (8 if saving else 4)
    assert same(*found)
    module, _ = body(saving=True, again=2)
    with pytest.raises(RecipeError, match=r"net\.block\.conv2 is under activation checkpointing .* called 2 times"):
        fit(module, DropBlock(0.3, 3))


# -- when and where ----------------------------------------------------------------------------------------------------


def test_at_0_in_evaluation_and_outside_a_step_nothing_is_dropped() -> None:
    found = [body()[0] for _ in range(3)]
    fit(found[0])
    fit(found[1], DropBlock(0.0))
    assert DropBlock((0.0, 0.0)).neutral and same(weights(found[0]), weights(found[1]))
    outside = []

    def look(trainer: Any, module: Any, *args: Any) -> None:
        assert module.training
        outside.append(module(X[:4]))
        module.eval()
        outside.append(module(X[:4]))
        module.train()

    fit(found[2], DropBlock(0.5, 3), Watch(on_train_batch_end=look))
    assert all(torch.equal(a, b) for a, b in zip(outside[::2], outside[1::2], strict=True))


def test_hooks_are_gone_after_the_fit_and_a_copy_made_in_it_has_none() -> None:
    module, _ = body()
    del module.net.block.conv2.__dict__["forward"]
    twin: list[nn.Module] = []
    fit(module, DropBlock(0.5, 3), Watch(on_train_batch_end=lambda t, m, *a: twin.append(copy.deepcopy(m.net))))
    assert not module.net.block.conv2._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(module(X), module(X))
        assert torch.equal(twin[-1].train()(X), module.train()(X))


def test_p_is_linear_in_depth_by_stage_or_by_place() -> None:
    def p_of(net: nn.Module, **arguments: Any) -> list[float]:
        recipe = DropBlock(**arguments)
        module = Classifier(net)
        quiet(callbacks=[recipe], limit_train_batches=0).fit(module, loader(X, Y))
        return list(recipe._p.values())

    paper = BalancedNet(3, 1, (8, 8, 8, 8), (3, 3, 3, 2), drop_prob=0.0)
    assert p_of(paper) == pytest.approx([0.05] * 3 + [0.10] * 3 + [0.15] * 3 + [0.20] * 2)
    assert p_of(CifarResNet(14, 3, 1)) == pytest.approx([0.05] * 2 + [0.125] * 2 + [0.20] * 2)
    assert p_of(SmallCNN(3, 1, 8)) == pytest.approx([0.05, 0.125, 0.20])
    assert p_of(SmallCNN(3, 1, 8), where=["stages.2", "net.stages.0"]) == [0.05, 0.20]
    assert p_of(SmallCNN(3, 1, 8), drop_prob=0.1) == [0.1] * 3


def test_p_rises_in_the_first_epochs_where_that_is_asked_for() -> None:
    assert [ramp(e, 4) for e in (0, 1, 2.5, 4, 9)] == [0, 0.25, 0.625, 1, 1] and ramp(0, 0) == 1
    module, given = body()
    fit(module, DropBlock(0.9, 3, ramp_epochs=2), max_epochs=3)
    share = [dropped(x).float().mean().item() for x in given]
    assert share[0] == 0 and share[1] < share[-1]
    full, given = body()
    fit(full, DropBlock(0.9, 3), max_epochs=3)
    assert [dropped(x).float().mean().item() for x in given][-4:] == share[-4:], "the same masks once it is over"


def test_a_map_smaller_than_the_squares_is_warned_of_once() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"at net\.stages\.2: block_size=7 is more than a map of 3x3") as seen:
        fit(Classifier(SmallCNN(3, 1, 8)), DropBlock(0.5), max_epochs=2)
    assert len([w for w in seen if "net.stages.2" in str(w.message)]) == 1


def test_a_network_with_drop_block_of_its_own_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"DropBlock of its own, the first at net\.stages\.0\.0\.drop; switch it off"):
        fit(Classifier(BalancedNet(3, 1, (8,), (1,))), DropBlock())
    timms = timm.create_model("resnet18", in_chans=1, num_classes=3, drop_block_rate=0.1)
    with pytest.raises(RecipeError, match="DropBlock of its own"):
        fit(Classifier(timms), DropBlock())
