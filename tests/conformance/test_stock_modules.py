"""The sockets on modules that nobody shaped for the purpose."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_recipes.callbacks import AAER, GLAD, PEGO, ProgressiveUnfreezing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.core.schedule import EveryN

from .table import ConvNet, digits, small_vit


class Halve(StepRecipe):
    """Halves the batch's input, mixes every target with its neighbour's, and adds a weight penalty; notes what it
    saw."""

    def __init__(self, criterion: str | int | None = None) -> None:
        super().__init__()
        self.criterion = criterion
        self.losses: list[tuple[Tensor, Tensor, Tensor]] = []

    def transform_batch(self, step: Any, batch: Any) -> Any:
        return (batch[0] / 2, *batch[1:]) if isinstance(batch, (tuple, list)) else batch

    def transform_targets(self, step: Any, logits: Tensor, targets: Tensor) -> Tensor:
        hot = F.one_hot(targets.clamp_min(0), logits.shape[1]).float()
        return (hot + hot.roll(1, 0)) / 2

    def extra_loss(self, step: Any) -> Tensor:
        self.losses.append((step.outputs.detach(), step.targets, step.loss.detach()))
        return 1e-3 * sum(p.square().sum() for p in step.module.parameters())


class Stock(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = ConvNet()
        self.seen: list[Tensor] = []
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.body(x)
        self.accuracy.update(logits, y)
        self.seen.append(y)
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithModule(Stock):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch: Any) -> Any:
        return self.loss(self.body(batch[0]), batch[1])


class ReturnsDict(Stock):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "n": len(batch[0])}


class BuildsLate(Stock):
    def __init__(self) -> None:
        super().__init__()
        self.body = None

    def configure_model(self) -> None:
        if self.body is None:
            torch.manual_seed(0)
            self.body = ConvNet()


class FiltersParameters(Stock):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class TimmGroups(Stock):
    def configure_optimizers(self) -> Any:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(self, "adamw", lr=1e-3, weight_decay=0.05)


class GroupsByHand(Stock):
    def configure_optimizers(self) -> Any:
        parts = [{"params": list(part.parameters()), "lr": 0.1 / (i + 1)} for i, part in enumerate(self.body)]
        return torch.optim.SGD([p for p in parts if p["params"]], lr=0.1)


class ValidatesByTraining(Stock):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))


class Auxiliary(Stock):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.body(x), y) + 0.1 * F.mse_loss(self.body[0](x).mean((1, 2, 3)), y.float())


class TimmLoss(Stock):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = LabelSmoothingCrossEntropy(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self.body(batch[0]), batch[1])


class TwoOptimizers(Stock):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body[:3].parameters(), 0.1), torch.optim.Adam(self.body[3].parameters(), 1e-3)]


class Text(pl.LightningModule):
    """A Hugging Face model with its built-in loss and dict batches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if kind == "classifier":
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            config = AutoConfig.for_model("bert", vocab_size=50, num_labels=10, **sizes)
            self.model = AutoModelForSequenceClassification.from_config(config)
        else:
            config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
            self.model = AutoModelForCausalLM.from_config(config)
        self.eval()  # without dropout, so that figures can be compared

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def text_batches(kind: str) -> DataLoader:
    batches, generator = [], torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(0, 50, (4, 8), generator=generator)
        labels = torch.randint(0, 10, (4,), generator=generator) if kind == "classifier" else ids
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return DataLoader(batches, batch_size=None)


def fit(module: Any, callbacks: list[pl.Callback], data: Any = None, **trainer: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    run = pl.Trainer(
        max_epochs=trainer.pop("max_epochs", 1), accelerator="cpu", callbacks=callbacks, **quiet, **trainer
    )
    validate = digits() if isinstance(module, ValidatesByTraining) else None
    run.fit(module, digits() if data is None else data, validate)
    return run


PLAIN = [Stock, WithModule, ReturnsDict, BuildsLate, FiltersParameters, TimmGroups, GroupsByHand, ValidatesByTraining]


@pytest.mark.parametrize("kind", PLAIN)
def test_the_loss_is_computed_from_what_the_recipe_made(kind: type[Stock]) -> None:
    """At every step the observed loss is cross-entropy with the soft targets, by hand, and metrics see hard labels."""
    module, recipe = kind(), Halve()
    fit(module, [recipe])
    assert len(recipe.losses) == 4
    smoothing = 0.1 if kind is WithModule else 0.0
    for logits, targets, loss in recipe.losses:
        smooth = targets * (1 - smoothing) + smoothing / 10
        by_hand = -(smooth * logits.log_softmax(1)).sum(1).mean()
        assert torch.allclose(loss, by_hand, atol=1e-6)
    if kind not in (WithModule,):
        assert all(not y.is_floating_point() for y in module.seen)


def test_the_batch_of_the_recipe_is_the_batch_of_the_step() -> None:
    plain, halved = Stock(), Stock()
    half = DataLoader([(x / 2, y) for batch in digits() for x, y in zip(*batch)], 16)
    only_batch = type("OnlyBatch", (StepRecipe,), {"transform_batch": Halve.transform_batch})
    fit(plain, [], half)
    fit(halved, [only_batch()])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), halved.parameters()))


