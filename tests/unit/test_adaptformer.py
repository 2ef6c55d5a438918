"""AdaptFormer and CosineHead: by hand, at first, over a fit and from a checkpoint."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_recipes.callbacks import PEGO, AdaptFormer, CosineHead, LogitAdjustment, ProgressiveUnfreezing
from lightning_recipes.callbacks.robustness.adaptformer import bottleneck_width
from lightning_recipes.callbacks.robustness.cosine_head import CosineLinear, class_means, cosine_logits, text_weights
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import DigitsDataModule, LongTailedDataModule
from lightning_recipes.modules import ImageClassifier
from lightning_recipes.modules.adapted_block import AdaptedBlock, ParallelAdapter
from tests.stock import Classifier, Watch, loader, quiet, same, weights

WIDTH, DEPTH = 16, 2


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "in_chans": 1}
    return timm.create_model("vit_tiny_patch16_224", **{**settings, "num_classes": 3, **arguments})


X, Y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def stock(net: nn.Module | None = None) -> Classifier:
    return Classifier(vit() if net is None else net, adam)


def fitted(module: Classifier, *callbacks: Any, **kwargs: Any) -> Any:
    trainer = quiet(callbacks=list(callbacks), **{"max_epochs": 2, **kwargs})
    trainer.fit(module, loader(X, Y))
    return trainer


# -- the branch --------------------------------------------------------------------------------------------------------


def test_the_width_of_the_card() -> None:
    assert [bottleneck_width(c, layers) for c, layers in ((1000, 12), (100, 12), (8142, 12), (10, 12), (1000, 24))] == [
        32,
        4,
        256,
        1,
        16,
    ]


def test_the_branch_starts_as_the_card_says_and_computes_it() -> None:
    torch.manual_seed(0)
    branch = ParallelAdapter(6, 400, torch.zeros(()))
    assert branch.down.weight.std().item() == pytest.approx(
        math.sqrt(2 / (6 * 6)), rel=0.05
    )  # gain^2 = 2 / (1 + 5), fan 6
    assert not any(p.any() for p in (branch.up.weight, branch.up.bias, branch.down.bias)) and branch.scale.item() == 1
    z = torch.randn(2, 3, 6)
    assert not branch(z).any()
    with torch.no_grad():
        branch.up.weight.normal_()
        branch.scale.fill_(0.5)
    normed = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    by_hand = 0.5 * torch.relu(normed @ branch.down.weight.T) @ branch.up.weight.T
    assert torch.allclose(branch(z), by_hand, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1, "drop_path_rate": 0.5}])
def test_a_block_adds_the_branch_of_the_residual_stream_outside_layer_scale_and_drop_path(arguments: Any) -> None:
    net = vit(**arguments)
    block, tokens = net.blocks[1].eval(), torch.randn(2, 5, WIDTH)
    plain = block(tokens)
    block.adapter = ParallelAdapter(WIDTH, 4, tokens)
    block.__class__ = AdaptedBlock
    assert torch.equal(block(tokens), plain)
    with torch.no_grad():
        block.adapter.up.weight.normal_()
    z = tokens + block.ls1(block.attn(block.norm1(tokens)))
    assert torch.allclose(block(tokens), plain + block.adapter(z), atol=1e-5)


def outputs_at_the_start(*callbacks: Any, net: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Before the fit, and as it begins."""
    module, at_first = stock(net), []
    before = module.net.eval()(X)
    module.net.train()
    look = Watch(on_train_start=lambda trainer, m: at_first.append(m.net(X).detach()))
    fitted(module, *callbacks, look, max_epochs=1, limit_train_batches=1)
    return before, at_first[0]


def test_at_first_the_outputs_are_bitwise_the_stock_modules() -> None:
    before, at_first = outputs_at_the_start(AdaptFormer(4))
    assert torch.equal(before, at_first)


def test_only_branches_and_head_train_and_the_rest_is_as_it_was() -> None:
    module = stock()
    start, flags = weights(module), {}

    def look(trainer: Any, m: Any) -> None:
        flags.update({name: p.requires_grad for name, p in m.named_parameters()})

    trainer = fitted(module, AdaptFormer(4), Watch(on_train_start=look))
    new = {name for name in flags if ".adapter." in name}
    assert new == {name for name in module.state_dict() if name not in start} and len(new) == 7 * DEPTH
    assert {name for name, flag in flags.items() if flag} == new | {"net.head.weight", "net.head.bias"}
    end = weights(module)
    assert all(torch.equal(end[name], start[name]) for name in start if "head" not in name)
    assert not torch.equal(end["net.head.weight"], start["net.head.weight"])
    assert all(end[f"net.blocks.{i}.adapter.up.weight"].any() for i in range(DEPTH))
    count = DEPTH * (2 * 4 * WIDTH + 4 + 3 * WIDTH + 1) + 3 * WIDTH + 3
    assert trainer.callback_metrics["adapt_former/trainable"].item() == count
    assert all(p.requires_grad for p in module.parameters())  # the user's own flags


