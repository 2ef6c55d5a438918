"""SaRA: its maths by hand, and the same training in sparse, dense and by a plain loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_recipes.callbacks import ProgressiveUnfreezing, SaRA
from lightning_recipes.callbacks.adapters import sara
from lightning_recipes.callbacks.adapters.sara import (
    chosen,
    drawn,
    entries_of,
    load_entries,
    nuclear_norm,
    packed,
    quantiles,
    save_entries,
    small,
    suggested_rate,
    unpacked,
    write_entries,
)
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(20)
MIB = 2**20


# -- the maths -------------------------------------------------------------------------------------------------------


def test_small_is_strict_and_takes_the_absolute_value():
    assert small(torch.tensor([0.5, -0.01, 0.02, 0.015, 0.0]), 0.015).tolist() == [False, True, False, False, True]


def test_small_compares_in_fp32():
    """The numbers of bf16 nearest to 0.002 are 0.0019989 and 0.0020142: in bf16 none would be below it."""
    stored = torch.tensor([0.0020142, 0.0019989], dtype=torch.bfloat16)
    assert small(stored, 0.002).tolist() == [False, True]
    assert torch.tensor(0.002, dtype=torch.bfloat16) == stored[1]


def test_quantiles_have_that_share_of_all_entries_below_them():
    values = [torch.arange(1.0, 61.0).view(6, 10) * -1, torch.arange(61.0, 101.0)]
    assert quantiles(values, [0.01, 0.1, 0.5]) == [2, 11, 51]
    (above,) = quantiles(values, [1.0])
    assert above > 100 and small(values[1], above).all()
    assert quantiles([torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([3.0]).double()], [0.34]) == [2]


def test_a_fraction_selects_that_many_entries_over_all_tensors():
    torch.manual_seed(0)
    parts = {"a": torch.randn(30, 40), "b": 10 * torch.randn(800)}
    theta, masks = chosen(parts, None, 0.1)
    assert sum(int(mask.sum()) for mask in masks.values()) == 200
    assert masks["a"].sum() > masks["b"].sum()
    assert all(torch.equal(mask, parts[name].abs() < theta) for name, mask in masks.items())
    assert chosen(parts, theta, None)[0] == theta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, None), r"threshold=0.5 selects 0 of 100 entries .*1%: 2, 10%: 11, 20%: 21, 50%: 51\. Give a threshold"),
        ((80.0, None), r"threshold=80.0 selects 79 of 100 entries .*1%: 2, 10%: 11, 20%: 21, 50%: 51\."),
        ((None, 0.001), r"fraction=0.001 selects 0 of 100 entries"),
    ],
)
def test_a_threshold_that_selects_nothing_or_most_says_the_count_and_the_quantiles(arguments, message):
    with pytest.raises(RecipeError, match=message):
        chosen({"p": torch.arange(1.0, 101.0)}, *arguments)


def test_exact_zeros_are_the_smallest_and_a_quantile_among_them_selects_nothing():
    with pytest.raises(RecipeError, match=r"fraction=0.1 selects 0 of 4 entries of the target; .*1%: 0, 10%: 0"):
        chosen({"p": torch.tensor([0.0, 0.0, 1.0, 2.0])}, None, 0.1)


def test_the_suggested_rate_has_the_papers_numbers():
    assert suggested_rate(2e-3) == pytest.approx(4.966e-4, rel=1e-4)
    assert suggested_rate(5e-4) == pytest.approx(8.395e-4, rel=1e-4)


def test_the_nuclear_norm_of_a_diagonal_and_its_subgradient():
    values = torch.tensor([3e-3, -4e-3], requires_grad=True)
    norm = nuclear_norm(values, torch.tensor([0, 3]), (2, 2))
    norm.backward()
    assert norm.item() == pytest.approx(7e-3)
    assert torch.allclose(values.grad, torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_nuclear_norm_is_the_sum_of_the_singular_values_with_their_gradient(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.6
    values = torch.randn(int(mask.sum()), dtype=torch.float64, requires_grad=True)
    full = torch.zeros(shape, dtype=torch.float64).masked_scatter(mask, values)
    expected = torch.linalg.svdvals(full).sum()
    found = nuclear_norm(values, mask.flatten().nonzero().squeeze(1).int(), shape)
    assert torch.allclose(found, expected)
    (grad,), (reference,) = torch.autograd.grad(found, values), torch.autograd.grad(expected, values)
    assert torch.allclose(grad, reference, atol=1e-12)


def test_the_nuclear_norm_leaves_out_directions_of_no_size_and_is_in_fp32_under_autocast():
    zero = torch.zeros(2, requires_grad=True)
    nuclear_norm(zero, torch.tensor([0, 3]), (2, 2)).backward()
    assert zero.grad.tolist() == [0, 0]
    half = torch.tensor([1.0, 2**-10], dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        norm = nuclear_norm(half, torch.tensor([0, 3]), (2, 2))
    norm.backward()
    assert norm.dtype == torch.float32 and norm.item() == 1 + 2**-10  # bf16 has nothing between 1 and 1 + 2^-7
    assert half.grad.dtype == torch.bfloat16


def test_the_matrix_is_drawn_uniformly_by_seed_and_step():
    first = [drawn(0, step, 3) for step in range(600)]
    assert first == [drawn(0, step, 3) for step in range(600)] != [drawn(1, step, 3) for step in range(600)]
    assert all(150 < first.count(which) < 250 for which in range(3))


def test_bits_hold_a_mask():
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == 2
    assert torch.equal(unpacked(bits, (3, 5)), mask)


def test_free_entries_go_to_a_file_and_back_onto_the_pre_trained_weights(tmp_path):
    before = mlp()
    after = copy.deepcopy(before)
    masks = {"0.weight": small(before[0].weight, 0.1), "4.bias": small(before[4].bias, 0.3)}
    with torch.no_grad():
        for name, mask in masks.items():
            after.get_parameter(name).add_(mask * 0.5)
    entries = entries_of(after.state_dict(), masks)
    index, values = entries["0.weight"]
    assert torch.equal(after[0].weight.flatten()[index], values) and len(index) == masks["0.weight"].sum()
    save_entries(entries, tmp_path / "free.safetensors")
    write_entries(before, load_entries(tmp_path / "free.safetensors"))
    assert same(weights(before), weights(after))


# -- in a Trainer ----------------------------------------------------------------------------------------------------


class Direct(LightningModule):
    """One vector of weights, whose gradient is the batch."""

    def __init__(self, values, **optimizer):
        super().__init__()
        self.p, self.optimizer = nn.Parameter(torch.tensor(values)), optimizer

    def training_step(self, batch, batch_idx):
        return (self.p * batch[0].sum(0)).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), **{"lr": 1e-3, **self.optimizer})


def only(**arguments):
    """SaRA of a module without a head and without matrices."""
    return SaRA(**{"progressive_at": None, "rank_weight": 0.0, "train_fully": [], **arguments})


@pytest.mark.parametrize("backprop", ["sparse", "dense"])
def test_the_cards_first_step_of_adamw(backprop):
    module = Direct([0.5, -0.01, 0.02])
    data = loader(torch.tensor([[1.0, 2.0, -3.0]]))
    quiet(callbacks=[only(threshold=0.015, backprop=backprop)]).fit(module, data)
    assert module.p[1].item() == pytest.approx(-0.0109999, abs=1e-9)
    assert torch.equal(module.p[[0, 2]], torch.tensor([0.5, 0.02]))


@pytest.mark.parametrize("backprop", ["sparse", "dense"])
def test_entries_that_have_grown_past_the_threshold_stop_when_half_of_the_steps_are_done(backprop):
    """[0.001, 0.0015, 1] at theta 0.002, four SGD-like steps; the second grows past it before the third begins."""
    module, seen = Direct([0.001, 0.0015, 1.0, 1.0], weight_decay=0.0, eps=1e-30), []
    gradients = torch.tensor([[-1e-9, -1.0, 5.0, 5.0]] * 4)
    watch = Watch(on_train_batch_end=lambda *args: seen.append(module.p.tolist()))
    quiet(callbacks=[only(threshold=2e-3, progressive_at=0.5, backprop=backprop), watch]).fit(
        Scaled(module), loader(gradients, size=1)
    )
    first, second = ([row[i] for row in seen] for i in (0, 1))
    assert second == pytest.approx([0.0025, 0.0035, 0.0035, 0.0035], abs=1e-6)
    assert second[1] == second[2] == second[3]
    assert first == pytest.approx([0.00101, 0.00102, 0.00103, 0.00104], abs=1e-6)
    assert all(row[2:] == [1, 1] for row in seen)


class Scaled(LightningModule):
    """A :class:`Direct` whose first entry moves a hundred times more slowly."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def training_step(self, batch, batch_idx):
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return SignDescent(self.parameters())


