"""BackdoorAdjustment: its maths against the card's numbers, and whose outputs a stock module's evaluation reports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from lightning_recipes.callbacks import (
    AdaptFormer,
    BackdoorAdjustment,
    CosineHead,
    LogitAdjustment,
    LongTailMonitor,
    RobustAccuracyMonitor,
)
from lightning_recipes.callbacks.robustness.backdoor_adjustment import disagreement, fuse
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.outputs import logits_in, part_of, replace_outputs, watch_outputs
from lightning_recipes.modules import ImageClassifier
from tests.stock import Classifier, in_two_ranks, loader, mlp, quiet, same, samples, weights

# -- maths -------------------------------------------------------------------------------------------------------------

THREE = [torch.tensor([row]) for row in ([2.0, 1.0, 0.0], [0.0, 1.5, 0.0], [0.0, 1.5, 0.5])]
THIRD = [1 / 3] * 3


def test_the_cards_oracle() -> None:
    mean = fuse(THREE, THIRD, "logit")
    assert (3 * mean)[0].tolist() == pytest.approx([2, 4, 0.5])
    assert mean.softmax(1)[0].tolist() == pytest.approx([0.281352, 0.547999, 0.170649], abs=1e-6)
    # (.665241 + .154281 + .140245) / 3 = .319922
    assert fuse(THREE, THIRD, "prob").exp()[0].tolist() == pytest.approx([0.319922, 0.521566, 0.158512], abs=1e-6)


def test_the_spaces_can_disagree() -> None:
    z = [torch.tensor([row]) for row in ([6.0, 0.0], [0.0, 1.6], [0.0, 1.6])]
    assert fuse(z, THIRD, "logit").argmax(1).item() == 0
    mixture = fuse(z, THIRD, "prob")
    assert mixture.argmax(1).item() == 1
    assert mixture.exp()[0].tolist() == pytest.approx([0.444, 0.556], abs=1e-3)


def test_logprob_is_logit_up_to_a_constant_a_sample() -> None:
    z = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    prior = [0.5, 0.3, 0.2]
    shift = fuse(z, prior, "logprob") - fuse(z, prior, "logit")
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-6)


def test_the_prior_weighs_members_and_zero_leaves_one_out() -> None:
    assert fuse(THREE, [0.5, 0.5, 0.0], "logit")[0].tolist() == [1.0, 1.25, 0.0]
    for space in ("logit", "logprob", "prob"):
        alone = fuse(THREE, [0.0, 1.0, 0.0], space)
        assert torch.allclose(alone.softmax(1), THREE[1].softmax(1), atol=1e-6)
    by_hand = 0.7 * THREE[0].softmax(1) + 0.3 * THREE[2].softmax(1)
    assert torch.allclose(fuse(THREE, [0.7, 0.0, 0.3], "prob").exp(), by_hand, atol=1e-6)


def test_one_member_comes_back_as_it_is_and_equal_ones_agree() -> None:
    z = torch.randn(5, 4)
    assert fuse([z], [1.0], "prob") is z
    assert torch.allclose(fuse([z] * 3, THIRD, "logit"), z, atol=1e-6)
    for space in ("prob", "logprob"):
        assert torch.allclose(fuse([z] * 3, THIRD, space), z.log_softmax(1), atol=1e-6)


def test_probabilities_are_averaged_in_fp32_and_without_underflow() -> None:
    z = [torch.tensor([[120.0, 0.0]]), torch.tensor([[100.0, 0.0]])]
    assert fuse(z, [0.5, 0.5], "prob")[0, 1].item() == pytest.approx(-100.6931, abs=1e-3)
    half = fuse([each.bfloat16() for each in THREE], THIRD, "logit")
    assert half.dtype == torch.float32 and torch.allclose(half, fuse(THREE, THIRD, "logit"))
    assert fuse([THREE[0].double(), THREE[1]], [0.5, 0.5]).dtype == torch.float64


def test_disagreement_counts_samples_on_which_not_all_agree() -> None:
    choices = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0], [0, 2, 2, 0]])
    assert disagreement(choices).item() == 2 and disagreement(choices[:1]).item() == 0


# -- the socket: outputs -----------------------------------------------------------------------------------------------


def test_outputs_are_replaced_for_callers_seen_by_watchers_and_given_back() -> None:
    module, x = Classifier(), torch.rand(2, 6)
    raw, seen = module(x), []
    stop_watching = watch_outputs(module, seen.append)
    stop = replace_outputs(module, "One", lambda logits, args, kwargs: logits + len(args) + kwargs.get("more", 0))
    assert torch.equal(module(x), raw + 1) and torch.equal(seen[0], raw + 1)
    with pytest.raises(RecipeError, match="One and Other both replace the outputs"):
        replace_outputs(module, "Other", lambda logits, args, kwargs: logits)
    stop()
    assert torch.equal(module(x), raw) and torch.equal(seen[1], raw)
    stop_watching()
    stop_watching()
    assert "forward" not in vars(module) and len(seen) == 2


def test_something_else_may_run_instead_of_the_forward() -> None:
    module, x, ran = Classifier(), torch.rand(2, 6), []
    module.net.register_forward_hook(lambda *args: ran.append(1))
    stop = replace_outputs(module, "One", None, instead=lambda x: -x)
    assert torch.equal(module(x), -x) and not ran
    with pytest.raises(RecipeError, match="One and Other both replace the outputs"):
        replace_outputs(module, "Other", lambda logits, args, kwargs: logits)
    stop()
    module(x)
    assert ran and "forward" not in vars(module)


def test_only_logits_are_acted_upon() -> None:
    z = torch.rand(2, 3)
    assert logits_in(z) is z and logits_in({"logits": z, "loss": 1}) is z
    for other in (z.long(), z[0], z.sum(), (z,), {"loss": z}, None):
        assert logits_in(other) is None

    class Says(Classifier):
        def forward(self, x: Any) -> Any:
            return {"loss": x.sum(), "logits": x} if x.dim() == 2 else x.sum()

    module = Says()
    stop = replace_outputs(module, "One", lambda logits, args, kwargs: -logits)
    out = module(z)
    assert torch.equal(out["logits"], -z) and torch.equal(out["loss"], z.sum())
    assert torch.equal(module(z[0]), z[0].sum())
    stop()


def test_a_deepcopy_carries_no_replacement() -> None:
    module, x = Classifier(), torch.rand(2, 6)
    raw = module(x)
    stop = replace_outputs(module, "One", lambda logits, args, kwargs: logits + 1)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), raw)
    stop()
    assert part_of(module, "net.4") is module.net[4]


# -- evaluation --------------------------------------------------------------------------------------------------------

X, Y = samples(10)


class Evaluates(Classifier):
    """A module whose every evaluation asks itself for logits."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("test/loss", F.cross_entropy(logits, y), batch_size=len(x))
        self.log("test/acc", (logits.argmax(1) == y).float().mean(), batch_size=len(x))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def member(seed: int) -> Evaluates:
    return Evaluates(mlp(seed=seed))


