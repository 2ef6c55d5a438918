"""Prediction on a user's own table: from Python and by the command, in the table's own units."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import cli
from lightning_recipes.callbacks import InContextPrediction
from lightning_recipes.callbacks.data.in_context_prediction import Scaling
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import LinearPrior, MLPPrior, PriorDataModule, TableDataModule
from lightning_recipes.modules import PFNModule
from tests.stock import Classifier, Watch, in_two_ranks, quiet

RIDGE = LinearPrior(1.0, 1.0, 0.3, -1.0, 1.0)
SIZES = {"emsize": 16, "nhead": 2, "nlayers": 1, "nhid": 32, "num_buckets": 20}


@pytest.fixture(scope="module")
def trained() -> PFNModule:
    """On ridge regression in two features, not for long."""
    torch.manual_seed(0)
    module = PFNModule(2, **SIZES, lr=3e-3)
    data = PriorDataModule(RIDGE, 2, 16, 12, 12, steps_per_epoch=60, val_datasets=0)
    quiet().fit(module, datamodule=data)
    return module.eval()


def table(features: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x, y = RIDGE.sample(30, 1, features, torch.Generator().manual_seed(5))
    return x[:9, 0], y[:9, 0], x[9:, 0]


def predict(module: LightningModule, batches: Any, **arguments: Any) -> dict[str, Tensor]:
    parts = quiet(callbacks=[InContextPrediction(**arguments)]).predict(module, batches)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_predictions_are_the_networks_mean_and_quantiles(trained: PFNModule) -> None:
    x, y, queries = table()
    found = predict(trained, DataLoader(queries, batch_size=21), context=(x, y), interval=0.8)
    with torch.no_grad():
        logits = trained(torch.cat([x, queries])[:, None], y[:, None], 9)[:, 0]
    bar = trained.distribution
    for name, values in (
        ("mean", bar.mean(logits)),
        ("median", bar.median(logits)),
        ("lower", bar.icdf(logits, 0.1)),
        ("upper", bar.icdf(logits, 0.9)),
    ):
        assert torch.allclose(found[name], values, atol=1e-5), name
    assert "predict_step" not in vars(trained)


def test_batches_and_chunks_make_no_difference(trained: PFNModule) -> None:
    x, y, queries = table()
    whole = predict(trained, DataLoader(queries, batch_size=21), context=(x, y))
    for batches, chunk in ((DataLoader(TensorDataset(queries), batch_size=4), None), (DataLoader(queries, 21), 5)):
        parts = predict(trained, batches, context=(x.tolist(), y.tolist()), chunk_size=chunk)
        assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


def test_a_table_in_other_units_is_predicted_in_its_own(trained: PFNModule, caplog: Any) -> None:
    """Both are brought to the prior's mean and spread, so a linear change of units changes the predictions with it."""
    x, y, queries = table()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        plain = predict(trained, DataLoader(queries, 21), context=(x, y), standardize=True, rescale=True)
        assert "beyond the prior's" not in caplog.text
        other = predict(trained, DataLoader(400 + 70 * queries, 21), context=(400 + 70 * x, 1e3 + 250 * y))
    assert "the context's features reach beyond the prior's; they are brought to its mean" in caplog.text
    assert "the context's targets reach beyond the prior's" in caplog.text
    for name in plain:
        assert torch.allclose(other[name], 1e3 + 250 * plain[name], rtol=1e-3), name
    within = predict(trained, DataLoader(queries, 21), context=(x, y))
    unscaled = predict(trained, DataLoader(queries, 21), context=(x, y), standardize=False, rescale=False)
    assert torch.equal(within["mean"], unscaled["mean"]), "a table like the prior's is taken as it is"


def test_scaling_goes_there_and_back() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    scaling = Scaling.between(values, torch.tensor([0.0, 1.0]), torch.tensor([2**0.5, 1.0]))
    assert torch.allclose(scaling.there(values), torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))
    assert torch.allclose(scaling.back(scaling.there(values)), values)


def test_fewer_features_are_padded_and_a_long_context_is_said(trained: PFNModule, recwarn: Any) -> None:
    x, y, queries = table(1)
    padded = predict(trained, DataLoader(queries, 21), context=(x, y))
    zero = torch.zeros(21, 1)
    by_hand = predict(trained, DataLoader(torch.cat([queries, zero], 1), 21), context=(torch.cat([x, zero[:9]], 1), y))
    assert torch.allclose(padded["mean"], by_hand["mean"], atol=1e-5)
    assert not [each for each in recwarn if "InContextPrediction" in str(each.message)]
    with pytest.warns(UserWarning, match="the context has 18 samples, and the network was trained on at most 11"):
        predict(trained, DataLoader(queries, 21), context=(x.repeat(2, 1), y.repeat(2)))
    with pytest.warns(UserWarning, match="1 of 1 queries lie beyond all inputs of the prior"):
        predict(trained, DataLoader(torch.tensor([[9.0]]), 1), context=(x, y))


def test_a_classifier_gives_probabilities_and_labels() -> None:
    torch.manual_seed(0)
    module = PFNModule(2, 16, 2, 1, output="bce")
    prior = MLPPrior(2, 4, binary=True)
    quiet(max_steps=2).fit(module, datamodule=PriorDataModule(prior, 2, 8, 10, 10, val_datasets=0))
    x, y = prior.sample(15, 1, 2, torch.Generator().manual_seed(0))
    found = predict(module, DataLoader(x[9:, 0], 6), context=(x[:9, 0], y[:9, 0]))
    assert found["probabilities"].shape == (6, 2) and torch.allclose(found["probabilities"].sum(1), torch.ones(6))
    assert torch.equal(found["label"], found["probabilities"].argmax(1))


