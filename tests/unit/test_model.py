"""A loaded PRM is one function, whatever its config asks for."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamprm_dist.prm.batch import Batch, InputFormat, collate, encode_instance
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer


@pytest.fixture
def prm(tiny_prm_dir: Path) -> PRM:
    config = json.loads((tiny_prm_dir / "config.json").read_text())
    assert config["text_config"]["attention_dropout"] > 0
    assert config["vision_config"]["hidden_dropout_prob"] > 0
    return load_prm(str(tiny_prm_dir), "fp32").train()


@pytest.fixture
def batch(tiny_prm_dir: Path, tiny_data_dir: Path, prm: PRM) -> Batch:
    """A few instances with their images."""
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
    records = json.loads((tiny_data_dir / "train.json").read_text())[:4]
    instances = [
        encode_instance(
            record["conversations"],
            [(tiny_data_dir / record["image"]).read_bytes()],
            tokenizer,
            format,
        )
        for record in records
    ]
    return collate(instances, tokenizer.pad_token_id)


def two_passes(prm: PRM, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return prm(batch).logits, prm(batch).logits


def test_passes_in_train_mode_are_the_same(prm: PRM, batch: Batch):
    first, second = two_passes(prm, batch)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["language attention", "vision attention", "modules"])
def test_any_dropout_would_show(prm: PRM, batch: Batch, kind: str):
    network = prm.model.model
    places = {
        "language attention": [
            (layer.self_attn, "attention_dropout") for layer in network.language_model.layers
        ],
        "vision attention": [
            (layer.attention, "attention_dropout") for layer in network.vision_tower.encoder.layer
        ],
        "modules": [(m, "p") for m in network.modules() if isinstance(m, nn.Dropout)],
    }[kind]
    assert places
    for module, name in places:
        assert getattr(module, name) == 0
        setattr(module, name, 0.1)
    first, second = two_passes(prm, batch)
    assert not torch.equal(first, second)
