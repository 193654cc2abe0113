"""What a run's instances are like: tiles, tokens and steps, and batches of them without values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.batch import Batch, InputFormat, measure
from dreamprm_dist.prm.model import PRM

SAMPLED = 2000  # instances that are looked at


class Workload(NamedTuple):
    """An instance.

    Attributes:
        tiles: of its images together.
        text_tokens: beside those of its images.
        steps: scored ones.
    """

    tiles: int
    text_tokens: int
    steps: int

    @property
    def described(self) -> str:
        return f"{self.tiles} tiles, {self.text_tokens} tokens of text and {self.steps} steps"

    def batch(self, prm: PRM, size: int, sharing: int = 1) -> Batch:
        """A batch on the meta device.

        Args:
            size: images that differ.
            sharing: instances that show the same image.
        """
        rows, length = size * sharing, self.text_tokens + self.tiles * prm.tokens_per_tile
        shape = size * self.tiles, 3, prm.tile_size, prm.tile_size

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.long, device="meta")

        tiles = torch.empty(shape, dtype=prm.model.dtype, device="meta")
        return Batch(
            input_ids=integers(rows, length),
            pixel_values=tiles if self.tiles else None,
            shown_tiles=integers(rows * self.tiles),
            tile_rows=integers(size * self.tiles),
            step_rows=integers(rows * self.steps),
            step_positions=integers(rows * self.steps),
            step_targets=integers(rows * self.steps),
            step_counts=integers(rows * self.steps, 2),
            sample_ids=integers(rows),
            true_false=torch.empty(rows, device="meta"),
        )


def workloads_of(
    shards: ShardFolder, tokenizer: PreTrainedTokenizerBase, format: InputFormat
) -> tuple[Workload, Workload]:
    """The largest and the mean of the first instances of some shards.

    The largest has the most of each that one of them has.
    """
    found = list(islice(_instances(shards, tokenizer, format), SAMPLED))
    columns = list(zip(*found, strict=True))
    mean = Workload(*(ceil(sum(column) / len(column)) for column in columns))
    return Workload(*map(max, columns)), mean


def _instances(
    shards: ShardFolder, tokenizer: PreTrainedTokenizerBase, format: InputFormat
) -> Iterator[Workload]:
    for shard in range(shards.num_shards):
        columns = (shards.read_column(shard, name) for name in ("conversations", "image_sizes"))
        for conversations, sizes in zip(*columns, strict=True):
            length, tiles, steps = measure(conversations, sizes, tokenizer, format)
            yield Workload(tiles, length - tiles * format.tokens_per_tile, steps)
