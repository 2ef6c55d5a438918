"""WiSEFT and BANG: limit cases, what checkpoints hold, the curve over alpha, softened targets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_recipes.callbacks import BANG, PEGO, ExactResume, WiSEFT
from lightning_recipes.callbacks.finetuning.bang import at_chance, shares
from lightning_recipes.core.averaging import copied, fisher_information, fisher_mean, interpolate
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.random import key
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(24)
SHIFTED = X.flip(1)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


class Logs(Classifier):
    """Validates on any number of loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val/acc", (self(x).argmax(1) == y).float().mean())
        self.log("val/norm", sum(p.square().sum() for p in self.parameters()))

    def test_step(self, batch, batch_idx):
        self.log("test/norm", sum(p.square().sum() for p in self.parameters()))


def fit(module, *callbacks, epochs=2, validation=None, ckpt_path=None, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y), validation, ckpt_path=ckpt_path)
    return trainer


def finetuned(make=mlp, **kwargs):
    """theta_0 and theta_1 of the same training without the recipe."""
    module = Logs(make())
    before = weights(module)
    torch.manual_seed(1)
    fit(module, **kwargs)
    return before, weights(module)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3))


def averaged(recipe, make=mlp, **kwargs):
    module = Logs(make())
    torch.manual_seed(1)
    fit(module, recipe, **kwargs)
    return module


# -- maths -------------------------------------------------------------------------------------------------------------


def test_shares_count_where_the_mean_differs_from_both_ends():
    bits = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]).bool()
    found = shares(*torch.cat([bits, bits[1:2]]).unbind(1))
    assert found["fft"] == 2  # 001, twice
    assert found["ttf"] == 1  # 110


def test_chance_is_told_only_where_the_samples_can_tell():
    assert at_chance(6, 64, 10)
    assert not at_chance(40, 64, 10)
    assert not at_chance(1, 4, 3), "of 4 samples nobody can say"
    assert at_chance(0, 512, 1000)


# -- limit cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["finetuned", "interpolate", "recalibrate"])
def test_alpha_0_is_the_pre_trained_module_bitwise(buffers):
    before, _ = finetuned(normed)
    assert same(weights(averaged(WiSEFT(0.0, buffers=buffers), normed)), before)


def test_alpha_1_is_plain_fine_tuning_bitwise_also_with_a_curve():
    _, after = finetuned(normed, validation=loader(X, Y))
    for recipe in (WiSEFT(1.0), BANG(1.0, label_smoothing=0, mixup_alpha=0), WiSEFT(1.0, grid=[0.3])):
        assert same(weights(averaged(recipe, normed, validation=loader(X, Y))), after)


def test_in_between_every_parameter_is_the_mean_and_buffers_follow_their_rule():
    before, after = finetuned(normed)
    parameters = [name for name, _ in normed().named_parameters(prefix="net")]
    for buffers in ("finetuned", "interpolate"):
        found = weights(averaged(WiSEFT(0.25, buffers=buffers), normed))
        for name, value in found.items():
            mean = torch.lerp(before[name], after[name], 0.25) if value.is_floating_point() else after[name]
            assert torch.equal(value, mean if name in parameters or buffers == "interpolate" else after[name]), name


def test_a_linear_model_gives_the_mean_of_the_logits():
    before, after = finetuned(linear)
    logits = lambda state: F.linear(X, state["net.0.weight"], state["net.0.bias"])  # noqa: E731
    module = averaged(WiSEFT(0.3), linear)
    assert torch.allclose(module(X), 0.7 * logits(before) + 0.3 * logits(after), atol=1e-6)


def test_out_of_scope_is_the_fine_tuned_end():
    before, after = finetuned(normed)
    found = weights(averaged(WiSEFT(0.5, scope=["0", "1"], buffers="interpolate"), normed))
    for name, value in found.items():
        inside = name.startswith(("net.0.", "net.1.")) and value.is_floating_point()
        assert torch.equal(value, torch.lerp(before[name], after[name], 0.5) if inside else after[name]), name


def test_recalibrated_statistics_are_those_of_the_mean_on_the_training_data():
    module = averaged(WiSEFT(0.5, buffers="recalibrate"), normed)
    hidden = F.linear(X, module.net[0].weight, module.net[0].bias)
    batches = hidden.detach().split(4)
    assert torch.allclose(module.net[1].running_mean, hidden.mean(0), atol=1e-6)
    assert torch.allclose(module.net[1].running_var, torch.stack([b.var(0) for b in batches]).mean(0), rtol=1e-5)


