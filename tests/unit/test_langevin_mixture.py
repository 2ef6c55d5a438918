"""SGLD: the law that it samples, the mixture of its samples, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_recipes.callbacks import PSKD, ExactResume, LangevinMixture
from lightning_recipes.callbacks.regularization.langevin_mixture import (
    gradient_deviation,
    noise_deviation,
    prior_strength,
    slot,
    stationary_variance,
)
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.likelihood import GaussianLogProb, code_lengths, mixture_log_prob, mixture_sums
from lightning_recipes.core.noise import add_noise_
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.step import observe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(32)
SHORT = {"burn_in_steps": 2, "sample_every": 2, "max_samples": 3}


def fit(module, *callbacks, epochs=1, data=None, validation=None, **settings):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **settings)
    trainer.fit(module, loader(X, Y) if data is None else data, validation)
    return trainer


def short(**arguments):
    return LangevinMixture(**{**SHORT, **arguments})


# -- the maths -------------------------------------------------------------------------------------------------------


def test_the_noise_is_that_of_a_mean_loss():
    assert noise_deviation(0.2, 1.0, 20) == pytest.approx(math.sqrt(0.02))
    assert noise_deviation(torch.tensor(0.2), 1.0, 20) == pytest.approx(math.sqrt(0.02))
    assert gradient_deviation(0.2, 1.0, 20) * 0.2 == pytest.approx(noise_deviation(0.2, 1.0, 20))
    assert gradient_deviation(torch.tensor(0.2), 1.0, 20) == pytest.approx(gradient_deviation(0.2, 1.0, 20))
    assert gradient_deviation(0.0, 1.0, 20) == gradient_deviation(torch.tensor(0.0), 1.0, 20) == 0


def test_the_prior_is_an_l2_coefficient_that_the_temperature_scales():
    assert prior_strength(1.0, 20, 2.0) == pytest.approx(1 / 80)
    assert prior_strength(0.25, 20, 2.0) == pytest.approx(1 / 320)
    assert prior_strength(1.0, 20, None) == 0


def test_the_discrete_chain_is_wider_than_the_posterior():
    h = 1 + prior_strength(1.0, 20, 2.0)
    assert stationary_variance(0.2, h, 1.0, 20) == pytest.approx(0.05495, abs=1e-5)
    assert stationary_variance(1e-6, h, 1.0, 20) == pytest.approx(1 / 20.25, rel=1e-5)
    # the prior is not tempered: at T = 1/4 its pull is a quarter, and 80.25 the precision
    cold = 1 + prior_strength(0.25, 20, 2.0)
    assert stationary_variance(0.2, cold, 0.25, 20) == pytest.approx(0.013850, abs=1e-6)
    assert stationary_variance(1e-6, cold, 0.25, 20) == pytest.approx(1 / 80.25, rel=1e-5)


def test_probabilities_are_averaged_and_not_logits():
    p = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], dtype=torch.float64)
    assert torch.allclose(mixture_log_prob(p.log()).exp(), torch.tensor([[0.7, 0.3]], dtype=torch.float64))
    of_logits = p.log().mean(0).softmax(-1)
    assert float(of_logits[0, 0]) == pytest.approx(0.75), "their geometric mean is another one"


def test_the_mixture_of_equals_is_each_of_them():
    one = torch.randn(1, 5, 4).log_softmax(-1)
    same_thrice = one.expand(3, -1, -1)
    assert torch.allclose(mixture_log_prob(same_thrice), one[0], atol=1e-6)
    sums = mixture_sums(same_thrice, mixture_log_prob(same_thrice), torch.arange(5) % 4)
    assert float(sums[0]) == pytest.approx(float(sums[1]), rel=1e-6) and float(sums[2]) == pytest.approx(0, abs=1e-5)


def test_the_mixture_is_never_worse_than_its_members_on_average():
    for seed in range(20):
        z = 3 * torch.randn(7, 11, 4, generator=torch.Generator().manual_seed(seed))
        log_probs = z.log_softmax(-1)
        mixed, mean, apart, labelled, count = mixture_sums(log_probs, mixture_log_prob(log_probs), torch.arange(11) % 4)
        assert mixed <= mean and apart > 0 and labelled == count == 11


def test_the_figures_of_a_batch_are_those_by_hand():
    p = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]])
    mixed, mean, apart, labelled, count = mixture_sums(p.log(), mixture_log_prob(p.log()), torch.tensor([1])).tolist()
    assert mixed == pytest.approx(-math.log(0.3)) and mean == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    first = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    second = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    assert apart == pytest.approx((first + second) / 2, rel=1e-5) and (labelled, count) == (1, 1)
    assert mixture_sums(p.log(), mixture_log_prob(p.log()), None).tolist()[3:] == [0, 1]


def test_a_probability_of_0_does_no_harm():
    log_probs = torch.tensor([[[0.0, -math.inf]], [[-math.inf, 0.0]]])
    assert torch.allclose(mixture_log_prob(log_probs).exp(), torch.tensor([[0.5, 0.5]]))
    assert float(mixture_sums(log_probs, mixture_log_prob(log_probs), None)[2]) == pytest.approx(math.log(2))


def test_a_reservoir_keeps_early_and_late_alike():
    kept = torch.zeros(40)
    for seed in range(400):
        held = [None] * 8
        for count in range(40):
            place = slot(count, 8, seed)
            if place is not None:
                held[place] = count
        assert None not in held and len(set(held)) == 8
        kept[held] += 1
    share = kept / 400
    assert share.sub(0.2).abs().max() < 0.08
    assert share[:20].mean() == pytest.approx(0.2, abs=0.02)


# -- the law ---------------------------------------------------------------------------------------------------------


class GaussianMean(LightningModule):
    """Many chains at once for the mean of 20 numbers of variance 1, each parameter one of them."""

    def __init__(self, chains=20_000, optimizer=None):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(chains))
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.2))

    def training_step(self, batch, batch_idx):
        return ((self.theta[None] - batch[0][:, None]).square() / 2).mean(0).sum()

    def configure_optimizers(self):
        return self.make(self.parameters())


NUMBERS = torch.linspace(-1, 3, 20)


def chains(recipe, epochs=45, **settings):
    module = GaussianMean()
    fit(module, recipe, epochs=epochs, data=loader(NUMBERS, size=20), **settings)
    return module.theta.detach().double()


@pytest.mark.parametrize("inject", ["param", "grad"])
@pytest.mark.parametrize(("temperature", "variance"), [(1.0, 0.05495), (0.25, 0.013850)])
def test_the_chain_samples_the_posterior_of_a_gaussian_mean(temperature, variance, inject):
    recipe = LangevinMixture(temperature, 2.0, None, 1, 30, evaluate=[], inject=inject)
    theta = chains(recipe)
    tempered = temperature / 4
    posterior = NUMBERS.sum().item() / (20 + tempered)
    assert theta.mean().item() == pytest.approx(posterior, abs=4 * math.sqrt(variance / len(theta)))
    assert theta.var().item() == pytest.approx(variance, rel=0.04)


def test_a_flat_prior_has_the_mean_of_the_data():
    theta = chains(LangevinMixture(1.0, None, None, 1, 30, evaluate=[]))
    assert theta.mean().item() == pytest.approx(1.0, abs=0.01)
    assert theta.var().item() == pytest.approx(stationary_variance(0.2, 1.0, 1.0, 20), rel=0.04)


def test_the_two_ways_to_inject_are_one_for_plain_sgd():
    ends = [chains(LangevinMixture(prior_std=2.0, burn_in_steps=1, sample_every=1, evaluate=[], inject=how), epochs=5)
            for how in ("param", "grad")]  # fmt: skip
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_clipping_shortens_neither_the_noise_nor_the_prior():
    recipe = LangevinMixture(prior_std=2.0, burn_in_steps=0, sample_every=1, evaluate=[], seed=4)
    module = GaussianMean(4)
    with torch.no_grad():
        module.theta.fill_(5.0)
    with pytest.warns(UserWarning, match="gradient_clip_val=1e-09 shortens the gradient of the likelihood"):
        fit(module, recipe, data=loader(NUMBERS, size=20), gradient_clip_val=1e-9)
    expected = [torch.full((4,), 5.0 - 0.2 * 5.0 / 80)]
    add_noise_(expected, noise_deviation(0.2, 1.0, 20), 4, "LangevinMixture", 0)
    assert torch.allclose(module.theta, expected[0], atol=1e-5)


def test_every_group_gets_the_noise_of_its_own_rate_and_a_schedule_is_followed():
    def two(parameters):
        first, *rest = parameters
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest, "lr": 0.4}], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Classifier(nn.Linear(6, 3), two)
    before = weights(module)
    with torch.no_grad():
        module.net.bias.zero_()
    path = []
    watch = Watch(on_train_batch_end=lambda t, m, *rest: path.append(m.net.bias.detach().clone()))
    fit(module, LangevinMixture(1e6, None, 100, 0, 1, evaluate=[]), watch, data=loader(X[:8], Y[:8]))
    assert torch.equal(module.net.weight, before["net.weight"]), "a rate of 0 has no noise"
    for step, there in enumerate(path):
        noise = [torch.zeros(3), torch.zeros(3, 6)]
        add_noise_(noise, 1.0, 0, "LangevinMixture", step)  # the bias comes first by name
        moved = there - (path[step - 1] if step else torch.zeros(3))
        assert torch.allclose(moved / math.sqrt(2 * 0.4 * 0.25**step * 1e6 / 100), noise[0], atol=0.02)


def test_accumulated_micro_batches_get_the_noise_of_one_step():
    drawn, ends = [], []
    for data, every in ((loader(X, Y, size=16), 1), (loader(X, Y, size=4), 4)):
        module = Classifier()
        recipe = LangevinMixture(0.1, 1.0, None, 0, 1, evaluate=[])
        fit(module, recipe, data=data, accumulate_grad_batches=every)
        drawn.append(recipe.state()["steps"])
        ends.append(weights(module))
    assert drawn == [2, 2]
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


def test_a_step_that_fp16_skips_gets_no_noise():
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000))
    module, path = Classifier(), []
    watch = Watch(on_train_batch_end=lambda t, m, *rest: path.append(weights(m)))
    recipe = LangevinMixture(1.0, None, None, 0, 1, evaluate=[])
    start = weights(module)
    trainer = fit(module, recipe, watch, plugins=[half])
    taken = recipe.state()["steps"]
    assert 0 <= taken < trainer.global_step == 8
    assert same(path[0], start), "the first step overflows"


def test_what_is_frozen_gets_no_noise_and_is_in_no_sample():
    module = Classifier()
    module.net[0].requires_grad_(False)
    before = weights(module)
    recipe = LangevinMixture(1.0, 1.0, None, 0, 4, evaluate=[])
    module.make_optimizer = lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.1)
    fit(module, recipe)
    assert torch.equal(module.net[0].weight, before["net.0.weight"])
    assert set(recipe.state()["samples"][0]) == {"net.2.weight", "net.2.bias", "net.4.weight", "net.4.bias"}


def test_temperature_0_trains_bitwise_as_without():
    plain, off = Classifier(), Classifier()
    fit(plain)
    for prior in (None, 0.2):
        off = Classifier()
        recipe = LangevinMixture(0.0, prior)
        fit(off, recipe, validation=loader(X, Y))
        assert same(weights(plain), weights(off)) and recipe.samples == 0


# -- samples and the mixture -----------------------------------------------------------------------------------------


class Known(Classifier):
    """Keeps what its own evaluation steps see."""

    def validation_step(self, batch, batch_idx):
        self.seen = self(batch[0]).detach()
        self.log("val/loss", F.cross_entropy(self.seen, batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def by_hand(module, held, x=X):
    log_probs = []
    for sample in held:
        twin = copy.deepcopy(module)
        twin.load_state_dict({**twin.state_dict(), **sample})
        log_probs.append(twin.eval().net(x).log_softmax(1))
    return torch.stack(log_probs).exp().mean(0).log().detach(), torch.stack(log_probs).detach()


@pytest.mark.parametrize("storage", ["cpu", "device", "disk"])
def test_validation_test_and_prediction_are_of_the_mixture_and_the_weights_come_back(storage, tmp_path):
    module, recipe = Known(), short(temperature=0.5, prior_std=1.0, storage=storage)
    trainer = fit(module, recipe, validation=loader(X, Y, size=32), default_root_dir=tmp_path)
    held = [torch.load(s, weights_only=True)["content"] if storage == "disk" else s for s in recipe.state()["samples"]]
    assert len(held) == 3 and recipe.state()["taken"] == 3  # after steps 4, 6, 8
    expected, log_probs = by_hand(module, held)
    assert torch.allclose(module.seen, expected, atol=1e-6)
    own = weights(module)
    found = trainer.validate(module, loader(X, Y, size=32), verbose=False)[0]
    nll = F.cross_entropy(expected, Y)
    mean = F.cross_entropy(log_probs.flatten(0, 1), Y.repeat(3))
    assert found["val/loss"] == pytest.approx(float(nll), rel=1e-5)
    assert found["bayes/mixture_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert found["bayes/mean_sample_nll"] == pytest.approx(float(mean), rel=1e-5)
    assert found["bayes/gain"] == pytest.approx(float(mean - nll), abs=1e-5) and found["bayes/gain"] > 0
    assert found["bayes/n_samples"] == 3 and found["bayes/disagreement"] > 0
    trainer.test(module, loader(X, Y, size=32), verbose=False)
    assert torch.allclose(module.seen, expected, atol=1e-6)
    predicted = torch.cat(trainer.predict(module, loader(X, Y, size=8)))
    assert torch.allclose(predicted, expected, atol=1e-6)
    assert same(own, weights(module))
    assert torch.allclose(module.eval()(X), module.net(X)), "nothing is left on the module"


def test_stages_that_are_not_chosen_are_of_the_weights_that_train():
    module, recipe = Known(), short(evaluate=["predict"])
    trainer = fit(module, recipe, validation=loader(X, Y, size=32))
    assert torch.allclose(module.seen, module.net(X))
    found = trainer.validate(module, loader(X, Y, size=32), verbose=False)[0]
    assert not any(name.startswith("bayes/") for name in found)
    assert not torch.allclose(torch.cat(trainer.predict(module, loader(X, Y))), module.net(X))


def test_until_there_is_a_sample_validations_of_the_fit_are_plain():
    module, seen = Known(), []
    watch = Watch(on_validation_batch_end=lambda t, m, *rest: seen.append(torch.equal(m.seen, m.net(X))))
    fit(module, short(burn_in_steps=8), watch, epochs=2, validation=loader(X, Y, size=32))
    assert seen == [True, False]


def test_a_checkpoint_evaluates_by_its_samples_in_a_new_trainer(tmp_path):
    module, recipe = Known(), short()
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(module, recipe, keep, enable_checkpointing=True)
    path = tmp_path / "step=6.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["LangevinMixture"]["state"]
    assert len(saved["samples"]) == 2 and saved["steps"] == 6
    fresh = Known()
    trainer = quiet(callbacks=[short()])
    predicted = torch.cat(trainer.predict(fresh, loader(X, Y), ckpt_path=path, weights_only=True))
    assert torch.allclose(predicted, by_hand(fresh, saved["samples"])[0], atol=1e-6)
    early = tmp_path / "step=3.ckpt"
    message = r"3 steps were taken, and the first sample comes after 4\. Fit first"
    for run in (trainer.predict, trainer.test, trainer.validate):
        with pytest.raises(RecipeError, match=message):
            run(fresh, loader(X, Y), ckpt_path=early, weights_only=True)


def test_statistics_of_a_batch_norm_belong_to_the_sample():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    module, recipe = Known(net), short(temperature=0.1)
    with pytest.warns(UserWarning, match=r"net\.1 is a batch norm in train mode"):
        trainer = fit(module, recipe)
    held = recipe.state()["samples"]
    assert not torch.equal(held[0]["net.1.running_mean"], held[1]["net.1.running_mean"])
    own = weights(module)
    predicted = torch.cat(trainer.predict(module, loader(X, Y)))
    assert torch.allclose(predicted, by_hand(module, held)[0], atol=1e-6)
    assert same(own, weights(module))


def test_a_submodule_that_gives_the_logits_is_named():
    class Inner(Known):
        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    module, recipe = Inner(), short()
    trainer = fit(module, recipe)
    with pytest.raises(RecipeError, match=r"no logits .* came out of the module in the evaluation step"):
        trainer.predict(module, loader(X, Y))
    module, recipe = Inner(), short(forward="net")
    trainer = fit(module, recipe)
    predicted = torch.cat(trainer.predict(module, loader(X, Y)))
    assert torch.allclose(predicted, by_hand(module, recipe.state()["samples"])[0], atol=1e-6)


def test_an_input_gradient_of_the_mixture_is_there():
    module, recipe, found = Known(), short(), []

    def attack(trainer, module, outputs, batch, *rest):
        with torch.inference_mode(False), torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            found.append(torch.autograd.grad(module(x).sum(), x)[0])

    fit(module, recipe, Watch(on_validation_batch_end=attack), validation=loader(X, Y))
    assert all(g.abs().sum() > 0 for g in found)


def test_a_monitor_that_looks_at_the_loss_in_a_validation_sees_that_of_the_mixture():
    module, recipe, found = Known(), short(), []

    def look(trainer, module, outputs, batch, *rest):
        with torch.inference_mode(False), torch.enable_grad():
            seen = observe(trainer, module, [each.clone() for each in batch], 0)
        found.append(seen.loss.detach() - F.cross_entropy(module.seen, batch[1]))

    fit(module, recipe, Watch(on_validation_batch_end=look), validation=loader(X, Y))
    assert len(found) == 8 and max(map(abs, found)) < 1e-5


def test_a_second_fit_begins_anew_and_a_fit_that_goes_on_keeps_its_samples():
    recipe = short()
    fit(Classifier(), recipe)
    first = recipe.state()["samples"]
    fit(Classifier(), recipe)
    again = recipe.state()["samples"]
    assert recipe.state()["taken"] == 3
    assert all(same(a, b) for a, b in zip(first, again, strict=True)), "the same seed draws the same chain"


# -- a log-probability of the user's own ----------------------------------------------------------------------------


class PosteriorMean(LightningModule):
    """Predicts one number, the mean of normal numbers of variance 1."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))
        self.seen = None

    def forward(self, x):
        return self.theta.expand(len(x), 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1][:, None]) / 2

    def validation_step(self, batch, batch_idx):
        self.seen = self(batch[0]).detach()

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return {"mean": self(batch[0]), "twice": 2 * self(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def of_numbers(size=20):
    return loader(torch.zeros(20, 1), NUMBERS, size=size)


def test_the_mixture_of_a_gaussian_mean_is_its_posterior_predictive():
    module = PosteriorMean()
    recipe = LangevinMixture(1.0, 2.0, 20, 80, 8, 80, log_prob=GaussianLogProb(1.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LangevinMixture")
        trainer = fit(module, recipe, data=loader(torch.zeros(20 * 720, 1), NUMBERS.repeat(720), size=20))
    found = trainer.validate(module, of_numbers(), verbose=False)[0]
    posterior, variance = NUMBERS.sum().item() / 20.25, 0.05495
    own = torch.stack([sample["theta"] for sample in recipe.state()["samples"]])
    assert len(own) == 80 and own.mean().item() == pytest.approx(posterior, abs=0.07)
    predictive = torch.distributions.Normal(posterior, math.sqrt(1 + variance))
    assert found["bayes/mixture_nll"] == pytest.approx(-predictive.log_prob(NUMBERS).mean().item(), abs=0.01)
    # the mean log-loss of the members: that of their mean, and half their variance
    at_mean = -torch.distributions.Normal(own.mean(), 1.0).log_prob(NUMBERS).mean().item()
    spread = own.var(correction=0).item() / 2
    assert found["bayes/mean_sample_nll"] == pytest.approx(at_mean + spread, abs=1e-4)
    assert found["bayes/gain"] > 0.01 and found["bayes/n_samples"] == 80
    assert "bayes/disagreement" not in found
    assert torch.allclose(module.seen, own.mean().expand(20, 1), atol=1e-5), "the module's own metrics see the mean"
    predicted = trainer.predict(module, of_numbers())[0]
    assert torch.allclose(predicted["mean"], own[:, None].expand(80, 20, 1)), "every member's, stacked"
    assert torch.equal(predicted["twice"], 2 * predicted["mean"])
    assert torch.equal(module(torch.zeros(2, 1)), module.theta.expand(2, 1)), "nothing is left on the module"


def test_a_log_prob_that_is_a_function_leaves_the_module_s_own_outputs():
    def log_prob(outputs, targets):
        return -(outputs[:, 0] - targets).abs()

    module, recipe = PosteriorMean(), LangevinMixture(1.0, 2.0, None, 0, 2, 4, log_prob=log_prob)
    trainer = fit(module, recipe, epochs=8, data=of_numbers())
    found = trainer.test(module, of_numbers(), verbose=False)[0]
    assert torch.equal(module.seen, module.theta.detach().expand(20, 1))
    each = torch.stack([-(s["theta"] - NUMBERS).abs() for s in recipe.state()["samples"]])
    assert found["bayes/mixture_nll"] == pytest.approx(-mixture_log_prob(each).mean().item(), rel=1e-5)


def test_a_log_prob_of_another_shape_is_refused():
    recipe = LangevinMixture(
        1.0, 2.0, None, 0, 2, 4, log_prob=lambda outputs, targets: -(outputs - targets[:, None]).abs()
    )
    trainer = fit(PosteriorMean(), recipe, epochs=8, data=of_numbers())
    with pytest.raises(RecipeError, match=r"log_prob must give one number a sample, \[20\]; got \(20, 1\)"):
        trainer.validate(trainer.lightning_module, of_numbers(), verbose=False)


def test_a_loss_that_is_not_the_mean_of_log_prob_is_said():
    class Twice(PosteriorMean):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1][:, None])

    recipe = LangevinMixture(1.0, 2.0, None, 0, 1, 4, log_prob=GaussianLogProb(1.0))
    with pytest.warns(UserWarning, match="the loss that trains is 2 times the mean of -log_prob"):
        fit(Twice(), recipe, data=of_numbers())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*times the mean of -log_prob")
        recipe = LangevinMixture(1.0, 2.0, None, 0, 1, 4, log_prob=GaussianLogProb(math.sqrt(0.5)))
        fit(Twice(), recipe, data=of_numbers())


# -- the prequential code -------------------------------------------------------------------------------------------


def test_the_code_of_a_stream_of_two_batches_is_that_by_hand():
    first = code_lengths(torch.tensor([[0.5, 0.25]]).log())  # the weights at hand alone
    second = code_lengths(torch.tensor([[0.5], [0.1]]).log())  # and an earlier member
    assert first.tolist() == pytest.approx([math.log(8), math.log(8), 2])
    assert (first + second).tolist() == pytest.approx([math.log(8) - math.log(0.3), math.log(8) - math.log(0.1), 3])


def code_by_hand(path, regret_of):
    """Of batches of 8 of X and Y in order, from the weights before each; the last two earlier ones are members."""
    mixed = last = 0.0
    for number, own in enumerate(path):
        at = slice(8 * number, 8 * number + 8)
        members = [*path[1:number][-2:], own]  # those that the training began with are no sample
        each = torch.stack([-F.cross_entropy(net_of(m, X[at]), Y[at], reduction="none") for m in members])
        mixed -= float(mixture_log_prob(each).sum())
        last -= float(each[-1].sum())
    best = min(float(F.cross_entropy(net_of(m, X), Y, reduction="sum")) for m in regret_of)
    return mixed, last, mixed - best


def net_of(held, x):
    twin = Classifier()
    twin.load_state_dict(held)
    with torch.no_grad():
        return twin.eval().net(x)


def streaming(**arguments):
    return LangevinMixture(0.5, 1.0, None, 1, 1, 3, prequential=True, **arguments)


@pytest.mark.parametrize("storage", ["cpu", "disk"])
def test_every_batch_of_the_first_epoch_is_scored_before_it_is_trained_on(storage, tmp_path):
    path, ends = [], []
    watch = Watch(
        on_train_batch_start=lambda t, m, *rest: path.append(weights(m)),
        on_train_epoch_end=lambda t, m: ends.append(weights(m)),
    )
    trainer = fit(
        Classifier(), streaming(storage=storage), watch, epochs=2, data=loader(X, Y, size=8), default_root_dir=tmp_path
    )
    mixed, last, regret = code_by_hand(path[:4], [*path[2:4], ends[0]])
    found = trainer.callback_metrics
    assert float(found["bayes/prequential"]) == pytest.approx(mixed, rel=1e-5)
    assert float(found["bayes/prequential_last"]) == pytest.approx(last, rel=1e-5)
    assert float(found["bayes/regret"]) == pytest.approx(regret, abs=1e-3) and mixed != last


def test_a_fit_of_one_epoch_has_its_regret_too():
    recipe = streaming(evaluate=[])
    trainer = fit(Classifier(), recipe, data=loader(X, Y, size=8))
    assert "bayes/regret" in trainer.callback_metrics and recipe.state()["ring"] == []


def test_a_part_of_the_data_has_a_code_and_no_regret():
    trainer = fit(Classifier(), streaming(evaluate=[]), data=loader(X, Y, size=8), limit_train_batches=3)
    assert "bayes/prequential" in trainer.callback_metrics and "bayes/regret" not in trainer.callback_metrics


def test_the_code_of_a_gaussian_needs_no_classes():
    recipe = LangevinMixture(1.0, 2.0, None, 1, 1, 3, log_prob=GaussianLogProb(1.0), prequential=True)
    path = []
    watch = Watch(on_train_batch_start=lambda t, m, *rest: path.append(m.theta.item()))
    trainer = fit(PosteriorMean(), recipe, watch, data=of_numbers(10))
    each = [-torch.distributions.Normal(at, 1.0).log_prob(y).sum().item() for at, y in zip(path, NUMBERS.split(10))]
    assert float(trainer.callback_metrics["bayes/prequential"]) == pytest.approx(sum(each), rel=1e-5)


class Noisy(Classifier):
    """Has all that another look could move: dropout, running statistics, draws of its own, a metric."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)))
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0] + 0.1 * torch.rand_like(batch[0]))
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


@pytest.mark.filterwarnings("ignore:LangevinMixture. net.1 is a batch norm")
def test_the_code_and_the_targets_change_training_by_no_bit(tmp_path):
    ends = []
    for more in ({}, {"prequential": True, "distill": str(tmp_path)}):
        module, states = Noisy(), []
        torch.manual_seed(1)
        data = DataLoader(TensorDataset(X, Y), 4, shuffle=True)
        watch = Watch(on_train_batch_end=lambda t, m, *rest, kept=states: kept.append(torch.get_rng_state()))
        recipe = LangevinMixture(0.1, 0.5, None, 2, 2, 3, **more)
        trainer = fit(module, recipe, watch, epochs=2, data=data, validation=loader(X, Y))
        assert ("bayes/prequential" in trainer.callback_metrics) == bool(more)
        states.append(torch.get_rng_state())
        ends.append((weights(module), states, recipe.state()["samples"], float(trainer.callback_metrics["accuracy"])))
    (plain, drawn, held, accuracy), (there, drawn_there, held_there, accuracy_there) = ends
    assert same(plain, there) and accuracy == accuracy_there
    assert all(torch.equal(a, b) for a, b in zip(drawn, drawn_there, strict=True))
    assert all(same(a, b) for a, b in zip(held, held_there, strict=True))


def test_the_code_goes_on_in_the_middle_of_the_epoch(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(Classifier(), ExactResume(), streaming(), keep, data=loader(X, Y, size=8), enable_checkpointing=True)
    again = quiet(callbacks=[ExactResume(), streaming()])
    again.fit(Classifier(), loader(X, Y, size=8), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    for name in ("bayes/prequential", "bayes/prequential_last", "bayes/regret"):
        assert float(again.callback_metrics[name]) == float(whole.callback_metrics[name])


def test_labels_that_cannot_be_coded_are_refused():
    class Soft(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    data = loader(X, F.one_hot(Y, 3).float())
    with pytest.raises(
        RecipeError, match=r"LangevinMixture: a code of labels needs logits \[n, classes\] and class ind"
    ):
        fit(Soft(), streaming(), data=data)
    with pytest.raises(RecipeError, match="forward must be 'forward' or the name"):
        fit(Classifier(), streaming(forward="head"))


# -- soft targets ---------------------------------------------------------------------------------------------------


def test_a_student_is_trained_on_the_mixture_of_its_teacher(tmp_path):
    teacher, recipe = Known(), short(distill=str(tmp_path / "targets"))
    fit(teacher, recipe, data=DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    log_q, _ = by_hand(teacher, recipe.state()["samples"])
    (path,) = (tmp_path / "targets").glob("log_q-*.pt")
    content = torch.load(path, weights_only=True)["content"]
    assert torch.allclose(content["log_probs"], log_q, atol=1e-6) and content["total"] == 32

    student = Classifier(mlp(seed=3))
    fit(student, PSKD(alpha_T=1.0, schedule="constant", targets=str(path)), epochs=2)

    class OnTargets(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    twin = OnTargets(mlp(seed=3))
    fit(twin, epochs=2, data=loader(X, content["log_probs"].exp()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(student.parameters(), twin.parameters()))


def test_targets_of_a_subset_go_by_the_index_below_it(tmp_path):
    part = Subset(TensorDataset(X, Y), [3, 1, 8, 20])
    module, recipe = Known(), short(distill=str(tmp_path), burn_in_steps=0, sample_every=1)
    fit(module, recipe, data=DataLoader(part, 2))
    (path,) = tmp_path.glob("*.pt")
    content = torch.load(path, weights_only=True)["content"]
    assert content["ids"].tolist() == [3, 1, 8, 20] and content["total"] == 32
    log_q, _ = by_hand(module, recipe.state()["samples"], X[[3, 1, 8, 20]])
    assert torch.allclose(content["log_probs"], log_q, atol=1e-6)


def test_a_fit_that_ends_without_a_sample_has_nothing_to_distil(tmp_path):
    recipe = short(distill=str(tmp_path / "targets"))
    stop = Watch(on_train_batch_end=lambda t, *rest: setattr(t, "should_stop", True))
    with pytest.warns(UserWarning, match="ended after 1 steps without a sample to distil"):
        fit(Classifier(), recipe, stop)
    assert not (tmp_path / "targets").exists()


# -- misuse ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


def test_data_without_a_length_need_a_train_size():
    data = DataLoader(Stream(), batch_size=4)
    with pytest.raises(RecipeError, match="do not say how many samples they have; give train_size"):
        fit(Classifier(), short(), data=data, max_steps=8)
    fit(Classifier(), short(train_size=32), data=data, max_steps=8)


@pytest.mark.parametrize(("given", "steps"), [(7, 7), (0.9, 7), (500, 500)])
def test_a_burn_in_that_leaves_no_sample_is_refused(given, steps):
    with pytest.raises(RecipeError, match=f"burn_in_steps={given} is {steps} steps, and the fit has 8: with"):
        fit(Classifier(), short(burn_in_steps=given))


def test_momentum_adam_and_a_sum_are_said():
    for optimizer, name in (
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"SGD\(momentum=0.9\)"),
        (lambda p: torch.optim.Adam(p, lr=1e-3), "Adam"),
    ):
        with pytest.warns(UserWarning, match=f"under {name} the weights do not follow the posterior"):
            fit(Classifier(mlp(), optimizer), short())

    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    with pytest.warns(UserWarning, match="as if it were a sum over the batch"):
        fit(Summed(), short())


def test_a_decay_beside_a_prior_is_refused_and_without_one_is_not():
    decays = lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)  # noqa: E731
    with pytest.raises(RecipeError, match=r"prior_std=0.2 and SGD\(weight_decay=0.01\) are two priors"):
        fit(Classifier(mlp(), decays), short())
    fit(Classifier(mlp(), decays), short(prior_std=None))


def test_weights_of_16_bits_are_refused():
    with pytest.raises(RecipeError, match="is of 16 bits, in which noise as small as this is rounded away"):
        fit(Classifier(), short(), precision="bf16-true")


@pytest.mark.parametrize("name", ["GradientNoise", "NormalizedGD", "WiSEFT", "BANG", "BackdoorAdjustment",
                                  "AdaptiveSmoothing", "EnsembleEvaluation", "StrongWeightDecay"])  # fmt: skip
def test_those_that_it_cannot_share_a_trainer_with_are_refused_by_name(name):
    stand_in = type(name, (Recipe,), {})()
    for callbacks in ([short(), stand_in], [stand_in, short()]):
        with pytest.raises(RecipeError, match=f"LangevinMixture and {name} cannot share a Trainer"):
            fit(Classifier(), *callbacks)
    if name == "StrongWeightDecay":
        fit(Classifier(), short(prior_std=None), stand_in)


def test_lightnings_averages_are_refused():
    with pytest.raises(RecipeError, match="LangevinMixture and StochasticWeightAveraging cannot share a Trainer"):
        fit(Classifier(), short(), StochasticWeightAveraging(1e-2))
