"""The prior-data fitted network: what may look at what, what it is trained on, and its own arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import GPPrior, LinearPrior, MLPPrior, Prior, PriorDataModule
from lightning_recipes.modules import PFNModule
from lightning_recipes.modules.pfn import PFNTransformer, attention_mask, warm_up_cosine
from tests.stock import quiet

SIZES = {"emsize": 16, "nhead": 2, "nlayers": 2, "nhid": 32}
RIDGE = LinearPrior(1.0, 1.0, 0.3, -1.0, 1.0)


def stirred(module: PFNModule) -> PFNModule:
    """With every weight away from where it begins, so that all branches do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return module.eval()


def small(features: int = 1, **changes: Any) -> PFNModule:
    torch.manual_seed(0)
    return PFNModule(features, **{**SIZES, "num_buckets": 20, **changes})


def data(prior: Prior = RIDGE, features: int = 1, **changes: Any) -> PriorDataModule:
    arguments = {"batch_size": 8, "seq_len": 8, "max_context": 6, "steps_per_epoch": 4, "val_datasets": 16}
    return PriorDataModule(prior, features, **{**arguments, **changes})


# -- who sees whom ---------------------------------------------------------------------------------------------------


def test_the_mask_has_the_columns_of_the_card() -> None:
    """T = 4, n = 2: columns {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 3}."""
    allowed = ~attention_mask(4, 2)
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 3]]
    assert torch.equal(~attention_mask(3, 0), torch.eye(3, dtype=torch.bool)), "a query without a context sees itself"


def test_the_order_of_the_context_makes_no_difference() -> None:
    module = stirred(small(3))
    x, y = MLPPrior().sample(12, 4, 3, generator(0))
    order = torch.randperm(8, generator=generator(1))
    with torch.no_grad():
        straight = module(x, y, 8)
        turned = module(torch.cat([x[order], x[8:]]), torch.cat([y[order], y[8:]]), 8)
        other = module(x, y.flip(0), 8)
    assert torch.allclose(straight, turned, atol=2e-5)
    assert not torch.allclose(straight, other, atol=1e-2)


def test_queries_do_not_see_each_other_nor_any_target_but_the_contexts() -> None:
    module = stirred(small(3))
    x, y = MLPPrior().sample(12, 4, 3, generator(0))
    with torch.no_grad():
        together = module(x, y, 8)
        alone = [module(torch.cat([x[:8], x[i : i + 1]]), y[:8], 8)[0] for i in range(8, 12)]
        without_targets = module(x, torch.cat([y[:8], torch.full((4, 4), 1e6)]), 8)
    assert torch.allclose(together, torch.stack(alone), atol=2e-5)
    assert torch.allclose(together, without_targets, atol=2e-5)


def test_without_a_context_targets_make_no_difference_and_inputs_do() -> None:
    module = stirred(small())
    x, y = RIDGE.sample(5, 3, 1, generator(0))
    with torch.no_grad():
        assert torch.equal(module(x, y, 0), module(x, 100 * y, 0))
        assert not torch.allclose(module(x, y, 0), module(x + 1, y, 0), atol=1e-3)


def test_every_residual_branch_is_zero_at_the_start_and_layers_differ() -> None:
    network = small().network
    tokens = torch.randn(2, 5, 16)
    for layer in network.layers:
        normed = layer.norm2(layer.norm1(tokens))
        assert torch.allclose(layer(tokens, src_mask=attention_mask(5, 3)), normed, atol=1e-6)
    first, second = network.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_it_has_the_parameters_of_the_cards_small_network() -> None:
    network = PFNTransformer(1, 100, 48, 4, 2, 96, 0.0)
    assert sum(p.numel() for p in network.parameters()) == 52_516


# -- training --------------------------------------------------------------------------------------------------------


