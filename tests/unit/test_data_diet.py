"""Data diet: the scores by hand, what is kept of them, and that neither leaves a trace."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_recipes.callbacks import DataDiet, ExactResume, PruneTrainSet
from lightning_recipes.callbacks.data.scores import (
    el2n,
    forget,
    forgetting,
    grand,
    grand_last,
    l1,
    max_margin,
    prune_indices,
    read_scores,
    sum_margin,
    suspicious,
)
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, in_two_ranks, loader, mlp, quiet, same, samples, weights

X, Y = samples(14)
Z = torch.tensor([0.1, 0.9, 0.5, 0.3])


def shuffled(x=X, y=Y, size=4):
    return DataLoader(TensorDataset(x, y), size, shuffle=True)


def fit(module, *callbacks, data=None, seed=0, **trainer):
    torch.manual_seed(seed)
    run = quiet(callbacks=list(callbacks), **trainer)
    run.fit(module, shuffled() if data is None else data)
    return run


# -- scores by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "value"), [(2, 0.707107), (3, 0.816497), (10, math.sqrt(0.9))])
def test_el2n_of_equal_logits_is_the_root_of_one_less_a_share(classes, value):
    found = el2n(torch.full((4, classes), 0.7), torch.tensor([0, 1, 0, 1]))
    assert found.tolist() == pytest.approx([value] * 4, abs=1e-6)


def test_the_scores_of_logits_ln_3_and_0():
    """p = (3/4, 1/4); label 1: p - y = (3/4, -3/4). Label 0: (-1/4, 1/4)."""
    logits, labels = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([1, 0])
    assert el2n(logits, labels).tolist() == pytest.approx([1.060660, 0.353553], abs=1e-6)
    assert l1(logits, labels).tolist() == pytest.approx([1.5, 0.5])
    assert max_margin(logits, labels).tolist() == pytest.approx([0.5, -0.5])
    assert sum_margin(logits, labels).tolist() == pytest.approx([0.5, -0.5])


def test_margins_of_three_classes():
    """p = (1/2, 1/3, 1/6)."""
    logits = torch.tensor([[3.0, 2.0, 1.0]]).log().expand(3, -1)
    labels = torch.tensor([0, 1, 2])
    assert max_margin(logits, labels).tolist() == pytest.approx([-1 / 6, 1 / 6, 1 / 3])
    assert sum_margin(logits, labels).tolist() == pytest.approx([-1 / 2, 0, 1 / 2], abs=1e-6)
    hot = F.one_hot(labels, 3).float()
    for score in (el2n, l1, max_margin, sum_margin):
        assert torch.equal(score(logits, labels), score(logits, hot))


def test_half_precision_logits_are_scored_in_fp32():
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.float16)
    assert el2n(logits, torch.tensor([0])).item() == pytest.approx(math.sqrt(2) / (1 + math.exp(8)), rel=1e-3)


def test_el2n_is_the_norm_of_the_gradient_with_respect_to_the_logits():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    assert torch.allclose(el2n(logits.detach(), labels), gradient.norm(dim=1))


def linear(bias=True):
    layer = nn.Linear(2, 2, bias=bias)
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


@pytest.mark.parametrize(("bias", "value"), [(True, 3.605551), (False, 0.707107 * 5)])
def test_grand_of_a_linear_layer_of_zeros(bias, value):
    layer, x, y = linear(bias), torch.tensor([[3.0, 4.0]]), torch.tensor([1])
    assert grand(layer, (x,), y).item() == pytest.approx(value, abs=1e-5)
    assert grand_last(layer(x), y, x, bias).item() == pytest.approx(value, abs=1e-5)


def a_network():
    """Convolutions with batch norm, dropout and an activation that works in place; one layer is frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    net[5].requires_grad_(False)
    net[1].running_mean.normal_()
    return net.eval()


