"""Annealed gradient noise: its variance step by step, where it is added, and who draws what."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_recipes.callbacks import GradientNoise, LangevinMixture, ProgressiveUnfreezing
from lightning_recipes.callbacks.regularization.gradient_noise import deviation
from lightning_recipes.core import noise
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.noise import add_noise_, normal_like
from lightning_recipes.core.random import generator
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class Flat(Classifier):
    """A loss whose gradient is 0: only the noise moves the weights."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx)


def fit(module, *callbacks, x=X, y=Y, **kwargs):
    trainer = quiet(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, loader(x, y))
    return trainer


def moved(module, start=None):
    """What each parameter was moved by, in the order of their names."""
    start = weights(mlp()) if start is None else start
    return {name: p.detach() - start[name] for name, p in sorted(module.net.named_parameters())}


# -- the maths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (0.01, [0.1, 0.082645, 0.053088, 0.028184, 0.014962, 0.007943]),
        (0.3, [0.547723, 0.452665, 0.290777, 0.154369, 0.081952, 0.043507]),
        (1.0, [1.0, 0.826450, 0.530884, 0.281838, 0.149624, 0.079433]),
    ],
)
def test_the_deviation_has_the_numbers_of_the_card(eta, expected):
    assert [deviation(t, eta, 0.55) for t in (0, 1, 9, 99, 999, 9999)] == pytest.approx(expected, abs=6e-7)


def test_the_first_deviation_is_the_root_of_eta_and_gamma_0_keeps_it():
    assert deviation(0, 0.3, 0.55) == math.sqrt(0.3)
    assert [deviation(t, 0.3, 0.0) for t in (0, 7, 999)] == [math.sqrt(0.3)] * 3


def test_the_noise_is_standard_normal_times_sigma():
    gradients = [torch.full((300, 500), 2.0), torch.full((50_000,), 2.0)]
    add_noise_(gradients, 0.25, 3)
    for g in gradients:
        noise = (g - 2).flatten() / 0.25
        assert abs(noise.mean()) < 0.02
        assert noise.std().item() == pytest.approx(1, abs=0.01)
        assert (noise.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.006)
    a, b = gradients[0].flatten()[:50_000], gradients[1]
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.02


def test_a_key_gives_the_same_noise_again_and_another_key_other_noise():
    def noise(*key):
        tensors = [torch.zeros(7, 3), torch.zeros(40)]
        add_noise_(tensors, 1.0, *key)
        return torch.cat([t.flatten() for t in tensors])

    assert torch.equal(noise(0, "a", 5), noise(0, "a", 5))
    for other in [(1, "a", 5), (0, "b", 5), (0, "a", 6)]:
        assert abs(torch.corrcoef(torch.stack([noise(0, "a", 5), noise(*other)]))[0, 1]) < 0.4


def test_the_numbers_are_those_of_one_draw_in_order():
    tensors = [torch.zeros(4, 5), torch.zeros(30)]
    add_noise_(tensors, 0.5, 9)
    drawn = 0.5 * torch.randn(50, generator=generator(9, 0))
    assert torch.equal(torch.cat([t.flatten() for t in tensors]), drawn)


def test_a_large_network_is_drawn_in_portions(monkeypatch):
    sizes = []

    def watched(tensors, generator):
        sizes.append([t.numel() for t in tensors])
        return normal_like(tensors, generator)

    monkeypatch.setattr(noise, "normal_like", watched)
    monkeypatch.setattr(noise, "_AT_ONCE", 100)
    tensors = [torch.zeros(n) for n in (60, 40, 1, 250, 99)]
    add_noise_(tensors, 1.0, 0)
    assert sizes == [[60, 40], [1], [250], [99]]
    assert all(abs(t.std() - 1) < 0.3 for t in tensors if len(t) > 1)
    assert not torch.equal(tensors[0][:40], tensors[1])


def test_16_bit_gradients_get_noise_that_was_drawn_in_32_and_64_bit_ones_in_64():
    half, double = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.float64)
    add_noise_([half, double], 1.0, 4)
    assert torch.equal(half, torch.randn(64, generator=generator(4, 0)).bfloat16())
    assert torch.equal(double, torch.randn(64, generator=generator(4, 1), dtype=torch.float64))


# -- where it is added -------------------------------------------------------------------------------------------------


