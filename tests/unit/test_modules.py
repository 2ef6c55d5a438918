"""The stock modules, their nets and metrics, and the base configs that combine them with data."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F

from lightning_recipes.core.weights import load_weights
from lightning_recipes.datamodules import (
    ArrayDataModule,
    CharDataModule,
    DataModule,
    DigitsDataModule,
    FewShotDataModule,
    TextDataModule,
)
from lightning_recipes.modules import (
    AURC,
    BaseToNovelAccuracy,
    CausalLM,
    CifarResNet,
    DeepMLP,
    ImageClassifier,
    SmallCNN,
    TextClassifier,
    aurc,
    harmonic_mean,
)
from lightning_recipes.modules.image_classifier import build_net

DATA = os.environ.get("LIGHTNING_RECIPES_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LIGHTNING_RECIPES_DATA is not set")
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "base"
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
BERT = {
    "model_type": "bert",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = BERT | {"model_type": "llama", "vocab_size": 128}


def trainer(**kwargs) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 2,
    }
    return Trainer(**(quiet | kwargs))


# ---------------------------------------------------------------------------------------------------- nets


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (32, 0.46e6), (56, 0.85e6)])
def test_cifar_resnet_has_the_papers_sizes(depth, parameters):
    net = CifarResNet(depth)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.02)
    assert len([m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_cifar_resnet_shortcut_pads_both_sides():
    block = CifarResNet(20).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().max() == 0 and out[:, 24:].abs().max() == 0


def test_cifar_resnet18_keeps_the_resolution_of_small_images():
    net = build_net("cifar_resnet18", 10)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    x = torch.rand(2, 3, 32, 32)
    assert net.layer1(net.maxpool(net.conv1(x))).shape == (2, 64, 32, 32)
    assert net(x).shape == (2, 10) and build_net("cifar_resnet18", 4, 1)(x[:, :1]).shape == (2, 4)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_small_cnn(norm, side):
    net = SmallCNN(num_classes=7, in_chans=3, width=8, norm=norm)
    assert net(torch.rand(2, 3, side, side)).shape == (2, 7)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (norm == "batch")


@needs_data
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_published_weights_load(depth):
    load_weights(CifarResNet(depth), f"{DATA}/cifar10_resnet{depth}.safetensors")


@needs_data
def test_resnet20_has_its_published_accuracy():
    module = ImageClassifier(
        "cifar_resnet",
        weights=f"{DATA}/cifar10_resnet20.safetensors",
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    data = ArrayDataModule(f"{DATA}/cifar10_subset.npz", batch_size=250)
    (result,) = trainer().test(module, datamodule=data, verbose=False)
    assert result["test/acc"] == pytest.approx(0.9210, abs=1e-6)  # 1842 of 2000


# ---------------------------------------------------------------------------------------------------- metrics


def test_aurc_of_four_samples_by_hand():
    """Most confident first: right, wrong, right, wrong. Error rates among the first 1, 2, 3, 4: 0, 1/2, 1/3, 1/2."""
    confidence, correct = torch.tensor([0.7, 0.9, 0.6, 0.8]), torch.tensor([True, True, False, False])
    assert aurc(confidence, correct).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert aurc(confidence, torch.ones(4, dtype=torch.bool)).item() == 0
    assert aurc(confidence, torch.zeros(4, dtype=torch.bool)).item() == 1


def test_aurc_shares_errors_among_equally_confident_samples():
    """0.9 right; three of 0.5 of which one is wrong, 1/3 each: 0, (1/3)/2, (2/3)/3, 1/4."""
    confidence = torch.tensor([0.5, 0.9, 0.5, 0.5])
    expected = (0 + 1 / 6 + 2 / 9 + 1 / 4) / 4
    for wrong in (0, 2, 3):
        correct = torch.ones(4, dtype=torch.bool)
        correct[wrong] = False
        assert aurc(confidence, correct).item() == pytest.approx(expected)


def test_aurc_as_a_metric_over_batches():
    logits = torch.tensor([[3.0, 0.0], [2.0, -0.5], [-0.7, 1.0], [0.5, -0.5]])
    labels = torch.tensor([0, 1, 1, 1])  # right, wrong, right, wrong, from the most confident on
    metric = AURC(2)
    metric.update(logits[2:], labels[2:])
    metric.update(logits[:2].softmax(1), labels[:2])
    assert metric.compute().item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    with pytest.raises(ValueError, match=r"preds: shape \(4, 2\), must be \(N, 3\)"):
        AURC(3).update(logits, labels)


def test_harmonic_mean():
    assert harmonic_mean(0.8, 0.6) == pytest.approx(2 * 0.48 / 1.4)
    assert harmonic_mean(0.0, 0.0) == 0


def test_base_to_novel_accuracy_decides_within_each_half():
    metric = BaseToNovelAccuracy(num_classes=5)  # base 0, 1, 2; novel 3, 4
    logits = torch.tensor(
        [
            [1.0, 0.0, 0.0, 9.0, 0.0],  # label 0: right among base, though a novel class is higher
            [0.0, 1.0, 2.0, 0.0, 0.0],  # label 1: wrong
            [9.0, 0.0, 0.0, 0.0, 1.0],  # label 4: right among novel
            [0.0, 0.0, 0.0, 1.0, 2.0],  # label 4: right
            [0.0, 0.0, 0.0, 1.0, 2.0],  # label 3: wrong
        ]
    )
    labels = torch.tensor([0, 1, 4, 4, 3])
    metric.update(logits[:2], labels[:2])
    metric.update(logits[2:], labels[2:])
    result = metric.compute()
    assert result["base"] == 0.5 and result["novel"] == pytest.approx(2 / 3)
    assert result["harmonic_mean"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    with pytest.raises(ValueError, match=r"logits: shape \(5, 4\), must be \(N, 5\)"):
        metric.update(logits[:, :4], labels)
    with pytest.raises(ValueError, match="num_base=5: must be from 1 to num_classes - 1 = 4"):
        BaseToNovelAccuracy(5, 5)


# ---------------------------------------------------------------------------------------------------- image classifier


@pytest.mark.parametrize(
    ("model", "arguments", "side"),
    [("small_cnn", {"width": 8}, 8), ("cifar_resnet", {"depth": 8}, 16), ("vit_tiny_patch16_224", VIT, 16)],
)
def test_image_classifier_trains(model, arguments, side):
    module = ImageClassifier(model, in_chans=1, model_args=arguments)
    run = trainer(limit_train_batches=4)
    run.fit(module, datamodule=DigitsDataModule(size=side, batch_size=32))
    assert {"train/loss", "val/loss", "val/acc", "val/ece"} <= run.callback_metrics.keys()
    assert 0 <= run.callback_metrics["val/acc"] <= 1


def test_metrics_are_those_of_all_batches_together():
    module = ImageClassifier(SmallCNN(width=8), in_chans=1)
    data = DigitsDataModule(batch_size=50)
    (result,) = trainer().test(module, datamodule=data, verbose=False)
    images, labels = (torch.stack(part) for part in zip(*data.test_set, strict=True))
    logits = module.eval()(images).detach()
    assert result["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    confidence, guess = logits.softmax(1).max(1)
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [
        ((guess == labels)[bins == b].float().mean() - confidence[bins == b].mean()).abs() * (bins == b).float().mean()
        for b in bins.unique()
    ]
    assert result["test/ece"] == pytest.approx(sum(gaps).item(), rel=1e-4)


def test_several_loaders_are_measured_apart():
    module = ImageClassifier("small_cnn", in_chans=1)
    data = FewShotDataModule(DigitsDataModule(), shots=2, batch_size=10)
    trainer().fit(module, datamodule=data)
    results = trainer().test(module, datamodule=data, verbose=False)
    for loader, (dataset, result) in enumerate(zip((data.base_set, data.novel_set), results, strict=True)):
        images, labels = (torch.stack(part) for part in zip(*dataset, strict=True))
        accuracy = (module.eval()(images).argmax(1) == labels).float().mean().item()
        assert result[f"test/acc/dataloader_idx_{loader}"] == pytest.approx(accuracy)


def test_predict_gives_probabilities():
    module = ImageClassifier("small_cnn", in_chans=1)
    batches = trainer().predict(module, datamodule=DigitsDataModule(batch_size=100))
    assert [len(batch) for batch in batches] == [100, 100, 100, 59]
    assert torch.allclose(batches[0].sum(1), torch.ones(100))


def test_normalisation_is_inside_and_leaves_the_keys_alone():
    net = SmallCNN(width=8).eval()
    module = ImageClassifier(net, mean=[0.5], std=[0.25])
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(module(x), net((x - 0.5) / 0.25))
    assert set(module.state_dict()) == {f"net.{key}" for key in net.state_dict()}


@pytest.mark.parametrize(
    ("scheduler", "interval", "monitor"),
    [
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), "step", None),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), "epoch", "val/acc"),
    ],
)
def test_schedulers(scheduler, interval, monitor):
    module = ImageClassifier(
        "small_cnn",
        in_chans=1,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        lr_scheduler=scheduler,
        lr_interval="step",
        monitor="val/acc",
    )
    made = module.configure_optimizers()["lr_scheduler"]
    assert made["interval"] == interval and made.get("monitor") == monitor
    run = trainer(max_epochs=2)
    run.fit(module, datamodule=DigitsDataModule())
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == (4 if interval == "step" else 2)


def test_checkpoint_is_read_without_pickled_code(tmp_path):
    module = ImageClassifier(
        "small_cnn",
        in_chans=1,
        model_args={"width": 8},
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )
    run = trainer()
    run.fit(module, datamodule=DigitsDataModule())
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not {"optimizer", "lr_scheduler", "weights", "pretrained"} & state["hyper_parameters"].keys()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )
    begun = ImageClassifier("small_cnn", in_chans=1, model_args={"width": 8}, weights=str(tmp_path / "a.ckpt"))
    assert torch.equal(begun.net.head.weight, module.net.head.weight)


def test_weights_for_new_classes(tmp_path):
    path = str(tmp_path / "a.pt")
    old = SmallCNN(num_classes=10, width=8)
    torch.save(old.state_dict(), path)
    module = ImageClassifier(SmallCNN(num_classes=4, width=8), 4, weights=path, load_head=False)
    assert torch.equal(module.net.stages[0][0].weight, old.stages[0][0].weight)
    with pytest.raises(ValueError, match=r"does not fit SmallCNN: other shape: head.bias \(10,\) for \(4,\)"):
        ImageClassifier(SmallCNN(num_classes=4, width=8), 4, weights=path)
    with pytest.raises(ValueError, match=r"does not fit CifarResNet: missing: bn1.bias, .* and \d+ more"):
        ImageClassifier("cifar_resnet", weights=path)
    with pytest.raises(FileNotFoundError, match=r"weights='none.pt': no such file \(looked for /"):
        ImageClassifier("small_cnn", weights="none.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "resnet51"},
            r"model='resnet51': must be one of small_cnn, lightweight_cnn, .*, deep_mlp or a name in timm",
        ),
        ({"num_classes": 1}, r"num_classes=1: must be at least 2"),
        ({"lr_interval": "batch"}, r"lr_interval='batch': must be 'epoch' or 'step'"),
        ({"mean": [0.5]}, r"mean=\[0.5\], std=None: must be given together"),
        ({"pretrained": True}, r"pretrained=True: model='small_cnn' has no weights to download"),
        ({"model": nn.Identity(), "model_args": {"width": 8}}, r"belong to a model given by name"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


# ---------------------------------------------------------------------------------------------------- language


def test_text_classifier():
    module = TextClassifier(config=BERT, num_classes=6)
    run = trainer()
    data = TextDataModule(max_length=16, batch_size=8)
    run.fit(module, datamodule=data)
    assert {"train/loss", "val/loss", "val/acc", "val/ece"} <= run.callback_metrics.keys()
    batch = next(iter(data.test_dataloader()))
    output = module.eval()(**batch)
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, batch["labels"]))
    assert torch.allclose(module.predict_step(batch, 0), output.logits.softmax(-1))


def test_causal_lm():
    module = CausalLM(config=LLAMA)
    run = trainer()
    data = CharDataModule(block_length=16, batch_size=8)
    run.fit(module, datamodule=data)
    assert {"train/loss", "val/loss", "val/perplexity"} <= run.callback_metrics.keys()
    # all blocks have one length, so the mean loss is that over the tokens
    values = run.callback_metrics
    assert values["val/perplexity"] == pytest.approx(values["val/loss"].exp().item(), rel=1e-4)


@pytest.mark.parametrize("cls", [TextClassifier, CausalLM])
def test_language_models_say_what_is_missing(cls):
    with pytest.raises(ValueError, match="model_name_or_path=None, config=None: exactly one of them must be given"):
        cls()
    with pytest.raises(ValueError, match="exactly one"):
        cls(model_name_or_path="gpt2", config=LLAMA)
    with pytest.raises(ValueError, match="must name a model_type"):
        cls(config={"hidden_size": 8})


def test_language_model_from_a_folder_and_a_checkpoint(tmp_path):
    module = CausalLM(config=LLAMA)
    module.model.save_pretrained(tmp_path / "model")
    again = CausalLM(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    run = trainer()
    run.fit(module, datamodule=CharDataModule(block_length=16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_recipes\[language\]'"):
        CausalLM(config=LLAMA)


# ---------------------------------------------------------------------------------------------------- configs

OFFLINE = [
    "digits_cnn",
    "digits_vit",
    "rotated_digits_vit",
    "digits_few_shot",
    "digits_long_tailed",
    "digits_unlearnable",
    "class_incremental_digits",
    "scole_digits",
    "char_lm",
    "text_classifier",
]
LESS = {
    "digits_unlearnable": ["--data.init_args.steps=2", "--data.init_args.surrogate_epochs=1"],
    "scole_digits": ["--data.init_args.num_tasks=1"],
}
FEW_STEPS = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def cli(*args: str, run: bool = True) -> LightningCLI:
    return LightningCLI(
        LightningModule,
        DataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=run,
        args=list(args),
    )


def test_every_base_config_is_named_here():
    others = {"pacs_vit", "fashion_mnist", "cifar10_resnet20"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == others | set(OFFLINE)


@pytest.mark.parametrize("name", OFFLINE)
def test_base_config_trains(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = cli("fit", f"--config={CONFIGS}/{name}.yaml", *LESS.get(name, []), *FEW_STEPS)
    assert result.trainer.global_step == 2
    assert "train/loss" in result.trainer.callback_metrics


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10_resnet20", "pacs_vit"])
def test_base_config_with_data_of_its_own_builds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model.init_args.pretrained=false"] if name == "pacs_vit" else []
    result = cli(f"--config={CONFIGS}/{name}.yaml", *small, *FEW_STEPS, run=False)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        result.datamodule.setup()


@pytest.mark.parametrize("name", ["digits_few_shot", "digits_long_tailed", "char_lm", "cifar10_resnet20"])
def test_printed_config_builds_it_again(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(f"--config={CONFIGS}/{name}.yaml", "--print_config", run=False)
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli(f"--config={tmp_path}/printed.yaml", "--print_config", run=False)
    assert capsys.readouterr().out == printed
    first = cli(f"--config={CONFIGS}/{name}.yaml", *FEW_STEPS, run=False).model
    again = cli(f"--config={tmp_path}/printed.yaml", *FEW_STEPS, run=False).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_default_optimizer_is_printed_and_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli("--model=ImageClassifier", "--model.in_chans=1", "--data=DigitsDataModule", "--print_config", run=False)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    model = cli(f"--config={tmp_path}/printed.yaml", *FEW_STEPS, run=False).model
    assert isinstance(model.configure_optimizers(), torch.optim.AdamW)


def test_checkpoint_written_by_the_cli_is_read(tmp_path):
    result = cli("fit", f"--config={CONFIGS}/digits_cnn.yaml", *FEW_STEPS)
    result.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.net.head.weight, result.model.net.head.weight)
    cli("test", f"--config={CONFIGS}/digits_cnn.yaml", f"--ckpt_path={tmp_path}/a.ckpt", *FEW_STEPS)


def test_deep_mlp_has_the_layers_that_are_asked_for():
    net = DeepMLP(num_classes=5, in_chans=3, image_size=4, widths=[8, 6], dropout=0.2)
    names = ["Flatten", *["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2, "Linear"]
    assert [type(part).__name__ for part in net] == names
    assert [(part.in_features, part.out_features) for part in net if isinstance(part, nn.Linear)] == [
        (48, 8),
        (8, 6),
        (6, 5),
    ]
    assert net(torch.rand(2, 3, 4, 4)).shape == (2, 5)
    assert sum(isinstance(part, nn.Linear) for part in DeepMLP()) == 25
    assert not any(isinstance(part, nn.Dropout) for part in DeepMLP(dropout=0))
    with pytest.raises(ValueError, match=r"widths=\[8, 0\]: must hold a positive width"):
        DeepMLP(widths=[8, 0])
