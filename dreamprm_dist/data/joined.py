"""Training data that the meta set has joined: one folder to draw from."""

from __future__ import annotations

from math import gcd
from typing import Literal

from dreamprm_dist.data.held_out import RowSubset
from dreamprm_dist.data.schema import Turn, step_labels
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError

NO_ROW = -1  # the sample_id of an instance without a learned weight

MetaLabels = Literal["steps", "answer"]


class JoinedRows:
    """Training shards, each with some of the meta rows behind its own, read as a training folder.

    A meta row comes to a shard whose owner owns the row's own shard too, at every number of ranks
    that divides both numbers of shards. The meta rows of such shards are dealt to theirs in turn,
    so that an instance of either set is drawn as often as any other. Its `sample_id` is `NO_ROW`.

    Args:
        train: the training folder.
        meta: the meta rows that may be trained on.
        labels: `steps`: the records' own; `answer`: of the last step alone, `+` where the answer
            is right, else `-`.

    Attributes:
        path, kind, num_shards: the training folder's.
        num_rows, rows_per_shard: of both.

    Raises:
        InputError: with `steps`, no step of the meta set is labelled, or a wrong solution has `+`
            alone: what stands there is no label.
    """

    def __init__(self, train: ShardFolder, meta: ShardFolder | RowSubset, labels: MetaLabels):
        self._train, self._meta, self._labels = train, meta, labels
        self.path, self.kind, self.num_shards = train.path, train.kind, train.num_shards
        if labels == "steps":
            _refuse_placeholders(meta)
        # From the place in a joined shard, behind the training rows, to the meta row.
        self._joined: list[list[tuple[int, int]]] = [[] for _ in range(train.num_shards)]
        common = gcd(train.num_shards, meta.num_shards)
        for first in range(common):
            to = self._joined[first::common]
            rows = (
                (shard, row)
                for shard in range(first, meta.num_shards, common)
                for row in range(meta.rows_per_shard[shard])
            )
            for turn, place in enumerate(rows):
                to[turn % len(to)].append(place)
        self.rows_per_shard = [
            rows + len(joined)
            for rows, joined in zip(train.rows_per_shard, self._joined, strict=True)
        ]
        self.num_rows = sum(self.rows_per_shard)

    def read(self, shard: int, row: int) -> dict:
        """As `ShardFolder.read`, the meta rows behind the training rows."""
        behind = row - self._train.rows_per_shard[shard]
        if behind < 0:
            return self._train.read(shard, row)
        record = self._meta.read(*self._joined[shard][behind])
        turns = self._labelled(record["conversations"], record["true_false"])
        return record | {"sample_id": NO_ROW, "conversations": turns}

    def read_column(self, shard: int, name: str) -> list:
        """As `ShardFolder.read_column`."""
        column = self._train.read_column(shard, name)
        joined = self._joined[shard]
        if name == "sample_id":
            return column + [NO_ROW] * len(joined)
        from_shards = {s for s, _ in joined}
        meta = {s: self._meta.read_column(s, name) for s in from_shards}
        values = [meta[s][row] for s, row in joined]
        if name == "conversations":
            right = {s: self._meta.read_column(s, "true_false") for s in from_shards}
            values = [
                self._labelled(turns, right[s][row])
                for turns, (s, row) in zip(values, joined, strict=True)
            ]
        return column + values

    def _labelled(self, turns: list[Turn], right: bool) -> list[Turn]:
        if self._labels == "steps":
            return turns
        last = max(place for place, turn in enumerate(turns) if turn["from"] == "gpt")
        answer = "+" if right else "-"
        return [
            turn
            if turn["from"] != "gpt"
            else {"from": "gpt", "value": answer if place == last else None}
            for place, turn in enumerate(turns)
        ]


def _refuse_placeholders(meta: ShardFolder | RowSubset) -> None:
    labelled = False
    columns = ("source_id", "conversations", "true_false")
    for shard in range(meta.num_shards):
        for source_id, turns, right in zip(
            *(meta.read_column(shard, name) for name in columns), strict=True
        ):
            labels = set(step_labels(turns)) - {None}
            labelled |= bool(labels)
            if not right and labels == {"+"}:
                raise InputError(
                    f"{meta.path}: id {source_id!r} has a wrong answer and every label is +, so "
                    "that its labels are placeholders; use --train_on_meta answer"
                )
    if not labelled:
        raise InputError(
            f"{meta.path}: no step of its {meta.num_rows} solutions is labelled; use "
            "--train_on_meta answer"
        )