@pytest.mark.parametrize("chunk", [1, 3, 32, None])
def test_grand_is_the_norm_of_each_examples_own_gradient(chunk):
    net, x, y = a_network(), torch.randn(7, 1, 4, 4), torch.arange(7) % 3
    by_hand = []
    for i in range(len(x)):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
        by_hand.append(torch.cat([g.flatten() for g in gradients]).norm())
    found = grand(net, (x,), y, chunk=chunk)
    assert torch.allclose(found, torch.stack(by_hand), rtol=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_forgetting_counts_the_times_that_what_was_right_is_wrong():
    rows = torch.zeros(3, 3)
    for correct in ([1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]):
        rows = forget(rows, torch.tensor(correct).bool())
    assert forgetting(rows).tolist() == [2, math.inf, 0]


# -- choosing --------------------------------------------------------------------------------------------------------


def test_which_are_kept():
    assert prune_indices(Z, 2).tolist() == [1, 2]
    assert prune_indices(Z, 0.5).tolist() == [1, 2]
    assert prune_indices(Z, 2, "offset", 1).tolist() == [2, 3]
    assert prune_indices(Z, 2, "offset", 0.25).tolist() == [2, 3]
    assert prune_indices(Z, 2, "keep_min").tolist() == [0, 3]
    assert prune_indices(-Z, 2, "keep_max_abs").tolist() == [1, 2]
    assert prune_indices(-Z, 1, "keep_min_abs").tolist() == [0]
    assert prune_indices(Z, 1.0).tolist() == prune_indices(Z, 4).tolist() == [0, 1, 2, 3]
    assert prune_indices(torch.tensor([1.0, math.inf, 2.0]), 1).tolist() == [1]
    assert suspicious(Z, 2).tolist() == [1, 2] and suspicious(Z, 0.25).tolist() == [1]


def test_equal_scores_are_chosen_alike_everywhere():
    equal = torch.zeros(1000)
    assert prune_indices(equal, 10).tolist() == list(range(990, 1000))
    assert prune_indices(equal, 10, "keep_min").tolist() == list(range(10))


def test_a_random_choice_is_of_its_seed_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = (prune_indices(torch.zeros(50), 10, "random", seed=s).tolist() for s in (0, 0, 1))
    assert first == again != other and len(set(first)) == 10 and first == sorted(first)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        (r"keep=5 of 4 scores: must be a share in \(0, 1\] or from 1 to 4", {"keep": 5}),
        ("offset=3 and keep=2: 3 \\+ 2 are more than 4 scores", {"keep": 2, "mode": "offset", "offset": 3}),
        ("offset goes with mode='offset'; got mode='keep_max', offset=1", {"keep": 2, "offset": 1}),
        ("mode must be one of 'keep_max', 'keep_min', .*; got 'best'", {"keep": 2, "mode": "best"}),
    ],
)
def test_a_choice_that_is_none_is_refused(says, arguments):
    with pytest.raises(RecipeError, match=says):
        prune_indices(Z, **arguments)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(RecipeError, match=r"scores must be numbers \[n\], none of them nan"):
        prune_indices(torch.tensor([0.1, math.nan]), 1)
    with pytest.raises(RecipeError, match="the logits have 2 classes and a label is 2"):
        el2n(torch.zeros(1, 2), torch.tensor([2]))
    with pytest.raises(RecipeError, match=r"needs logits \[n, classes\] .*; got \(2, 3, 4\) and \(2,\)"):
        el2n(torch.zeros(2, 3, 4), torch.tensor([0, 1]))


# -- scoring in a fit ------------------------------------------------------------------------------------------------


