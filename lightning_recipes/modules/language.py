"""The stock modules over Hugging Face models, trained by the model's own built-in loss on dict batches."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lightning_recipes.modules.classifier import NOT_SAVED, Classifier, OptimizedModule
from lightning_recipes.modules.sharded import shard

Batch = dict[str, Tensor]


def build_language_model(
    head: str, model_name_or_path: str | None, config: dict[str, Any] | None, **overrides: Any
) -> nn.Module:
    """A model of transformers' class ``head``: pretrained by name or folder, or new from a configuration.

    Args:
        head: "AutoModelForSequenceClassification", "AutoModelForCausalLM", ...
        model_name_or_path: a hub name, or a folder with config and weights.
        config: ``model_type`` (as ``transformers.AutoConfig.for_model`` takes it) and the sizes of a new model.
        overrides: further configuration, such as num_labels.
    """
    if (model_name_or_path is None) == (config is None):
        raise ValueError(
            f"model_name_or_path={model_name_or_path!r}, config={config!r}: exactly one of them must be given"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this module needs transformers: pip install 'lightning_recipes[language]'") from error
    auto = getattr(transformers, head)
    if model_name_or_path is not None:
        return auto.from_pretrained(model_name_or_path, **overrides)
    if "model_type" not in config:
        raise ValueError(f"config={config!r}: must name a model_type, for example bert, gpt2 or llama")
    sizes = {key: value for key, value in config.items() if key != "model_type"} | overrides
    return auto.from_config(transformers.AutoConfig.for_model(config["model_type"], **sizes))


class TextClassifier(Classifier):
    """Any Hugging Face sequence classifier on dict batches (input_ids (N,L), attention_mask (N,L), labels (N,)).

    Logs train/loss and, for val and test, loss, acc and ece; ``predict_step`` returns probabilities (N,num_classes).

    Args:
        model_name_or_path: a pretrained model, by hub name or folder; or
        config: a new one, without a download: ``model_type`` and sizes, for example {model_type: bert, vocab_size: 259,
            hidden_size: 64, ...}.
        num_classes: classes.
        optimizer, lr_scheduler, lr_interval, monitor: as in `ImageClassifier`.
    """

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        num_classes: int = 2,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            monitor=monitor,
        )
        self.save_hyperparameters(ignore=[*NOT_SAVED])
        self.model = build_language_model(
            "AutoModelForSequenceClassification", model_name_or_path, config, num_labels=num_classes
        )
        self.model.train()

    def configure_model(self) -> None:
        shard(self, self.model)

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output, with ``loss`` where ``labels`` are given and ``logits`` (N,num_classes)."""
        return self.model(**batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("val", dataloader_idx, self(**batch).logits, batch["labels"])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("test", dataloader_idx, self(**batch).logits, batch["labels"])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(**{key: value for key, value in batch.items() if key != "labels"}).logits.softmax(-1)


class CausalLM(OptimizedModule):
    """Any Hugging Face causal language model on dict batches (input_ids, attention_mask, labels, each (N,L)).

    ``labels`` equal ``input_ids`` (-100 where nothing is to be predicted); the model shifts them itself.
    Logs train/loss and, for val and test, loss and perplexity (over all predicted tokens); ``predict_step`` returns
    logits (N,L,V).

    Args:
        model_name_or_path: a pretrained model, by hub name or folder; or
        config: a new one, without a download: ``model_type`` and sizes, for example {model_type: llama,
            vocab_size: 128, hidden_size: 64, ...}.
        optimizer, lr_scheduler, lr_interval, monitor: as in `ImageClassifier`.
    """

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval, monitor=monitor)
        self.save_hyperparameters(ignore=[*NOT_SAVED])
        self.model = build_language_model("AutoModelForCausalLM", model_name_or_path, config)
        self.model.train()
        self.perplexity = nn.ModuleDict({stage: Perplexity(ignore_index=-100) for stage in ("val", "test")})

    def configure_model(self) -> None:
        shard(self, self.model)

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output, with ``loss`` where ``labels`` are given and ``logits`` (N,L,V)."""
        return self.model(**batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(**{key: value for key, value in batch.items() if key != "labels"}).logits

    def _evaluate(self, stage: str, batch: Batch) -> None:
        output, size = self(**batch), len(batch["input_ids"])
        self.log(f"{stage}/loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.perplexity[stage].update(output.logits[:, :-1].float(), batch["labels"][:, 1:])
        self.log(f"{stage}/perplexity", self.perplexity[stage], on_step=False, on_epoch=True, batch_size=size)
