"""From a record to tensors: encode one instance, pad several into a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.schema import Turn
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.chat import EncodedConversation, encode_conversation
from dreamprm_dist.prm.grid import num_tiles
from dreamprm_dist.prm.tiling import image_tiles


@dataclass(frozen=True)
class InputFormat:
    """The format of model inputs; the same for training and scoring but for `max_tiles`.

    Attributes:
        max_tiles: most tiles of an image, thumbnail not counted.
        tile_size: side of a tile in pixels.
        tokens_per_tile: image tokens of one tile.
        max_length: most tokens of an instance, the context length of the model.
        label_context: see `encode_conversation`.
        tile_dtype: of the tiles; best the model's, to which it would cast them.
    """

    max_tiles: int
    tile_size: int = 448
    tokens_per_tile: int = 256
    max_length: int = 32768
    label_context: str = "plus"
    tile_dtype: torch.dtype = torch.float32


@dataclass
class Instance:
    """One encoded conversation and the images that it shows.

    Attributes:
        encoded: tokens, step positions and step targets.
        images: for each image its tiles, (tiles, 3, size, size).
        sample_id: of a training instance, else -1.
        true_false: of a meta instance, whether its final answer is right.
    """

    encoded: EncodedConversation
    images: list[Tensor]
    sample_id: int = -1
    true_false: bool = False


@dataclass(kw_only=True)
class Batch:
    """B instances, right-padded to L tokens, with n scored steps in all.

    They show T tiles, of which U differ: an image that several of them show is held, and seen by
    the vision tower, once.

    Attention is causal, so padding on the right changes nothing to its left and no attention mask
    is needed.

    Attributes:
        input_ids: (B, L) int64.
        pixel_values: (U, 3, size, size) tiles, or None when no instance has an image.
        shown_tiles: (T,) the place in `pixel_values` of each tile in the order of the tokens.
        step_rows: (n,) the instance that each step belongs to, ascending.
        step_positions: (n,) the position in that instance whose logits score the step.
        step_targets: (n,) token ids of the labels, `IGNORE_INDEX` where unlabelled.
        step_counts: (n, 2) int64, the right ones of a step's roll-outs and all; 0, 0 where unknown.
        sample_ids: (B,) int64; -1 for an instance without a weight of its own.
        true_false: (B,) float32, 1 where the final answer is right (meta instances only).
        tile_rows: (U,) the instance that each tile belongs to; None where instances may share one.
    """

    input_ids: Tensor
    pixel_values: Tensor | None
    shown_tiles: Tensor
    step_rows: Tensor
    step_positions: Tensor
    step_targets: Tensor
    step_counts: Tensor
    sample_ids: Tensor
    true_false: Tensor
    tile_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def weighted(self) -> Tensor:
        """(B,) on the CPU, whether an instance has a weight of its own.

        Those of the meta set that joined the lower level have none.
        """
        return self.sample_ids >= 0

    def _map(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if v is not None})

    def to(self, device: torch.device) -> "Batch":
        """All on a device but `sample_ids`, by which rows are looked up without waiting for it."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, sample_ids=self.sample_ids)

    def share_memory(self) -> "Batch":
        """All where other processes can read it; RuntimeError if /dev/shm is full."""
        return self._map(lambda tensor: tensor.share_memory_())

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())


def encode_instance(
    conversations: Sequence[Turn],
    images: Sequence[bytes],
    tokenizer: PreTrainedTokenizerBase,
    format: InputFormat,
    *,
    sample_id: int = -1,
    true_false: bool = False,
    tiled: dict[bytes, Tensor] | None = None,
) -> Instance:
    """Tile the images and encode the conversation.

    Args:
        tiled: tiles of images that other instances of the batch show; this one's are added.

    Raises:
        InputError: the instance is longer than `format.max_length`, or see `encode_conversation`.
    """
    tiled = {} if tiled is None else tiled
    for data in images:
        if data not in tiled:
            tiles = image_tiles(data, format.max_tiles, format.tile_size)
            tiled[data] = tiles.to(format.tile_dtype)
    shown = [tiled[data] for data in images]
    encoded = encode_conversation(
        conversations,
        tokenizer,
        [len(tiles) for tiles in shown],
        format.tokens_per_tile,
        format.label_context,
    )
    if len(encoded.input_ids) > format.max_length:
        raise InputError(
            f"{len(encoded.input_ids)} tokens are more than the model's context of "
            f"{format.max_length}; lower max_patch_num, now {format.max_tiles}, or leave the "
            "record out"
        )
    return Instance(encoded, shown, sample_id, true_false)


def measure(
    conversations: Sequence[Turn],
    image_sizes: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    format: InputFormat,
) -> tuple[int, int, int]:
    """Tokens, tiles and steps of an instance, with no image read and no image token written out."""
    tiles = [
        num_tiles(width, height, format.max_tiles, format.tile_size)
        for width, height in image_sizes
    ]
    text = encode_conversation(conversations, tokenizer, [0] * len(tiles))
    length = len(text.input_ids) + sum(tiles) * format.tokens_per_tile
    return length, sum(tiles), len(text.step_positions)


def collate(instances: Sequence[Instance], pad_token_id: int, *, share_tiles: bool = True) -> Batch:
    """Pad instances into one batch.

    Args:
        share_tiles: tiles that several instances show are held once; else each has its own.
    """
    lengths = [len(instance.encoded.input_ids) for instance in instances]
    input_ids = torch.full((len(instances), max(lengths)), pad_token_id)
    for row, instance in enumerate(instances):
        input_ids[row, : lengths[row]] = torch.tensor(instance.encoded.input_ids)
    shown = [
        ((None if share_tiles else row, id(image)), image)
        for row, instance in enumerate(instances)
        for image in instance.images
    ]
    different = dict(shown)
    starts = accumulate((len(image) for image in different.values()), initial=0)
    places = {
        key: range(start, start + len(image))
        for (key, image), start in zip(different.items(), starts, strict=False)
    }
    tile_rows = [row for (row, _), image in different.items() for _ in image]
    steps = [
        (row, position, target, *counts)
        for row, instance in enumerate(instances)
        for position, target, counts in zip(
            instance.encoded.step_positions,
            instance.encoded.step_targets,
            instance.encoded.step_counts,
            strict=True,
        )
    ]
    step_rows, step_positions, step_targets, *step_counts = torch.tensor(steps).T.contiguous()
    return Batch(
        input_ids=input_ids,
        pixel_values=torch.cat(list(different.values())) if different else None,
        shown_tiles=torch.tensor(
            [place for key, _ in shown for place in places[key]], dtype=torch.long
        ),
        tile_rows=None if share_tiles else torch.tensor(tile_rows, dtype=torch.long),
        step_rows=step_rows,
        step_positions=step_positions,
        step_targets=step_targets,
        step_counts=torch.stack(step_counts, dim=1),
        sample_ids=torch.tensor([instance.sample_id for instance in instances]),
        true_false=torch.tensor([float(instance.true_false) for instance in instances]),
    )
