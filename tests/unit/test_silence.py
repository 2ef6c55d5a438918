"""Running a piece of the module without a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from lightning_recipes.core.silence import gradients_allowed, modes_kept, silent

X, Y = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


class Everything(LightningModule):
    """Each kind of state that a step can leave behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            spectral_norm(nn.Linear(4, 6)),
            nn.BatchNorm1d(6),
            nn.Dropout(0.5),
            nn.Unflatten(1, (3, 2)),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(6, 2),
        )
        self.net[4].eval()
        self.accuracy = MulticlassAccuracy(2)
        self.auroc = BinaryAUROC()  # keeps lists
        self.several = MetricCollection([MeanMetric()])
        self.register_buffer("count", torch.zeros(1))
        self.logged = []

    def log(self, name, value, **kwargs):
        self.logged.append(name)

    def log_dict(self, values, **kwargs):
        self.logged.extend(values)

    def step(self):
        logits = self.net(X + random.random() + np.random.rand())
        loss = F.cross_entropy(logits, Y)
        self.accuracy(logits, Y)
        self.auroc.update(logits.softmax(1)[:, 1], Y)
        self.several.update(loss)
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        self.count += 1
        self.auroc.compute()
        return loss


def trace(module):
    """All of it, copied."""
    metrics = [module.accuracy, module.auroc, *module.several.values()]
    states = [
        {name: [v.clone() for v in value] if isinstance(value, list) else value.clone()}
        for metric in metrics
        for name in metric._defaults
        for value in [getattr(metric, name)]
    ]
    return {
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "metrics": states,
        "counts": [m._update_count for m in metrics],
        "computed": [m._computed for m in metrics],
        "modes": [part.training for part in module.modules()],
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
        "logged": list(module.logged),
        "attributes": {name: sorted(part.__dict__) for name, part in module.named_modules()},
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def module():
    built = Everything()
    built.step()  # so that there is something to lose
    return built


def test_a_silent_run_leaves_no_trace(module):
    before = trace(module)
    with silent(module):
        module.step()
        assert module.auroc._update_count == 2  # inside, metrics work
    after = trace(module)
    for name in before:
        assert equal(before[name], after[name]), name
    module.step()
    assert module.logged == ["loss", "accuracy"] * 2
    assert module.auroc._update_count == 2


def test_a_silent_run_that_fails_leaves_no_trace(module):
    before = trace(module)
    with pytest.raises(ZeroDivisionError), silent(module):
        module.step()
        raise ZeroDivisionError
    assert all(equal(before[name], value) for name, value in trace(module).items())


def test_the_objects_stay_the_same(module):
    states = [module.accuracy.tp, module.auroc.preds, module.net[1].running_mean, module.count]
    with silent(module):
        module.step()
    after = [module.accuracy.tp, module.auroc.preds, module.net[1].running_mean, module.count]
    assert all(a is b for a, b in zip(states, after, strict=True))


def test_a_silent_run_computes_what_a_loud_one_computes(module):
    torch.manual_seed(1)
    with silent(module):
        quietly = module.step()
    torch.manual_seed(1)
    assert torch.equal(module.step(), quietly)


def test_a_graph_from_before_still_goes_backward_after_a_silent_run(module):
    """Statistics copied back in place would break it."""
    loss = module.step()
    with silent(module):
        torch.autograd.grad(module.step(), module.net[6].weight)
    loss.backward()
    assert module.net[0].parametrizations.weight.original.grad is not None


def test_a_silent_graph_goes_backward_after_a_loud_step(module):
    with silent(module):
        loss = module.step()
    module.step()
    torch.autograd.grad(loss, module.net[6].weight)


def test_statistics_may_be_tracked(module):
    mean, count = module.net[1].running_mean.clone(), module.count.clone()
    tp = module.accuracy.tp.clone()
    with silent(module, track_statistics=True):
        module.step()
    assert not torch.equal(module.net[1].running_mean, mean)
    assert module.count == count + 1
    assert torch.equal(module.accuracy.tp, tp)
    assert module.logged == ["loss", "accuracy"]


def test_batch_norm_that_never_tracked_stays_so():
    module = LightningModule()
    module.norm = nn.BatchNorm1d(3, track_running_stats=False)
    with silent(module):
        pass
    assert module.norm.track_running_stats is False


def test_batch_norm_in_eval_mode_uses_its_statistics_in_a_silent_run(module):
    module.eval()
    loud = module.net(X)
    with silent(module):
        assert torch.equal(module.net(X), loud)


def test_a_log_that_stood_on_the_instance_comes_back(module):
    own = lambda *args, **kwargs: None  # noqa: E731
    module.log = own
    with silent(module):
        assert module.log is not own
    assert module.log is own
    assert "log_dict" not in module.__dict__


def test_every_submodule_gets_its_own_mode_back(module):
    module.train()
    module.net[4].eval()
    before = [part.training for part in module.modules()]
    for training in (True, False):
        with modes_kept(module, training=training):
            assert {part.training for part in module.net} == {training}
        assert [part.training for part in module.modules()] == before


class KeepsItsNormInEval(nn.Sequential):
    """As many fine-tuning scripts have it."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


@pytest.mark.parametrize("where", ["in the class", "on the instance"])
def test_a_train_of_the_users_own_has_its_say(where):
    inner = KeepsItsNormInEval(nn.BatchNorm1d(4), nn.Linear(4, 2))
    if where == "on the instance":
        inner = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        inner.train = lambda mode=True: _norm_stays(inner, mode)
    net = nn.Sequential(inner, nn.Dropout())
    net.eval()
    with modes_kept(net, training=True):
        assert [part.training for part in (net, inner[0], inner[1], net[1])] == [True, False, True, True]
    assert not any(part.training for part in net.modules())


def _norm_stays(inner, mode):
    nn.Module.train(inner, mode)
    inner[0].eval()
    return inner


def test_a_mode_that_is_no_attribute_is_set_by_its_owner():
    class Watched(nn.Linear):
        seen = ()

        @property
        def training(self):
            return self.__dict__.get("_mode", True)

        @training.setter
        def training(self, mode):
            self.seen, self.__dict__["_mode"] = (*self.seen, mode), mode

    part = Watched(2, 2)
    net = nn.Sequential(part, nn.Linear(2, 2))
    with modes_kept(net, training=False):
        assert not part.training and not net[1].training
    assert part.training and net[1].training and part.seen[-2:] == (False, True)


def test_gradients_are_allowed_under_inference_mode():
    weight = nn.Parameter(torch.ones(3))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            x = torch.ones(3)
            with gradients_allowed():
                x = x.clone().requires_grad_()
                assert torch.equal(torch.autograd.grad((x * weight).sum(), x)[0], torch.ones(3))
            assert not torch.is_grad_enabled()