def test_what_was_fitted_stays_and_its_outputs_do_not_change_when_the_fit_closes() -> None:
    module, last = stock(), []
    look = Watch(on_train_end=lambda trainer, m: last.append(m.net.eval()(X).detach()))
    fitted(module, AdaptFormer(4), look)
    assert torch.equal(module.net.eval()(X), last[0])
    assert not torch.allclose(last[0], vit().eval()(X))
    assert type(module.net.blocks[0]) is AdaptedBlock
    twin = copy.deepcopy(module.net)
    buffer = io.BytesIO()
    torch.save(module.net, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), last[0])
    vit().load_state_dict({k: v for k, v in module.net.state_dict().items() if ".adapter." not in k})  # stock names


def test_the_branches_are_chosen_by_the_seed_and_leave_the_random_state_alone() -> None:
    def first(seed: int) -> tuple[Tensor, float]:
        module, draws = stock(), []
        torch.manual_seed(7)
        watch = Watch(on_train_start=lambda *_: draws.append(torch.rand(()).item()))
        fitted(module, AdaptFormer(4, seed=seed), watch, max_steps=1)
        return module.net.blocks[0].adapter.norm.weight, draws[0]

    module, draws = stock(), []
    torch.manual_seed(7)
    fitted(module, Watch(on_train_start=lambda *_: draws.append(torch.rand(()).item())), max_steps=1)
    assert draws[0] == first(0)[1] == first(1)[1]

    downs = []
    for seed in (0, 0, 1):
        module = stock()
        look = Watch(on_train_start=lambda t, m: downs.append(m.net.blocks[1].adapter.down.weight.detach().clone()))
        fitted(module, AdaptFormer(4, seed=seed), look, max_steps=1)
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


def test_some_blocks_only_and_the_width_by_rule() -> None:
    module = stock(vit(num_classes=40))
    fitted(module, AdaptFormer(blocks=[1]), limit_train_batches=1)
    assert type(module.net.blocks[0]) is not AdaptedBlock
    assert module.net.blocks[1].adapter.down.out_features == 8  # 2^floor(log2(40 / 4))
    module = stock()
    fitted(module, AdaptFormer(num_classes=100), limit_train_batches=1)
    assert module.net.blocks[1].adapter.down.out_features == 16


def test_a_second_fit_trains_the_branches_on() -> None:
    module = stock()
    fitted(module, AdaptFormer(4))
    between = weights(module)
    fitted(module, AdaptFormer(4))
    end = weights(module)
    assert end.keys() == between.keys()
    changed = {name for name in end if not torch.equal(end[name], between[name])}
    assert changed == {name for name in end if ".adapter." in name or "head" in name}
    with pytest.raises(
        RecipeError, match=r"already carries AdaptFormer branches of width \[4\] in blocks \[0, 1\], and"
    ):
        fitted(module, AdaptFormer(8))
    assert same(weights(module), end)


