"""The products of a run: `export/` with the PRM and `instance_weights.parquet`."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerBase

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm import layout
from dreamprm_dist.prm.chat import CHAT_TEMPLATE
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.tiling import IMAGENET_MEAN, IMAGENET_STD
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.model_card import model_card

INSTANCE_WEIGHTS = "instance_weights.parquet"


def export_prm(
    folder: Path, prm: PRM, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> None:
    """Write the PRM as a Hugging Face folder that loads again without torchvision."""
    save_model(folder, prm, tokenizer)
    (folder / "README.md").write_text(model_card(config.as_dict()), encoding="utf-8")


def save_model(
    folder: Path, prm: PRM, tokenizer: PreTrainedTokenizerBase, original: bool = False
) -> None:
    """Write model, tokenizer with chat template and image processor; weights as safetensors.

    Args:
        original: in the layout of `InternVLChatModel` instead of transformers' own.
    """
    if original:
        layout.save_original(folder, prm.model.config, prm.model.state_dict())
    else:
        prm.model.save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    # The Pil backend: the stock processor of InternVL also wants a video processor, and that
    # torchvision.
    GotOcr2ImageProcessorPil(
        size={"height": prm.tile_size, "width": prm.tile_size},
        crop_to_patches=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(folder)


def export_weights(folder: Path, shards: ShardFolder, raw_weights: Tensor, weights: Tensor) -> None:
    """Write `instance_weights.parquet`: a row per instance in the order of sample IDs.

    Args:
        raw_weights, weights: (instances,) float32.
    """
    source_ids: list[str] = [""] * shards.num_rows
    for shard in range(shards.num_shards):
        source_ids[shard :: shards.num_shards] = shards.read_column(shard, "source_id")
    table = pa.table(
        {
            "sample_id": pa.array(range(shards.num_rows), pa.int64()),
            "source_id": pa.array(source_ids, pa.string()),
            "raw_weight": raw_weights.numpy(),
            "weight": weights.numpy(),
        }
    )
    pq.write_table(table, folder / INSTANCE_WEIGHTS)
