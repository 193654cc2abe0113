"""Models with the shapes that the tiny one lacks."""

from pathlib import Path

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from dreamprm_dist.prm.model import PRM, load_tokenizer
from dreamprm_dist.training.export import save_model


def widened(folder: Path, tiny: Path, vocab_size: int) -> Path:
    """The tiny model with InternVL3-1B's heads: 14 and 2 of 64, in the vision tower 64 wide too.

    Embeddings and head are two matrices.
    """
    config = InternVLConfig.from_pretrained(tiny).to_dict()
    config["tie_word_embeddings"] = False
    config["text_config"] |= {
        **{"hidden_size": 896, "intermediate_size": 1024, "vocab_size": vocab_size},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 2},
        "layer_types": None,
        "initializer_range": 0.02,
    }
    config["vision_config"] |= {"hidden_size": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(InternVLConfig.from_dict(config))
    save_model(folder, PRM(model), load_tokenizer(str(tiny)))
    return folder


@pytest.fixture(scope="session")
def wide_prm_dir(tmp_path_factory: pytest.TempPathFactory, tiny_prm_dir: Path) -> Path:
    return widened(tmp_path_factory.mktemp("wide"), tiny_prm_dir, vocab_size=512)


@pytest.fixture(scope="session")
def large_prm_dir(tmp_path_factory: pytest.TempPathFactory, tiny_prm_dir: Path) -> Path:
    """Embeddings and head have 53.8 M parameters each, more than `reduce_bucket_size`."""
    return widened(tmp_path_factory.mktemp("large"), tiny_prm_dir, vocab_size=60_000)
