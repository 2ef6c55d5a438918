"""One method on one object, replaced and given back."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn

from lightning_recipes.core.patch import Patch


class Owner:
    def __init__(self):
        self.log = []

    def run(self, value, *, twice=False):
        """The user's own."""
        self.log.append("own")
        return value * (2 if twice else 1)


def wrapped(owner, mark):
    def function(*args, **kwargs):
        owner.log.append(mark)
        return patch.original(*args, **kwargs)

    patch = Patch(owner, "run", function)
    return patch


def test_a_patch_on_a_patch_calls_both():
    owner = Owner()
    first, second = wrapped(owner, "first"), wrapped(owner, "second")
    assert owner.run(3, twice=True) == 6
    assert owner.log == ["second", "first", "own"]
    assert second.original is first
    second.restore()
    assert owner.__dict__["run"] is first
    first.restore()
    assert "run" not in owner.__dict__
    owner.log.clear()
    assert owner.run(1) == 1
    assert owner.log == ["own"]


def test_a_patch_that_was_wrapped_since_stays_in_the_chain_and_does_nothing():
    owner = Owner()
    first, second = wrapped(owner, "first"), wrapped(owner, "second")
    first.restore()
    assert owner.run(1) == 1
    assert owner.log == ["second", "own"]
    second.restore()
    owner.log.clear()
    assert owner.run(1) == 1
    assert owner.log == ["own"]


def test_it_looks_like_what_it_replaces():
    owner = Owner()
    patch = wrapped(owner, "first")
    wrapped(owner, "second")
    assert str(inspect.signature(owner.run)) == "(value, *, twice=False)"
    assert (owner.run.__name__, owner.run.__doc__) == ("run", "The user's own.")
    assert not isinstance(inspect.unwrap(patch), Patch)


def test_attributes_of_what_it_replaces_are_kept():
    """torch's schedulers mark ``optimizer.step`` and warn when the mark is gone."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    patch = Patch(optimizer, "step", lambda *a, **k: patch.original(*a, **k))
    assert optimizer.step._wrapped_by_lr_sched


def test_a_copy_gets_its_own_plain_method():
    owner = Owner()
    wrapped(owner, "first")
    wrapped(owner, "second")
    twin = copy.deepcopy(owner)
    assert twin.run(1) == 1
    assert (twin.log, owner.log) == (["own"], [])
    assert twin.run.__self__ is twin