class Lively(Classifier):
    """Dropout, batch norm, one part in eval mode while the rest trains."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)))

    def on_train_epoch_start(self):
        self.net[1].eval()


PASSES = ["el2n", "grand", "grand_last", "l1", "max_margin", "sum_margin"]


@pytest.mark.parametrize("score", [*PASSES, "forgetting"])
def test_scoring_leaves_no_trace_and_is_of_the_weights_after_whole_epochs(score):
    ends, kept = [], []
    recipe = DataDiet(score, 1, batch_size=3)
    keep = Watch(on_train_epoch_end=lambda trainer, module: kept.append(weights(module)))
    for callbacks in ([], [recipe, keep]):
        module = Lively()
        run = fit(module, *callbacks, max_epochs=2)
        ends.append((weights(module), run.optimizers[0].state_dict(), torch.get_rng_state(), module.net[1].training))
    assert same(ends[0][0], ends[1][0]) and ends[0][1:2] == ends[1][1:2] and ends[0][3] == ends[1][3]
    assert torch.equal(ends[0][2], ends[1][2])
    assert torch.equal(recipe.labels, Y) and recipe.scores.shape == (14,)
    then = Lively()
    then.load_state_dict(kept[0])
    net, y = then.net.eval(), Y
    z, h = net(X).detach(), net[:4](X).detach()
    if score != "forgetting":
        expected = {
            "el2n": lambda: el2n(z, y), "grand": lambda: grand(net, (X,), y),
            "grand_last": lambda: grand_last(z, y, h), "l1": lambda: l1(z, y),
            "max_margin": lambda: max_margin(z, y), "sum_margin": lambda: sum_margin(z, y),
        }[score]()  # fmt: skip
        assert torch.allclose(recipe.scores, expected, atol=1e-6)
        assert run.callback_metrics["data_diet/mean"].item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_forgetting_is_counted_in_the_training_batches_themselves():
    """Seen from outside: the module's own training-mode logits, sample by sample."""
    correct = {i: [] for i in range(14)}

    class Notes(Lively):
        def training_step(self, batch, batch_idx):
            x, y, i = batch
            z = self(x)
            for index, right in zip(i.tolist(), (z.argmax(1) == y).tolist()):
                correct[index].append(right)
            return F.cross_entropy(z, y)

    recipe = DataDiet("forgetting", 4)
    data = DataLoader(TensorDataset(X, Y, torch.arange(14)), 4, shuffle=True)
    fit(Notes(), recipe, data=data, max_epochs=4)
    expected = [
        float(sum(a and not b for a, b in itertools.pairwise(seen))) if any(seen) else math.inf
        for seen in correct.values()
    ]
    assert recipe.scores.tolist() == expected
    assert sum(0 < each < math.inf for each in expected) > 2, "something was forgotten"


def test_forgetting_scores_stand_in_the_order_of_the_users_own_subset():
    chosen = [11, 3, 5, 0, 7, 2, 9, 1]
    data = DataLoader(Subset(TensorDataset(X, Y), chosen), 4, shuffle=True)
    whole, part = DataDiet("forgetting", 3), DataDiet("forgetting", 3)
    fit(Lively(), whole, data=DataLoader(TensorDataset(X[chosen], Y[chosen]), 4, shuffle=True), max_epochs=3)
    fit(Lively(), part, data=data, max_epochs=3)
    assert torch.equal(whole.scores, part.scores) and torch.equal(part.labels, Y[chosen])


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_fit_ends_once_the_scores_are_there(epochs):
    recipe = DataDiet(at_epoch=epochs, stop_after=True)
    run = fit(Classifier(), recipe, max_epochs=9)
    assert run.global_step == 4 * epochs and recipe.scores is not None


def test_at_the_last_epochs_end_the_scores_are_still_computed():
    module, recipe = Classifier(), DataDiet(at_epoch=2)
    fit(module, recipe, max_epochs=2)
    assert torch.allclose(recipe.scores, el2n(module.net(X), Y), atol=1e-6)


def test_a_fit_that_ends_before_says_that_there_are_no_scores():
    recipe = DataDiet(at_epoch=3)
    with pytest.warns(UserWarning, match="DataDiet: there are no scores, .* end of 3 whole epochs"):
        fit(Classifier(), recipe, max_epochs=5, max_steps=6)
    assert recipe.scores is None