def test_borders_and_moments_are_the_priors_and_the_same_every_time() -> None:
    module, again = small(), small()
    for each in (module, again):
        quiet(max_steps=1).fit(each, datamodule=data())
    assert torch.equal(module.distribution.borders, again.distribution.borders)
    assert bool(module.has_borders) and int(module.max_context) == 6
    assert module.x_mean.item() == pytest.approx(0, abs=0.01)
    assert module.x_std.item() == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert module.x_low.item() == pytest.approx(-1, abs=0.01) and module.x_high.item() == pytest.approx(1, abs=0.01)
    assert module.y_std.item() == pytest.approx(math.sqrt(1 / 3 + 1 + 0.09), abs=0.02)
    sample = RIDGE.sample(1, 50_000, 1, generator(9))[1].flatten()
    counts = module.distribution.bucket(sample).bincount(minlength=20) / 50_000
    assert (counts - 0.05).abs().max() < 0.006, "every bucket has as much of the prior"


def test_the_loss_is_the_mean_likelihood_of_the_queries() -> None:
    module = small()
    module.estimate(RIDGE, 8, 6)
    stirred(module)
    batch = data().batches("train")[3]
    n = batch["n_context"]
    logits = module(batch["x"], batch["y"], n)
    by_hand = [module.distribution(logits[i, b], batch["y"][n + i, b]) for i in range(8 - n) for b in range(8)]
    assert module.loss(batch).item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


@pytest.mark.parametrize("output", ["bar", "gaussian", "ce", "bce"])
def test_every_output_is_trained_and_predicts(output: str) -> None:
    prior = MLPPrior(2, 4, binary=output in ("ce", "bce"))
    module = small(2, output=output, lr=3e-3)
    trainer = quiet(max_epochs=2, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data(prior, 2))
    assert torch.isfinite(trainer.callback_metrics["pfn/nll"]) and torch.isfinite(trainer.callback_metrics["val/loss"])
    assert ("pfn/outside_support" in trainer.callback_metrics) == (output == "bar")
    x, y = prior.sample(8, 3, 2, generator(0))
    with torch.no_grad():
        predicted = module.eval().predict_step({"x": x, "y": y[:5], "n_context": 5})
    if output in ("ce", "bce"):
        assert predicted["probabilities"].shape == (3, 3, 2)
        assert torch.allclose(predicted["probabilities"].sum(-1), torch.ones(3, 3))
    else:
        assert predicted["mean"].shape == (3, 3)


def test_a_gaussian_output_has_the_likelihood_and_quantiles_of_a_normal() -> None:
    head = small(output="gaussian").distribution
    logits, y = torch.tensor([[0.5, -4.0], [1.0, 0.25]]), torch.tensor([1.5, 1.0])
    normal = torch.distributions.Normal(torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.5]))
    assert torch.allclose(head(logits, y), -normal.log_prob(y), atol=1e-5)
    assert torch.allclose(head.icdf(logits, 0.9), normal.icdf(torch.tensor(0.9)), atol=1e-5)


def test_the_rate_rises_in_a_line_and_falls_with_the_cosine() -> None:
    factors = [warm_up_cosine(step, 4, 12) for step in range(12)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    module = small(lr=1e-2)
    trainer = quiet(max_epochs=3)
    trainer.fit(module, datamodule=data())
    (config,) = trainer.lr_scheduler_configs
    assert config.interval == "step" and trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_paper_has_a_rate_for_every_size() -> None:
    module = small(lr=None)
    trainer = quiet(max_epochs=1)
    trainer.fit(module, datamodule=data())
    count = sum(p.numel() for p in module.parameters())
    assert trainer.optimizers[0].defaults["lr"] == pytest.approx(0.003239 - 0.0001395 * math.log(count))


def test_a_checkpoint_holds_all_that_a_prediction_needs(tmp_path: Any) -> None:
    module = small()
    trainer = quiet(max_epochs=1)
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "pfn.ckpt")
    again = PFNModule.load_from_checkpoint(tmp_path / "pfn.ckpt", weights_only=True)
    x, y = RIDGE.sample(8, 3, 1, generator(0))
    with torch.no_grad():
        first, second = (each.eval().predict_step({"x": x, "y": y, "n_context": 5}) for each in (module, again))
    assert torch.equal(first["mean"], second["mean"])
    assert again.hparams == module.hparams