class SignDescent(torch.optim.Optimizer):
    """Moves by 1e-3 sign(g), or by 1e-5 sign(g) where |g| is below 1e-6."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= torch.where(p.grad.abs() < 1e-6, 1e-5, 1e-3) * p.grad.sign()
        return loss


class Wide(Classifier):
    """Two matrices with both sides at least 30, in fp64, under AdamW with a strong decay."""

    def __init__(self, **optimizer):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
        settings = {"lr": 5e-3, "weight_decay": 0.1, **optimizer}
        super().__init__(net, lambda parameters: torch.optim.AdamW(parameters, **settings))


MATRICES = ["net.0.weight", "net.2.weight"]


def recipe(**arguments):
    return SaRA(**{"threshold": None, "fraction": 0.3, "rank_weight": 0.02, "rank_min_size": 30, **arguments})


def train(callbacks, module=None, steps=20, **trainer):
    """20 steps on one batch each, or on micro-batches of it."""
    module = module or Wide()
    parts = trainer.get("accumulate_grad_batches", 1)
    settings = {"max_epochs": steps // 5, "gradient_clip_val": 0.05, **trainer}
    ckpt_path = settings.pop("ckpt_path", None)
    fit = quiet(callbacks=callbacks, **settings)
    fit.fit(module, loader(X.double(), Y, size=4 // parts), ckpt_path=ckpt_path)
    return module, fit


def by_hand(steps=20, at=10, weight=0.02):
    """The card in a plain loop: AdamW on everything, then all but the free entries put back."""
    net = Wide().net
    names = {f"net.{name}": p for name, p in net.named_parameters()}
    target = {name: p for name, p in names.items() if not name.startswith("net.4")}
    everything = torch.cat([p.detach().abs().flatten() for p in target.values()])
    theta = everything.sort().values[round(0.3 * len(everything))].item()
    free = {name: p.detach().abs() < theta for name, p in target.items()}
    at_first = sum(int(mask.sum()) for mask in free.values())
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.1)
    batches = [(X[i : i + 4].double(), Y[i : i + 4]) for i in range(0, 20, 4)]
    for step in range(steps):
        if step == at:
            free = {name: mask & (target[name].detach().abs() < theta) for name, mask in free.items()}
        x, y = batches[step % 5]
        loss = F.cross_entropy(net(x), y)
        name = ["net.2.weight"][drawn(0, step, 1)]
        if free[name].sum() > 100:
            loss = loss + weight * torch.linalg.svdvals(target[name] * free[name]).sum()
        optimizer.zero_grad()
        loss.backward()
        for name, mask in free.items():
            target[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        before = {name: p.detach().clone() for name, p in target.items()}
        optimizer.step()
        with torch.no_grad():
            for name, mask in free.items():
                target[name].copy_(torch.where(mask, target[name], before[name]))
    assert 0 < sum(int(mask.sum()) for mask in free.values()) < at_first, "the re-selection has stopped some"
    return {name: p.detach() for name, p in names.items()}


def furthest(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sparse_and_dense_train_as_a_plain_loop_does(accumulate):
    expected = by_hand()
    start, found = weights(Wide()), {}
    for backprop in ("sparse", "dense"):
        found[backprop], _ = train([recipe(backprop=backprop)], accumulate_grad_batches=accumulate)
        assert furthest(weights(found[backprop]), expected) < 1e-12
    assert furthest(weights(found["sparse"]), start) > 1e-2


def test_without_rank_loss_the_weights_are_others():
    with_it, _ = train([recipe()])
    without, _ = train([recipe(rank_weight=0.0)])
    assert furthest(weights(with_it), weights(without)) > 1e-4


def test_entries_outside_the_mask_are_bitwise_as_they_were():
    for backprop in ("sparse", "dense"):
        callback, start = recipe(backprop=backprop), weights(Wide())
        module, _ = train([callback])
        entries = callback.entries(module)
        assert entries.keys() == start.keys() - {"net.4.weight", "net.4.bias"}
        for name, (index, values) in entries.items():
            rest = torch.ones(start[name].numel(), dtype=torch.bool).index_fill_(0, index, False)
            assert torch.equal(module.get_parameter(name).flatten()[rest], start[name].flatten()[rest])
            assert not torch.equal(values, start[name].flatten()[index])
        assert not torch.equal(module.net[4].weight, start["net.4.weight"]), "the head trains whole"


def test_of_all_entries_without_its_own_terms_it_is_adamw_bitwise():
    plain, _ = train([])
    settings = {"progressive_at": None, "rank_weight": 0.0, "train_fully": [], "fraction": 1 - 1e-9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, _ = train([recipe(backprop="dense", **settings)])
        sparse, _ = train([recipe(**settings)])
    assert same(weights(dense), weights(plain))
    assert furthest(weights(sparse), weights(plain)) < 1e-12


def test_a_parameter_without_a_small_entry_is_frozen_and_has_no_leaf():
    class Large(Wide):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[2].weight.add_(self.net[2].weight.sign())

    callback, start = recipe(rank_weight=0.0, fraction=0.1), weights(Large())
    module, _ = train([callback], Large())
    assert torch.equal(module.net[2].weight, start["net.2.weight"])
    assert "net.2.weight" not in callback.operation.spec.masks
    assert not torch.equal(module.net[0].weight, start["net.0.weight"])


def test_the_optimizer_holds_moments_of_the_free_entries_alone_under_the_users_rules():
    class Rules(Wide):
        def configure_optimizers(self):
            decayed = [p for p in self.parameters() if p.dim() > 1]
            others = [p for p in self.parameters() if p.dim() <= 1]
            return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)

    sizes = []

    def look(trainer, module, *args):
        (optimizer,) = trainer.optimizers
        sizes.append(
            [[len(optimizer.state[p]["exp_avg"].flatten()) for p in g["params"]] for g in optimizer.param_groups]
        )
        assert all(dict(module.named_parameters())[name].grad is None for name in callback.operation.leaves)

    callback = recipe()
    module, _ = train([callback, Watch(on_train_batch_end=look)], Rules(), steps=5)
    count = {name: len(index) for name, (index, _) in callback.entries(module).items()}
    names = ["net.0.weight", "net.2.weight"], ["net.0.bias", "net.2.bias"]
    assert sizes[-1] == [[count[n] for n in names[0]] + [90], [count[n] for n in names[1]] + [3]]


def test_an_optimizer_of_what_requires_a_gradient_gets_the_leaves_too():
    class Filter(Wide):
        def configure_optimizers(self):
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.1)

    filtered, plain = train([recipe()], Filter())[0], train([recipe()])[0]
    assert same(weights(filtered), weights(plain))


def test_what_the_module_froze_stays_frozen_unless_it_is_named():
    for backprop in ("sparse", "dense"):
        module = Wide()
        start = weights(module)
        module.net[0].requires_grad_(False)
        train([recipe(rank_weight=0.0, backprop=backprop)], module)
        assert torch.equal(module.net[0].weight, start["net.0.weight"])
        module = Wide()
        module.net[0].requires_grad_(False)
        train([recipe(rank_weight=0.0, target=["net.0.weight"], backprop=backprop)], module)
        assert not torch.equal(module.net[0].weight, start["net.0.weight"])
        assert torch.equal(module.net[2].weight, start["net.2.weight"])
        assert not module.net[0].weight.requires_grad and module.net[2].weight.requires_grad


def test_clipping_sees_the_norm_of_the_free_entries_and_the_head():
    norms = {}
    for backprop in ("sparse", "dense"):
        seen = norms[backprop] = []

        def note(trainer, module, seen=seen):
            (optimizer,) = trainer.optimizers
            grads = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            seen.append(torch.cat(grads).norm().item())

        class Notes(Wide):
            def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
                note(self.trainer, self)

        train([recipe(backprop=backprop)], Notes())
    assert norms["sparse"] == pytest.approx(norms["dense"], rel=1e-9)
    assert len(norms["sparse"]) == 20


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_reselection_comes_with_an_exact_step_and_never_in_mid_window(accumulate):
    changes, callback = [], recipe(progressive_at=0.3)

    def note(trainer, *args):
        stopped = any(target.active is not None for target in callback._targets.values())
        changes.append((trainer.global_step, stopped))

    train([callback, Watch(on_train_batch_start=note)], accumulate_grad_batches=accumulate)
    assert changes == [(step, step >= 6) for step in range(20) for _ in range(accumulate)]


def test_the_quantities_of_the_paper_are_logged(tmp_path):
    callback = recipe()
    train([callback], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    rows = [line.split(",") for line in Path(tmp_path, "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    found = {name: [float(row[i]) for row in rows[1:] if row[i]] for i, name in enumerate(rows[0])}
    assert len(found["sara/rank_loss"]) == len(found["sara/nuclear_norm"]) == 20
    assert found["sara/rank_loss"] == pytest.approx([0.02 * each for each in found["sara/nuclear_norm"]])
    trainable, below = found["sara/trainable"], found["sara/below_threshold"]
    of_all = sum(len(bits) for bits, _ in callback.entries(Wide()).values())
    assert trainable[:2] == [of_all] * 2 and trainable[2] == trainable[3] < of_all
    assert all(0 < share < 1 for share in below)


def test_a_matrix_with_a_hundred_free_entries_or_fewer_has_no_rank_loss(monkeypatch):
    plain, _ = train([recipe(rank_weight=0.0)])
    monkeypatch.setattr(sara, "_TOO_FEW", 10**6)
    without, _ = train([recipe()])
    assert same(weights(plain), weights(without))


def test_a_tied_weight_has_one_leaf_and_stays_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.mix, self.out = nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 9, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x):
            return self.out(torch.tanh(self.mix(self.words((8 * x).long()).mean(1))))

    found = {}
    for backprop in ("sparse", "dense"):
        module = Classifier(Tied(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        callback = recipe(train_fully=[], backprop=backprop, rank_min_size=9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet(callbacks=[callback], max_epochs=3).fit(module, loader(X, Y))
        assert module.net.out.weight is module.net.words.weight
        assert list(callback.operation.spec.masks) == ["net.words.weight", "net.mix.weight", "net.mix.bias"]
        found[backprop] = weights(module)
    assert furthest(found["sparse"], found["dense"]) < 1e-6


def test_a_head_inside_the_target_is_warned_of_by_name():
    with pytest.warns(
        UserWarning, match=r"of the head train \(net.4.weight, net.4.bias\). If it is new, .* train_fully"
    ):
        train([recipe(train_fully=[])], steps=5)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_resume_before_at_and_after_the_reselection_ends_the_same(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    for backprop in ("sparse", "dense"):
        whole, _ = train([recipe(backprop=backprop), keep], enable_checkpointing=True)
        for step in (5, 10, 15):
            trained = Wide()
            trained.load_state_dict({name: value + 0.01 for name, value in whole.state_dict().items()})
            path = tmp_path / f"step={step}.ckpt"
            train([recipe(backprop=backprop)], trained, ckpt_path=str(path))
            assert same(weights(trained), weights(whole)), f"{backprop}, after step {step}"
            path.unlink()


def test_a_checkpoint_is_the_weights_the_moments_of_the_leaves_and_bits(tmp_path):
    path, rest = tmp_path / "last.ckpt", {}

    class Big(Wide):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net.insert(4, nn.Linear(30, 30 * 2000).double())
            self.net.insert(5, nn.Unflatten(1, (2000, 30)))
            self.net.append(nn.Flatten())

    for name, callbacks in (("plain", []), ("sara", [recipe(fraction=0.1)])):
        saves = Watch(on_train_batch_end=lambda trainer, *args: trainer.save_checkpoint(path))
        quiet(callbacks=[*callbacks, saves], limit_train_batches=1, enable_checkpointing=False).fit(
            Big(), loader(X[:1].double(), Y[:1])
        )
        rest[name] = path.stat().st_size
    n = sum(p.numel() for p in Big().parameters())
    assert rest["plain"] == pytest.approx(3 * 8 * n, rel=0.01)
    assert rest["sara"] == pytest.approx((8 + 16 * 0.1 + 1 / 8) * n, rel=0.01)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(Big().state_dict())


def test_a_checkpoint_evaluates_with_the_recipe_and_without_it(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    module, found = Wide(), []
    seen = Watch(on_train_batch_end=lambda trainer, m, *args: found.append(m(X.double()).detach().clone()))
    train([recipe(), seen, keep], module, steps=10, enable_checkpointing=True)
    for callbacks in ([recipe()], []):
        other = Wide()
        predicted = []
        watch = Watch(on_validation_start=lambda trainer, m, into=predicted: into.append(m(X.double())))
        quiet(callbacks=[*callbacks, watch]).validate(
            other, loader(X.double(), Y), ckpt_path=str(tmp_path / "step=7.ckpt"), verbose=False
        )
        assert torch.equal(predicted[0], found[6])


def test_fitted_again_it_chooses_again_from_the_weights_as_they_are_now():
    callback, module = recipe(), Wide()
    train([callback], module)
    first = callback.operation.spec.masks
    train([callback], module)
    assert first.keys() == callback.operation.spec.masks.keys()
    assert any(not torch.equal(first[name], bits) for name, bits in callback.operation.spec.masks.items())


def test_entries_can_be_asked_for_during_the_fit_and_not_before_it():
    callback, seen = recipe(), []

    def note(trainer, module, *args):
        seen.append(
            (
                callback.entries(module),
                {n: leaf.values.detach().clone() for n, leaf in callback.operation.leaves.items()},
            )
        )

    with pytest.raises(RecipeError, match="no free entries before a fit has begun"):
        callback.entries(Wide())
    train([callback, Watch(on_train_batch_end=note)], steps=5)
    entries, leaves = seen[-1]
    assert all(torch.equal(values, leaves[name]) for name, (_, values) in entries.items())


def test_a_resume_without_it_is_refused_though_the_weights_have_stock_names(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    train([recipe(), keep], steps=5, enable_checkpointing=True)
    with pytest.raises(RecipeError, match="the checkpoint holds the sparse parameters of SaRA, which is not among"):
        train([ProgressiveUnfreezing(at=(0, 1))], ckpt_path=str(tmp_path / "step=5.ckpt"))


# -- errors ----------------------------------------------------------------------------------------------------------


def test_an_endless_fit_needs_progressive_at_none():
    def endless():
        while True:
            yield X.double(), Y

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return endless()

    def fit(callback, module):
        stop = Watch(on_train_batch_end=lambda trainer, *args: setattr(trainer, "should_stop", True))
        data = torch.utils.data.DataLoader(Stream(), batch_size=None)
        quiet(callbacks=[callback, stop], max_epochs=-1, min_steps=None).fit(module, data)

    module = Wide()
    start = weights(module)
    with pytest.raises(RecipeError, match=r"SaRA: progressive_at=0.5 \(or None for never\) needs Trainer\(max_steps"):
        fit(recipe(), module)
    assert same(weights(module), start) and type(module.net[0]) is nn.Linear
    fit(recipe(progressive_at=None), module)
    assert not same(weights(module), start)


def test_too_small_matrices_are_an_error_that_names_the_largest():
    with pytest.raises(
        RecipeError, match=r"both sides at least rank_min_size=65, and the largest matrix is 30 x 40; set"
    ):
        train([recipe(rank_min_size=65)])
    with pytest.raises(RecipeError, match="rank_min_size=30, and there is no matrix"):
        train([recipe(target=["*.bias"])])


def test_a_weight_stored_in_fp16_is_an_error():
    class Half(Wide):
        def __init__(self):
            super().__init__()
            self.net[2].half()

    with pytest.raises(RecipeError, match=r"SaRA: net.2.weight is stored in float16 \(quantised\?\)"):
        train([recipe()], Half())
