"""GrokkingMonitor: its measures by hand, its words, on classifiers of every kind, and without a trace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import GrokkingMonitor
from lightning_recipes.callbacks.diagnostics.grokking import (
    alignment,
    class_centroids,
    first_reaching,
    k_means,
    odd_and_even,
    phase_of,
    rising,
    share,
    words,
)
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import XORClusterDataModule
from lightning_recipes.modules import TwoLayerReLU
from tests.stock import Classifier, loader, mlp, quiet, same, samples, weights

X, Y = samples(24)


def fit(module, monitor, data=None, validation=None, epochs=2, **trainer):
    run = quiet(callbacks=[monitor], max_epochs=epochs, **trainer)
    run.fit(module, loader(X, Y) if data is None else data, loader(X, Y) if validation is None else validation)
    return run


# -- the maths ---------------------------------------------------------------------------------------------------------


def test_the_linear_share_of_a_relu_on_symmetric_points_is_one_half():
    x = torch.tensor([[-2.0], [-0.5], [0.5], [2.0]])
    assert share(*map(float, odd_and_even(x.relu(), (-x).relu()))) == 0.5


def test_the_linear_share_of_a_linear_and_of_an_even_function():
    x = torch.linspace(-3, 3, 7)[:, None]
    assert share(*map(float, odd_and_even(2 * x, -2 * x))) == 1
    assert share(*map(float, odd_and_even(x.abs(), x.abs()))) == 0
    assert math.isnan(share(0.0, 0.0))


def test_a_shift_of_all_logits_is_in_neither_part():
    f = torch.randn(5, 3)
    assert torch.allclose(torch.stack(odd_and_even(f + 7, -f + 7)), torch.stack(odd_and_even(f, -f)), atol=1e-4)
    assert float(odd_and_even(f + 7, -f + 7)[1]) < 1e-9


def test_alignment_is_the_largest_cosine_of_every_row():
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    assert alignment(rows, torch.eye(2)).tolist() == pytest.approx([0.8, 1.0, 0.0])


def test_centroids_by_class_and_by_k_means():
    x = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    assert class_centroids(x, torch.tensor([2, 2, 5, 5])).tolist() == [[0, 1], [10, 1]]
    found = k_means(x, 2, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == [[0, 1], [10, 1]]
    same_points = k_means(torch.ones(5, 2), 3, torch.Generator().manual_seed(0))
    assert torch.equal(same_points, torch.ones(3, 2))


def test_steps_and_phases():
    assert first_reaching([0, 1, 2, 5], [0.5, 0.98, 0.99, 0.7], 0.99) == 2
    assert first_reaching([0, 1], [0.5, 0.6], 0.99) is None
    assert [phase_of(*each) for each in ((False, True), (True, False), (True, True))] == [0, 1, 2]


def test_rising_is_beyond_two_standard_errors_since_half_as_many_steps():
    """With 100 samples at 0.5 and 0.6 one standard error is sqrt((0.25 + 0.24) / 100) = 0.07."""
    assert not rising([1, 10, 20], [0.1, 0.5, 0.6], 100)
    assert rising([1, 10, 20], [0.1, 0.4, 0.6], 100)
    assert rising([1, 11, 20], [0.1, 0.6, 0.6], 100), "since step 1: step 11 is later than half of 20"
    assert not rising([5], [0.9], 100)


def test_what_it_says_of_every_kind_of_run():
    def say(train, val, **more):
        return words([0, 1, 10, 100], {"train_acc": train, "val_acc": val, **more}, 0.99, 0.9, 1000)

    grokked = say([0.5, 1, 1, 1], [0.5, 0.5, 0.6, 0.95], noisy_fit=[0.5, 1, 1, 1], linear_share=[0.5, 0.9, 0.4, 0.05])
    assert grokked == (
        "Fitted at step 1, generalised at step 100: stopping at the fit would have cost 45.0 points of validation"
        " accuracy; keep training. 100 % of the flipped labels are fitted, which does no harm: the overfitting is"
        " benign. Linear share 0.90 at step 1, 0.05 at step 100."
    )
    assert say([0.5, 1, 1, 1], [0.5, 0.5, 0.95, 0.95]).endswith("the validation accuracy no longer grows: stop now.")
    waiting = say([0.5, 1, 1, 1], [0.5, 0.5, 0.5, 0.7], noisy_fit=[0.5, 1, 1, 1])
    assert "Fitted at step 1 and not generalised by step 100 (validation accuracy 0.700, rising): keep" in waiting
    assert waiting.endswith("100 % of the flipped labels are fitted.")
    assert "not rising): more steps have not helped so far" in say([0.5, 1, 1, 1], [0.5, 0.5, 0.7, 0.7])
    assert say([0.5, 0.6, 0.7, 0.8], [0.5] * 4).startswith(
        "Not fitted by step 100 (training accuracy 0.800, validation 0.500)"
    )
    assert "Generalised at step 10 and not fitted by step 100" in say([0.5, 0.8, 0.9, 0.95], [0.5, 0.8, 0.91, 0.95])
    assert "no later than fitted (step 10), so nothing was delayed: keep training." in say(
        [0.5, 0.9, 1, 1], [0.5, 0.8, 0.95, 0.99]
    )
    assert "and back at 0.600 by step 100: stop early." in say([0.5, 1, 1, 1], [0.5, 0.8, 0.95, 0.6])


# -- on the paper's data -----------------------------------------------------------------------------------------------


def test_a_small_run_of_the_papers_set_up_is_read_right(tmp_path):
    data = XORClusterDataModule(n=40, p=400, mu_norm=6.0, eta=0.1, n_val=100)
    module = TwoLayerReLU(p=400, m=32, lr=2.5e-3)
    path = tmp_path / "means.pt"
    torch.save(torch.stack([data.mu1, data.mu2]), path)
    monitor = GrokkingMonitor(directions=str(path), gen_threshold=0.7)
    run = quiet(callbacks=[monitor], max_epochs=5, check_val_every_n_epoch=99)
    run.fit(module, data)
    values, (x, y), (x_val, y_val) = monitor.history.values, data.train_set.tensors, data.val_set.tensors
    module.eval()
    with torch.no_grad():
        f, f_val, mirrored = module(x), module(x_val), module(-x_val)
    assert monitor.history.steps == [0, 1, 2, 3, 5]
    assert values["train_acc"][-1] == pytest.approx(float(((f > 0) == (y > 0)).float().mean()))
    assert values["val_acc"][-1] == pytest.approx(float(((f_val > 0) == (y_val > 0)).float().mean()))
    assert values["noisy_fit"][-1] == pytest.approx(float(((f > 0) == (y > 0))[data.flip_mask].float().mean()))
    odd, even = ((f_val - mirrored) / 2).square().mean(), ((f_val + mirrored) / 2).square().mean()
    assert values["linear_share"][-1] == pytest.approx(float(odd / (odd + even)), rel=1e-5)
    cosines = F.normalize(module.hidden.weight.detach(), dim=1)[:, :2].abs().amax(1)
    positive = module.out.weight[0] > 0
    assert values["align_mean"][-1] == pytest.approx(float(cosines.mean()), rel=1e-5)
    assert values["align_mean_pos"][-1] == pytest.approx(float(cosines[positive].mean()), rel=1e-5)
    assert values["align_mean_neg"][-1] == pytest.approx(float(cosines[~positive].mean()), rel=1e-5)
    logged = run.callback_metrics
    assert float(logged["grok/gap"]) == pytest.approx(values["train_acc"][-1] - values["val_acc"][-1])
    assert logged["grok/fit_step"] == monitor.fit_step and logged["grok/phase"] in (1, 2)
    assert monitor.limits == [], "the theory's own network"
    assert monitor.forwards(run) == 40 + 2 * 100


def test_without_flips_nothing_is_said_of_them():
    data = XORClusterDataModule(n=40, p=400, mu_norm=6.0, eta=0.0, n_val=40)
    monitor = GrokkingMonitor()
    quiet(callbacks=[monitor]).fit(TwoLayerReLU(p=400, m=8, lr=1e-3), data)
    assert "noisy_fit" not in monitor.history.values and "flipped" not in monitor.verdict


# -- on anybody's training ---------------------------------------------------------------------------------------------


class OneLogit(Classifier):
    """Two classes by one output."""

    def __init__(self, loss, signs=False, shape=(-1,)):
        super().__init__(mlp(classes=1))
        self.loss, self.signs, self.shape = loss, signs, shape

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self(x).reshape(self.shape)
        y = (y > 0).float().reshape(self.shape)
        if self.loss == "binary_cross_entropy":
            z = z.sigmoid()
        return getattr(F, self.loss)(z, 2 * y - 1 if self.signs else y)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize(
    ("loss", "signs"),
    [
        ("binary_cross_entropy_with_logits", False),
        ("soft_margin_loss", True),
        ("binary_cross_entropy", False),
    ],
)
def test_one_logit_is_read_by_its_sign(loss, signs, shape):
    module, monitor = OneLogit(loss, signs, shape), GrokkingMonitor()
    fit(module, monitor)
    with torch.no_grad():
        right = ((module(X)[:, 0] > 0) == (Y > 0)).float().mean()
    assert monitor.history.values["val_acc"][-1] == pytest.approx(float(right))


def test_soft_labels_and_a_criterion_by_name():
    class Named(Classifier):
        def training_step(self, batch, batch_idx):
            return self.mine(self(batch[0]), batch[1])

        def mine(self, logits, targets):
            return -logits.log_softmax(1).gather(1, targets[:, None]).mean()

    class Soft(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), F.one_hot(batch[1], 3).float())

    for module, monitor in ((Named(), GrokkingMonitor(criterion="mine")), (Soft(), GrokkingMonitor())):
        fit(module, monitor)
        right = (module(X).argmax(1) == Y).float().mean()
        assert monitor.history.values["train_acc"][-1] == pytest.approx(float(right))


def test_manual_optimization_is_read_by_forward_and_not_trained_on():
    class Manual(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.automatic_optimization, self.steps = False, 0

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.steps += 1

    ends = []
    for callbacks in ([], [GrokkingMonitor()]):
        module = Manual()
        quiet(callbacks=callbacks).fit(module, loader(X, Y), loader(X, Y))
        assert module.steps == 6
        ends.append(weights(module))
    assert same(*ends)
    right = (module(X).argmax(1) == Y).float().mean()
    assert callbacks[0].history.values["val_acc"][-1] == pytest.approx(float(right))


def test_images_have_no_linear_share_unless_asked_for():
    images, net = X.reshape(24, 1, 2, 3), lambda: nn.Sequential(nn.Flatten(), *mlp())
    auto = GrokkingMonitor()
    fit(Classifier(net()), auto, loader(images, Y), loader(images, Y))
    assert "linear_share" not in auto.history.values
    assert auto.limits == ["the inputs are not flat vectors, so the linear share is left out (linear_share=True asks)"]
    asked = GrokkingMonitor(linear_share=True)
    fit(Classifier(net()), asked, loader(images, Y), loader(images, Y))
    assert 0 < asked.history.values["linear_share"][-1] < 1
    assert "has biases and 3 parts with parameters and inputs that are not flat" in asked.verdict
    off = GrokkingMonitor(linear_share=False)
    fit(Classifier(), off)
    assert "linear_share" not in off.history.values and off.limits == []


def test_a_network_with_biases_is_reflected_about_the_mean_of_the_probe():
    """A linear layer with a bias is odd about any point but for its value there; several logits lose their mean."""
    module, monitor = Classifier(nn.Linear(6, 3)), GrokkingMonitor()
    fit(module, monitor)
    with torch.no_grad():
        f, at_mean = module(X), module(X.mean(0, keepdim=True))
    odd, even = f - at_mean, at_mean.expand(24, 3)
    odd, even = ((part - part.mean(1, keepdim=True)).square().sum() for part in (odd, even))
    assert monitor.history.values["linear_share"][-1] == pytest.approx(float(odd / (odd + even)), rel=1e-4)
    assert "this network has biases and 1 parts with parameters, so its odd part need not be linear" in monitor.verdict


def test_the_probe_is_as_large_as_it_is_told_and_drawn_once():
    monitor = GrokkingMonitor(probe_size=10, linear_share=False)
    run = fit(Classifier(), monitor)
    assert monitor.forwards(run) == 20
    assert all((10 * value) == pytest.approx(round(10 * value)) for value in monitor.history.values["train_acc"])


@pytest.mark.parametrize(("directions", "count"), [("classes", 3), ("kmeans:4", 4)])
def test_centroids_of_the_probe_are_directions(directions, count):
    monitor = GrokkingMonitor(directions=directions)
    module = Classifier()
    fit(module, monitor)
    assert monitor._along.shape == (count, 6)
    if directions == "classes":
        assert torch.allclose(monitor._along, torch.stack([X[c == Y].mean(0) for c in range(3)]))
    expected = alignment(module.net[0].weight.detach(), monitor._along).mean()
    assert monitor.history.values["align_mean"][-1] == pytest.approx(float(expected))
    assert "align_mean_pos" not in monitor.history.values, "several outputs have no one sign"
    later = GrokkingMonitor(directions=directions)
    later.load_state(monitor.state())
    assert torch.equal(later._along, monitor._along) and later.state()["history"] == monitor.state()["history"]


def test_flipped_labels_are_found_below_a_subset():
    class Flipped(TensorDataset):
        flip_mask = torch.arange(24) % 4 == 0

    subset = torch.utils.data.Subset(Flipped(X, Y), range(12, 24))
    module, monitor = Classifier(), GrokkingMonitor()
    fit(module, monitor, DataLoader(subset, 4))
    with torch.no_grad():
        right = (module(X).argmax(1) == Y)[12:][::4].float().mean()
    assert monitor.history.values["noisy_fit"][-1] == pytest.approx(float(right))


def test_random_transforms_are_said():
    class Augmented(TensorDataset):
        transform = staticmethod(lambda x: x)

    monitor = GrokkingMonitor()
    fit(Classifier(), monitor, DataLoader(Augmented(X, Y), 4))
    assert any("is that of augmented samples" in limit for limit in monitor.limits)


@pytest.mark.parametrize("stop", [False, True])
def test_it_stops_when_asked_to_and_not_before(stop):
    """All samples are of class 1 and the first weights say class 2, until some steps later."""
    net = nn.Linear(6, 3)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 0.0, 3.0]))
    monitor = GrokkingMonitor(stop_after_generalisation=stop, every_n_steps=1)
    ones = loader(X, torch.ones_like(Y))
    run = fit(Classifier(net, lambda p: torch.optim.SGD(p, lr=0.5)), monitor, ones, ones, epochs=3)
    assert 1 < monitor.gen_step < 18
    assert run.global_step == (max(monitor.fit_step, monitor.gen_step) if stop else 18)


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_a_regression_is_refused_before_the_first_step():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())

    module = Regression()
    before = weights(module)
    with pytest.raises(RecipeError, match=r"GrokkingMonitor: needs a classification loss, .*\(mse_loss\) got \(2, 3\)"):
        fit(module, GrokkingMonitor())
    assert same(before, weights(module))