def test_borders_that_were_given_stay() -> None:
    module = PFNModule(1, **SIZES, borders=[-3, -1, 0, 1, 3])
    quiet(max_steps=1).fit(module, datamodule=data())
    assert module.distribution.borders.tolist() == [-3, -1, 0, 1, 3]
    assert module.y_std > 1, "what the prior looks like is known all the same"


def test_it_learns_more_than_the_marginal() -> None:
    """A few hundred steps on ridge regression: with a context of 5 far below what no context gives."""
    torch.manual_seed(0)
    module = PFNModule(1, 32, 4, 1, 64, num_buckets=50, lr=3e-3)
    quiet(max_steps=250, gradient_clip_val=1.0, max_epochs=None).fit(
        module, datamodule=data(batch_size=32, seq_len=10, max_context=10, steps_per_epoch=250, val_datasets=0)
    )
    x, y = RIDGE.sample(6, 500, 1, generator(5))
    with torch.no_grad():
        nll = module.eval().distribution(module(x, y, 5), y[5:]).mean()
    marginal = 0.5 * math.log(2 * math.pi * math.e * (4 / 3 + 0.09))
    assert nll < marginal - 0.5
    assert nll > RIDGE.nll(x, y, 5).mean(), "the exact posterior is the best there is"


# -- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"emsize": 10, "nhead": 4}, r"nhead must be a divisor of emsize \(10\); got 4"),
        ({"output": "poisson"}, "output must be one of .*; got 'poisson'"),
        ({"num_buckets": 1}, "num_buckets must be at least 2; got 1"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\); got 1.0"),
        ({"lr": 0}, "lr must be None or positive; got 0"),
        ({"borders": [0.0, 2.0, 1.0]}, "borders must ascend; got 2 before 1"),
        ({"borders": [0.0, 1.0]}, "num_buckets must be at least 2|borders must be at least 3 numbers"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        PFNModule(**arguments)


class Constant(Prior):
    def sample(self, n_tokens: int, batch: int, num_features: int, generator: Any = None) -> tuple[Tensor, Tensor]:
        return torch.rand(n_tokens, batch, num_features, generator=generator), torch.ones(n_tokens, batch)


class Few(Constant):
    def sample(self, *args: Any) -> tuple[Tensor, Tensor]:
        x, _ = super().sample(*args)
        return x, (x[..., 0] * 3).floor()


@pytest.mark.parametrize(
    ("module", "prior", "says"),
    [
        (small, Constant(), "Constant.sample gave the same target 1 everywhere: nothing to learn"),
        (small, Few(), r"the targets of Few make no borders: borders must differ.*Take fewer buckets"),
        (lambda: small(2), GPPrior(), "num_features is 2, that of the PriorDataModule 1; they must be the same"),
    ],
)
def test_what_it_cannot_be_trained_on_is_said_before_the_first_step(module: Any, prior: Prior, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quiet().fit(module(), datamodule=data(prior))


def test_without_borders_or_a_prior_it_neither_trains_nor_predicts() -> None:
    batches = DataLoader([data().batches("train")[0]], batch_size=None)
    with pytest.raises(RecipeError, match=r"needs borders, or a PriorDataModule .*the data module is NoneType"):
        quiet().fit(small(), batches)
    with pytest.raises(RecipeError, match="its borders were never estimated: it was not trained, and no checkpoint"):
        quiet().predict(small(), batches)
    module: LightningModule = PFNModule(1, **SIZES, borders=[-3, 0, 3])
    quiet().fit(module, batches)
    assert quiet().predict(module, batches)[0]["mean"].shape[1] == 8


def test_a_schedule_without_an_end_is_refused() -> None:
    module = PFNModule(1, **SIZES, borders=[-3, 0, 3])
    with pytest.raises(RecipeError, match="its schedule needs an end; give the Trainer max_epochs or max_steps"):
        quiet(max_epochs=-1).fit(module, datamodule=data())
