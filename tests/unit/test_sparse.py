"""Sparse parameters: a flat leaf in the place of the entries that train."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_recipes.core.averaging import Swap
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.sparse import Places, is_sparse, make_sparse
from tests.stock import Classifier, mlp, same, samples, weights

X, Y = samples(8)


def smallest(module, share=0.4, only=None):
    """Masks of the smallest entries of every parameter."""
    masks = {}
    for name, p in module.named_parameters():
        if only is None or name in only:
            threshold = p.detach().abs().flatten().sort().values[max(1, int(share * p.numel())) - 1]
            masks[name] = p.detach().abs() <= threshold
    return masks


def sparse(net=None, share=0.4, only=None):
    """A module with leaves, a stock copy of it, and the operation."""
    module = Classifier(net)
    stock = copy.deepcopy(module)
    masks = smallest(module, share, only)
    operation = make_sparse(module, masks, "spec")
    for leaf in operation.leaves.values():
        leaf.dense.requires_grad_(False)
    return module, stock, operation, masks


def gradients_agree(stock, operation, masks, atol=0.0):
    full = {name: p.grad for name, p in stock.named_parameters()}
    assert operation.leaves
    for name, leaf in operation.leaves.items():
        expected = leaf.places.flat(full[name])[leaf.places.flat(masks[name])]
        assert torch.allclose(leaf.values.grad, expected, atol=atol, rtol=0), name
        assert leaf.dense.grad is None


# -- gradients -------------------------------------------------------------------------------------------------------


def test_the_leafs_gradient_is_the_full_one_at_the_free_entries():
    module, stock, operation, masks = sparse()
    for net in (module, stock):
        F.cross_entropy(net(X), Y).backward()
    gradients_agree(stock, operation, masks)


def test_passes_before_a_backward_and_accumulated_ones_come_out_right():
    module, stock, operation, masks = sparse()
    for net in (module, stock):
        first, second = F.cross_entropy(net(X), Y), F.cross_entropy(net(2 * X), Y)
        second.backward()
        first.backward()
        F.cross_entropy(net(3 * X), Y).backward()
    gradients_agree(stock, operation, masks)


def test_a_leaf_that_changes_between_forward_and_backward_is_an_error_as_ever():
    module, _, operation, _ = sparse()
    loss = module(X).square().sum()
    with torch.no_grad():
        operation.leaves["net.2.weight"].values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_of_a_gradient_reaches_the_leaf():
    module, stock, operation, masks = sparse(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    for net in (module, stock):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (slope.square().sum() + net(x).sum()).backward()
    gradients_agree(stock, operation, masks, atol=1e-7)


def test_checkpointed_activations_see_the_leaf_again():
    module, stock, operation, masks = sparse()
    F.cross_entropy(checkpoint(module, X, use_reentrant=False), Y).backward()
    F.cross_entropy(stock(X), Y).backward()
    gradients_agree(stock, operation, masks)


def test_autocast_computes_in_bf16_and_gives_the_leaf_a_gradient_in_fp32():
    module, stock, operation, masks = sparse()
    for net in (module, stock):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(X)
            assert out.dtype == torch.bfloat16
            loss = F.cross_entropy(out, Y) + F.cross_entropy(net(2 * X), Y)
        loss.backward()
    assert all(leaf.values.grad.dtype == torch.float32 for leaf in operation.leaves.values())
    gradients_agree(stock, operation, masks, atol=5e-3)  # a stock weight's gradients add up in bf16


def test_compiled_whole_it_has_no_graph_break_and_the_same_gradients():
    module, stock, operation, masks = sparse()
    torch._dynamo.reset()
    compiled = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    F.cross_entropy(compiled(X), Y).backward()
    F.cross_entropy(stock(X), Y).backward()
    gradients_agree(stock, operation, masks, atol=1e-7)


class Every(nn.Module):
    """Parameters that are read in every way there is."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 4, (2, 3))
        self.scale = nn.Parameter(torch.linspace(-1, 1, 4))
        self.parts = nn.ParameterList([torch.ones(3), torch.arange(3.0)])
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words):
        x = self.norm(self.words(words))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        maps = self.conv(x[:, None]).mean((2, 3)) * self.scale
        return self.out(x).mean(1) + maps.sum(1, keepdim=True) + sum(self.parts).sum()


WORDS = torch.arange(10).view(2, 5) % 7


def test_every_way_of_reading_a_parameter_gives_its_leaf_the_gradient():
    torch.manual_seed(0)
    module, stock, operation, masks = sparse(Every())
    assert len(operation.leaves) == len(list(stock.parameters())) == 12  # the tied weight once
    for net in (module, stock):
        F.cross_entropy(net(WORDS), torch.tensor([1, 2])).backward()
    gradients_agree(stock, operation, masks, atol=1e-7)
    tied = operation.leaves["net.words.weight"]
    assert sum(values is tied.values for values in operation.made.values()) == 2
    assert sum(values is tied.values for values in module.parameters()) == 1
    assert torch.equal(module.net.out.weight, module.net.words.weight)