class Noisy(TensorDataset):
    """Augmentation that draws from the global state and from a generator of its own."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.own = torch.Generator().manual_seed(3)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()) + torch.rand((), generator=self.own), y


class WithPlain(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.plain_train_set = TensorDataset(X, Y)

    def train_dataloader(self):
        return DataLoader(Noisy(X, Y), 4, shuffle=True)


def test_augmentation_is_left_out_where_a_plain_set_is_known_and_warned_of_otherwise():
    plain = el2n(mlp()(X), Y)
    for data, dataset in ((WithPlain(), None), (DataLoader(Noisy(X, Y), 4), TensorDataset(X, Y))):
        recipe = DataDiet(at_epoch=0, dataset=dataset)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="DataDiet")
            fit(Classifier(), recipe, data=data)
        assert torch.allclose(recipe.scores, plain, atol=1e-6)
    noisy, ends = Noisy(X, Y), []
    with pytest.warns(UserWarning, match="gives another input each time .* give dataset="):
        for callbacks in ([], [DataDiet(at_epoch=0)]):
            noisy.own.manual_seed(3)
            module = Classifier()
            fit(module, *callbacks, data=DataLoader(noisy, 4, shuffle=True))
            ends.append(weights(module))
    assert same(*ends)


def test_a_training_loader_that_is_no_dataloader_is_scored_by_its_data_set():
    class Batches:
        def __iter__(self):
            return iter([(X[i : i + 4], Y[i : i + 4]) for i in range(0, 12, 4)])

    recipe = DataDiet(at_epoch=0, dataset=TensorDataset(X, Y))
    fit(Classifier(), recipe, data=Batches())
    assert torch.allclose(recipe.scores, el2n(mlp()(X), Y), atol=1e-6)


class Dicts(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"a": x[:3], "b": x[3:], "labels": y}


class OfDicts(Classifier):
    """Two inputs by name, scaled in the step."""

    def __init__(self):
        super().__init__(Joined())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["a"] * 2, b=batch["b"]).logits.view(-1, 3), batch["labels"])


class Output(dict):
    logits = property(lambda self: self["logits"])


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, a, b):
        return Output(logits=self.inner(torch.cat([a, b], 1)))


class InPieces(Classifier):
    """The step puts its network together itself; ``forward`` does the same."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net[2:](self.net[:2](x)), y)


def test_grand_goes_through_whatever_the_step_calls():
    recipe = DataDiet("grand", 0)
    fit(OfDicts(), recipe, data=DataLoader(Dicts(X, Y), 4))
    doubled = torch.cat([2 * X[:, :3], X[:, 3:]], 1)
    assert torch.allclose(recipe.scores, grand(mlp(), (doubled,), Y), rtol=1e-5)
    for module, arguments in ((InPieces(), {}), (Classifier(), {"forward": "net"}), (Classifier(), {})):
        recipe = DataDiet("grand", 0, **arguments)
        fit(module, recipe)
        assert torch.allclose(recipe.scores, grand(mlp(), (X,), Y), rtol=1e-5)


def test_with_forward_the_training_step_is_not_called():
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return -self(x).log_softmax(1).gather(1, y[:, None]).mean()

        def criterion(self, logits, targets):
            return F.cross_entropy(logits, targets)

    recipe = DataDiet(at_epoch=0, forward="forward")
    fit(Own(), recipe)
    assert torch.allclose(recipe.scores, el2n(mlp()(X), Y), atol=1e-6)


def test_a_criterion_that_cannot_be_seen_is_named():
    class Named(Classifier):
        def training_step(self, batch, batch_idx):
            return self.own(self(batch[0]), batch[1])

        def own(self, logits, targets):
            return -logits.log_softmax(1).gather(1, targets[:, None]).mean()

    module, recipe = Named(), DataDiet(at_epoch=0, criterion="own")
    fit(module, recipe)
    assert torch.allclose(recipe.scores, el2n(mlp()(X), Y), atol=1e-6)
    assert "own" not in module.__dict__


