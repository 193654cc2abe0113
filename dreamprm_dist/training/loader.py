"""The two data streams of a run: each step's micro-batches of this rank, in the design's order."""

import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dreamprm_dist import distributed
from dreamprm_dist.data.held_out import RowSubset
from dreamprm_dist.data.joined import NO_ROW, JoinedRows
from dreamprm_dist.data.sampler import owned_shards, rank_draws
from dreamprm_dist.data.schema import Turn, relabelled, step_counts, step_labels
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.losses import LowerLossConfig
from dreamprm_dist.prm.batch import (
    Batch,
    InputFormat,
    Instance,
    collate,
    encode_instance,
    measure,
)
from dreamprm_dist.training.preemption import leave_signals_to_the_rank

logger = logging.getLogger(__name__)

NO_ROOM = (
    "the data workers have no room left in /dev/shm; give the container more of it (--shm-size, or "
    "--ipc=host for the machine's), or read without workers: --num_workers 0"
)


@dataclass(kw_only=True)
class RankBatches(Dataset):
    """Item t is this rank's part of global batch t: a list of micro-batches of equal size.

    They are sorted by length within the part, so that little padding is wasted.

    Attributes:
        shards: what is drawn from.
        format: how a record becomes tensors.
        global_batch_size: draws of all ranks per step.
        micro_batch_size: draws per micro-batch.
        seed, level: of the order of draws, see `sampler.rank_draws`.
        by_question: a draw is a meta question, which brings all of its solutions.
        share_tiles: see `collate`.
        num_images: of all ranks' records, once `check_rows` has counted them.
        labels: of training data, what their steps are trained on.
    """

    shards: ShardFolder | RowSubset | JoinedRows
    tokenizer: PreTrainedTokenizerBase
    format: InputFormat
    global_batch_size: int
    micro_batch_size: int
    seed: int
    level: int
    rank: int
    world_size: int
    by_question: bool = False
    share_tiles: bool = True
    labels: LowerLossConfig | None = None
    num_images: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._questions: list[list[range]] = []
        self._draws_per_shard = self.shards.rows_per_shard
        if self.by_question:
            shards = range(self.shards.num_shards)
            assert not isinstance(self.shards, JoinedRows)
            self._questions = [self.shards.questions(shard) for shard in shards]
            self._draws_per_shard = [len(questions) for questions in self._questions]

    def __getitem__(self, step: int) -> list[Batch]:
        draws = rank_draws(
            step,
            self.global_batch_size,
            self._draws_per_shard,
            seed=self.seed,
            level=self.level,
            rank=self.rank,
            world_size=self.world_size,
        )
        tiled: dict[bytes, Tensor] = {}
        drawn = [[self.instance(*place, tiled) for place in self._rows(*draw)] for draw in draws]
        drawn.sort(key=lambda instances: max(len(i.encoded.input_ids) for i in instances))
        size = self.micro_batch_size
        return [
            self._collate(list(chain(*drawn[i : i + size]))) for i in range(0, len(drawn), size)
        ]

    def _collate(self, instances: Sequence[Instance]) -> Batch:
        return collate(instances, self.tokenizer.pad_token_id, share_tiles=self.share_tiles)

    def _rows(self, shard: int, index: int) -> list[tuple[int, int]]:
        """The rows that a draw stands for: one, or all of a question."""
        rows = self._questions[shard][index] if self.by_question else [index]
        return [(shard, row) for row in rows]

    def instance(self, shard: int, row: int, tiled: dict[bytes, Tensor] | None = None) -> Instance:
        """One row, encoded; InputError names it where that cannot be done."""
        record = self.shards.read(shard, row)
        try:
            return encode_instance(
                self._labelled(record["conversations"]),
                record["images"],
                self.tokenizer,
                self.format,
                sample_id=record["sample_id"],
                true_false=record.get("true_false", False),
                tiled=tiled,
            )
        except InputError as error:
            raise InputError(_named(self.shards, record, error)) from error

    def _labelled(self, turns: list[Turn]) -> list[Turn]:
        """Turns with the labels that are trained on, which the context shows too."""
        threshold = self.labels.label_threshold if self.labels else None
        return turns if threshold is None else relabelled(turns, threshold)

    def stream(
        self, first: int, count: int, num_workers: int, device: torch.device
    ) -> Iterator[list[Batch]]:
        """Items first to first + count - 1 on the device, read ahead by worker processes."""
        steps = range(first, first + count)
        return _loaded(self.__getitem__, steps, num_workers, device)

    def every_row(self, num_workers: int, device: torch.device) -> Iterator[Batch]:
        """Each row of this rank's shards once on the device, in micro-batches.

        The last one may be smaller.
        """
        shards = owned_shards(self.shards.num_shards, self.rank, self.world_size)
        rows = [
            (shard, row) for shard in shards for row in range(self.shards.rows_per_shard[shard])
        ]
        size = self.micro_batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return chain.from_iterable(_loaded(self._batch_of, parts, num_workers, device))

    def _batch_of(self, rows: Sequence[tuple[int, int]]) -> list[Batch]:
        return [self._collate([self.instance(*place) for place in rows])]

    def check_size(self) -> None:
        """Refuse a global batch that would hold an instance, or a question, twice."""
        if self.global_batch_size > (size := sum(self._draws_per_shard)):
            raise InputError(
                f"{self.shards.path}: a global batch of {self.global_batch_size} is larger than "
                f"the data, {size} {'questions' if self.by_question else 'records'}; lower the "
                "batch size, the accumulation or the number of ranks"
            )

    def check_rows(self, device: torch.device) -> None:
        """Refuse records and data that cannot be learned from; by all ranks, each its shards.

        Counts the images, too. Reads text and image sizes only, so that a run fails at its start
        and not days later.

        Raises:
            InputError: records are longer than the model's context, no step is labelled, or none
                knows the roll-outs that `labels` needs.
        """
        too_long, first, images = 0, "", 0
        signs: Counter[str | bool | None] = Counter()
        counted = 0
        shards = owned_shards(self.shards.num_shards, self.rank, self.world_size)
        for shard in tqdm(shards, desc="checking records", disable=self.rank != 0, leave=False):
            columns = ["sample_id", "source_id", "conversations", "image_sizes"]
            columns += ["true_false"] if self.shards.kind == "meta" else []
            rows = zip(*(self.shards.read_column(shard, name) for name in columns), strict=True)
            for record in (dict(zip(columns, row, strict=True)) for row in rows):
                if "true_false" in record:
                    signs[record["true_false"]] += 1
                else:
                    of_record, with_counts = self._signs(record["conversations"])
                    signs.update(of_record)
                    counted += with_counts
                images += len(record["image_sizes"])
                length, *_ = measure(
                    record["conversations"], record["image_sizes"], self.tokenizer, self.format
                )
                if length > self.format.max_length:
                    too_long += 1
                    first = first or _named(
                        self.shards,
                        record,
                        f"{length} tokens are more than the model's context of "
                        f"{self.format.max_length}",
                    )
        if too_long:
            raise InputError(
                f"{first} ({too_long} such records on this rank); lower max_patch_num, now "
                f"{self.format.max_tiles}, or leave the records out and shard again"
            )
        mine = [signs["+"] + signs[True], signs["-"] + signs[False], counted, images]
        *totals, counted, self.num_images = distributed.all_reduce_sum(
            torch.tensor(mine, device=device)
        ).tolist()
        self._check_signs(totals)
        if self.labels and self.labels.needs_counts and not counted:
            raise InputError(
                f"{self.shards.path}: {self.labels.needs_counts} needs roll-outs, but no labelled "
                "step knows any; shard records that have num_mc_correct and num_mc_total, or leave "
                "the flag out"
            )

    def _signs(self, turns: list[Turn]) -> tuple[list[str], int]:
        """What the steps of a training record pull P(+) to, and how many of them know roll-outs.

        Where roll-outs themselves are trained on, some right and some wrong pull both ways.
        """
        reads_counts = self.labels is not None and self.labels.reads_counts
        labels, counts = step_labels(self._labelled(turns)), step_counts(turns)
        signs: list[str] = []
        num_counted = 0
        for label, (correct, total) in zip(labels, counts, strict=True):
            if label is None:
                continue
            num_counted += total > 0
            if reads_counts and total:
                signs += ["+"] * (correct > 0) + ["-"] * (correct < total)
            else:
                signs.append(label)
        return signs, num_counted

    def _check_signs(self, counts: Sequence[int]) -> None:
        """Refuse data that teach nothing, and warn of data that teach one answer alone."""
        signs = "right solution", "wrong solution"
        if self.shards.kind == "training":
            signs = "step labelled +", "step labelled -"
            if not any(counts):
                raise InputError(
                    f"{self.shards.path}: no step of its {self.shards.num_rows} records is "
                    "labelled, so there is nothing to learn; label steps + or - and shard again"
                )
        for sign, count in zip(signs, counts, strict=True):
            if not count:
                logger.warning(
                    "%s has no %s: a PRM learns one answer from it", self.shards.path, sign
                )


