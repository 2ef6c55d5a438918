"""InsertAttention: what it puts where, that a stock network begins as it was, and what is kept and decays."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_recipes.callbacks import InsertAttention, WiSEFT
from lightning_recipes.callbacks.adapters.insert_attention import inserted, remove_attention
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.modules import BalancedNet, CifarResNet, SmallCNN
from lightning_recipes.modules.balanced_attention import InsertedAttention
from tests.stock import Classifier, Watch, loader, quiet, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*channels are fewer than")
X = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def fit(module: Any, *callbacks: Any, **kwargs: Any) -> Any:
    trainer = quiet(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, loader(X, Y))
    return trainer


def made(net: Any, **arguments: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(net() if callable(net) and not isinstance(net, nn.Module) else net, **arguments)


def resnet() -> nn.Module:
    return CifarResNet(8, 3)


NETWORKS = {
    "residual": (resnet, [f"net.layer{i}.0.bn2" for i in (1, 2, 3)], [16, 32, 64]),
    "torchvision": (
        lambda: torchvision.models.resnet18(num_classes=3),
        [f"net.layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)],
        [64, 64, 128, 128, 256, 256, 512, 512],
    ),
    "timm": (
        lambda: timm.create_model("resnet26", num_classes=3, channels=(8, 8, 8, 8)),
        [f"net.layer{i}.{j}.bn3" for i in (1, 2, 3, 4) for j in (0, 1)],
        [32] * 8,
    ),
    "plain": (lambda: SmallCNN(3, 3, 8), ["net.stages.0.3", "net.stages.1.3", "net.stages.2.2"], [8, 16, 32]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["balanced", "se"])
def test_a_block_stands_at_the_end_of_every_residual_block_or_stage(name: str, kind: Any) -> None:
    net, paths, channels = NETWORKS[name]
    module = made(net)
    keys = list(module.state_dict())
    fit(module, InsertAttention(kind=kind), limit_train_batches=1)
    assert list(inserted(module)) == paths
    assert [module.get_submodule(path).attention.channels for path in paths] == channels
    new = [key for key in module.state_dict() if key not in keys]
    assert [key for key in module.state_dict() if key in keys] == keys, "stock keys stay, in their order"
    assert all(any(key.startswith(f"{path}.attention.") for path in paths) for key in new)
    assert remove_attention(module) == paths
    assert list(module.state_dict()) == keys
    assert not any(part._forward_hooks for part in module.modules())


def test_a_pre_trained_network_is_bitwise_what_it_was_at_first_and_the_papers_is_not() -> None:
    outputs = {}

    def look(trainer: Any, module: Any) -> None:
        module.eval()
        outputs[module.net.layer1[0].bn2.attention.g is None] = module(X)
        module.train()

    for identity_init in (True, False):
        module = made(resnet)
        plain = module.eval()(X)
        fit(module.train(), InsertAttention(identity_init=identity_init), Watch(on_train_start=look))
    assert torch.equal(outputs[False], plain)
    assert not torch.allclose(outputs[True], plain, atol=1e-3)


def test_first_values_are_the_codes_and_come_from_the_seed_alone() -> None:
    starts = []

    def keep(trainer: Any, module: Any) -> None:
        starts.append({k: v.clone() for k, v in module.state_dict().items() if ".attention." in k})

    for seed, other in ((0, 1), (0, 2), (1, 1)):
        module = made(resnet)
        torch.manual_seed(other)
        before = torch.get_rng_state()
        fit(module, InsertAttention(seed=seed), Watch(on_fit_start=keep), limit_train_batches=0)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(starts[0], starts[1]) and not same(starts[0], starts[2])
    squeeze = starts[0]["net.layer3.0.bn2.attention.attention.se.squeeze.weight"]
    assert squeeze.std().item() == pytest.approx(0.01, rel=0.15)
    assert starts[0]["net.layer1.0.bn2.attention.attention.theta"] == 0.5


@pytest.mark.parametrize("decay_alpha", [False, True])
def test_theta_decays_only_where_that_is_asked_for(decay_alpha: bool) -> None:
    """At the identity theta has no gradient, so that all that moves it is decay: (1 - 0.1 * 0.5) a step."""

    def optimizer(parameters: Any) -> Any:
        return torch.optim.AdamW([{"params": list(parameters)}], lr=0.1, weight_decay=0.5)

    module = made(resnet, optimizer=optimizer)
    with_g = InsertAttention(decay_alpha=decay_alpha)

    def hold(*args: Any) -> None:
        for path in inserted(module):
            module.get_submodule(path).attention.g.data.zero_()

    run = fit(module, with_g, Watch(on_train_batch_start=hold))
    thetas = [module.get_submodule(path).attention.attention.theta.item() for path in inserted(module)]
    assert thetas == pytest.approx([0.5 * (0.95**4 if decay_alpha else 1)] * 3, rel=1e-5)
    assert run.callback_metrics["attention/theta_grad"] == 0
    assert run.callback_metrics["attention/alpha_mean"].item() == pytest.approx(
        torch.tensor(thetas).sigmoid()[0].item()
    )
    assert {"attention/alpha/net.layer1.0.bn2", "attention/g_mean"} <= run.callback_metrics.keys()


def test_an_optimizer_whose_parameters_are_listed_by_hand_adopts_the_blocks() -> None:
    class ByHand(Classifier):
        def configure_optimizers(self) -> Any:
            named = [p for n, p in self.net.named_parameters() if ".attention." not in n]
            return torch.optim.SGD(named, lr=0.1)

    module = ByHand(resnet())
    fit(module, InsertAttention(identity_init=False))
    assert module.net.layer3[0].bn2.attention.attention.theta != 0.5


def test_blocks_that_were_kept_train_on_and_others_are_refused() -> None:
    module = made(resnet)
    fit(module, InsertAttention())
    blocks = [part for part in module.modules() if isinstance(part, InsertedAttention)]
    fit(module, InsertAttention())
    assert [part for part in module.modules() if isinstance(part, InsertedAttention)] == blocks
    before = weights(module)
    with pytest.raises(
        RecipeError, match=r"carries other attention blocks from an earlier fit .* use its arguments, or"
    ):
        fit(module, InsertAttention(kind="se"))
    with pytest.raises(RecipeError, match="carries other attention blocks"):
        fit(module, InsertAttention(after=["layer1.0.bn2"]))
    assert same(before, weights(module))


def test_a_checkpoint_is_tested_with_the_recipe_and_refused_for_a_resume_without_it(tmp_path: Path) -> None:
    module = made(resnet)
    keep = ModelCheckpoint(tmp_path, "last")
    quiet(callbacks=[InsertAttention(), keep], enable_checkpointing=True, max_epochs=2).fit(
        module, loader(X, Y), loader(X, Y)
    )
    path = str(tmp_path / "last.ckpt")
    saved = torch.load(path, weights_only=True)
    table = saved["callbacks"]["InsertAttention"]["structure"]["spec"]["after"]
    assert table == ["net.layer1.0.bn2", "net.layer2.0.bn2", "net.layer3.0.bn2"]
    fresh = made(resnet)
    keys = list(fresh.state_dict())
    (found,) = quiet(callbacks=[InsertAttention()]).validate(fresh, loader(X, Y), ckpt_path=path, verbose=False)
    (expected,) = quiet().validate(module, loader(X, Y), verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)
    assert list(fresh.state_dict()) == keys, "an evaluation leaves nothing"
    with pytest.raises(RecipeError, match="holds the attention blocks of InsertAttention, which is not among"):
        quiet(max_epochs=3, callbacks=[WiSEFT()]).fit(made(resnet), loader(X, Y), ckpt_path=path)


def test_a_copy_in_mid_fit_attends_with_its_own_blocks() -> None:
    twins: list[nn.Module] = []
    module = made(resnet)
    fit(module, InsertAttention(), Watch(on_train_batch_end=lambda t, m, *a: twins.append(copy.deepcopy(m.net))))
    twin = twins[-1].eval()
    with torch.no_grad():
        assert torch.equal(twin(X), module.net.eval()(X))
        twin.layer1[0].bn2.attention.g.fill_(5.0)
        assert not torch.equal(twin(X), module.net(X))


def test_in_half_precision_and_channels_last() -> None:
    module = made(resnet)
    module.net.to(memory_format=torch.channels_last)
    fit(module, InsertAttention(identity_init=False), precision="bf16-true")
    block = module.net.layer1[0].bn2.attention
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_places_can_be_named_and_what_gives_no_maps_is_said() -> None:
    module = made(lambda: SmallCNN(3, 3, 8))
    fit(module, InsertAttention(after=["stages.1", "net.stages.0.1"]), limit_train_batches=1)
    assert list(inserted(module)) == ["net.stages.0.1", "net.stages.1.3"]
    with pytest.raises(
        RecipeError, match=r"net\.head gives \[4, 3\] where maps \[n, 32, height, width\] were expected"
    ):
        fit(made(lambda: SmallCNN(3, 3, 8)), InsertAttention(after=["head"]))
    with pytest.raises(RecipeError, match=r"'stages\.9' is no part of Classifier"):
        fit(made(lambda: SmallCNN(3, 3, 8)), InsertAttention(after=["stages.9"]))


def test_a_transformer_and_a_network_with_attention_of_its_own_are_refused() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=2)
    with pytest.raises(RecipeError, match=r"found no feature maps in Classifier: no residual blocks .* with after="):
        fit(made(vit), InsertAttention())
    with warnings.catch_warnings(), pytest.raises(RecipeError, match="balanced attention of its own, the first at net"):
        warnings.simplefilter("ignore")
        fit(made(BalancedNet(3, 3, (8,), (1,))), InsertAttention())
