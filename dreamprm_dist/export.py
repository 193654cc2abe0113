"""What a run leaves behind: `export/` with the PRM and `instance_weights.parquet`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerBase

from dreamprm_dist.config import TrainConfig
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.model import PRM

INSTANCE_WEIGHTS = "instance_weights.parquet"


@contextlib.contextmanager
def export_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends without an exception."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def export_prm(
    folder: Path, prm: PRM, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> None:
    """Write the PRM as a Hugging Face folder that loads again without torchvision."""
    prm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The Pil backend: the stock processor of InternVL also wants a video processor, and that
    # torchvision.
    try:
        processor = GotOcr2ImageProcessorPil.from_pretrained(config.model.reward_model)
    except OSError:
        size = {"height": prm.tile_size, "width": prm.tile_size}
        processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(_model_card(config), encoding="utf-8")


def export_weights(folder: Path, shards: ShardFolder, raw_weights: Tensor, weights: Tensor) -> None:
    """Write `instance_weights.parquet`: a row an instance in the order of sample IDs.

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


def _model_card(config: TrainConfig) -> str:
    settings = "\n".join(f"| {name} | `{value}` |" for name, value in config.as_dict().items())
    kind = (
        "plain fine-tuning"
        if config.unweighted
        else f"bi-level optimisation, a learned weight an instance ({config.upper.reweighter})"
    )
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {config.model.reward_model}
---

# Process reward model

Trained by dreamprm_dist with {kind}. It reads an image, a question and a solution step by step;
a step's score is the probability of `+` after it, at the last token of `<|im_start|>assistant\\n`.

| setting | value |
|---|---|
{settings}
"""