def test_sparse_gradients_of_an_embedding_are_taken_too():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4, sparse=True)
    module, stock, operation, masks = sparse(table)
    for net in (module, stock):
        net(torch.tensor([1, 2, 2])).square().sum().backward()
    stock.net.weight.grad = stock.net.weight.grad.to_dense()
    gradients_agree(stock, operation, masks)


def test_weights_in_channels_last_and_turned_ones_keep_their_memory():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    linear = nn.Linear(4, 5)
    linear.weight = nn.Parameter(torch.randn(4, 5).t())
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    module, stock, operation, masks = sparse(net)
    images = torch.randn(2, 3, 5, 5)
    for net in (module, stock):
        net(images).square().sum().backward()
    gradients_agree(stock, operation, masks, atol=1e-6)
    with torch.no_grad():
        for name, leaf in operation.leaves.items():
            leaf.values.add_(1)
            path, _, local = name.rpartition(".")
            read = getattr(module.get_submodule(path), local)
            assert torch.allclose(read, stock.get_parameter(name) + masks[name])
    assert module.net[0].weight.stride() == conv.weight.stride() == stock.net[0].weight.stride()
    operation.remove(merge=True)
    assert torch.allclose(module.net[3].weight, stock.net[3].weight + masks["net.3.weight"])
    assert torch.allclose(module.net[0].weight, stock.net[0].weight + masks["net.0.weight"])


# -- memory ----------------------------------------------------------------------------------------------------------


def live_bytes(job):
    """What a job leaves allocated, and the most that it had at once."""
    gc.collect()  # what an earlier profile saw allocated counts as freed here, whenever the collector comes to it
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = job()
    finally:
        gc.enable()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return live, peak


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_no_dense_gradient_outlives_its_layer(share):
    layers, width = 10, 128
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    module, stock, operation, _ = sparse(net, share)
    one, free = 4 * width * width, sum(4 * leaf.values.numel() for leaf in operation.leaves.values())
    found = {}
    for name, each in (("sparse", module), ("full", stock)):
        loss = each(torch.randn(2, width)).square().sum()
        found[name] = live_bytes(loss.backward)
    small = 4 * 2 * width * 4
    assert abs(found["sparse"][0] - free) <= small, "left are the gradients of the leaves"
    assert found["sparse"][1] <= free + 2 * one + small, "at no time more dense gradients than one layer's"
    assert found["full"][0] >= layers * one - small
    assert all(leaf.dense.grad is None for leaf in operation.leaves.values())


def test_the_forward_pass_makes_no_copy_of_the_weights():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(10)])
    module, _, operation, _ = sparse(net, 0.05)
    x = torch.randn(2, 128)
    _, peak = live_bytes(lambda: module(x))
    assert peak < 2 * 4 * 128 * 128, "activations, and one leaf's places in 64 bits at a time"
    assert module.net[0].weight.data_ptr() == operation.leaves["net.0.weight"].dense.data_ptr()


# -- what is stored --------------------------------------------------------------------------------------------------


def test_a_state_dict_is_the_stock_modules_with_the_leaves_written_in():
    module, stock, operation, masks = sparse()
    with torch.no_grad():
        for leaf in operation.leaves.values():
            leaf.values.add_(1)
    state = module.state_dict()
    assert list(state) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(state[name], torch.where(masks[name], value + 1, value))
    assert stock.load_state_dict(state).missing_keys == []


def test_loading_weights_fills_the_leaves():
    module, stock, operation, masks = sparse()
    other = {name: value + 2 for name, value in stock.state_dict().items()}
    result = module.load_state_dict(other)
    assert result.missing_keys == result.unexpected_keys == []
    for name, leaf in operation.leaves.items():
        assert torch.equal(leaf.values, other[name][masks[name]])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*net.0.weight"):
        module.load_state_dict({k: v for k, v in other.items() if k != "net.0.weight"})


def test_other_weights_for_a_while_act_on_the_free_entries_too_and_are_put_back_bit_for_bit():
    module, stock, operation, _ = sparse()
    with torch.no_grad():
        for leaf in operation.leaves.values():
            leaf.values.add_(1)
    before, own = module(X), {name: leaf.values.clone() for name, leaf in operation.leaves.items()}
    swap = Swap(module)
    swap.put(stock.state_dict(), lambda name, _: stock.state_dict()[name])
    assert torch.equal(module(X), stock(X)) and not torch.equal(module(X), before)
    swap.back()
    assert torch.equal(module(X), before)
    assert all(torch.equal(leaf.values, own[name]) for name, leaf in operation.leaves.items())


