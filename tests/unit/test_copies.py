"""Frozen copies of weights: what a module computes with them, and that nothing else notices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.copies import FrozenCopy, wearing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, loader, mlp, quiet, samples

X, Y = samples()


def moved(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5)


class Everything(nn.Module):
    """Tied weights, running statistics, a recurrent layer, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.out.weight = self.embed.weight
        self.norm, self.rnn = nn.BatchNorm1d(6), nn.LSTM(6, 6, batch_first=True)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.rnn(self.embed(x)[:, None])[0][:, 0])) * self.scale


def test_worn_the_module_computes_what_it_did_when_the_copy_was_taken() -> None:
    module = Everything()
    module(X)
    module.eval()
    frozen, then = FrozenCopy(module), module(X).detach()
    assert not frozen
    frozen.take()
    assert frozen
    moved(module)
    module.train()(X + 1)  # running statistics move too
    module.eval()
    now = module(X).detach()
    assert not torch.allclose(then, now, atol=0.1)
    with torch.no_grad(), frozen.worn():
        assert torch.equal(module(X), then)
    assert torch.equal(module(X), now), "its own again"


def test_the_modules_own_tensors_are_put_aside_and_not_written_over() -> None:
    """A graph that holds them can be run backwards afterwards; the same objects come back."""
    module = Everything()
    frozen = FrozenCopy(module)
    frozen.take()
    before = {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]}
    keys, weights = list(module.state_dict()), list(module.rnn._flat_weights)
    loss = module(X).square().mean()
    with torch.no_grad(), frozen.worn():
        module(X)
    loss.backward()
    assert {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]} == before
    assert list(module.state_dict()) == keys
    assert all(one is other for one, other in zip(weights, module.rnn._flat_weights, strict=True))
    assert module.embed.weight.grad is not None


def test_tied_weights_stay_tied_and_are_copied_once() -> None:
    module = Everything()
    frozen = FrozenCopy(module)
    frozen.take()
    assert "out.weight" not in frozen.state()
    with frozen.worn():
        assert module.out.weight is module.embed.weight


def test_they_come_back_after_an_error_too() -> None:
    module = Everything()
    frozen = FrozenCopy(module)
    frozen.take()
    own = module.embed.weight
    with pytest.raises(RuntimeError, match="in the middle"), frozen.worn():
        raise RuntimeError("in the middle")
    assert module.embed.weight is own


def test_other_weights_of_some_names_are_worn_and_may_be_asked_for_a_gradient() -> None:
    net = mlp()
    own, before = dict(net.named_parameters()), {n: p.detach().clone() for n, p in net.named_parameters()}
    worn = {"4.bias": torch.full((3,), 7.0), "0.weight": nn.Parameter(torch.zeros(5, 6)), "nobody": torch.ones(1)}
    with wearing(net, worn):
        assert torch.equal(net[4].bias, worn["4.bias"]) and isinstance(net[4].bias, nn.Parameter)
        assert net[0].weight is worn["0.weight"] and net[2].weight is own["2.weight"]
        (found,) = torch.autograd.grad(net(torch.ones(2, 6)).sum(), [worn["0.weight"]])
        assert found.shape == (5, 6)
    assert all(p is own[n] and torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_it_needs_no_gradient_and_is_none_of_the_optimizers() -> None:
    module = Everything()
    frozen = FrozenCopy(module)
    frozen.take()
    with frozen.worn():
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_taken_again_it_keeps_its_tensors_and_a_new_structure_gets_new_ones() -> None:
    module = Classifier()
    frozen = FrozenCopy(module)
    frozen.take()
    first = frozen.state()
    moved(module)
    frozen.take()
    assert all(frozen.state()[name].data_ptr() == value.data_ptr() for name, value in first.items())
    assert torch.equal(frozen.state()["net.0.weight"], module.net[0].weight)
    module.net.append(nn.Linear(3, 2))
    frozen.take()
    assert "net.5.weight" in frozen.state()


def test_through_a_checkpoint(tmp_path) -> None:
    module = Everything()
    frozen = FrozenCopy(module)
    frozen.take()
    torch.save(frozen.state(), tmp_path / "state")
    other = copy.deepcopy(module)
    moved(other)
    again = FrozenCopy(other)
    again.load(torch.load(tmp_path / "state", weights_only=True))
    with torch.no_grad(), again.worn():
        assert torch.equal(other.eval()(X), module.eval()(X))
    for change in (lambda state: state.pop("norm.bias"), lambda state: state.update({"norm.bias": torch.zeros(2)})):
        state = frozen.state()
        change(state)
        with pytest.raises(RecipeError, match=r"copy of the weights does not fit the module at 'norm\.bias'"):
            again.load(state)


def test_it_goes_where_the_module_went_after_a_checkpoint_was_read() -> None:
    module = mlp()
    frozen, read = FrozenCopy(module), FrozenCopy(module)
    frozen.take()
    read.load(frozen.state())
    module.to("meta")  # as Lightning moves a module to its device after it has read the checkpoint
    with read.worn():
        assert all(parameter.is_meta and not parameter.requires_grad for parameter in module.parameters())


# -- a look with other weights from within a step ----------------------------------------------------------------------


class Looks(StepRecipe):
    """Compares the step's logits with those of a copy that was taken before the first step."""

    looks = True
    needs_criterion = True

    def on_train_start(self, trainer, pl_module) -> None:
        self.copy = FrozenCopy(pl_module)
        self.copy.take()
        self.found = []

    def transform_targets(self, step, logits, targets):
        self.found.append((logits.detach(), step.look(self.copy.worn())))
        return targets


class Noisy(Classifier):
    """Draws numbers, computes a loss for its log before the one that trains, drops out; remembers its inputs."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(mlp(), nn.BatchNorm1d(3)))
        self.inputs: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + torch.rand_like(x)
        self.inputs.append(x)
        logits = self(x)
        with torch.no_grad():
            self.log("aside", F.cross_entropy(logits * 3, y))
        return F.cross_entropy(F.dropout(logits, 0.5, self.training), y)


def run(*recipes):
    torch.manual_seed(3)
    module = Noisy()
    trainer = quiet(callbacks=list(recipes), max_epochs=2)
    trainer.fit(module, loader(X, Y))
    return module, {**module.state_dict(), "random": torch.get_rng_state(), "log": trainer.callback_metrics["aside"]}


def test_a_look_leaves_no_trace_in_the_run() -> None:
    _, plain = run()
    _, watched = run(Looks())
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_a_look_is_of_the_same_inputs_in_eval_mode_with_the_copys_weights() -> None:
    recipe = Looks()
    module, _ = run(recipe)
    torch.manual_seed(3)
    start = Noisy().eval()
    assert len(recipe.found) == 8
    for number, (_, seen) in enumerate(recipe.found):
        own, again = module.inputs[2 * number : 2 * number + 2]
        assert torch.equal(own, again), "the look drew the numbers of the step"
        assert not seen.requires_grad
        with torch.no_grad():
            assert torch.equal(seen, start(own)), "the loss that trains, not the one before it; no dropout"
