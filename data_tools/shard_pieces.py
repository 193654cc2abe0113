"""The work of sharding's workers: a block of the source's lines becomes a file of checked rows, and
rows of many blocks become a shard.

Every image is read, checked and re-encoded once, when its block is made. A block's rows lie in an
Arrow file, of which a shard maps the few rows that it needs. Both kinds of file are kept over a
kill (`folders.make_once`) and depend on the job alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.folders import make_once
from data_tools.reencode import encoded
from dreamprm_dist.data.images import MAX_IMAGE_BYTES, ON_WHITE, REDRAWN, read_image
from dreamprm_dist.data.json_records import json_lines, parse_line
from dreamprm_dist.data.question_key import NO_ID, question_key
from dreamprm_dist.data.schema import (
    MetaRecord,
    TrainingRecord,
    parse_meta_record,
    parse_training_record,
    step_counts,
    step_labels,
)
from dreamprm_dist.data.shards import ROW_GROUP_ROWS, SCHEMAS
from dreamprm_dist.errors import RecordError

BLOCK_RECORDS = 256  # what a killed worker loses at most
BLOCK_BYTES = 64 << 20
_PARSERS = {"training": parse_training_record, "meta": parse_meta_record}
# Images are compressed already; and statistics would copy whole images into the footer.
_WRITER_OPTIONS = {
    "compression": {
        "sample_id": "ZSTD",
        "source_id": "ZSTD",
        "dataset": "ZSTD",
        "conversations": "ZSTD",
        "images.list.element": "NONE",
        "image_sizes.list.element.list.element": "ZSTD",
        "group_id": "ZSTD",
        "true_false": "ZSTD",
        "response": "ZSTD",
    },
    "use_dictionary": False,
    "write_statistics": False,
}
UNLABELLED = "unlabelled"
STEP_LABELS = ("+", "-", UNLABELLED)
_NUMBERED = ("sample_id", "group_id")  # known when all blocks are made


class Block(NamedTuple):
    """Lines of the source: bytes ``start`` to ``end``, of which ``line`` is the first."""

    number: int
    start: int
    end: int
    line: int
    num_records: int


class Shard(NamedTuple):
    """A shard's rows by sample_id, in order, and their group_ids (None in a training shard)."""

    number: int
    sample_ids: Sequence[int]
    group_ids: Sequence[int] | None


@dataclass(frozen=True)
class Job:
    """A source and how it is sharded, the same for all pieces.

    Attributes:
        source: its name, for records without an id.
        lines: the source as JSONL.
        kind: "training" or "meta".
        image_root: folder that image paths start from.
        work: folder for the pieces.
        dry_run: check and count, and store nothing.
    """

    source: str
    lines: Path
    kind: str
    image_root: Path
    work: Path
    dry_run: bool = False

    @property
    def blocks(self) -> Path:
        return self.work / "blocks"

    @property
    def shards(self) -> Path:
        return self.work / "shards"

    def block_file(self, index: int) -> Path:
        return self.blocks / f"block-{index:06d}.arrow"

    def block_schema(self) -> pa.Schema:
        return pa.schema([field for field in SCHEMAS[self.kind] if field.name not in _NUMBERED])


def find_blocks(lines: Path, limit: int | None = None) -> Iterator[Block]:
    """Cut a JSONL file, or its first ``limit`` records, into blocks; always at the same places."""
    index = start = count = 0
    line = 1
    with lines.open("rb") as file:
        for number, _ in islice(json_lines(file), limit):
            count += 1
            if count == BLOCK_RECORDS or file.tell() - start >= BLOCK_BYTES:
                yield Block(index, start, file.tell(), line, count)
                index, start, line, count = index + 1, file.tell(), number + 1, 0
        if count:
            yield Block(index, start, file.tell(), line, count)


def make_block(job: Job, block: Block) -> dict:
    """Check a block's records and store the good ones; returns the fields of `Tally`."""
    if job.dry_run:
        tally = Tally()
        deque(_checked_rows(job, block, tally), maxlen=0)
        return asdict(tally)
    note = job.blocks / f"block-{block.number:06d}.json"
    return make_once(job.block_file(block.number), note, partial(_write_block, job, block))


@dataclass
class Tally:
    """What is in a block.

    Attributes:
        rows: number of good records.
        on_white: how many of them have an image with transparent pixels.
        rejected: line, id and reason of each of the others.
        steps: number of steps with each label.
        counted_steps: number of steps from which at least one roll-out is known.
        unlabelled: number of records without any labelled step.
        group_keys: of each meta record, equal for solutions of one question.
        right: number of meta records whose final answer is right.
    """

    rows: int = 0
    on_white: int = 0
    rejected: list[dict] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEP_LABELS, 0))
    counted_steps: int = 0
    unlabelled: int = 0
    group_keys: list[str] = field(default_factory=list)
    right: int = 0