# -- the file and the picture ----------------------------------------------------------------------------------------


def test_runs_add_to_one_file_and_a_run_counts_once(tmp_path):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        recipe = DataDiet(at_epoch=1, out=str(tmp_path))
        fit(Classifier(mlp(seed=seed)), recipe, seed=seed)
        found.append(recipe.scores)
    scores = read_scores(tmp_path)
    assert recipe.path == next(tmp_path.glob("*.pt")) and recipe.path.name.startswith("el2n-epoch1-")
    assert torch.equal(scores.values, torch.stack(found)) and len(set(scores.runs)) == 2
    assert torch.allclose(scores.mean, torch.stack(found).double().mean(0))
    assert torch.equal(scores.labels, Y) and scores.suspicious(1).tolist() == [int(scores.mean.argmax())]
    with pytest.raises(RecipeError, match=r"holds run .* already; .* begin with another seed"):
        fit(Classifier(mlp(seed=1)), DataDiet(at_epoch=1, out=str(tmp_path)), seed=1)
    assert len(read_scores(tmp_path).runs) == 2
    fit(Classifier(mlp(seed=1)), DataDiet(at_epoch=1, out=str(tmp_path), run="by name"), seed=1)
    assert read_scores(tmp_path).runs[2] == "by name"
    with pytest.raises(
        RecipeError, match=r"the labels of the training set are not those of the scores in .* \(\d+ dif"
    ):
        fit(Classifier(), DataDiet(at_epoch=1, out=str(tmp_path)), data=shuffled(y=(Y + 1) % 3), seed=5)


def test_a_resumed_run_that_had_written_its_scores_writes_them_once(tmp_path):
    """It died after the file was written and before a checkpoint knew of it."""
    out = str(tmp_path / "scores")
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2, save_on_train_epoch_end=False)
    data = lambda: loader(X, Y)  # noqa: E731
    first = DataDiet(at_epoch=1, out=out)
    fit(Classifier(), first, ExactResume(), keep, data=data(), max_epochs=2, enable_checkpointing=True)
    again = DataDiet(at_epoch=1, out=out)
    run = quiet(callbacks=[again, ExactResume()], max_epochs=2)
    run.fit(Classifier(), data(), ckpt_path=str(tmp_path / "step=2.ckpt"), weights_only=True)
    assert torch.equal(first.scores, again.scores)
    assert len(read_scores(out).runs) == 1
    later = DataDiet(at_epoch=1, out=out)
    run = quiet(callbacks=[later, ExactResume()], max_epochs=2)
    run.fit(Classifier(), data(), ckpt_path=str(tmp_path / "step=6.ckpt"), weights_only=True)
    assert torch.equal(first.scores, later.scores) and later.path == first.path
    assert run.callback_metrics["data_diet/mean"].item() == pytest.approx(first.scores.mean().item())


class Pictures(Classifier):
    def forward(self, x):
        return super().forward(x.flatten(1))


def test_the_hardest_and_easiest_images_are_drawn_where_the_run_logs(tmp_path):
    pytest.importorskip("matplotlib")
    images = X.reshape(-1, 1, 2, 3) * 3 - 1
    recipe = DataDiet(at_epoch=1)
    fit(Pictures(), recipe, data=shuffled(images), logger=CSVLogger(tmp_path, version=0))
    assert (tmp_path / "lightning_logs" / "version_0" / "data_diet_el2n.png").stat().st_size > 5000
    fit(Classifier(), DataDiet(at_epoch=1), logger=CSVLogger(tmp_path, version=1))
    assert not list((tmp_path / "lightning_logs" / "version_1").glob("*.png")), "vectors are no images"


# -- pruning ---------------------------------------------------------------------------------------------------------


def seen_by(callbacks, data, **trainer):
    """Labels' places of every training batch: the first feature tells samples apart."""
    found = []
    watch = Watch(on_train_batch_start=lambda trainer, module, batch, index: found.append(batch[0][:, 0].tolist()))
    fit(Classifier(), *callbacks, watch, data=data, **trainer)
    return found