def test_without_a_gradient_a_weight_walks_as_far_as_the_card_says():
    """1000 steps at eta 0.01: standard deviation L * 0.693411, on 10^5 weights to 1 %."""
    torch.manual_seed(0)
    module = Flat(nn.Linear(1000, 100, bias=False), sgd(0.5))
    start = module.net.weight.detach().clone()
    x, y = torch.zeros(1000, 1000), torch.zeros(1000, dtype=torch.int64)
    quiet(callbacks=[GradientNoise()]).fit(module, loader(x, y, size=1))
    walk = (module.net.weight - start).detach()
    assert walk.std().item() == pytest.approx(0.5 * 0.693411, rel=0.01)
    assert abs(walk.mean().item()) < 0.005


def test_noise_is_added_to_the_clipped_gradient_with_the_deviation_of_each_step():
    module, seen = Classifier(optimizer=sgd(1.0)), []
    watch = Watch(on_train_batch_start=lambda t, m, *rest: seen.append(weights(m.net)))
    fit(module, GradientNoise(eta=0.01, seed=5), watch, gradient_clip_val=0.1)
    seen.append(weights(module.net))
    for step in range(4):
        net = mlp()
        net.load_state_dict(seen[step])
        F.cross_entropy(net(X[4 * step : 4 * step + 4]), Y[4 * step : 4 * step + 4]).backward()
        gradients = [p.grad for _, p in sorted(net.named_parameters())]
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        add_noise_(gradients, deviation(step, 0.01, 0.55), 5, "GradientNoise", step)
        for (name, p), g in zip(sorted(net.named_parameters()), gradients, strict=True):
            assert torch.allclose(seen[step + 1][name], p - g, atol=1e-6)


def test_with_a_tiny_threshold_the_step_is_as_long_as_the_noise_and_before_clipping_as_the_threshold():
    lengths = {}
    for after in (True, False):
        module = Classifier(mlp(width=100), sgd(1.0))
        start = weights(module.net)
        noise = GradientNoise(eta=1.0, after_clipping=after)
        fit(module, noise, limit_train_batches=1, gradient_clip_val=1e-3)
        lengths[after] = torch.cat([d.flatten() for d in moved(module, start).values()])
    assert lengths[True].norm().item() == pytest.approx(math.sqrt(len(lengths[True])), rel=0.05)
    assert lengths[False].norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_noise_is_added_once_an_optimizer_step_and_steps_are_counted_not_batches():
    module, recipe = Flat(optimizer=sgd(1.0)), GradientNoise(eta=0.04)
    start = weights(module.net)
    fit(module, recipe, accumulate_grad_batches=2, max_epochs=2)
    assert recipe.state()["steps"] == 4
    expected = [torch.zeros_like(p) for _, p in sorted(module.net.named_parameters())]
    for step in range(4):
        add_noise_(expected, deviation(step, 0.04, 0.55), 0, "GradientNoise", step)
    for got, want in zip(moved(module, start).values(), expected, strict=True):
        assert torch.allclose(got, -want, atol=1e-6)


def test_start_and_stop_bound_the_noise_and_steps_count_from_0_all_the_same():
    module, path = Flat(optimizer=sgd(1.0)), []
    watch = Watch(on_train_batch_end=lambda t, m, *rest: path.append(moved(m)))
    fit(module, GradientNoise(eta=1.0, start_step=1, stop_step=3), watch)
    lengths = [torch.cat([d.flatten() for d in each.values()]).norm().item() for each in path]
    assert lengths[0] == 0 and lengths[1] > 0 and lengths[2] != lengths[1] and lengths[3] == lengths[2]
    expected = [torch.zeros_like(p) for _, p in sorted(module.net.named_parameters())]
    for step in (1, 2):
        add_noise_(expected, deviation(step, 1.0, 0.55), 0, "GradientNoise", step)
    assert all(torch.allclose(a, -b, atol=1e-6) for a, b in zip(path[-1].values(), expected, strict=True))


def test_eta_0_draws_nothing_and_trains_bitwise_as_without(monkeypatch):
    monkeypatch.setattr(noise, "normal_like", None)
    plain, off = Classifier(), Classifier()
    fit(plain)
    fit(off, GradientNoise(eta=0.0))
    assert same(weights(plain), weights(off))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    fit(Classifier())
    without = torch.rand(3)
    torch.manual_seed(7)
    fit(Classifier(), GradientNoise(eta=1.0))
    assert torch.equal(torch.rand(3), without)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_any_optimizer_gets_the_noisy_gradient(optimizer):
    module, plain = (Classifier(optimizer=lambda p: getattr(torch.optim, optimizer)(p, lr=0.01)) for _ in range(2))
    fit(module, GradientNoise(eta=0.1))
    fit(plain)
    assert not same(weights(module), weights(plain))


