"""The products of a run: `export/` with the PRM, and weights and losses of its instances."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerBase

from dreamprm_dist.data.instance_values import source_ids_of
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm import layout
from dreamprm_dist.prm.chat import CHAT_TEMPLATE, IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.model_folder import CARD
from dreamprm_dist.prm.tiling import IMAGENET_MEAN, IMAGENET_STD
from dreamprm_dist.training.model_card import ModelCard

INSTANCE_WEIGHTS, INSTANCE_LOSSES = "instance_weights.parquet", "instance_losses.parquet"
# By what names transformers' processor of InternVL knows the chat format's tokens. It wants one of
# videos too: a word of its own would be one more than the model has embeddings, and no text that
# the processor is given holds the end of an image.
PROCESSOR_TOKENS = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": IMAGE_END,
}


def export_prm(
    folder: Path,
    prm: PRM,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    original: bool = False,
) -> None:
    """Write the PRM as a folder that loads again without torchvision; see `save_model`."""
    save_model(folder, prm, tokenizer, original)
    text = card.text("original" if original else "transformers")
    (folder / CARD).write_text(text, encoding="utf-8")


def save_model(
    folder: Path, prm: PRM, tokenizer: PreTrainedTokenizerBase, original: bool = False
) -> None:
    """Write model, tokenizer with chat template and image processor; weights as safetensors.

    Args:
        original: in the layout of `InternVLChatModel` instead of transformers' own.

    Raises:
        InputError: as `layout.to_original_config`.
    """
    if original:
        layout.save_original(folder, prm.model.config, prm.model.state_dict())
    else:
        prm.model.save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    tokenizer_config = folder / "tokenizer_config.json"
    held = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    named = PROCESSOR_TOKENS | held.get("model_specific_special_tokens", {})
    _write_json(tokenizer_config, named | held | {"model_specific_special_tokens": named})
    # The Pil backend: the stock processor of InternVL also wants a video processor, and that
    # torchvision. Where there is one, it finds the rest here.
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": prm.tokens_per_tile}
    _write_json(folder / "processor_config.json", processor)
    GotOcr2ImageProcessorPil(
        size={"height": prm.tile_size, "width": prm.tile_size},
        crop_to_patches=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(folder)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def export_weights(folder: Path, shards: ShardFolder, raw_weights: Tensor, weights: Tensor) -> None:
    """Write `instance_weights.parquet`: a row per instance in the order of sample IDs.

    Args:
        raw_weights, weights: (instances,) float32.
    """
    columns = {"raw_weight": raw_weights.numpy(), "weight": weights.numpy()}
    _write_instances(folder / INSTANCE_WEIGHTS, shards, columns)


def export_losses(folder: Path, shards: ShardFolder, losses: Tensor) -> None:
    """Write `instance_losses.parquet`: a row per instance in the order of sample IDs.

    Args:
        losses: (instances,) float32; NaN, where no step is labelled, becomes null.
    """
    columns = {"loss": pa.array(losses.numpy(), from_pandas=True)}
    _write_instances(folder / INSTANCE_LOSSES, shards, columns)


def _write_instances(path: Path, shards: ShardFolder, columns: Mapping[str, Any]) -> None:
    ids = {
        "sample_id": pa.array(range(shards.num_rows), pa.int64()),
        "source_id": pa.array(source_ids_of(shards), pa.string()),
    }
    pq.write_table(pa.table({**ids, **columns}), path)