def flat(batches):
    return list(itertools.chain(*batches))


SCORES = torch.arange(14.0).flip(0)


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
def test_only_what_is_kept_is_trained_on_and_shuffled_as_before():
    recipe = PruneTrainSet(SCORES, 6)
    batches = seen_by([recipe], shuffled(), max_epochs=2)
    kept = sorted(X[:6, 0].tolist())
    assert recipe.kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(batch) for batch in batches] == [4, 2, 4, 2]
    first, second = flat(batches[:2]), flat(batches[2:])
    assert sorted(first) == sorted(second) == kept and first != second != kept
    in_order = seen_by([PruneTrainSet(SCORES.tolist(), 6)], loader(X, Y))
    assert flat(in_order) == X[:6, 0].tolist()


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
@pytest.mark.parametrize("keep", [1.0, 14])
def test_keeping_all_trains_bit_for_bit_as_without(keep):
    ends = []
    for callbacks in ([], [PruneTrainSet(SCORES, keep)]):
        module = Lively()
        fit(module, *callbacks, max_epochs=2)
        ends.append(weights(module))
    assert same(*ends)


class Scheduled(Classifier):
    """Asks for the number of steps where schedules are made, or already in its own setup."""

    def __init__(self, early):
        super().__init__()
        self.early = early

    def setup(self, stage):
        if self.early:
            self.steps_then = self.trainer.estimated_stepping_batches

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
@pytest.mark.parametrize("early", [False, True])
def test_schedules_know_the_steps_of_what_is_kept(early):
    module = Scheduled(early)
    run = fit(module, PruneTrainSet(None, 6, "random"), max_epochs=3)
    assert module.steps == 6 == run.global_step


class InDataModule(LightningDataModule):
    def train_dataloader(self):
        return {"only": DataLoader(Subset(TensorDataset(X, Y), list(range(13, -1, -1))), 4, drop_last=True)}


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
def test_a_data_module_of_the_users_own_is_pruned_and_keeps_its_ways():
    found = []
    watch = Watch(on_train_batch_start=lambda trainer, module, batch, index: found.append(batch["only"][0][:, 0]))

    class OfNames(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["only"], batch_idx)

    fit(OfNames(), PruneTrainSet(SCORES, 6), watch, data=InDataModule())
    assert [batch.tolist() for batch in found] == [X[[13, 12, 11, 10], 0].tolist()], "the last two are dropped"


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
def test_a_sampler_that_draws_by_weight_draws_by_the_weights_of_what_is_kept():
    importance = torch.tensor([0.0, 1.0, 0.0, 3.0] + [5.0] * 10)
    sampler = WeightedRandomSampler(importance, 28, generator=torch.Generator().manual_seed(0))
    kept = []
    watch = Watch(on_train_start=lambda trainer, module: kept.append(trainer.train_dataloader.sampler))
    batches = seen_by([PruneTrainSet(SCORES, 4), watch], DataLoader(TensorDataset(X, Y), 4, sampler=sampler))
    assert type(kept[0]) is WeightedRandomSampler and kept[0].weights.tolist() == [0.0, 1.0, 0.0, 3.0]
    assert len(flat(batches)) == 8 and set(flat(batches)) <= set(X[[1, 3], 0].tolist())


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
def test_loaders_and_sampler_generators_are_the_users_own_again_afterwards():
    data = DataLoader(TensorDataset(X, Y), 4, sampler=RandomSampler(X, generator=torch.Generator().manual_seed(0)))
    before = len(data)
    fit(Classifier(), PruneTrainSet(SCORES, 4), data=data)
    run = quiet()
    run.fit(Classifier(), data)
    assert run.global_step == before == 4