# -- which parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "noisy"),
    [
        ("head", {"4.weight", "4.bias"}),
        (["0", "2.bias"], {"0.weight", "0.bias", "2.bias"}),
        ("*.weight", {"0.weight", "2.weight", "4.weight"}),
        (lambda name, p: p.dim() == 1, {"0.bias", "2.bias", "4.bias"}),
    ],
)
def test_only_the_chosen_parameters_get_noise(parameters, noisy):
    module = Flat(optimizer=sgd(1.0))
    fit(module, GradientNoise(eta=1.0, parameters=parameters))
    assert {name for name, d in moved(module).items() if d.any()} == noisy


def test_frozen_and_unused_parameters_get_no_noise_and_no_gradient():
    module = Flat(optimizer=sgd(1.0))
    module.net[0].requires_grad_(False)
    module.unused = nn.Linear(2, 2)
    before = weights(module.unused)
    fit(module, GradientNoise(eta=1.0))
    assert {name.split(".")[0] for name, d in moved(module).items() if d.any()} == {"2", "4"}
    assert same(before, weights(module.unused))
    assert module.net[0].weight.grad is None


def test_noise_follows_what_trains_now():
    module, awake = Flat(optimizer=sgd(1.0)), []
    watch = Watch(
        on_train_epoch_end=lambda t, m: awake.append({n.split(".")[0] for n, d in moved(m).items() if d.any()})
    )
    fit(
        module,
        ProgressiveUnfreezing(groups=[["4"], ["2"], ["0"]], at=(0, 1, 2)),
        GradientNoise(eta=1.0),
        watch,
        max_epochs=3,
    )
    assert awake == [{"4"}, {"2", "4"}, {"0", "2", "4"}]


def test_the_noise_does_not_depend_on_the_order_in_which_layers_were_made():
    class Named(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(6, 3))
                nn.init.zeros_(getattr(self, name).weight)
                nn.init.zeros_(getattr(self, name).bias)

        def forward(self, x):
            return self.a(x) + self.b(x)

    ends = []
    for order in ("ab", "ba"):
        module = Flat(Named(order), sgd(1.0))
        fit(module, GradientNoise(eta=1.0))
        ends.append(weights(module))
    assert same(ends[0], {name: ends[1][name] for name in ends[0]})


# -- looking -----------------------------------------------------------------------------------------------------------


def test_sigma_and_the_ratio_of_noise_to_gradient_are_logged():
    module, logged = Classifier(optimizer=sgd(0.0)), []
    watch = Watch(
        on_train_batch_end=lambda t, *rest: logged.append({k: float(v) for k, v in t.callback_metrics.items()})
    )
    fit(module, GradientNoise(eta=0.04), watch, gradient_clip_val=0.01, log_every_n_steps=1)
    size = sum(p.numel() for p in module.parameters())
    for step, values in enumerate(logged):
        assert values["gradient_noise/sigma"] == pytest.approx(deviation(step, 0.04, 0.55))
        assert values["gradient_noise/ratio"] == pytest.approx(
            values["gradient_noise/sigma"] * size**0.5 / 0.01, rel=1e-3
        )


def test_it_logs_where_the_loggers_write():
    logged = []
    watch = Watch(on_train_batch_end=lambda t, *rest: logged.append("gradient_noise/sigma" in t.callback_metrics))
    fit(Classifier(), GradientNoise(), watch, log_every_n_steps=3)
    assert logged[:3] == [False, False, True]
    logged.clear()
    fit(Classifier(), GradientNoise(), watch, log_every_n_steps=0)
    assert not any(logged)


def test_noise_that_drowns_the_gradient_is_worth_a_word_once_after_fifty_steps_of_it():
    with pytest.warns(
        UserWarning, match=r"last 50 steps the noise was more than 100 times the gradient; eta=1.0"
    ) as said:
        quiet(callbacks=[GradientNoise(gamma=0.0, eta=1.0)], max_epochs=220).fit(Flat(), loader(X, Y, size=16))
    assert sum("100 times" in str(each.message) for each in said) == 1