def _write_block(job: Job, block: Block, path: Path) -> dict:
    schema, tally = job.block_schema(), Tally()
    buffer: list[dict] = []
    buffered_bytes = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def flush() -> None:
            nonlocal buffered_bytes
            writer.write_batch(pa.RecordBatch.from_pylist(buffer, schema=schema))
            buffer.clear()
            buffered_bytes = 0

        for row in _checked_rows(job, block, tally):
            buffer.append(row)
            buffered_bytes += sum(map(len, row["images"]))
            if len(buffer) == ROW_GROUP_ROWS or buffered_bytes >= MAX_IMAGE_BYTES:
                flush()
        if buffer:
            flush()
    return asdict(tally)


def _checked_rows(job: Job, block: Block, tally: Tally) -> Iterator[dict]:
    """The rows of a block's good records; ``tally`` counts them and lists the others."""
    _shard_image.cache_clear()  # an earlier block's images may have changed since
    for line, raw in _block_records(job.lines, block):
        place = f"{job.source}:{line}"
        try:
            record = _PARSERS[job.kind](raw)
            row, on_white = _row(record, place, job.image_root)
            if isinstance(record, MetaRecord):
                tally.group_keys.append(question_key(record, job.image_root))
                tally.right += record.true_false
        except RecordError as error:
            source_id = raw.get("id") if isinstance(raw, dict) else None
            named = isinstance(source_id, str | int) and str(source_id) not in NO_ID
            rejected = {"line": line, "id": source_id if named else place, "reason": str(error)}
            tally.rejected.append(rejected)
            continue
        labels = step_labels(record.conversations)
        for label in labels:
            tally.steps[label or UNLABELLED] += 1
        tally.counted_steps += sum(total > 0 for _, total in step_counts(record.conversations))
        tally.unlabelled += not any(labels)
        tally.rows += 1
        tally.on_white += on_white
        yield row


def _block_records(lines: Path, block: Block) -> Iterator[tuple[int, dict | RecordError]]:
    with lines.open("rb") as file:
        file.seek(block.start)
        for number, line in json_lines(file, block.line):
            yield number, parse_line(line)
            if file.tell() >= block.end:
                return


def _row(record: TrainingRecord, place: str, image_root: Path) -> tuple[dict, bool]:
    """A record's row, and whether transparent pixels of its images were put on white."""
    images = [_shard_image(str(image_root / image), image) for image in record.images]
    # 16 rows of a row group must stay below Arrow's 2 GiB per column.
    if sum(len(data) for data, _, _ in images) > MAX_IMAGE_BYTES:
        raise RecordError(
            f"its {len(images)} images have more than {MAX_IMAGE_BYTES >> 20} MiB together; "
            "use fewer or smaller ones."
        )
    row: dict[str, object] = {
        "source_id": place if record.source_id in NO_ID else record.source_id,
        "dataset": record.dataset,
        "conversations": json.dumps(record.conversations, ensure_ascii=False),
        "images": [data for data, _, _ in images],
        "image_sizes": [size for _, size, _ in images],
    }
    if isinstance(record, MetaRecord):
        row |= {"true_false": record.true_false, "response": record.response}
    return row, any(on_white for _, _, on_white in images)


# Solutions of one question follow each other and share its images, and decoding is the cost.
@lru_cache(maxsize=16)
def _shard_image(path: str, shown: str) -> tuple[bytes, tuple[int, int], bool]:
    data, picture = read_image(path, shown)
    return *encoded(data, picture), picture.info.get(REDRAWN) == ON_WHITE


def make_shard(job: Job, block_starts: Sequence[int], shard: Shard) -> dict:
    """Write a shard from its blocks; ``block_starts`` holds the first sample_id of each block.

    Returns:
        The shard's entry in the manifest: ``file``, ``rows`` and ``sha256``.
    """
    name = f"shard-{shard.number:05d}"
    path = job.shards / f"{name}.parquet"
    make = partial(_write_shard, job, block_starts, shard)
    return make_once(path, job.work / f"{name}.json", make)


def _write_shard(job: Job, block_starts: Sequence[int], shard: Shard, path: Path) -> dict:
    _open_block.cache_clear()
    schema = SCHEMAS[job.kind]
    with pq.ParquetWriter(path, schema, **_WRITER_OPTIONS) as writer:
        for first in range(0, len(shard.sample_ids), ROW_GROUP_ROWS):
            some = slice(first, first + ROW_GROUP_ROWS)
            rows = [_stored_row(job, block_starts, i) for i in shard.sample_ids[some]]
            stored = pa.concat_tables(rows).combine_chunks()
            columns = {name: stored[name] for name in stored.column_names}
            columns["sample_id"] = list(shard.sample_ids[some])
            if shard.group_ids is not None:
                columns["group_id"] = list(shard.group_ids[some])
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP_ROWS)
    return {"file": f"shard-{shard.number:05d}.parquet", "rows": len(shard.sample_ids)}


def _stored_row(job: Job, block_starts: Sequence[int], sample_id: int) -> pa.Table:
    index = bisect_right(block_starts, sample_id) - 1
    return _open_block(job, index).slice(sample_id - block_starts[index], 1)


@lru_cache(maxsize=4)
def _open_block(job: Job, index: int) -> pa.Table:
    """A block's rows, of which memory holds only those that are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(job.block_file(index)))).read_all()
