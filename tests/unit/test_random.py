"""Keyed random numbers against SplitMix64 written out in plain Python."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_recipes.core.random import (
    forked,
    generator,
    generators_in,
    key,
    set_state_of,
    set_states,
    snapshot,
    state_of,
    states,
    uniform,
)
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, loader, quiet, samples

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
KEY = 1206148491884313180  # of (0, 3, 17, "AAER/start", 0)


def splitmix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on unsigned 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_hand(parts: int, index: int, size: int) -> list[float]:
    """The first `size` outputs of a SplitMix64 whose state starts at the hashed index; the upper 24 bits of each."""
    state, out = splitmix((index + parts) & MASK), []
    for _ in range(size):
        state = (state + GOLDEN) & MASK
        out.append((splitmix(state) >> 40) / 2**24)
    return out


def test_the_plain_python_version_is_splitmix64():
    """The first outputs of the published generator from state 1234567."""
    state, out = 1234567, []
    for _ in range(5):
        state = (state + GOLDEN) & MASK
        out.append(splitmix(state))
    assert out == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("parts", [0, 1, -1, 2**63 - 1, -(2**63), key(0, 1, "x")])
def test_uniform_is_splitmix64_of_key_and_index(parts):
    index = torch.tensor([0, 1, 17, 2**40])
    drawn = uniform(parts, index, (2, 3))
    assert drawn.dtype == torch.float32
    assert drawn.shape == (4, 2, 3)
    for row, i in zip(drawn, index.tolist(), strict=True):
        assert row.flatten().tolist() == by_hand(parts, i, 6)


def test_a_sample_has_its_numbers_whoever_stands_beside_it():
    whole = uniform(5, torch.arange(12), (4,))
    assert torch.equal(torch.cat([uniform(5, part, (4,)) for part in torch.arange(12).split(5)]), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(5, order, (4,)), whole[order])
    ranks = [uniform(5, torch.arange(rank, 12, 3), (4,)) for rank in range(3)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole)


def test_samples_of_no_shape_are_scalars():
    assert uniform(5, torch.arange(3), ()).tolist() == [by_hand(5, i, 1)[0] for i in range(3)]


def test_range_mean_variance_and_independence():
    drawn = uniform(key(0, "test"), torch.arange(400), (500,))
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    # 5 standard errors of 200 000 numbers: 0.2887 / 447 for the mean, 0.0745 / 447 for the variance
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 * 0.2887 / 447)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=5 * 0.0745 / 447)
    centred = drawn.double() - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), uniform(key(1, "test"), torch.arange(400), (500,)) - 0.5):
        assert abs((centred * other).mean().item() * 12) < 5 / 447
    assert len(drawn.flatten().unique()) > 198_000  # of 2^24 values: about 1 200 pairs alike by chance


def test_a_key_is_the_same_everywhere():
    """Written down once: another process, another machine and a later version must give the same numbers."""
    assert key(0, 3, 17, "AAER/start", 0) == KEY


def test_keys_of_different_parts_differ():
    parts = [(0, 0), (0, 1), (1, 0), (0, "0"), ("0", 0), (0,), (0, 0, 0), (11, 1), (1, 11), ("a/b",), ("a", "b")]
    assert len({key(*p) for p in parts}) == len(parts)
    assert all(-(2**63) <= key(*p) < 2**63 for p in parts)


def test_a_generator_is_seeded_by_its_key_alone():
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator(0, "box"))
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=generator(0, "box")), first)
    assert not torch.equal(torch.rand(3, generator=generator(1, "box")), first)


def test_a_generator_stands_on_the_device_that_was_asked_for():
    there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device = generator(0, "a", device=there)
    assert on_device.device.type == there.type
    assert on_device.initial_seed() == generator(0, "a").initial_seed() == key(0, "a") & (2**63 - 1)


def test_nothing_here_draws_from_the_global_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    uniform(key(0), torch.arange(3), (2,))
    torch.rand(2, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_forked_puts_the_state_back_also_after_an_error():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with forked(torch.device("cpu"), seed=5):
        inside = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), forked(torch.device("cpu")):
        torch.rand(2)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), inside)


# -- whole states ----------------------------------------------------------------------------------------------------


def draw():
    """One number of each global generator; a Gaussian of NumPy's leaves a second one behind."""
    return [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(2)]


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_forked_keeps_every_global_generator():
    draw()
    before = states()
    expected = draw()
    set_states(before)
    with forked(torch.device("cpu")):
        assert same(draw(), expected)
    assert same(draw(), expected)


def test_a_snapshot_is_taken_up_in_another_process(tmp_path):
    draw()
    torch.save(snapshot(), tmp_path / "random.pt")
    code = (
        "import sys, torch\n"
        "from lightning_recipes.core.random import restore\n"
        "from tests.unit.test_random import draw\n"
        "restore(torch.load(sys.argv[1], weights_only=True))\n"
        "print(draw())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "random.pt")]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert there.splitlines()[-1] == str(draw())


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
    "random": (lambda: random.Random(1), lambda g: [g.random(), g.gauss(0, 1)]),
    "RandomState": (lambda: np.random.RandomState(1), lambda g: [g.randn(), g.rand()]),
    "PCG64": (lambda: np.random.default_rng(1), lambda g: g.random(3).tolist()),
    "Philox": (lambda: np.random.Generator(np.random.Philox(1)), lambda g: g.random(3).tolist()),
    "MT19937": (lambda: np.random.Generator(np.random.MT19937(1)), lambda g: g.random(3).tolist()),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_any_generator_is_saved_and_restored(name, tmp_path):
    make, use = GENERATORS[name]
    generator = make()
    use(generator)
    torch.save(state_of(generator), tmp_path / "state.pt")
    expected = use(generator)
    other = make()
    set_state_of(other, torch.load(tmp_path / "state.pt", weights_only=True))
    assert use(other) == expected


def test_generators_are_found_wherever_an_object_holds_them():
    made = [GENERATORS[name][0]() for name in ("torch", "random", "RandomState", "PCG64")]

    class Held:
        pass

    held, inner = Held(), Held()
    inner.transforms, inner.rng = [Held(), {"noise": made[2]}], made[1]
    inner.transforms[0].own, inner.again, inner.itself = made[3], made[1], held
    held.dataset, held.generator, held.samples = inner, made[0], [random.Random(i) for i in range(200)]
    held.globals = [random, np.random, torch.default_generator]
    found = generators_in(held)
    assert {id(each) for each in found} == {id(each) for each in made}, "each once, no sample and no global one"
    assert [id(each) for each in found] == [id(each) for each in generators_in(held)]


# -- in a training step -----------------------------------------------------------------------------------------------


class Draws(StepRecipe):
    def __init__(self):
        super().__init__()
        self.drawn = []

    def transform_batch(self, step, batch):
        self.drawn.append([step.uniform(self, 3, "u", batch[0]) for _ in range(2)])
        return batch


@pytest.mark.parametrize("size", [2, 4, 6, 16])
def test_uniform_numbers_belong_to_the_place_of_the_sample(size):
    """Keyed by epoch and call number; the same however the samples are batched, a short last batch included."""
    recipe = Draws()
    quiet(callbacks=[recipe], max_epochs=2).fit(Classifier(), loader(*samples(16), size=size))
    batches = len(recipe.drawn) // 2
    for epoch in (0, 1):
        for call in (0, 1):
            drawn = torch.cat([draws[call] for draws in recipe.drawn[epoch * batches :][:batches]])
            assert torch.equal(drawn, uniform(key(3, epoch, "Draws/u", call), torch.arange(16), (6,)))