def test_it_moves_with_the_module():
    module, stock, operation, masks = sparse()
    module.double()
    stock.double()
    for net in (module, stock):
        F.cross_entropy(net(X.double()), Y).backward()
    gradients_agree(stock, operation, masks)
    leaf = operation.leaves["net.0.weight"]
    assert leaf.places.index.dtype == torch.int32
    module.to("meta")
    assert leaf.places.index.device.type == module.get_parameter("net.0.weight_free").device.type == "meta"


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_one_of_its_own_and_outlives_the_originals_removal(twin):
    module, stock, operation, masks = sparse(mlp())
    module.make_optimizer = None  # a lambda, which nothing can pickle
    other = twin(module)
    operation.remove(merge=True)
    assert not is_sparse(module) and is_sparse(other)
    F.cross_entropy(other(X), Y).backward()
    F.cross_entropy(stock(X), Y).backward()
    expected = stock.net[0].weight.grad[masks["net.0.weight"]]
    assert torch.equal(dict(other.named_parameters())["net.0.weight_free"].grad, expected)
    assert module.net[0].weight.grad is None


def test_removal_gives_back_the_same_parts_with_the_leaves_written_in():
    torch.manual_seed(0)
    net = Every()
    parts, parameters = [(m, type(m), set(vars(m))) for m in net.modules()], list(net.parameters())
    module, stock, operation, masks = sparse(net)
    assert type(net.norm) is not nn.LayerNorm and isinstance(net.norm, nn.LayerNorm)
    with torch.no_grad():
        for leaf in operation.leaves.values():
            leaf.values.mul_(3)
    operation.remove(merge=True)
    assert [(m, type(m), set(vars(m))) for m in net.modules()] == parts
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    expected = {name: torch.where(masks[name], 3 * p, p) for name, p in stock.named_parameters()}
    assert same(dict(module.named_parameters()), expected)


# -- the optimizer ---------------------------------------------------------------------------------------------------


def test_a_leaf_stands_where_the_users_rules_put_its_parameter():
    module, _, operation, _ = sparse(only=["net.0.weight", "net.0.bias", "net.4.weight"])
    leaf = {name: each.values for name, each in operation.leaves.items()}
    vectors = [p for p in module.parameters() if p.dim() < 2]
    matrices = [p for p in module.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    operation.take_places([optimizer])
    decayed, free = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert decayed == [id(leaf["net.0.weight"]), id(module.net[2].weight), id(leaf["net.4.weight"])]
    assert free == [id(leaf["net.0.bias"]), id(module.net[2].bias), id(module.net[4].bias)]
    F.cross_entropy(module(X), Y).backward()
    optimizer.step()
    assert optimizer.state[leaf["net.0.weight"]]["exp_avg"].shape == leaf["net.0.weight"].shape


def test_a_leaf_whose_parameter_is_in_no_optimizer_stays_where_it_was_adopted():
    module, _, operation, _ = sparse(only=["net.0.weight", "net.4.weight"])
    adopted = operation.leaves["net.0.weight"].values
    optimizer = torch.optim.SGD([adopted, *module.net[4].parameters()], lr=0.1)
    operation.take_places([optimizer])
    ids = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert ids == [id(adopted), id(operation.leaves["net.4.weight"].values), id(module.net[4].bias)]


# -- refusals --------------------------------------------------------------------------------------------------------


class Occupied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.weight_free = nn.Parameter(torch.ones(4)), None


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: nn.LSTM(4, 4), "net.weight_ih_l0 belongs to a LSTM, which reads its weights from a list of its own"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), "belongs to a scripted module, whose code is fixed"),
        (Occupied, "net.weight belongs to a Occupied that has a weight_free of its own"),
    ],
)
def test_what_cannot_be_held_this_way_is_refused_and_left_alone(net, message):
    module = Classifier(nn.Sequential(nn.Linear(4, 4), net()))
    before, kinds = weights(module), [type(part) for part in module.modules()]
    with pytest.raises(RecipeError, match=message.replace("net.", r"net\.1\.").replace("(", r"\(")):
        make_sparse(module, smallest(module), "spec")
    assert [type(part) for part in module.modules()] == kinds
    assert same(weights(module), before)
    assert not [name for name, _ in module.named_parameters() if name.endswith("_free")] or isinstance(net(), Occupied)


def test_a_second_time_is_refused():
    module, *_ = sparse()
    with pytest.raises(RecipeError, match="has sparse parameters already"):
        make_sparse(module, smallest(module, only=["net.0.weight"]), "spec")


def test_a_tensor_with_gaps_in_memory_is_refused():
    module = Classifier(nn.Linear(4, 4))
    module.net.weight = nn.Parameter(torch.ones(4, 8)[:, ::2])
    with pytest.raises(RecipeError, match=r"net\.weight overlaps itself or has gaps in memory; make it contiguous"):
        make_sparse(module, {"net.weight": torch.ones(4, 4, dtype=torch.bool)}, "spec")


def test_places_are_flat_positions_in_ascending_order():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    places = Places(torch.zeros(2, 3), mask)
    assert places.index.tolist() == [0, 2, 5] and places.order == ()
    turned = Places(torch.zeros(3, 2).t(), mask)
    assert turned.index.tolist() == [0, 4, 5] and turned.order == (1, 0)
    full = turned.filled(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 2).t())
    assert full.tolist() == [[1, 0, 2], [0, 0, 3]]