def _loaded(
    read: Callable[[Any], list[Batch]], keys: Iterable, num_workers: int, device: torch.device
) -> Iterator[list[Batch]]:
    """What is read for each key, on the device; the workers start at once.

    Raises:
        InputError: what is read cannot be used, or has no room in shared memory.
    """
    loader = DataLoader(
        _Items(read),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_rank,
    )
    return _received(iter(loader), device)


def _received(
    items: Iterator[list[Batch] | InputError], device: torch.device
) -> Iterator[list[Batch]]:
    try:
        for item in items:
            if isinstance(item, InputError):
                raise item
            yield [batch.to(device) for batch in item]
    except RuntimeError as error:
        if "Bus error" in f"{error} {error.__cause__}":
            raise InputError(NO_ROOM) from error
        raise


class _Items(Dataset):
    """Batches in shared memory where a worker reads them, or the InputError in their place.

    DataLoader moves them there itself, but when that fails it drops them: they would be waited for
    without end. An exception it passes on, but as a traceback in place of the message.
    """

    def __init__(self, read: Callable[[Any], list[Batch]]):
        self._read = read

    def __getitem__(self, key: Any) -> list[Batch] | InputError:
        try:
            batches = self._read(key)
        except InputError as error:
            return error
        if get_worker_info() is None:
            return batches
        try:
            return [batch.share_memory() for batch in batches]
        except RuntimeError as error:
            if f"({errno.ENOSPC})" in str(error):
                return InputError(NO_ROOM)
            raise


def _named(shards: ShardFolder | RowSubset | JoinedRows, record: dict, problem: object) -> str:
    number, source_id = record["sample_id"], record["source_id"]
    what = "of the meta set that joined it" if number == NO_ROW else f"sample_id {number}"
    return f"{shards.path}: {what} (id {source_id!r}): {problem}"