def logits_of(*modules: LightningModule) -> list[Tensor]:
    with torch.no_grad():
        return [module.eval()(X) for module in modules]


def saved(module: LightningModule, path: Path, **more: Any) -> str:
    torch.save({"state_dict": module.state_dict(), **more}, path)
    return str(path)


def predict(module: LightningModule, *callbacks: Any, **kwargs: Any) -> Tensor:
    return torch.cat(quiet(callbacks=list(callbacks), **kwargs).predict(module, loader(X, Y)))


@pytest.mark.parametrize("space", ["logit", "prob", "logprob"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_modules_own_steps_report_the_mixture(space: Any, inference_mode: bool, tmp_path: Path) -> None:
    own, built, on_disk = (member(seed) for seed in range(3))
    expected = fuse(logits_of(own, built, on_disk), [0.5, 0.2, 0.3], space)
    recipe = BackdoorAdjustment([built, saved(on_disk, tmp_path / "2.ckpt")], [0.5, 0.2, 0.3], space)
    start = weights(own)
    predicted = predict(own, recipe, inference_mode=inference_mode)
    assert torch.allclose(predicted, expected, atol=1e-6)
    trainer = quiet(callbacks=[recipe], inference_mode=inference_mode)
    (tested,) = trainer.test(own, loader(X, Y), verbose=False)
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(expected, Y).item(), abs=1e-5)
    assert tested["test/acc"] == pytest.approx((expected.argmax(1) == Y).float().mean().item())
    (validated,) = trainer.validate(own, loader(X, Y), verbose=False)
    assert validated["val/loss"] == pytest.approx(F.cross_entropy(expected, Y).item(), abs=1e-5)
    choices = torch.stack([z.argmax(1) for z in logits_of(own, built, on_disk)])
    for i, row in enumerate(choices):
        assert tested[f"backdoor_adjustment/acc_member_{i}"] == pytest.approx((row == Y).float().mean().item())
    assert tested["backdoor_adjustment/disagreement"] == pytest.approx(disagreement(choices).item() / len(X))
    assert same(weights(own), start) and "forward" not in vars(own)
    assert torch.allclose(predict(own), logits_of(own)[0], atol=1e-6)


def test_without_members_the_predictions_are_bitwise_the_modules() -> None:
    assert torch.equal(predict(member(0), BackdoorAdjustment()), predict(member(0)))


def test_the_module_itself_may_stand_aside() -> None:
    expected = fuse(logits_of(member(1), member(2)), [0.5, 0.5], "prob")
    recipe = BackdoorAdjustment([member(1), member(2)], space="prob", include_self=False)
    assert torch.allclose(predict(member(0), recipe), expected, atol=1e-6)
    assert torch.equal(predict(member(0), BackdoorAdjustment([member(1)], include_self=False)), predict(member(1)))


def test_members_are_evaluated_in_eval_mode_and_get_their_modes_back() -> None:
    other = Evaluates(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    other.train()
    other.net[1].eval()
    start = weights(other)
    predicted = predict(member(0), BackdoorAdjustment([other]))
    assert other.training and other.net[2].training and not other.net[1].training and same(weights(other), start)
    assert torch.allclose(predicted, fuse(logits_of(member(0), other), [0.5, 0.5]), atol=1e-6)


def test_a_fit_is_left_alone_with_its_validations() -> None:
    def trained(*callbacks: Any) -> tuple[dict[str, Tensor], Tensor]:
        module = member(0)
        trainer = quiet(callbacks=list(callbacks), max_epochs=2, num_sanity_val_steps=2)
        trainer.fit(module, loader(X, Y), loader(X, Y))
        return weights(module), trainer.callback_metrics["val/loss"]

    (with_it, loss), (without, plain) = trained(BackdoorAdjustment([member(1)])), trained()
    assert same(with_it, without) and torch.equal(loss, plain)


def test_members_come_from_a_fit_of_stage_one(tmp_path: Path) -> None:
    """Checkpoints of Lightning as they are, with optimizer and callback states, also of another width."""

    class Sized(Evaluates):
        def __init__(self, width: int = 5, seed: int = 0) -> None:
            super().__init__(mlp(width=width, seed=seed))
            self.save_hyperparameters()

    members = []
    for seed, width in enumerate((5, 7)):
        keep = ModelCheckpoint(tmp_path, str(seed))
        module = Sized(width, seed)
        quiet(callbacks=[LogitAdjustment(), keep], enable_checkpointing=True).fit(module, loader(X, Y))
        members.append((module, str(tmp_path / f"{seed}.ckpt")))
    own = Sized(5, 9)
    expected = fuse(logits_of(own, *(module for module, _ in members)), THIRD, "logit")
    assert torch.allclose(predict(own, BackdoorAdjustment([p for _, p in members])), expected, atol=1e-6)


def test_a_member_that_differs_in_no_weight_shape_is_built_from_its_own_hyperparameters(tmp_path: Path) -> None:
    """Another activation fits the module's state dict as well: a copy of the module would be silently wrong."""

    class Activated(Evaluates):
        def __init__(self, activation: str = "ReLU", seed: int = 0) -> None:
            net = mlp(seed=seed)
            net[1] = net[3] = getattr(nn, activation)()
            super().__init__(net)
            self.save_hyperparameters()

    other, own = Activated("Tanh", 1), Activated("ReLU", 0)
    keep = ModelCheckpoint(tmp_path, "tanh")
    quiet(callbacks=[keep], enable_checkpointing=True).fit(other, loader(X, Y))
    expected = fuse(logits_of(own, other), [0.5, 0.5])
    states = []
    for recipe in (BackdoorAdjustment([str(tmp_path / "tanh.ckpt")]), BackdoorAdjustment()):
        torch.manual_seed(0)
        found = predict(own, recipe)
        states.append(torch.get_rng_state())
        assert torch.allclose(found, expected, atol=1e-6) == bool(recipe.members)
    assert torch.equal(*states)


def test_members_of_stage_one_carry_its_branches_and_head(tmp_path: Path) -> None:
    """AdaptFormer, cosine head and logit adjustment on two backbones, then all of it from checkpoints alone."""

    def stage_one(embed_dim: int) -> tuple[ImageClassifier, str]:
        torch.manual_seed(embed_dim)
        net = {"img_size": 8, "patch_size": 4, "embed_dim": embed_dim, "depth": 2, "num_heads": 2}
        module = ImageClassifier("vit_tiny_patch16_224", num_classes=3, in_chans=1, model_args=net)
        keep = ModelCheckpoint(tmp_path, str(embed_dim))
        recipes = [AdaptFormer(4), CosineHead(init="class_mean"), LogitAdjustment(), keep]
        quiet(callbacks=recipes, enable_checkpointing=True).fit(module, loader(images, Y))
        return module, str(tmp_path / f"{embed_dim}.ckpt")

    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (own, path), (other, other_path) = stage_one(16), stage_one(24)
    with torch.no_grad():
        expected = fuse([module.eval()(images) for module in (own, other)], [0.5, 0.5]).softmax(1)
    torch.manual_seed(9)
    fresh = ImageClassifier(**{k: own.hparams[k] for k in ("model", "num_classes", "in_chans", "model_args")})
    recipes = [BackdoorAdjustment([other_path]), AdaptFormer(4), CosineHead(init="class_mean")]
    found = torch.cat(quiet(callbacks=recipes).predict(fresh, loader(images, Y), ckpt_path=path))
    assert torch.allclose(found, expected, atol=1e-5)
    in_memory = torch.cat(quiet(callbacks=recipes).predict(own, loader(images, Y)))
    assert torch.allclose(in_memory, expected, atol=1e-5)


def test_transforms_are_each_members_own_preprocessing() -> None:
    own, other = member(0), member(1)
    with torch.no_grad():
        expected = fuse([own(X), other(2 * X - 1)], [0.5, 0.5])
    recipe = BackdoorAdjustment([other], transforms=[lambda x: 2 * x - 1])
    assert torch.allclose(predict(own, recipe), expected, atol=1e-6)


def test_logits_of_a_named_submodule() -> None:
    class AsksItsNet(Evaluates):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])

    own, other = AsksItsNet(mlp(seed=0)), AsksItsNet(mlp(seed=1))
    expected = fuse(logits_of(own, other), [0.5, 0.5])
    assert torch.allclose(predict(own, BackdoorAdjustment([other], forward="net")), expected, atol=1e-6)
    assert "forward" not in vars(own.net)
    with pytest.raises(
        RecipeError, match=r"no logits \[n, classes\] came out of the module's forward .*forward='NAME'"
    ):
        predict(own, BackdoorAdjustment([other]))
    assert "forward" not in vars(own)


