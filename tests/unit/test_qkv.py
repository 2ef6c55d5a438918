"""Query, key and value projections in every layout: split, fused, fused and transposed, packed."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.qkv import FusedProjections, PackedProjections, RowSlice, open_projections


class Split(nn.Module):
    def __init__(self, names=("q_proj", "k_proj", "v_proj")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


class Fused(nn.Module):
    def __init__(self, out=12, name="qkv"):
        super().__init__()
        self.add_module(name, nn.Linear(4, out))


@pytest.mark.parametrize(
    "names",
    [("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("wq", "wk", "wv")],
)
def test_split_projections_are_found_by_their_names_and_left_as_they_are(names):
    block, undo = nn.ModuleDict({"attn": Split(names)}), ExitStack()
    before = dict(block.named_modules())
    assert open_projections(block, "qv", undo) == [f"attn.{names[0]}", f"attn.{names[2]}"]
    assert open_projections(block, "qkv", undo) == [f"attn.{name}" for name in names]
    assert dict(block.named_modules()) == before


def test_split_projections_at_the_top_have_bare_names():
    assert open_projections(Split(), "k", ExitStack()) == ["k_proj"]


def test_the_rows_of_a_fused_layer_are_views_of_its_weight():
    fused = nn.Linear(4, 12)
    wrapper = FusedProjections(fused)
    for i, role in enumerate("qkv"):
        part = getattr(wrapper, role)
        assert torch.equal(part.weight, fused.weight[4 * i : 4 * i + 4])
        assert torch.equal(part.bias, fused.bias[4 * i : 4 * i + 4])
        assert (part.in_features, part.out_features) == (4, 4)
        assert list(part.parameters()) == []
    with torch.no_grad():
        fused.weight[5, 1] = 7
    assert wrapper.k.weight[1, 1] == 7
    x = torch.randn(3, 4)
    assert torch.equal(wrapper(x), fused(x))


def test_the_rows_of_a_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(12, 4)
    wrapper = FusedProjections(conv)
    assert torch.equal(wrapper.v.weight, conv.weight.T[8:])
    assert wrapper.v.weight.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()


def test_a_fused_layer_without_bias():
    wrapper = FusedProjections(nn.Linear(4, 12, bias=False))
    assert wrapper.q.bias is None


def test_opening_and_closing_a_fused_and_a_packed_block():
    block = nn.ModuleDict({"a": Fused(), "b": nn.MultiheadAttention(4, 2)})
    fused, packed = block["a"].qkv, block["b"]
    undo = ExitStack()
    assert open_projections(block, "qv", undo) == ["a.qkv.q", "a.qkv.v", "b.q", "b.v"]
    assert isinstance(block["a"].qkv, FusedProjections)
    assert isinstance(block["b"], PackedProjections)
    assert {type(block.get_submodule(p)) for p in ("a.qkv.q", "b.v")} == {RowSlice}
    undo.close()
    assert block["a"].qkv is fused
    assert block["b"] is packed


def test_a_packed_wrapper_shows_what_the_attention_has():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    wrapper = PackedProjections(attention)
    assert wrapper.batch_first is True
    assert wrapper.num_heads == 2
    assert wrapper.out_proj is attention.out_proj
    assert wrapper.in_proj_weight is attention.in_proj_weight
    with pytest.raises(AttributeError):
        wrapper.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_packed_wrapper_computes_the_attention(need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x, mask = torch.randn(2, 3, 4), torch.ones(3, 3).triu(1).bool()
    ours = PackedProjections(attention)(x, x, x, attn_mask=mask, need_weights=need_weights)
    theirs = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(ours[0], theirs[0])
    assert (ours[1] is None) == (theirs[1] is None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Fused(out=8), r"qkv fuses projections of different sizes \(4 to 8\)"),
        (Fused(name="query_key_value"), "query_key_value interleaves q, k and v by head"),
        (nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, kdim=3)}), "attn has keys and values of other sizes"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), r"no attention block.*\['0', '1'\]"),
    ],
)
def test_layouts_that_cannot_be_opened_are_errors(block, message):
    with pytest.raises(RecipeError, match=message):
        open_projections(block, "qv", ExitStack())
