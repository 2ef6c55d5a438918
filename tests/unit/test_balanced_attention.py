"""BalancedAttention and its branches, DropBlock as a layer, and the paper's network: closed forms and limit cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_recipes.modules import (
    BalancedAttention,
    BalancedCNN,
    BalancedNet,
    CoordinateAttention,
    DropBlock2d,
    SqueezeExcitation,
)
from lightning_recipes.modules.balanced_attention import InsertedAttention, fused
from lightning_recipes.modules.drop_block import fitting_block, kept, rates, seed_rate
from tests.stock import loader, quiet

# The paper's code on map sizes 64, 32, 16 and 8 at p = .05, .10, .15, .20, block size 7: what is really dropped.
EFFECTIVE = {(64, 0.05): 0.046, (32, 0.10): 0.086, (16, 0.15): 0.113, (8, 0.20): 0.116}
ORIGINAL_FACTOR = {64: 1.22, 32: 1.51, 16: 2.56, 8: 16.0}


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def still(attention: nn.Module) -> nn.Module:
    """Both branches' last layers at zero, so that every gate is a half."""
    for name, p in attention.named_parameters():
        if "conv_h" in name or "conv_w" in name or "excite" in name:
            nn.init.zeros_(p)
    return attention


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "share"), [(0.5, 0.344385), (0.0, 0.375)])
def test_with_every_gate_at_a_half_the_output_is_the_cards_share_of_the_input(theta: float, share: float) -> None:
    x = maps(2, 16, 5, 7)
    attention = still(BalancedAttention(16, theta_init=theta))
    assert torch.allclose(attention.coord(x), x / 4)
    assert torch.allclose(attention.se(x), x / 2)
    assert torch.allclose(attention(x), share * x, rtol=1e-5)


def test_alpha_starts_at_0_6225_and_not_at_a_half() -> None:
    assert BalancedAttention(16).alpha.item() == pytest.approx(0.622459, abs=1e-6)
    assert BalancedAttention(16, theta_init=0.0).alpha.item() == 0.5


@pytest.mark.parametrize(("theta", "branch"), [(60.0, "coord"), (-60.0, "se")])
def test_at_the_ends_of_theta_one_branch_is_left(theta: float, branch: str) -> None:
    x = maps(3, 16, 6, 4)
    attention = BalancedAttention(16, theta_init=theta).eval()
    assert torch.allclose(attention(x), getattr(attention, branch)(x), atol=1e-6)


def test_both_branches_equal_their_layers_written_out() -> None:
    """As in the official code, with its poolings, transposes and split."""
    x, attention = maps(4, 16, 6, 10), BalancedAttention(16)
    coord, se = attention.coord, attention.se
    rows = F.adaptive_avg_pool2d(x, (None, 1))
    columns = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
    q = F.relu(F.batch_norm(coord.conv(torch.cat([rows, columns], 2)), None, None, training=True))
    a_h = coord.conv_h(q[:, :, :6]).sigmoid()
    a_w = coord.conv_w(q[:, :, 6:].permute(0, 1, 3, 2)).sigmoid()
    assert a_h.shape == (4, 16, 6, 1) and a_w.shape == (4, 16, 1, 10)
    s = se.excite(F.relu(se.squeeze(x.mean((2, 3))))).sigmoid()[:, :, None, None]
    alpha = 1 / (1 + math.exp(-0.5))
    assert torch.allclose(coord(x), x * a_h * a_w, atol=1e-6)
    assert torch.allclose(attention(x), alpha * x * a_h * a_w + (1 - alpha) * x * s, atol=1e-6)