def test_a_compiled_network_is_replaced_too() -> None:
    torch.compiler.reset()
    own, other = member(0), member(1)
    expected = fuse(logits_of(own, other), [0.5, 0.5])
    own.net.compile(backend="eager")
    other.net.compile(backend="eager")
    plain = predict(own)
    assert torch.allclose(predict(own, BackdoorAdjustment([other])), expected, atol=1e-5)
    assert torch.allclose(predict(own, BackdoorAdjustment([other], forward="net")), expected, atol=1e-5)
    assert torch.equal(predict(own), plain)


def test_a_module_compiled_whole_is_replaced_too() -> None:
    torch.compiler.reset()
    own, other = member(0), member(1)
    expected = fuse(logits_of(own, other), [0.5, 0.5])
    compiled = torch.compile(own, backend="eager")
    plain = predict(compiled)
    assert torch.allclose(predict(compiled, BackdoorAdjustment([other])), expected, atol=1e-5)
    assert torch.allclose(predict(compiled), plain, atol=1e-6)


def test_monitors_measure_the_mixture() -> None:
    own, other = member(0), member(1)
    expected = fuse(logits_of(own, other), [0.5, 0.5]).argmax(1)
    within = [(expected[c == Y] == c).float().mean().item() for c in range(3)]
    for callbacks in (
        [BackdoorAdjustment([other]), LongTailMonitor([200, 50, 3])],
        [LongTailMonitor([200, 50, 3]), BackdoorAdjustment([other])],
    ):
        (values,) = quiet(callbacks=callbacks).test(own, loader(X, Y), verbose=False)
        found = [values[f"long_tail/{name}"] for name in ("many", "medium", "few")]
        assert found == pytest.approx(within)