def test_fishers_weight_the_mean():
    before, after = finetuned()
    module = averaged(WiSEFT(0.5, fisher=True, seed=3))
    fishers = []
    for state in (before, after):
        holder = Logs(mlp())
        holder.load_state_dict(state)
        draws = key(0)
        parameters = dict(holder.named_parameters())
        many = (holder(x) for _ in range(300) for x, _ in loader(X, Y))
        fishers.append(fisher_information(parameters, many, draws))
    plain, expected, found = [], [], []
    for name, value in weights(module).items():
        plain.append(interpolate(before[name], after[name], 0.5).flatten())
        expected.append(fisher_mean(before[name], after[name], 0.5, fishers[0][name], fishers[1][name]).flatten())
        found.append(value.flatten())
    plain, expected, found = torch.cat(plain), torch.cat(expected), torch.cat(found)
    # one pass draws one label a sample: an estimate of what many passes measure
    assert (found - expected).norm() < 0.5 * (plain - torch.cat([v.flatten() for v in after.values()])).norm()
    assert torch.nn.functional.cosine_similarity(found - plain, expected - plain, dim=0) > 0.3
    assert not torch.allclose(found, plain)


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "ckpt", "network.pt", "safetensors"])
def test_a_reference_from_a_file(kind, tmp_path):
    from safetensors.torch import save_file

    other = Logs(mlp(seed=5))
    path = tmp_path / f"zero.{kind}"
    if kind == "safetensors":
        save_file(dict(other.state_dict()), path)
    else:
        state = other.net.state_dict() if kind == "network.pt" else other.state_dict()
        torch.save({"state_dict": state} if kind == "ckpt" else state, path)
    assert same(weights(averaged(WiSEFT(0.0, reference=path))), weights(other))