def test_a_gate_of_a_row_sees_that_row_and_one_of_a_column_that_column() -> None:
    """A profile pooled over the wrong axis, or joined without the transpose, would mix them up."""
    coord = CoordinateAttention(8, 1).eval()
    x = maps(1, 8, 5, 6)
    moved = x.clone()
    moved[:, :, 2] += maps(8, 6) - maps(8, 6).mean(1, keepdim=True)  # row 2 with the same mean
    (a_h, a_w), (b_h, b_w) = coord.gates(x), coord.gates(moved)
    assert torch.allclose(a_h, b_h, atol=1e-6)
    assert (a_w - b_w).abs().amax((0, 1, 2)).min() > 1e-6
    moved = x.clone()
    moved[:, :, 2] += 1
    (a_h, _), (b_h, _) = coord.gates(x), coord.gates(moved)
    changed = (a_h - b_h).abs().amax((0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False, False]


def test_a_map_of_one_pixel_gives_finite_gates() -> None:
    attention = BalancedAttention(16)
    assert torch.isfinite(attention(maps(2, 16, 1, 1))).all()


def test_the_bottlenecks_have_at_least_one_channel_and_say_so() -> None:
    with pytest.warns(UserWarning, match="CoordinateAttention: 4 channels are fewer than reduction=8"):
        narrow = BalancedAttention(4)
    assert narrow.coord.conv.out_channels == narrow.se.squeeze.out_features == 1
    with pytest.raises(ValueError, match="SqueezeExcitation: channels=4, reduction=0: both must be at least 1"):
        SqueezeExcitation(4, 0)


def test_the_number_of_parameters_of_a_block() -> None:
    """3 C C/8 and the batch norm's 2 C/8, 2 C C/16, and theta."""
    assert sum(p.numel() for p in BalancedAttention(64).parameters()) == 3 * 64 * 8 + 2 * 8 + 2 * 64 * 4 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_and_sigmoids_are_taken_in_fp32_whatever_the_map_is_in(dtype: torch.dtype) -> None:
    """4,096 pixels of 1 + 1/128: a running sum in 16 bits would stop growing long before."""
    attention = BalancedAttention(16).eval()
    x = (1 + maps(2, 16, 64, 64).sign() / 128).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attention.gate(x)
    assert low.dtype == dtype
    assert torch.allclose(low.float(), attention.gate(x.float()), atol=5e-3)
    assert torch.allclose(attention.double().gate(x.double()).float(), attention.gate(x.double()).float())


@pytest.mark.parametrize("kind", ["balanced", "coord", "se"])
def test_an_inserted_block_is_bitwise_the_identity_at_first_and_the_attention_at_g_1(kind: Any) -> None:
    x = maps(3, 16, 6, 6)
    block = InsertedAttention(16, kind)
    assert torch.equal(block(x), x)
    (slope,) = torch.autograd.grad(block(x).sum(), block.g)
    assert slope != 0, "it can leave the identity"
    nn.init.ones_(block.g)
    assert torch.allclose(block.eval()(x), block.attention(x), atol=1e-6)
    plain = InsertedAttention(16, kind, identity_init=False).eval()
    assert plain.g is None and torch.equal(plain(x), plain.attention(x))


def test_the_gate_is_the_mix_of_the_gates() -> None:
    half = torch.full((1, 1, 2, 1), 0.5)
    mixed = fused(half, torch.tensor([0.2, 0.4]).reshape(1, 1, 1, 2), torch.full((1, 1, 1, 1), 0.6), torch.tensor(0.0))
    assert torch.allclose(mixed, torch.tensor([[0.35, 0.4], [0.35, 0.4]])[None, None])


# -- DropBlock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "p"), EFFECTIVE)
def test_the_paper_codes_rate_drops_less_than_its_p(side: int, p: float) -> None:
    """The card's table, exactly: every pixel is kept where none of the seeds that reach it fires."""
    rate = seed_rate(p, 7, side, side)
    reach = F.conv2d(torch.ones(1, 1, side, side), torch.ones(1, 1, 7, 7), padding=3)
    assert 1 - ((1 - rate) ** reach).mean().item() == pytest.approx(EFFECTIVE[side, p], abs=1e-3)
    assert seed_rate(p, 7, side, side, "dropblock") / rate == pytest.approx(ORIGINAL_FACTOR[side], rel=5e-3)


def test_how_likely_a_pixel_is_kept_inside_and_in_a_corner() -> None:
    torch.manual_seed(0)
    uniform = torch.rand(40_000, 1, 15, 15)
    keep = kept((uniform < seed_rate(0.2, 7, 15, 15)).float(), 7).mean((0, 1))
    inside, corner = (1 - 0.2 / 49) ** 49, (1 - 0.2 / 49) ** 16
    assert [inside, corner] == pytest.approx([0.8184, 0.9367], abs=1e-4)
    assert keep[7, 7].item() == pytest.approx(0.8184, abs=0.006)
    assert keep[0, 0].item() == pytest.approx(0.9367, abs=0.004)


def test_one_seed_takes_out_one_square_that_the_border_cuts() -> None:
    seeds = torch.zeros(1, 1, 5, 6)
    seeds[0, 0, 1, 4] = 1
    keep = torch.ones(5, 6)
    keep[0:3, 3:6] = 0
    assert torch.equal(kept(seeds, 3)[0, 0], keep)
    keep[0:4, 2:6] = 0
    assert torch.equal(kept(seeds, 5)[0, 0], keep)


def test_a_layer_drops_the_same_of_all_channels_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropBlock2d(0.2)(torch.ones(8, 3, 16, 16))
    assert out.mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(out[:, 0], out[:, 2]) and (out == 0).any()
    assert not torch.equal(out[0], out[1]), "every sample has a mask of its own"


def test_a_layer_does_nothing_at_0_and_in_evaluation() -> None:
    x = maps(2, 3, 8, 8)
    before = torch.get_rng_state()
    assert DropBlock2d(0.0)(x) is x and DropBlock2d(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), before), "and draws nothing"


def test_a_map_smaller_than_the_blocks_has_blocks_of_its_own_size() -> None:
    """Never a negative factor; and odd, so that they stand on their middles."""
    assert [fitting_block(7, side, side) for side in (1, 2, 3, 4, 6, 7, 9)] == [1, 1, 3, 3, 5, 7, 7]
    layer = DropBlock2d(0.3, gamma="dropblock")
    with pytest.warns(UserWarning, match="block_size=7 is more than a map of 4x4 pixels has; its blocks are 3x3"):
        assert torch.isfinite(layer(torch.ones(4, 2, 4, 4))).all()
    assert 0 < seed_rate(0.3, 3, 4, 4, "dropblock") <= 1
    assert seed_rate(0.9, 7, 7, 7, "dropblock") == pytest.approx(0.9), "one place for a block, which falls at rate p"


