"""Small networks with attention in every layout, and where the query and value projections stand in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config

from tests.stock import Classifier

D = 8  # width of every network here


class Encoder(nn.Module):
    """PyTorch's own encoder layers, whose eval mode takes a fused path that reads the packed weight itself."""

    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Tokens(LightningModule):
    """A Hugging Face classifier."""

    def __init__(self, config):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_config(config)

    def forward(self, x):
        return self.model(input_ids=x).logits

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def timm_vit():
    return Classifier(
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=4,
            embed_dim=D,
            depth=2,
            num_heads=2,
            num_classes=3,
        )
    )


def torchvision_vit():
    return Classifier(
        torchvision.models.VisionTransformer(
            image_size=8,
            patch_size=4,
            num_layers=2,
            num_heads=2,
            hidden_dim=D,
            mlp_dim=16,
            num_classes=3,
        )
    )


def bert():
    return Tokens(
        BertConfig(
            vocab_size=11,
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
    )


def gpt2():
    return Tokens(
        GPT2Config(vocab_size=11, n_positions=16, n_embd=D, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    )


def rows(name: str, transposed: bool = False) -> Callable[[nn.Module, str], Tensor]:
    """The rows of q or v in a weight of all three."""

    def find(block: nn.Module, role: str) -> Tensor:
        weight = block.get_parameter(name)
        return (weight.T if transposed else weight)[{"q": slice(0, D), "v": slice(2 * D, 3 * D)}[role]]

    return find


@dataclass
class Case:
    build: Callable[[], LightningModule]
    inputs: Callable[[], Tensor]
    blocks: list[str]
    projection: Callable[[nn.Module, str], Tensor]  # weight of q or v in a stock attention block, as a view
    adapted: dict[str, str]  # role to where in the block the adapted layer stands
    head: str


def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randint(1, 11, (3, 5), generator=torch.Generator().manual_seed(1))


def vectors():
    return torch.rand(3, 5, D, generator=torch.Generator().manual_seed(1))


CASES = {
    "timm vit": Case(
        timm_vit,
        images,
        [f"net.blocks.{i}.attn" for i in range(2)],
        rows("qkv.weight"),
        {"q": "qkv.q", "v": "qkv.v"},
        "net.head",
    ),
    "torchvision vit": Case(
        torchvision_vit,
        images,
        [f"net.encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)],
        rows("in_proj_weight"),
        {"q": "q", "v": "v"},
        "net.heads",
    ),
    "encoder layers": Case(
        lambda: Classifier(Encoder()),
        vectors,
        [f"net.encoder.layers.{i}.self_attn" for i in range(2)],
        rows("in_proj_weight"),
        {"q": "q", "v": "v"},
        "net.head",
    ),
    "pre-norm encoder layers": Case(
        lambda: Classifier(Encoder(norm_first=True)),
        vectors,
        [f"net.encoder.layers.{i}.self_attn" for i in range(2)],
        rows("in_proj_weight"),
        {"q": "q", "v": "v"},
        "net.head",
    ),
    "bert": Case(
        bert,
        tokens,
        [f"model.bert.encoder.layer.{i}.attention.self" for i in range(2)],
        lambda block, role: {"q": block.query, "v": block.value}[role].weight,
        {"q": "query", "v": "value"},
        "model.classifier",
    ),
    "gpt2": Case(
        gpt2,
        tokens,
        [f"model.transformer.h.{i}.attn" for i in range(2)],
        rows("c_attn.weight", transposed=True),
        {"q": "c_attn.q", "v": "c_attn.v"},
        "model.score",
    ),
}