def test_a_resume_reads_the_same_file_again_and_refuses_another(tmp_path):
    path, keep = tmp_path / "zero.pt", ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    torch.save(Logs(mlp(seed=5)).state_dict(), path)
    through, resumed = Logs(mlp()), Logs(mlp(seed=7))
    fit(through, WiSEFT(0.5, reference=path), ExactResume(), keep, enable_checkpointing=True)
    section = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["WiSEFT"]["state"]
    assert "theta_0" not in section, "the file has it"
    fit(resumed, WiSEFT(0.5, reference=path), ExactResume(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert same(weights(through), weights(resumed))
    torch.save(Logs(mlp(seed=6)).state_dict(), path)
    with pytest.raises(RecipeError, match="is not the file that the checkpoint was written with; its contents have"):
        fit(resumed, WiSEFT(0.5, reference=path), ExactResume(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))


def test_a_new_fit_begins_from_its_own_weights():
    recipe, module = WiSEFT(0.0), Logs(mlp())
    before = weights(module)
    fit(module, recipe)
    assert same(weights(module), before)
    with torch.no_grad():
        module.net[0].weight.zero_()
    between = weights(module)
    fit(module, recipe)
    assert same(weights(module), between)


def test_adapters_are_merged_and_their_product_is_scaled():
    """W + a B A, not the product of the two means."""
    make = lambda: PEGO(2, 2, target_modules=["0", "2"], train_fully=["4"])  # noqa: E731
    plain, mean = Classifier(mlp()), Classifier(mlp())
    before = weights(plain)
    fit(plain, make(), epochs=6)
    fit(mean, make(), WiSEFT(0.25), epochs=6, validation=loader(X, Y))
    after, found = weights(plain), weights(mean)
    assert (after["net.0.weight"] - before["net.0.weight"]).abs().max() > 1e-3
    for name, value in found.items():
        assert torch.allclose(value, torch.lerp(before[name], after[name], 0.25), atol=1e-6), name


# -- validation and checkpoints ----------------------------------------------------------------------------------------


def norm(state):
    return sum(v.square().sum() for n, v in state.items()).item()


@pytest.mark.parametrize("evaluate", [True, False])
def test_validations_are_of_the_mean_and_training_goes_on_bitwise(evaluate, tmp_path):
    before, after = finetuned(validation=loader(X, Y))
    module, ends = Logs(mlp()), []
    torch.manual_seed(1)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val/norm")
    keep_weights = ModelCheckpoint(tmp_path, "w{epoch}", save_top_k=-1, save_weights_only=True)
    look = Watch(on_fit_end=lambda trainer, module: ends.append(weights(module)))
    recipe = WiSEFT(0.5, evaluate=evaluate, save=False)
    trainer = fit(module, look, keep, keep_weights, recipe, validation=loader(X, Y), enable_checkpointing=True)
    assert same(ends[0], after)
    for name in ("epoch=1.ckpt", "wepoch=1.ckpt"):
        assert same(torch.load(tmp_path / name, weights_only=True)["state_dict"], after)
    mean = {name: torch.lerp(before[name], after[name], 0.5) for name in after}
    assert same(weights(module), mean)
    logged = trainer.callback_metrics["val/norm"].item()
    assert logged == pytest.approx(norm(mean if evaluate else after), rel=1e-5)


def test_a_checkpoint_taken_by_anybody_in_the_middle_of_a_validation_holds_the_training_weights(tmp_path):
    """Also the one that Lightning saves when the validation breaks off; after that the module has them too."""
    _, after = finetuned(epochs=1)

    def save(trainer, module, *args):
        trainer.save_checkpoint(tmp_path / "amid.ckpt")
        if not trainer.sanity_checking:
            raise RuntimeError("in mid-validation")

    module = Logs(mlp())
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="in mid-validation"):
        fit(module, WiSEFT(0.5), Watch(on_validation_batch_end=save), validation=loader(X, Y))
    assert same(torch.load(tmp_path / "amid.ckpt", weights_only=True)["state_dict"], after)
    assert same(weights(module), after)


def test_testing_a_checkpoint_of_the_run_is_of_the_mean_and_leaves_the_module_as_loaded(tmp_path):
    before, after = finetuned()
    keep = ModelCheckpoint(tmp_path, "last", every_n_epochs=1)
    module = Logs(mlp())
    torch.manual_seed(1)
    trainer = fit(module, WiSEFT(0.25), keep, enable_checkpointing=True)
    mean = weights(module)
    expected = norm({name: torch.lerp(before[name], after[name], 0.25) for name in after})
    assert trainer.test(module, loader(X, Y), verbose=False)[0]["test/norm"] == pytest.approx(expected, rel=1e-5)
    assert same(weights(module), mean), "what the fit left is the mean already"

    fresh = Logs(mlp(seed=9))
    found = quiet(callbacks=[WiSEFT(0.25)]).test(fresh, loader(X, Y), str(tmp_path / "last.ckpt"), verbose=False)
    assert found[0]["test/norm"] == pytest.approx(expected, rel=1e-5)
    assert same(weights(fresh), after)
    alone = [path for path in tmp_path.iterdir() if "wise-alpha=0.25" in path.name]
    assert same(torch.load(alone[0], weights_only=True)["state_dict"], mean)
    found = quiet(callbacks=[WiSEFT(0.25)]).test(fresh, loader(X, Y), str(alone[0]), verbose=False)
    assert found[0]["test/norm"] == pytest.approx(expected, rel=1e-5), "not averaged twice"


def test_a_resume_from_the_middle_ends_at_the_mean_with_the_first_weights(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    through = Logs(mlp())
    grid = [0.25]
    fit(through, WiSEFT(0.5, grid), ExactResume(), keep, validation=loader(X, Y), epochs=3, enable_checkpointing=True)
    for epoch in range(3):
        resumed = Logs(mlp(seed=7))
        path = str(tmp_path / f"epoch={epoch}.ckpt")
        fit(resumed, WiSEFT(0.5, grid), ExactResume(), validation=loader(X, Y), epochs=3, ckpt_path=path)
        assert same(weights(through), weights(resumed)), epoch


def test_a_run_that_saves_nowhere_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    averaged(WiSEFT(0.5, grid=[0.5]), validation=loader(X, Y))
    assert not list(tmp_path.iterdir())


# -- the curve ---------------------------------------------------------------------------------------------------------


def test_the_curve_over_two_loaders_is_that_of_models_made_by_hand(tmp_path):
    sets = [loader(X, Y), loader(SHIFTED[:10], Y[:10])]
    before, after = finetuned(normed, epochs=6, validation=sets)
    module = Logs(normed())
    torch.manual_seed(1)
    recipe = WiSEFT(0.5, grid=[0.125, 0.75], buffers="interpolate")
    logger = CSVLogger(tmp_path)
    trainer = fit(module, recipe, epochs=6, validation=sets, logger=logger)
    logged = trainer.callback_metrics
    holder, correct = Logs(normed()).eval(), {}
    for alpha, named in ((0.0, "0.00"), (0.125, "0.125"), (0.5, "0.50"), (0.75, "0.75"), (1.0, "1.00")):
        mean = {name: interpolate(before[name], after[name], alpha) for name in after}
        holder.load_state_dict(mean)
        for k, (x, y) in enumerate([(X, Y), (SHIFTED[:10], Y[:10])]):
            correct[alpha, k] = holder(x).argmax(1) == y
            expected = correct[alpha, k].float().mean().item()
            assert logged[f"wise/accuracy@{named}/dataloader_idx_{k}"].item() == pytest.approx(expected)
            assert recipe.curve[alpha][k] == pytest.approx(expected)
            if alpha in (0.0, 1.0):
                name = "ref" if alpha == 0 else "ft"
                confidence = holder(x).softmax(1).amax(1).mean().item()
                assert logged[f"wise/confidence_{name}/dataloader_idx_{k}"].item() == pytest.approx(confidence)
    for k in range(2):
        found = shares(correct[0.0, k], correct[1.0, k], correct[0.5, k])
        for name, value in found.items():
            assert logged[f"wise/{name}/dataloader_idx_{k}"].item() == pytest.approx(value / len(correct[0.0, k]))
    moved = torch.cat([(after[n] - before[n]).float().flatten() for n in after if after[n].is_floating_point()])
    assert logged["wise/distance"].item() == pytest.approx(moved.norm().item(), rel=1e-5)
    pytest.importorskip("matplotlib")
    assert Path(logger.log_dir, "wise_accuracy.png").exists()


def test_the_curve_is_made_where_nothing_was_validated_before_and_within_the_limit_of_batches():
    recipe = WiSEFT(0.5, grid=[0.5])
    trainer = fit(Logs(mlp()), recipe, validation=loader(X, Y), check_val_every_n_epoch=9, limit_val_batches=2)
    assert "wise/accuracy@0.50" in trainer.callback_metrics
    assert {round(8 * value[0]) / 8 for value in recipe.curve.values()} == {v[0] for v in recipe.curve.values()}


def test_the_curve_leaves_no_trace_in_the_module():
    """Metrics, modes and the random state; the weights that end the fit are those of the run without it."""
    states = []
    for grid in (None, [0.3, 0.6]):
        module = Logs(normed())
        torch.manual_seed(1)
        fit(module, WiSEFT(0.5, grid=grid, buffers="recalibrate"), validation=loader(X, Y))
        states.append((weights(module), torch.get_rng_state(), [part.training for part in module.modules()]))
    assert same(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_a_start_at_chance_is_said_and_a_good_one_is_not(recwarn):
    good = Classifier(nn.Sequential(nn.Linear(6, 3, bias=False)))
    y = Y.repeat(4)
    x = F.one_hot(y, 6).float()
    with torch.no_grad():
        good.net[0].weight.copy_(torch.eye(3, 6) * 3)
    trainer = quiet(callbacks=[WiSEFT(0.5)])
    trainer.fit(good, loader(x, y, size=96))
    assert not [w for w in recwarn if "chance" in str(w.message)]
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.net[0].weight.copy_(torch.eye(3, 6).roll(1, 0) * 3)
    with pytest.warns(UserWarning, match="classify 0 of the first 96 samples correctly, which is chance"):
        quiet(callbacks=[WiSEFT(0.5)]).fit(bad, loader(x, y, size=96))


def test_any_module_is_averaged_without_a_curve():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())

    module = Regression(mlp())
    before = weights(module)
    fit(module, WiSEFT(0.0))
    assert same(weights(module), before)


# -- BANG --------------------------------------------------------------------------------------------------------------


class Targets(StepRecipe):
    needs_criterion = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def extra_loss(self, step):
        self.seen.append((step.targets, step.hard_targets))
        return {}


def test_smoothing_is_torchs_own():
    class Smoothed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.2)

    theirs, ours = Smoothed(mlp()), Classifier(mlp())
    fit(theirs)
    fit(ours, BANG(1.0, label_smoothing=0.2, mixup_alpha=0))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs.parameters(), ours.parameters()))