@pytest.mark.parametrize(
    "recipes", [lambda: [AdaptFormer(4)], lambda: [CosineHead()], lambda: [AdaptFormer(4), CosineHead()]]
)
def test_a_checkpoint_gives_the_same_predictions_in_a_fresh_module(recipes: Callable, tmp_path: Path) -> None:
    class Predicts(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=2, save_top_k=-1)
    module = Predicts(vit(), adam)
    fitted(module, *recipes(), keep, max_epochs=1, enable_checkpointing=True)
    fresh = Predicts(vit(), adam)
    found = quiet(callbacks=recipes()).predict(fresh, loader(X, Y), ckpt_path=tmp_path / "last.ckpt")
    assert torch.allclose(torch.cat(found), module.net.eval()(X), atol=1e-6)
    assert fresh.state_dict().keys() == stock().state_dict().keys()  # stock again
    kept = quiet(callbacks=recipes()).predict(module, loader(X, Y), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(torch.cat(kept), torch.cat(found))


@pytest.mark.parametrize("other", [lambda: PEGO(2, 2), lambda: ProgressiveUnfreezing(at=(0, 1, 1))])
def test_beside_other_recipes_both_train(other: Callable) -> None:
    module = stock()
    start = weights(module)
    fitted(module, AdaptFormer(4), other(), max_epochs=3)
    end = weights(module)
    assert all(end[f"net.blocks.{i}.adapter.up.weight"].any() for i in range(DEPTH))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    own = {"net.head.weight", "net.head.bias"}
    lora = {f"net.blocks.{i}.attn.qkv.weight" for i in range(DEPTH)} if isinstance(other(), PEGO) else set()
    assert moved == own | lora


def test_bad_uses_of_adaptformer() -> None:
    for arguments, says in (
        ({"bottleneck": 0}, "bottleneck must be None or at least 1; got 0"),
        ({"num_classes": 1}, "num_classes must be None or at least 2; got 1"),
        ({"blocks": []}, r"blocks must be None or at least one index of a block, each once; got \[\]"),
        ({"blocks": [1, 1]}, r"blocks must be None or .* each once; got \[1, 1\]"),
        ({"train_fully": "head"}, "train_fully must be a list of names; got 'head'"),
    ):
        with pytest.raises(RecipeError, match=f"AdaptFormer: {says}"):
            AdaptFormer(**arguments)
    for module, recipe, says in (
        (Classifier(), AdaptFormer(4), "needs a vision transformer of timm, .* the module's blocks are none"),
        (stock(), AdaptFormer(4, blocks=[0, 2]), "blocks must be indices from 0 to 1; got 2"),
        (stock(), AdaptFormer(4, train_fully=["top"]), "train_fully: 'top' matches no parameter"),
    ):
        before = weights(module)
        with pytest.raises(RecipeError, match=f"AdaptFormer: {says}"):
            fitted(module, recipe)
        assert same(weights(module), before)


# -- the cosine head ---------------------------------------------------------------------------------------------------


def test_cosines_by_hand() -> None:
    h, w = torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([[1.0, 0.0], [0.0, 7.0], [-1.0, -1.0]])
    expected = torch.tensor([[0.6, 0.8, -1.4 / math.sqrt(2)], [0.0, -1.0, 1 / math.sqrt(2)]])
    assert torch.allclose(cosine_logits(h, w, 1.0), expected, atol=1e-6)
    assert torch.allclose(cosine_logits(5 * h, 0.1 * w, 25.0), 25 * expected, atol=1e-5)


def test_class_means_are_normalised_and_a_class_without_samples_keeps_its_own() -> None:
    features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    means = class_means(features, torch.tensor([0, 0, 1, 1]), torch.tensor([[9.0, 9.0], [9.0, 9.0], [0.0, -5.0]]))
    half = math.sqrt(0.5)
    assert torch.allclose(means, torch.tensor([[1.0, 0.0], [half, half], [0.0, -1.0]]))


def test_text_goes_back_through_the_visual_projection() -> None:
    """P = [[1, 0], [0, 2], [0, 0]]; t = (0, 5), (3, 4): P (0, 1) = (0, 2, 0), P (.6, .8) = (.6, 1.6, 0)."""
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    w = text_weights(torch.tensor([[0.0, 5.0], [3.0, 4.0]]), p)
    norm = math.hypot(0.6, 1.6)
    assert torch.allclose(w, torch.tensor([[0.0, 1.0, 0.0], [0.6 / norm, 1.6 / norm, 0.0]]))
    assert torch.allclose(text_weights(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def head_at_the_start(recipe: CosineHead, module: Classifier | None = None) -> tuple[Tensor, Tensor, nn.Module]:
    """The head's weight and the outputs as the fit begins."""
    module, seen = module or stock(), []
    look = Watch(on_train_start=lambda t, m: seen.append((m.net.head.weight.detach().clone(), m.net(X).detach())))
    fitted(module, recipe, look, max_epochs=1, limit_train_batches=1)
    return *seen[0], module.net


def features(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval().forward_head(net.forward_features(X), pre_logits=True)


def test_keep_takes_the_heads_own_weights() -> None:
    net = vit()
    expected = 25 * F.normalize(features(net)) @ F.normalize(net.head.weight.detach()).T
    weight, logits, fitted_net = head_at_the_start(CosineHead())
    assert torch.equal(weight, net.head.weight) and torch.allclose(logits, expected, atol=1e-5)
    assert type(fitted_net.head) is CosineLinear and fitted_net.head.bias is None
    assert fitted_net.state_dict().keys() == net.state_dict().keys() - {"head.bias"}


def test_class_means_are_those_of_the_training_set_in_eval_mode() -> None:
    h = features(vit())
    expected = F.normalize(torch.stack([h[c == Y].mean(0) for c in range(3)]))
    weight, *_ = head_at_the_start(CosineHead(init="class_mean"), stock(vit(drop_path_rate=0.5, proj_drop_rate=0.5)))
    assert torch.allclose(weight, expected, atol=1e-5)


def test_class_means_leave_augmentation_out_where_the_data_can() -> None:
    class Black:
        def __call__(self, image: Tensor) -> Tensor:
            return torch.zeros_like(image)

    data = LongTailedDataModule(
        DigitsDataModule(train_transform=Black()), imbalance_ratio=10, largest=20, batch_size=200
    )
    module, seen = ImageClassifier(vit(num_classes=10)), []
    look = Watch(on_train_start=lambda t, m: seen.append(m.net.head.weight.detach().clone()))
    quiet(callbacks=[CosineHead(init="class_mean"), look], limit_val_batches=0).fit(module, datamodule=data)
    assert not next(iter(data.train_dataloader()))[0].any()
    assert (seen[0] - seen[0][0]).abs().max() > 0.01  # black images would give all classes one mean


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", None])
@pytest.mark.parametrize("projected", [True, False])
def test_text_features_from_a_file_or_a_tensor(suffix: str | None, projected: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 6 if projected else WIDTH, generator=generator)
    projection = torch.randn(WIDTH, 6, generator=generator) if projected else None
    expected = text_weights(text, projection)
    held = {"text": text} | ({"projection": projection} if projected else {})
    if suffix == ".pt":
        torch.save(held, tmp_path / "text.pt")
    elif suffix:
        save_file(held, tmp_path / "text.safetensors")
    given: Any = expected if suffix is None else str(tmp_path / f"text{suffix}")
    weight, *_ = head_at_the_start(CosineHead(init="text", text=given))
    assert torch.allclose(weight, expected, atol=1e-6)


def test_it_trains_with_the_rest_of_the_module_and_beside_adaptformer() -> None:
    module = stock()
    start = weights(module)
    fitted(module, CosineHead(), LogitAdjustment())
    end = weights(module)
    assert all(not torch.equal(end[name], start[name]) for name in end if name.endswith("weight"))
    module = stock()
    fitted(module, AdaptFormer(4), CosineHead(init="class_mean"))
    end = weights(module)
    assert {n for n in start.keys() & end.keys() if not torch.equal(start[n], end[n])} == {"net.head.weight"}
    module = stock()
    fitted(module, CosineHead(init="class_mean"), AdaptFormer(4))
    assert same(weights(module), end)


def test_a_resume_takes_the_checkpoints_weights_not_the_first_ones(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=2, save_top_k=-1)
    fitted(stock(), CosineHead(init="class_mean"), keep, max_epochs=1, enable_checkpointing=True)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["net.head.weight"]
    seen = []
    look = Watch(on_train_start=lambda t, m: seen.append(m.net.head.weight.detach().clone()))
    quiet(callbacks=[CosineHead(init="class_mean"), look], max_epochs=2).fit(
        stock(), loader(X, Y), ckpt_path=tmp_path / "last.ckpt"
    )
    assert torch.equal(seen[0], held)


def test_bad_uses_of_the_cosine_head(tmp_path: Path) -> None:
    for arguments, says in (
        ({"scale": 0}, "scale must be positive; got 0"),
        ({"init": "mean"}, "init must be 'keep', 'class_mean' or 'text'; got 'mean'"),
        ({"init": "text"}, "text must be given with init='text' and only then; got None"),
        ({"text": "a.pt"}, "text must be given with init='text' and only then; got 'a.pt'"),
    ):
        with pytest.raises(RecipeError, match=f"CosineHead: {says}"):
            CosineHead(**arguments)
    torch.save({"image": torch.rand(3, WIDTH)}, tmp_path / "image.pt")
    for recipe, says in (
        (CosineHead(init="text", text=str(tmp_path / "no.pt")), "there is no such file"),
        (CosineHead(init="text", text=str(tmp_path / "image.pt")), r"under 'text' .*; it holds \['image'\]"),
        (
            CosineHead(init="text", text=torch.rand(3, 6)),
            r"class weights \[3, 6\] and the head net\.head takes \[3, 16\] .* need its 'projection'",
        ),
        (CosineHead(head="net.blocks.0.norm1"), "is a LayerNorm and no linear layer"),
    ):
        module = stock()
        with pytest.raises(RecipeError, match=f"CosineHead: .*{says}"):
            fitted(module, recipe)
        assert type(module.net.head) is nn.Linear and module.net.head.bias is not None