def written(path: Path, features: int = 1) -> Path:
    x, y, queries = table(features)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*[f"dose{i}" for i in range(features)], "effect"])
        writer.writerows([*row.tolist(), 10 * float(target)] for row, target in zip(x, y))
        writer.writerows([*row.tolist(), ""] for row in queries)
    return path


def test_a_csv_file_becomes_another_one_and_a_picture(trained: PFNModule, tmp_path: Path) -> None:
    data = TableDataModule(str(written(tmp_path / "table.csv", 2)), batch_size=8)
    recipe = InContextPrediction(folder=str(tmp_path / "out"))
    parts = quiet(callbacks=[recipe]).predict(trained, datamodule=data)
    assert [len(part["mean"]) for part in parts] == [8, 8, 5]
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["dose0", "dose1", "mean", "median", "lower", "upper"]
    assert [float(row["dose0"]) for row in rows] == pytest.approx(data.query_rows[:, 0].tolist())
    assert [float(row["mean"]) for row in rows] == pytest.approx(torch.cat([p["mean"] for p in parts]).tolist())
    assert all(float(row["lower"]) < float(row["median"]) < float(row["upper"]) for row in rows)
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 5000


def _on_two_ranks(rank: int, folder: Path) -> None:
    module = PFNModule.load_from_checkpoint(folder / "pfn.ckpt", weights_only=True)
    recipe = InContextPrediction(folder=str(folder / "two"), draw=False)
    settings = {"devices": 2, "strategy": "ddp", "plugins": LightningEnvironment()}
    parts = quiet(callbacks=[recipe], **settings).predict(
        module, datamodule=TableDataModule(str(folder / "table.csv"), batch_size=4)
    )
    assert sum(len(part["mean"]) for part in parts) in (10, 11), "each rank its share"


@pytest.mark.ddp
def test_two_ranks_write_the_file_of_one(trained: PFNModule, tmp_path: Path) -> None:
    written(tmp_path / "table.csv", 2)
    trainer = quiet(callbacks=[InContextPrediction(folder=str(tmp_path / "one"), draw=False)])
    trainer.predict(trained, datamodule=TableDataModule(str(tmp_path / "table.csv"), batch_size=4))
    trainer.save_checkpoint(tmp_path / "pfn.ckpt")
    in_two_ranks(_on_two_ranks, tmp_path)
    one, two = (
        [[float(cell) for cell in row] for row in list(csv.reader((tmp_path / name / "predictions.csv").open()))[1:]]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 21
    assert torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-4)


def test_the_command_trains_and_predicts_from_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's own config in small, then the recipe's over it with a table."""
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    small += ["--trainer.enable_model_summary=false"]
    size = {"emsize": 16, "nhead": 2, "nlayers": 1, "nhid": 32, "num_buckets": 20}
    model = [f"--model.init_args.{name}={value}" for name, value in size.items()]
    fit = ["fit", "--config=papers/pfn_gp_1d.yaml", *model, *small, "--trainer.max_epochs=1", "--trainer.callbacks=[]"]
    fit += ["--data.init_args.steps_per_epoch=3", "--data.init_args.val_datasets=0", "--trainer.default_root_dir=run"]
    assert cli.main(fit) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    written(tmp_path / "mine.csv")
    mine = {
        "model": {"class_path": "PFNModule", "init_args": size},
        "data": {"class_path": "TableDataModule", "init_args": {"path": "mine.csv", "target": "effect"}},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    command = ["predict", "--config=mine.yaml", "--config=recipes/in_context_prediction.yaml", *small]
    command += [f"--ckpt_path={checkpoint}", "--trainer.callbacks.folder=out"]
    assert cli.main(command) == 0
    with open("out/predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 21
    assert Path("out/predictions.png").is_file()


def test_what_it_cannot_predict_on_is_said_and_the_module_is_let_go_of(trained: PFNModule) -> None:
    x, y, queries = table()
    for arguments, batches, says in (
        ({}, DataLoader(queries, 21), "has no context to predict from; give context="),
        ({"context": (x[:, None], y)}, DataLoader(queries, 21), r"context must be x \[n, F\] and y \[n\]; got shapes"),
        ({"context": (x.repeat(1, 2), y)}, DataLoader(queries, 21), "has 4 features and the network was trained on 2"),
        ({"context": (x / 0 * 0, y)}, DataLoader(queries, 21), "has values that are not finite"),
        (
            {"context": (x, y)},
            DataLoader(queries[:, :1], 21),
            r"queries must be \[n, 2\], as the context has; got shape",
        ),
    ):
        with pytest.raises(RecipeError, match=f"InContextPrediction:? .*{says}|InContextPrediction: {says}"):
            predict(trained, batches, **arguments)
        assert "predict_step" not in vars(trained)
    with pytest.raises(RecipeError, match=r"InContextPrediction: predicts with a PFNModule.*Classifier takes none"):
        predict(Classifier(), DataLoader(queries, 21), context=(x, y))
    with pytest.raises(RecipeError, match="borders were never estimated"):
        predict(PFNModule(2, **SIZES), DataLoader(queries, 21), context=(x, y))


def test_after_an_error_the_module_predicts_by_itself(trained: PFNModule) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("in mid-prediction")

    x, y, queries = table()
    recipe = InContextPrediction((x, y))
    with pytest.raises(RuntimeError, match="in mid-prediction"):
        quiet(callbacks=[recipe, Watch(on_predict_batch_end=fail)]).predict(trained, DataLoader(queries, 4))
    assert "predict_step" not in vars(trained)