@pytest.mark.parametrize(
    "recipe", [lambda: ProgressiveUnfreezing(at=EveryN(1)), lambda: AAER(0.1), lambda: GLAD(rank=None)]
)
@pytest.mark.parametrize("kind", PLAIN)
def test_the_recipes_train_every_stock_module(kind: type[Stock], recipe: Any) -> None:
    module = kind()
    torch.manual_seed(0)
    fit(module, [recipe()], max_epochs=5)
    fresh = ConvNet.__new__(ConvNet)
    torch.manual_seed(0)
    fresh.__init__()
    moved = [not torch.equal(a, b) for a, b in zip(module.body.parameters(), fresh.parameters())]
    assert all(moved), "every layer trained in the end"
    assert all(p.requires_grad for p in module.parameters())


def test_an_auxiliary_loss_is_an_error_that_lists_both_until_one_is_chosen() -> None:
    with pytest.raises(RecipeError, match=r"2 losses \(0: cross_entropy of \(16, 10\) .*1: mse_loss"):
        fit(Auxiliary(), [Halve()])
    recipe = Halve(criterion=0)
    fit(Auxiliary(), [recipe])
    logits, targets, loss = recipe.losses[0]
    assert torch.allclose(loss, -(targets * logits.log_softmax(1)).sum(1).mean(), atol=1e-6)


def test_a_timm_loss_is_named() -> None:
    with pytest.raises(RecipeError, match="no loss was seen"):
        fit(TimmLoss(), [AAER(0.1)])
    module = TimmLoss()
    run = fit(module, [AAER(0.3, criterion="criterion")], max_epochs=2)
    assert "aaer/abnormal_fraction" in run.callback_metrics
    assert "forward" not in module.criterion.__dict__


def test_a_timm_loss_does_not_take_soft_targets() -> None:
    with pytest.raises(RecipeError, match="takes class indices and a recipe made the targets soft"):
        fit(TimmLoss(), [Halve(criterion="criterion")])


def test_under_manual_optimization_transforms_work_and_the_rest_is_refused() -> None:
    class Transforms(StepRecipe):
        transform_batch, transform_targets = Halve.transform_batch, Halve.transform_targets

    plain, changed = TwoOptimizers(), TwoOptimizers()
    fit(plain, [])
    fit(changed, [Transforms()])
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), changed.parameters()))
    for recipe in (Halve(), AAER(0.1), GLAD(rank=None), ProgressiveUnfreezing(at=EveryN(1))):
        with pytest.raises(RecipeError, match="manual optimization"):
            fit(TwoOptimizers(), [recipe])


def test_what_the_user_froze_in_configure_model_stays_frozen() -> None:
    class Frozen(BuildsLate):
        def configure_model(self) -> None:
            super().configure_model()
            self.body[0].requires_grad_(False)

    module = Frozen()
    torch.manual_seed(0)
    start = [p.detach().clone() for p in ConvNet()[0].parameters()]
    fit(module, [ProgressiveUnfreezing(at=EveryN(1))], max_epochs=5)
    assert all(torch.equal(a, b) for a, b in zip(start, module.body[0].parameters()))
    assert not any(p.requires_grad for p in module.body[0].parameters())
    assert all(p.requires_grad for p in module.body[1:].parameters())


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_hugging_face_models_with_their_own_loss(kind: str) -> None:
    recipe = Halve()
    fit(Text(kind), [recipe], text_batches(kind))
    logits, targets, loss = recipe.losses[0]
    # A causal LM scores every token but the first, so its last position is ignored.
    kept = torch.ones(len(logits), dtype=torch.bool)
    if kind == "causal":
        kept = torch.arange(len(logits)) % 8 != 7
    by_hand = -(targets * logits.float().log_softmax(1)).sum(1)[kept].mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "causal"])
@pytest.mark.parametrize(
    "recipe", [lambda: PEGO(2, 2), lambda: GLAD(rank=2), lambda: ProgressiveUnfreezing(at=EveryN(1))]
)
def test_recipes_on_hugging_face_models(kind: str, recipe: Any) -> None:
    module = Text(kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, [recipe()], text_batches(kind), max_epochs=6)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert any("attn" in n or "attention" in n for n in before if not torch.equal(before[n], after[n]))


def test_adapters_on_timm_and_torchvision() -> None:
    from torchvision.models import VisionTransformer

    class Vit(Stock):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

    packed = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=10)
    packed.conv_proj = nn.Conv2d(1, 16, 4, 4)
    for body in (small_vit(), packed):
        module = Vit(body)
        trained = {name: p.detach().clone() for name, p in module.named_parameters()}
        fit(module, [PEGO(2, 2)], max_epochs=3)
        moved = {n for n, p in module.named_parameters() if not torch.equal(p, trained[n])}
        assert moved
        assert all("head" in n or "qkv.weight" in n or "in_proj_weight" in n for n in moved), moved


def test_timm_is_the_library_of_models() -> None:
    """The head and the layers are found for a model as timm makes it."""
    from lightning_recipes.core.select import head, layers

    module = Stock()
    module.body = timm.create_model("resnet18", num_classes=3)
    assert head(module) == "body.fc"
    assert [name for name, _ in layers(module)][-3:] == ["body.layer3", "body.layer4", "head"]
