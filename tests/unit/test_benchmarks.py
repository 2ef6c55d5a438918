"""The benchmark's hand-written loops train as the recipes do, and its measurements measure what they say."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import random
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import cases, loops, turns
from benchmarks.cases import CASES, build
from benchmarks.loops import finetuning
from benchmarks.turns import Settings
from lightning_recipes.callbacks.adapters import sara
from lightning_recipes.core import noise
from lightning_recipes.core.adapters import Adapters
from lightning_recipes.core.mixing import Mix, Mixing
from lightning_recipes.core.step import Step
from lightning_recipes.modules import ImageClassifier
from tests.stock import Watch, loader, quiet

TINY = {
    "resnet": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "vit": {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
STEPS, BATCH, SIZE = 4, 8, 16
BY_HAND = [name for name, case in CASES.items() if case.loop is not None]


def data(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(steps * BATCH, 3, SIZE, SIZE, generator=generator)
    return loader(x, torch.arange(len(x)) % 10, size=BATCH)


def net(name):
    torch.manual_seed(0)
    return build(name, **TINY[name])


# -- the loops by hand -------------------------------------------------------------------------------------------------


@pytest.fixture
def same_noise(monkeypatch):
    """Random starts and mixes are the same in a recipe and in a loop; when called, they begin anew."""

    def begin():
        generator = torch.Generator().manual_seed(1)
        monkeypatch.setattr(torch, "rand_like", lambda x, **dtype: torch.rand(x.shape, generator=generator))
        draws = random.Random(1)
        monkeypatch.setattr(finetuning, "random", draws)
        monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.tensor(draws.sample(range(count), count)))

    def mix_by_hand(mixing, recipe, step, x):
        alpha = getattr(recipe, "mixup_alpha", recipe.alpha)
        return Mix(*loops.mix(x.shape[-1], len(x), mixing.kind == "cutmix", alpha, mixing.prob))

    monkeypatch.setattr(torch, "randn_like", lambda x: torch.arange(1.0, x.numel() + 1).sin().view(x.shape))
    monkeypatch.setattr(noise, "normal_like", lambda tensors, _: [torch.randn_like(t) for t in tensors])
    monkeypatch.setattr(Mixing, "_decide", mix_by_hand)
    monkeypatch.setattr(Step, "uniform", lambda self, recipe, seed, stream, like: torch.rand_like(like))
    monkeypatch.setattr(sara, "drawn", lambda seed, step, count: step % count)
    return begin


def first_adapters(recipes, into):
    """Keeps A of every projection as the fit begins, those of a group stacked."""

    def keep(trainer, module):
        for recipe in recipes:
            if isinstance(getattr(recipe, "operation", None), Adapters):
                into.extend(torch.cat([a.detach().clone() for a in group]) for _, group, _ in recipe.operation.pairs())

    return Watch(on_train_start=keep)


def adapters_of(trained):
    return [layer for layer in trained.modules() if isinstance(layer, loops.LoRA)]


def folded(trained):
    """The state dict with adapters folded into the layers that they stand on."""
    trained = copy.deepcopy(trained)
    for part in list(trained.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, loops.LoRA):
                with torch.no_grad():
                    for role in layer.a:
                        layer.weight(role).add_(layer.scale * layer.b[role] @ layer.a[role])
                setattr(part, name, layer.fused)
    return trained.state_dict()


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loop_by_hand_ends_with_the_weights_of_the_recipe(name, same_noise, monkeypatch):
    case, start = CASES[name], net(CASES[name].network)
    module, recipes, adapters = ImageClassifier(copy.deepcopy(start), optimizer=case.optimizer), case.recipes(), []
    same_noise()
    watch = first_adapters(recipes, adapters)
    steps = max(STEPS, case.least // BATCH)
    validation = data() if case.validates else None
    quiet(callbacks=[*recipes, watch], max_epochs=case.epochs).fit(module, data(steps), validation)

    with_lora = loops.with_lora

    def with_the_same_lora(*args, **kwargs):
        adapted = with_lora(*args, **kwargs)
        places = [a for layer in adapters_of(adapted) for a in layer.a.values()]
        for place, a in zip(places, adapters, strict=True):
            place.data.copy_(a)
        return adapted

    monkeypatch.setattr(loops, "with_lora", with_the_same_lora)
    by_hand = copy.deepcopy(start)
    same_noise()
    torch.manual_seed(0)  # what a recipe's seed gives the parts that it makes
    case.loop(by_hand, data(steps), nullcontext)

    expected, found, before = module.net.state_dict(), folded(by_hand), start.state_dict()
    expected = {key.removeprefix("base."): value for key, value in expected.items()}  # a kept ensemble's
    assert found.keys() == expected.keys()
    moved = [key for key in expected if key not in before or not torch.equal(expected[key], before[key])]
    assert moved and moved == [key for key in found if key not in before or not torch.equal(found[key], before[key])]
    for key in moved:
        assert torch.allclose(found[key], expected[key], rtol=1e-6, atol=1e-7), key


def test_what_the_loops_add_to_plain_training_acts_on_the_data_of_these_tests(same_noise):
    """Else a loop that leaves it out would end with the same weights."""

    def train(loop, network, **arguments):
        same_noise()
        torch.manual_seed(0)
        trained = network()
        loop(trained, data(), **arguments)
        return torch.cat([p.detach().flatten() for p in trained.parameters()])

    def resnet():
        return net("resnet")

    def vit():
        return loops.with_lora(net("vit"), "qv", rank=2, groups=2)

    for loop, network, off in (
        (loops.aaer, resnet, {"lambda1": 0.0}),
        (loops.aaer, resnet, {"project": False}),
        (loops.pego, vit, {"weight": 0.0}),
        (loops.glad, vit, {"mix": 0.0}),
        (partial(loops.sara, share=0.2), lambda: net("vit"), {"weight": 0.0}),
        (loops.mixing, resnet, {"prob": 0.0}),
        (loops.wise_ft, resnet, {"alpha": 1.0}),
        (loops.noisy, resnet, {"eta": 0.0}),
        (loops.langevin, resnet, {"temperature": 0.0}),
        (loops.self_distillation, resnet, {"alpha": 0.0}),
        (partial(loops.self_distillation, table=False), resnet, {"alpha": 0.0}),
        (loops.drop_block, resnet, {"first": 0.0, "last": 0.0}),
        (partial(loops.class_weighted, weights=[3.0] + [1.0] * 9), resnet, {"weights": [1.0] * 10}),
    ):
        assert (train(loop, network) - train(loop, network, **off)).abs().max() > 1e-4, off


def test_orthogonality_by_hand_has_the_numbers_of_the_card():
    """W = [[1, 0], [0, 3]], D_1 = [[1, 0], [0, 0]], D_2 = [[0, 1], [0, 1]]: preserve 1 + 6, diversify 0."""
    fused = nn.Linear(2, 6)
    layer = loops.LoRA(fused, "q", rank=1, groups=2, scale=1.0)
    with torch.no_grad():
        fused.weight[:2] = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        layer.a["q"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.b["q"].copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert loops.orthogonality(layer, "q").item() == 7
    with torch.no_grad():
        layer.a["q"][0, 1] = 1.0  # D_1 = [[1, 1], [0, 0]]: D_1 D_2^T = [[1, 1], [0, 0]]; W D_1^T = [[1, 0], [3, 0]]
    assert loops.orthogonality(layer, "q").item() == 4 + 6 + 2


# -- measuring ---------------------------------------------------------------------------------------------------------


def make_tiny(monkeypatch):
    """Networks that are trained in no time, on a CPU."""
    networks = {
        name: (cases.NETWORKS["cpu"][name][0], {**cases.NETWORKS["cpu"][name][1], **TINY[name]}) for name in TINY
    }
    monkeypatch.setitem(cases.NETWORKS, "cpu", networks)
    monkeypatch.setitem(turns.IMAGE_SIZE, "cpu", SIZE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def tiny(monkeypatch):
    """Tiny networks, and a garbage collector as it was."""
    make_tiny(monkeypatch)
    yield
    gc.unfreeze()
    gc.enable()


def told(turns_ahead):
    """A pipe whose other end has said in advance to go on."""
    ours, theirs = multiprocessing.Pipe()
    for _ in range(turns_ahead):
        ours.send(None)
    return ours, theirs


@pytest.mark.parametrize("variant", ["plain loop", "loop with method", "plain", "neutral", "recipe"])
def test_a_run_takes_as_many_turns_as_it_was_told_and_then_ends(variant, tiny):
    ours, theirs = told(10)
    turns.run("ProgressiveUnfreezing, all", variant, "steps", Settings(batch=2, steps=3, free=2), theirs)
    ready, *seconds, last = (ours.recv() for _ in range(1 + 3 + 1))
    assert (ready, last) == (None, 0) and all(0 < each < 10 for each in seconds)
    taken = 10
    while theirs.poll():
        theirs.recv()
        taken -= 1
    assert taken == 3 + 1 and not ours.poll()  # the last is the permission to end


@pytest.mark.parametrize("name", ["AAER", "PEGO", "GLAD"])
def test_runs_in_bf16_compute_in_bf16(name, tiny, monkeypatch):
    outputs, plain = set(), nn.Linear.forward

    def forward(layer, x):
        out = plain(layer, x)
        outputs.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", forward)
    for variant in ("loop with method", "recipe"):
        outputs.clear()
        _, theirs = told(2)
        turns.run(name, variant, "steps", Settings(batch=2, steps=1, free=1, bf16=True), theirs)
        assert outputs == {torch.bfloat16}, variant


def test_a_run_that_saves_says_how_large_a_checkpoint_is(tiny):
    sizes = {}
    for variant in ("plain", "recipe"):
        ours, theirs = told(2)
        turns.run("ExactResume", variant, "saves", Settings(batch=2, steps=1, free=0), theirs)
        ready, seconds, sizes[variant] = (ours.recv() for _ in range(3))
        assert ready is None and seconds > 0
    weights = sum(p.nbytes for p in net("resnet").parameters())
    assert 3 * weights < sizes["plain"] < sizes["recipe"] < 3 * weights + 2**20  # AdamW keeps two of each


def test_peak_bytes_counts_the_weights_and_what_was_held_at_once():
    part = nn.BatchNorm1d(1000)
    own = 4 * 4 * 1000 + 8  # weight, bias, mean, variance; and a counter

    def job():
        first = torch.zeros(3000)
        del first
        held = [torch.zeros(2000), torch.zeros(2000)]
        held.pop()
        held.append(torch.zeros(100))

    if torch.cuda.is_available():
        pytest.skip("counts on the CPU")
    assert turns.peak_bytes(part, job) == own + 4 * 4000


def _peak_memory(case, batch, pipe):
    """In a new interpreter, from which each variant is forked as the command does it: the profiler sees everything that
    is allocated only where none ran before."""
    make_tiny(pytest.MonkeyPatch())
    for variant in ("plain", "recipe", "loop with method"):
        ours, theirs = told(0)
        arguments = (case, variant, "memory", Settings(batch=batch), theirs)
        measured = multiprocessing.get_context("fork").Process(target=turns.run, args=arguments)
        measured.start()
        pipe.send(ours.recv())
        measured.join()


def peak_memory(case, batch):
    ours, theirs = multiprocessing.Pipe()
    interpreter = multiprocessing.get_context("spawn").Process(target=_peak_memory, args=(case, batch, theirs))
    interpreter.start()
    theirs.close()
    peaks = [ours.recv() for _ in range(3)]
    interpreter.join()
    return peaks


def test_peak_memory_says_what_unfreezing_saves(tiny):
    plain, recipe, by_hand = peak_memory("ProgressiveUnfreezing, head", 2)
    weights = sum(p.nbytes for p in net("resnet").parameters())
    assert plain - recipe > 3 * 0.9 * weights  # no gradients and no state of AdamW but the head's
    assert by_hand == pytest.approx(recipe, rel=0.1)


def test_peak_memory_says_what_training_a_tenth_of_the_entries_saves(tiny):
    """Against all of them, in bytes for each: a gradient, two moments of AdamW, and what its step makes meanwhile."""
    plain, recipe, by_hand = peak_memory("SaRA, 10%", 1)
    weights = sum(p.nbytes for p in net("vit").parameters())
    assert plain > 4 * weights
    assert recipe < 2.5 * weights
    assert by_hand == pytest.approx(recipe, rel=0.15)


def test_a_slow_moment_that_hits_a_whole_round_does_not_show_in_the_factors():
    quiet_round = {"plain loop": 1.0, "loop with method": 2.0, "plain": 1.1, "neutral": 1.1, "recipe": 2.2}
    slow = [1, 5, 1, 3, 1]
    seconds = {variant: [t * factor for factor in slow] for variant, t in quiet_round.items()}
    expected = {"Lightning": 1.1, "neutral": 1, "recipe": 2, "by hand": 2, "recipe/by hand": 1}
    for factor, value in expected.items():
        assert command.paired(seconds, command.FACTORS[factor][1]) == pytest.approx(value)
    assert command.paired(seconds, command.FACTORS["own ms"][1]) == pytest.approx(1e3 * (2.2 - 1.1 - 2 + 1))


def test_the_commands_help_names_every_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    told = "".join(capsys.readouterr().out.split())
    assert all("".join(name.split()) in told for name in CASES)


def test_the_command_prints_tables_and_writes_json(tmp_path, monkeypatch, capsys):
    seen = []

    def block(name, variants, task, settings, seed):
        seen.append((name, task, seed))
        return {v: [0.1 * (1 + seed), 0.1] for v in variants}, {v: 2048 * len(v) for v in variants}

    monkeypatch.setattr(command, "block", block)
    monkeypatch.setattr(command, "peak", lambda name, variant, settings: 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "glad", "exactresume", "--blocks", "2", "--markdown", "--json", str(out)]
    )
    command.main()
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    names = [name for name in CASES if name.startswith(("GLAD", "ExactResume"))]
    assert [row["case"] for row in results["speed"]] == names
    alone = [name for name in names if not CASES[name].num_workers]  # what workers hold is not the run's
    assert [row["case"] for row in results["memory"]] == alone
    assert [row["case"] for row in results["checkpoint"]] == ["ExactResume", "ExactResume, 2 workers"]
    assert ("GLAD", "steps", 1) in seen and ("ExactResume", "saves", 0) in seen and ("GLAD", "saves", 0) not in seen
    glad = next(row for row in results["speed"] if row["case"] == "GLAD")
    assert glad["factors"]["recipe"] == {"median": 1, "lowest": 1, "highest": 1} and "neutral" not in glad["factors"]
    rows = [line for line in printed.splitlines() if line.startswith("| GLAD ")]
    assert len(rows) == 2 and "1.000 ±0.000" in rows[0] and all(row.endswith(" |") for row in rows)


def test_a_name_of_no_case_is_an_error_that_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "nonsense"])
    with pytest.raises(SystemExit):
        command.main()
    assert "nonsense" in (error := capsys.readouterr().err) and "PEGO" in error