def test_mixup_alone_and_both_soften_the_targets():
    for s in (0.0, 0.1):
        watch = Targets()
        fit(Classifier(mlp()), BANG(0.5, label_smoothing=s, mixup_alpha=0.5), watch, epochs=1)
        targets, hard = watch.seen[0]
        assert torch.allclose(targets.sum(1), torch.ones(4))
        assert targets.min() >= s / 3 - 1e-6
        assert (targets.gather(1, hard[:, None]) < 1 - s / 2).any()


def test_bang_ends_at_the_mean_of_its_own_ends():
    ends, module = [], Classifier(mlp())
    before = weights(module)
    look = Watch(on_fit_end=lambda trainer, module: ends.append(weights(module)))
    fit(module, look, BANG(0.5))
    assert same(weights(module), {n: torch.lerp(before[n], ends[0][n], 0.5) for n in before})
    plain = Classifier(mlp())
    fit(plain)
    assert not same(ends[0], weights(plain))


def test_theta_0_is_in_checkpoints_once_and_loads_without_pickle(tmp_path):
    keep = ModelCheckpoint(tmp_path, "x", every_n_epochs=1)
    module = Logs(mlp())
    held = copied(dict(module.state_dict()))
    fit(module, BANG(), keep, enable_checkpointing=True)
    section = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["BANG"]["state"]
    assert same(section["theta_0"], held)
    assert section["averaged"] is False