def test_short_of_fifty_steps_after_the_warm_up_nothing_is_said(recwarn):
    quiet(callbacks=[GradientNoise(eta=1.0, gamma=0.0)], max_epochs=99).fit(Flat(), loader(X, Y, size=16))
    assert not [each for each in recwarn if "100 times" in str(each.message)]


# -- resume and refusals -----------------------------------------------------------------------------------------------


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, resumed = Classifier(), Classifier()
    fit(whole, GradientNoise(eta=1.0), keep, max_epochs=3, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["GradientNoise"]
    assert saved["state"] == {"steps": 4, "drowned": 0, "names": None}
    trainer = quiet(callbacks=[GradientNoise(eta=1.0)], max_epochs=3)
    trainer.fit(resumed, loader(X, Y), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(weights(whole), weights(resumed))


def test_a_function_is_the_same_function_on_a_resume_if_it_chooses_the_same(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(Classifier(), GradientNoise(parameters=lambda n, p: p.dim() == 1), keep, enable_checkpointing=True)

    def resume(choice):
        trainer = quiet(callbacks=[GradientNoise(parameters=choice)], max_epochs=2)
        trainer.fit(Classifier(), loader(X, Y), ckpt_path=tmp_path / "epoch=0.ckpt")

    resume(lambda n, p: "bias" in n)
    for other in (lambda n, p: p.dim() == 2, None, "head"):
        with pytest.raises(
            RecipeError, match=r"GradientNoise: .*`parameters` chose 3 parameters, the first 'net\.0\.bias'"
        ):
            resume(other)


def test_a_fit_anew_begins_at_step_0_and_one_that_goes_on_does_not():
    recipe, module = GradientNoise(), Classifier()
    trainer = fit(module, recipe)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(X, Y))
    assert recipe.state()["steps"] == 8
    fit(Classifier(), recipe)
    assert recipe.state()["steps"] == 4


def test_sparse_gradients_are_refused_where_they_would_get_noise():
    class Words(Classifier):
        def __init__(self, sparse=True, functional=False):
            super().__init__(nn.Linear(4, 3))
            self.words, self.functional = nn.Embedding(9, 4, sparse=sparse), functional

        def forward(self, x):
            index = x.argmax(1)
            return self.net(
                F.embedding(index, self.words.weight, sparse=True) if self.functional else self.words(index)
            )

    with pytest.raises(RecipeError, match="GradientNoise: words has sparse gradients, and noise is dense"):
        fit(Words(), GradientNoise())
    with pytest.raises(RecipeError, match="GradientNoise: a gradient is sparse, and noise is dense"):
        fit(Words(sparse=False, functional=True), GradientNoise())
    module = Words()
    fit(module, GradientNoise(parameters="net"))
    fit(Words(sparse=False), GradientNoise())


def test_a_second_source_of_noise_is_refused_by_its_name():
    for callbacks in ([LangevinMixture(), GradientNoise()], [GradientNoise(), LangevinMixture()]):
        with pytest.raises(RecipeError, match=r"LangevinMixture.* cannot share a Trainer: both add noise"):
            fit(Classifier(), *callbacks)


def test_a_recipe_can_be_copied_before_and_after_a_fit():
    recipe = GradientNoise()
    fit(Classifier(), recipe)
    assert copy.deepcopy(recipe).arguments == recipe.arguments


def half():
    """fp16 on the CPU: autocast off, the scaler on."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_under_fp16_noise_is_added_to_the_unscaled_gradient_and_a_skipped_step_counts():
    class Breaks(Flat):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    module, recipe = Breaks(optimizer=sgd(1.0)), GradientNoise(eta=1.0)
    trainer = fit(module, recipe, plugins=[half()])
    expected = [torch.zeros_like(p) for _, p in sorted(module.net.named_parameters())]
    for step in (0, 2, 3):
        add_noise_(expected, deviation(step, 1.0, 0.55), 0, "GradientNoise", step)
    assert all(torch.allclose(a, -b, atol=1e-6) for a, b in zip(moved(module).values(), expected, strict=True))
    assert recipe.state()["steps"] == trainer.global_step == 4


def test_a_fused_optimizer_under_fp16_is_refused():
    module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
    with pytest.raises(RecipeError, match=r"GradientNoise .*AdamW\(fused=True\) unscales"):
        fit(module, GradientNoise(), plugins=[half()])