def test_rates_grow_with_depth() -> None:
    assert rates((0.05, 0.20), 4) == pytest.approx([0.05, 0.10, 0.15, 0.20])
    assert rates((0.05, 0.20), 1) == [0.05] and rates(0.1, 3) == [0.1] * 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"drop_prob": 1.0}, r"drop_prob=1\.0: must be in \[0, 1\)"),
        ({"block_size": 4}, "block_size=4: must be odd"),
        ({"gamma": "own"}, "gamma='own': must be 'paper_code' or 'dropblock'"),
    ],
)
def test_bad_arguments_of_the_layer(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DropBlock2d(**arguments)


# -- the network -------------------------------------------------------------------------------------------------------

SMALL = {"in_chans": 1, "widths": (8, 16), "depths": (1, 2)}


@pytest.mark.filterwarnings("ignore:.*channels are fewer than")
def test_the_papers_network_has_the_cards_number_of_parameters_and_eleven_alphas() -> None:
    module = BalancedCNN()
    assert sum(p.numel() for p in module.parameters()) == 13_115_813
    assert module.alphas.shape == (11,)
    drops = [part.drop_prob for part in module.modules() if isinstance(part, DropBlock2d)]
    assert drops == pytest.approx([0.05] * 3 + [0.1] * 3 + [0.15] * 3 + [0.2] * 2)
    sizes = []
    hooks = [stage.register_forward_hook(lambda *a: sizes.append(tuple(a[2].shape[1:]))) for stage in module.net.stages]
    with torch.no_grad():
        assert module.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 10)
    assert sizes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8)]
    assert len(hooks) == 4


def test_first_weights_are_those_of_the_code() -> None:
    torch.manual_seed(0)
    net = BalancedNet(widths=(64, 128), depths=(1, 1))
    conv = net.stages[1][0].conv2.weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)  # fan out
    assert net.stages[1][0].attention.se.squeeze.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.1) and (net.fc.bias == 0).all()


@pytest.mark.filterwarnings("ignore:.*channels are fewer than", "ignore:.*block_size=7 is more than")
def test_it_trains_and_logs_kappa_and_the_accuracy_of_every_class() -> None:
    torch.manual_seed(0)
    x, y = maps(24, 1, 8, 8), torch.arange(24) % 3
    module = BalancedCNN(3, **SMALL, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.5))
    run = quiet(max_epochs=2)
    run.fit(module, loader(x, y, size=8), loader(x, y, size=8))
    (tested,) = quiet().test(module, loader(x, y, size=7), verbose=False)
    with torch.no_grad():
        right = module.eval()(x).argmax(1) == y
    per_class = [right[y == c].float().mean().item() for c in range(3)]
    assert [tested[f"test/acc/{c}"] for c in range(3)] == pytest.approx(per_class)
    assert tested["test/worst_class"] == pytest.approx(min(per_class))
    chance = 1 / 3  # balanced labels: expected agreement, whatever is predicted
    assert tested["test/kappa"] == pytest.approx((tested["test/acc"] - chance) / (1 - chance), abs=1e-5)
    assert {"val/kappa", "val/worst_class", "val/acc/0", "train/alpha"} <= run.callback_metrics.keys()
    (probabilities,) = quiet().predict(module, loader(x, size=24))
    assert torch.allclose(probabilities.sum(1), torch.ones(24), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*channels are fewer than")
def test_classes_without_a_sample_and_several_loaders() -> None:
    torch.manual_seed(0)
    module = BalancedCNN(4, **SMALL)
    sets = [loader(maps(8, 1, 8, 8), torch.arange(8) % 2), loader(maps(8, 1, 8, 8), torch.arange(8) % 3)]
    first, second = quiet().test(module, sets, verbose=False)
    assert "test/acc/1/dataloader_idx_0" in {**first, **second} and "test/acc/2/dataloader_idx_0" not in first
    assert "test/acc/2/dataloader_idx_1" in {**first, **second} and "test/acc/3/dataloader_idx_1" not in second


@pytest.mark.filterwarnings("ignore:.*channels are fewer than")
@pytest.mark.parametrize("decay_alpha", [False, True])
def test_weight_decay_moves_the_alphas_where_the_papers_code_lets_it(decay_alpha: bool) -> None:
    module = BalancedCNN(3, **SMALL, decay_alpha=decay_alpha)
    (optimizer,) = [torch.optim.AdamW(module.optimized_parameters(), lr=0.1, weight_decay=0.5)]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(module.alphas, torch.full((3,), 0.5 * (0.95 if decay_alpha else 1.0)).sigmoid())
    assert module.net.stages[0][0].conv1.weight.abs().sum() > 0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))


def test_sizes_that_fit_no_network() -> None:
    with pytest.raises(ValueError, match=r"widths=\(8, 16\), depths=\(1,\): must be one number a stage each"):
        BalancedNet(widths=(8, 16), depths=(1,))