@pytest.mark.filterwarnings("ignore:PruneTrainSet")
def test_from_scores_to_a_pruned_run_by_a_file(tmp_path):
    fit(Classifier(), DataDiet(at_epoch=1, out=str(tmp_path)))
    mean = read_scores(tmp_path).mean
    for where in (tmp_path, next(tmp_path.glob("*.pt"))):
        recipe = PruneTrainSet(str(where), 0.5, "offset", 0.25)
        run = fit(Classifier(), recipe)
        assert torch.equal(recipe.kept, prune_indices(mean, 7, "offset", 4))
        kept = {c: float((Y[recipe.kept] == c).sum()) for c in range(3)}
        logged = {k: v.item() for k, v in run.callback_metrics.items()}
        assert logged == {"prune_train_set/kept": 7.0} | {f"prune_train_set/kept_of_class_{c}": kept[c] for c in kept}


def test_a_few_labels_may_have_been_mended_since_and_most_may_not(tmp_path, monkeypatch):
    fit(Classifier(), DataDiet(at_epoch=1, out=str(tmp_path)))
    mended = Y.clone()
    mended[3] = (mended[3] + 1) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Classifier(), PruneTrainSet(str(tmp_path)), data=shuffled(y=mended))
        with pytest.raises(RecipeError, match=r"PruneTrainSet: 14 of 14 labels are not those that were scored"):
            fit(Classifier(), PruneTrainSet(str(tmp_path)), data=shuffled(y=(Y + 1) % 3))


def test_fewer_steps_than_the_full_run_are_warned_of_and_as_many_are_not():
    with pytest.warns(UserWarning, match=r"1 epochs over 7 of 14 samples are fewer steps .* Trainer\(max_steps=...\)"):
        fit(Classifier(), PruneTrainSet(SCORES))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PruneTrainSet")
        run = fit(Classifier(), PruneTrainSet(SCORES), max_epochs=-1, max_steps=8)
    assert run.global_step == 8


# -- two processes ---------------------------------------------------------------------------------------------------


def _rank(rank, path):
    found = []
    for score in ("el2n", "grand"):
        recipe = DataDiet(score, 0, batch_size=3, out=f"{path}/{score}")
        data = DataLoader(TensorDataset(X[:13], Y[:13]), 4, shuffle=True)
        two = {"devices": 2, "strategy": "ddp", "plugins": LightningEnvironment()}
        fit(Classifier(), recipe, data=data, logger=CSVLogger(path, version=score), **two)
        found.append((recipe.scores, recipe.labels, recipe.verdict))
    torch.save(found, f"{path}/rank{rank}.pt")


@pytest.mark.ddp
def test_two_ranks_give_the_scores_of_one_also_where_they_have_not_as_many_samples(tmp_path):
    in_two_ranks(_rank, tmp_path)
    expected = el2n(mlp()(X), Y), grand(mlp(), (X,), Y)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for found in ranks:
        for (scores, labels, _), by_hand in zip(found, expected):
            assert torch.allclose(scores, by_hand[:13], atol=1e-6) and torch.equal(labels, Y[:13])
    assert ranks[0][0][2] == ranks[1][0][2] and "1 run in" in ranks[0][0][2]
    assert len(read_scores(tmp_path / "grand").runs) == 1


# -- what cannot be scored -------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


def test_a_network_that_mixes_examples_has_no_gradient_of_one():
    module = Classifier(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(RecipeError, match=r"DataDiet: score='grand' .*; net\.1 normalises by its batch"):
        fit(module, DataDiet("grand", 1))


def test_a_network_that_cannot_be_vectorised_is_told_of():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = mlp(), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.net(x * self.scale) if x.sum().item() > 0 else self.net(-x)

    with pytest.raises(RecipeError, match=r"cannot be computed example by example through .*; use score='grand_last'"):
        fit(Classifier(Branches()), DataDiet("grand", 1))


def test_grand_at_initialisation_is_warned_of():
    with pytest.warns(UserWarning, match="GraNd at initialisation does not beat a random choice"):
        fit(Classifier(), DataDiet("grand", 0))