def test_an_attack_at_evaluation_attacks_the_mixture(tmp_path: Path) -> None:
    """Its gradient goes through every member, also one that was loaded while Lightning was in inference mode."""
    wide = [Evaluates(nn.Sequential(nn.Flatten(), mlp(seed=seed))) for seed in (0, 1)]
    data = loader(X[:, :, None, None], Y)
    expected = sum(wide[i].eval()(X[:, :, None, None]) for i in (0, 1)).argmax(1)
    recipe = BackdoorAdjustment([saved(wide[1], tmp_path / "1.ckpt")])
    monitor = RobustAccuracyMonitor("fgsm", epsilon=1e-6)
    (values,) = quiet(callbacks=[recipe, monitor]).test(wide[0], data, verbose=False)
    assert values["robust_accuracy/clean"] == pytest.approx((expected == Y).float().mean().item())
    (attacked,) = quiet(callbacks=[recipe, RobustAccuracyMonitor("fgsm", epsilon=1.0)]).test(
        wide[0], data, verbose=False
    )
    assert attacked["robust_accuracy/fgsm"] < values["robust_accuracy/clean"]


def _measure(**settings: Any) -> dict[str, float]:
    own, recipes = member(0), [BackdoorAdjustment([member(1)]), LongTailMonitor([200, 50, 3])]
    trainer = quiet(callbacks=recipes, **settings)
    (values,) = trainer.test(own, loader(X, Y), verbose=False)
    still = Evaluates(mlp(seed=0), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = quiet(callbacks=recipes, limit_train_batches=1, **settings)
    trainer.fit(still, loader(X, Y), loader(X, Y))
    fitted = {f"fit {k}": v.item() for k, v in trainer.callback_metrics.items() if k.startswith("long_tail")}
    return {**{k: v for k, v in values.items() if "/" in k and not k.startswith("test")}, **fitted}


def _measure_on_a_rank(rank: int, folder: Path) -> None:
    torch.save(_measure(devices=2, strategy="ddp", plugins=LightningEnvironment()), folder / f"{rank}.pt")


@pytest.mark.ddp
def test_on_two_ranks_figures_are_those_of_one_process(tmp_path: Path) -> None:
    """Also in a fit's validation, where DDP routes the step through the module's forward."""
    in_two_ranks(_measure_on_a_rank, tmp_path)
    alone, both = _measure(), [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert both[0] == both[1] == pytest.approx(alone) and len(alone) >= 7


def test_equal_tensors_of_loaded_members_are_held_once(tmp_path: Path) -> None:
    first = member(1)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.net[4].weight.add_(1)
    paths = [saved(m, tmp_path / f"{i}.ckpt") for i, m in enumerate((first, second))]
    recipe, places = BackdoorAdjustment(paths), []

    class Look(Evaluates):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            places.append([p.data_ptr() for _, part, _ in recipe._running for p in part.parameters()])
            super().test_step(batch, batch_idx)

    own = Look(mlp(seed=0))
    quiet(callbacks=[recipe]).test(own, loader(X, Y), verbose=False)
    one, two = places[0][:6], places[0][6:]
    assert [a == b for a, b in zip(one, two)] == [True, True, True, True, False, True]
    assert not set(one) & {p.data_ptr() for p in own.parameters()}
    assert recipe._running == []


def test_it_may_be_an_averaged_module() -> None:
    """After a fit with averaging the module has its averaged weights, and is member 0 with them."""
    own = member(0)
    trainer = quiet(callbacks=[EMAWeightAveraging(), BackdoorAdjustment([member(1)])], max_epochs=2)
    trainer.fit(own, loader(X, Y))
    expected = fuse(logits_of(own, member(1)), [0.5, 0.5])
    (tested,) = trainer.test(own, loader(X, Y), verbose=False)
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(expected, Y).item(), abs=1e-5)


# -- errors ------------------------------------------------------------------------------------------------------------


class Shapeless:
    """An object of a class that is not torch's."""


class Named(LightningDataModule):
    class_names = ("cat", "dog", "fox")

    def predict_dataloader(self) -> Any:
        return loader(X, Y)

    def train_dataloader(self) -> Any:
        return loader(X, Y)


def test_members_with_other_classes_are_refused_where_names_are_known(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "stage_one")
    stage_one = quiet(callbacks=[LogitAdjustment(), keep], enable_checkpointing=True)
    stage_one.fit(member(1), datamodule=Named())
    path = str(tmp_path / "stage_one.ckpt")

    class Reordered(Named):
        class_names = ("dog", "cat", "fox")

    assert len(quiet(callbacks=[BackdoorAdjustment([path])]).predict(member(0), datamodule=Named())) == 3
    says = r"member 1 \(.*stage_one\.ckpt\) has its classes in another order .*\['cat', 'dog', 'fox'\]; not \['dog'"
    with pytest.raises(RecipeError, match=says):
        quiet(callbacks=[BackdoorAdjustment([path])]).predict(member(0), datamodule=Reordered())
    hyper = saved(member(1), tmp_path / "hyper.ckpt", hyper_parameters={"class_names": ["fox", "dog", "cat"]})
    with pytest.raises(RecipeError, match="has its classes in another order"):
        quiet(callbacks=[BackdoorAdjustment([hyper])]).predict(member(0), datamodule=Named())


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (None, r"member 1 \(.*m\.ckpt\): there is no such file"),
        (lambda path: path.write_bytes(b"nonsense"), r"member 1 \(.*m\.ckpt\) cannot be read with weights_only=True"),
        (
            lambda path: torch.save({"weights": 1}, path),
            r"m\.ckpt\) is no checkpoint of Lightning: it has no 'state_dict'",
        ),
        (lambda path: torch.save({"state_dict": {}, "own": Shapeless()}, path), r"m\.ckpt\) cannot be read with"),
        (
            lambda path: saved(Evaluates(mlp(classes=4)), path),
            r"m\.ckpt\) does not fit Evaluates: size mismatch for net\.4",
        ),
    ],
)
def test_checkpoints_that_are_no_members(write: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    if write is not None:
        write(path)
    module = member(0)
    with pytest.raises(RecipeError, match=f"BackdoorAdjustment: .*{says}"):
        predict(module, BackdoorAdjustment([str(path)]))
    assert "forward" not in vars(module)


def test_a_member_of_another_width_is_refused_in_the_first_batch() -> None:
    module = member(0)
    with pytest.raises(
        RecipeError, match=r"member 1 \(Evaluates\) gives logits \[4, 4\] where the module gives \[4, 3\]"
    ):
        predict(module, BackdoorAdjustment([Evaluates(mlp(classes=4))]))
    assert "forward" not in vars(module)


def test_copies_are_said_to_adjust_for_nothing() -> None:
    with pytest.warns(UserWarning, match="members 0 and 1 of 3 have the same weights; averaging copies is not"):
        predict(member(0), BackdoorAdjustment([member(0), member(1)]))


def test_an_exception_in_the_step_gives_the_module_its_outputs_back() -> None:
    class Fails(Evaluates):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            self(batch[0])
            raise KeyError("own")

    module, other = Fails(mlp()), member(1).train()
    with pytest.raises(KeyError):
        predict(module, BackdoorAdjustment([other]))
    assert "forward" not in vars(module) and other.training


def test_checkpoints_hold_the_paths_of_members_and_their_hashes(tmp_path: Path) -> None:
    path = saved(member(1), tmp_path / "1.ckpt")
    recipe, own = BackdoorAdjustment([path]), member(0)
    trainer = quiet(callbacks=[recipe])
    trainer.fit(own, loader(X, Y))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    section = checkpoint["callbacks"]["BackdoorAdjustment"]
    assert section["arguments"]["members"] == [path] and len(section["state"]["hashes"][path]) == 64
    assert checkpoint["state_dict"].keys() == own.state_dict().keys() == member(0).state_dict().keys()
    saved(member(2), tmp_path / "1.ckpt")
    with pytest.warns(UserWarning, match=r"member 1 .* is another file than when the checkpoint was written"):
        quiet(callbacks=[BackdoorAdjustment([path])]).predict(own, loader(X, Y), ckpt_path=tmp_path / "own.ckpt")
