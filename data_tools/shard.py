"""Turn training and meta records with their images into shard folders.

Two passes over the source: the first parses, checks and hashes everything and keeps only small
facts a record; the second reads the accepted records again in shard order and writes them, 16
rows at a time. Every byte written depends on the input alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.folders import claim_folder, move_into_place, refuse_existing
from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.schema import (
    JsonRecords,
    MetaRecord,
    RecordError,
    TrainingRecord,
    parse_meta_record,
    parse_training_record,
)
from dreamprm_dist.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTED,
    ROW_GROUP_ROWS,
    SCHEMAS,
    file_sha256,
)

SOLUTION_MARK = "### Solution Process:"  # in VisualPRM's format the first step follows it
WORKER_TIMEOUT_S = 600
_CHUNK = 16
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


class _Accepted(NamedTuple):
    position: int  # where `JsonRecords.at` finds the record again
    image_sizes: list[tuple[int, int]]
    image_digests: list[bytes]
    group_key: str | bytes | None  # None in a training file


class _Rejected(NamedTuple):
    line: int
    id: str | int | None
    reason: str


def shard_file(
    source: str | Path,
    out_dir: str | Path,
    kind: str,
    num_shards: int,
    image_root: str | Path | None = None,
    num_workers: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> dict:
    """Write one shard folder from a JSON list or JSONL file and return its manifest.

    Training: ``sample_id`` is dense in file order over the accepted records, the shard is
    ``sample_id % num_shards``, and row j of shard s has sample_id ``j * num_shards + s``.
    Meta: a question's solutions share a dense ``group_id`` in order of first appearance, the
    shard is ``group_id % num_shards``, rows are ordered by (group_id, file order).

    Image paths are relative to ``image_root``, by default the source's own folder. The folder
    appears at ``out_dir`` only when it is complete; ``overwrite`` replaces a finished one.

    Raises:
        FileNotFoundError: no such source.
        ValueError: nothing accepted, fewer records (questions) than shards, ``out_dir`` taken,
            or the input changed meanwhile.
    """
    source, out_dir = Path(source), Path(out_dir).resolve()
    if kind not in SCHEMAS:
        raise ValueError(f"unknown kind {kind!r}; use one of {', '.join(SCHEMAS)}.")
    if num_shards < 1 or num_workers < 1:
        raise ValueError("the number of shards and of workers must be 1 or more.")
    records = JsonRecords(source)
    root = source.parent if image_root is None else Path(image_root)
    before = source.stat()
    tmp, lock = claim_folder(out_dir, overwrite)
    try:
        source_entry = {"path": source.name, "sha256": file_sha256(source)}
        accepted, num_rejected = _first_pass(
            records, kind, root, num_workers, progress, tmp / REJECTED
        )
        group_ids = _dense_ids([entry.group_key for entry in accepted]) if kind == "meta" else None
        owner_ids = range(len(accepted)) if group_ids is None else group_ids
        num_owners = max(owner_ids) + 1
        if num_owners < num_shards:
            what = "accepted records" if group_ids is None else "questions"
            raise ValueError(
                f"{source}: {num_owners} {what} cannot fill {num_shards} shards; use at most "
                f"{num_owners} shards."
            )
        # A stable sort: within a question the file's order stays.
        ids_of_shard: list[list[int]] = [[] for _ in range(num_shards)]
        for i in sorted(range(len(accepted)), key=owner_ids.__getitem__):
            ids_of_shard[owner_ids[i] % num_shards].append(i)
        shards = []
        with tqdm(total=len(accepted), desc="writing", unit="rec", disable=_quiet(progress)) as bar:
            for shard, ids in enumerate(ids_of_shard):
                rows = (_row(records, kind, root, i, accepted[i], group_ids) for i in ids)
                file = tmp / f"shard-{shard:05d}.parquet"
                _write_shard(file, SCHEMAS[kind], rows, bar)
                shards.append({"file": file.name, "rows": len(ids), "sha256": file_sha256(file)})
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ValueError(f"{source}: changed while it was being sharded; run again.")
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "num_rows": len(accepted),
            "num_groups": num_owners if kind == "meta" else None,
            "num_shards": num_shards,
            "num_rejected": num_rejected,
            "source": source_entry,
            "shards": shards,
        }
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        move_into_place(tmp, out_dir)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        os.close(lock)
    print(
        f"{out_dir}: {len(accepted)} {kind} records in {num_shards} shards, {num_rejected} "
        f"rejected" + (f" (see {out_dir / REJECTED})" if num_rejected else "")
    )
    return manifest


def cached_shards(
    source: str | Path, kind: str, num_shards: int, image_root: str | Path | None = None
) -> Path:
    """The shard folder of a raw JSON file, built once in ``.shards/`` beside it.

    The folder's name holds the source's SHA-256 (and a hash of ``image_root`` when given), so a
    changed file is sharded anew; images changed behind an unchanged file are not noticed.

    Raises:
        FileNotFoundError, ValueError: as `shard_file`.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give a JSON list or a JSONL file.")
    name = f"{source.stem}-{kind}-{num_shards}-{file_sha256(source)[:12]}"
    if image_root is not None:
        name += "-" + hashlib.sha256(os.fsencode(Path(image_root).resolve())).hexdigest()[:8]
    folder = source.parent / ".shards" / name
    if not (folder / MANIFEST).is_file():
        shard_file(source, folder, kind, num_shards, image_root)
    return folder


def _first_pass(
    records: JsonRecords, kind: str, root: Path, num_workers: int, progress: bool, rejected: Path
) -> tuple[list[_Accepted], int]:
    """Check every record; write the rejected ones to a file, return the others and a count."""
    _image_facts.cache_clear()  # an earlier call's images may have changed since
    accepted: list[_Accepted] = []
    first: _Rejected | None = None
    num_rejected = 0
    check = partial(_check_record, kind=kind, root=root)
    results = _in_order(check, iter(records), num_workers)
    # backslashreplace keeps a rejected id that is no valid Unicode as a JSON escape.
    with rejected.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for result in tqdm(results, desc="checking", unit="rec", disable=_quiet(progress)):
            if isinstance(result, _Accepted):
                accepted.append(result)
                continue
            file.write(json.dumps(result._asdict(), ensure_ascii=False) + "\n")
            first = first or result
            num_rejected += 1
    if not accepted:
        if first is None:
            raise ValueError(f"{records.path}: holds no record; give a file that has some.")
        raise ValueError(
            f"{records.path}: all {num_rejected} records were rejected, so there is nothing to "
            f"write; the first, at line {first.line}, because: {first.reason}"
        )
    return accepted, num_rejected


def _in_order(check: partial, items: Iterator, num_workers: int) -> Iterator:
    if num_workers == 1:
        yield from map(check, items)
        return
    # spawn: a forked worker would inherit the lock, and threads of whoever calls this.
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        # Chunks made here: the iterator of imap's own chunks has no time limit.
        chunks = iter(lambda: list(islice(items, _CHUNK)), [])
        results = pool.imap(partial(_check_chunk, check), chunks)
        while True:
            try:
                yield from results.next(timeout=WORKER_TIMEOUT_S)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:  # a pool never reports that a worker was killed
                raise ValueError(
                    f"no record was checked for {WORKER_TIMEOUT_S} s, so a worker was probably "
                    "killed (out of memory?); use fewer workers."
                ) from None


def _check_chunk(check: partial, items: list) -> list[_Accepted | _Rejected]:
    return [check(item) for item in items]


def _check_record(
    item: tuple[int, int, dict | RecordError], kind: str, root: Path
) -> _Accepted | _Rejected:
    line, position, record = item
    try:
        if isinstance(record, RecordError):
            raise record
        parsed = _PARSERS[kind](record)
        facts = [_image_facts(str(root / image), image) for image in parsed.images]
    except RecordError as error:
        source_id = record.get("id") if isinstance(record, dict) else None
        return _Rejected(line, source_id if isinstance(source_id, str | int) else None, str(error))
    digests = [digest for digest, _ in facts]
    key = _group_key(parsed, digests) if kind == "meta" else None
    return _Accepted(position, [size for _, size in facts], digests, key)


def _group_key(record: TrainingRecord, digests: list[bytes]) -> str | bytes:
    """What the solutions of one question share: the id, else image bytes and question text."""
    if record.source_id not in ("", "-1"):
        return record.source_id
    human = next(turn["value"] for turn in record.conversations if turn["from"] == "human")
    question = human.partition(SOLUTION_MARK)[0].strip()
    return hashlib.sha256(b"".join(digests) + question.encode("utf-8")).digest()


@lru_cache(maxsize=4096)  # solutions of one question share an image, and decoding it is the cost
def _image_facts(path: str, shown: str) -> tuple[bytes, tuple[int, int]]:
    """(SHA-256 digest, (width, height)) of an image file; RecordError names it as ``shown``."""
    data, size = read_image(path, shown)
    return hashlib.sha256(data).digest(), size


def _dense_ids(keys: list) -> list[int]:
    """Integers from 0 in order of first appearance; the same integer for equal keys."""
    ids: dict = {}
    return [ids.setdefault(key, len(ids)) for key in keys]


def _row(
    records: JsonRecords,
    kind: str,
    root: Path,
    sample_id: int,
    entry: _Accepted,
    group_ids: list[int] | None,
) -> dict:
    try:
        record = _PARSERS[kind](records.at(entry.position))
        images = [read_image(root / image, image)[0] for image in record.images]
    except RecordError as error:
        raise ValueError(f"{records.path}: changed while being sharded: {error}") from error
    if [hashlib.sha256(data).digest() for data in images] != entry.image_digests:
        raise ValueError(
            f"{records.path}: an image of {record.images} changed while being sharded; run again."
        )
    row = {
        "sample_id": sample_id,
        "source_id": record.source_id,
        "dataset": record.dataset,
        "conversations": json.dumps(record.conversations, ensure_ascii=False),
        "images": images,
        "image_sizes": entry.image_sizes,
    }
    if isinstance(record, MetaRecord):
        row["group_id"] = group_ids[sample_id]
        row["true_false"] = record.true_false
        row["response"] = record.response
    return row


def _write_shard(path: Path, schema: pa.Schema, rows: Iterator[dict], bar: tqdm) -> None:
    buffer: list[dict] = []
    with pq.ParquetWriter(path, schema, **_WRITER_OPTIONS) as writer:

        def flush() -> None:
            table = pa.Table.from_pylist(buffer, schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            bar.update(len(buffer))
            buffer.clear()

        for row in rows:
            buffer.append(row)
            if len(buffer) == ROW_GROUP_ROWS:
                flush()
        if buffer:
            flush()


def _quiet(progress: bool) -> bool | None:
    return None if progress else True  # None: tqdm stays silent unless it writes to a terminal


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.shard",
        description="Check training and meta records, and pack them with their images into the "
        "shard folders OUT/train and OUT/meta that training reads. A record that cannot be taken "
        "is listed with its reason in rejected.jsonl there; nothing is dropped silently.",
        epilog="example: python -m data_tools.shard --train train.json --meta meta.json "
        "--out shards --num_shards 8 --num_workers 4",
    )
    add = parser.add_argument
    add("--train", type=Path, help="training records, a JSON list or JSONL")
    add("--meta", type=Path, help="meta records (with true_false), a JSON list or JSONL")
    add("--out", type=Path, required=True, help="folder to write train/ and meta/ into")
    add(
        "--num_shards",
        type=int,
        default=8,
        help="shards a folder; the number of ranks must divide it (default: 8)",
    )
    add("--meta_num_shards", type=int, help="shards of the meta folder (default: --num_shards)")
    add(
        "--image_root",
        type=Path,
        help="folder that image paths start from (default: the JSON file's own folder)",
    )
    add("--num_workers", type=int, default=1, help="processes that check images (default: 1)")
    add("--overwrite", action="store_true", help="replace shard folders that are there already")
    args = parser.parse_args(argv)
    jobs = [
        (args.train, args.out / "train", "training", args.num_shards),
        (args.meta, args.out / "meta", "meta", args.meta_num_shards or args.num_shards),
    ]
    jobs = [job for job in jobs if job[0] is not None]
    if not jobs:
        parser.error("give --train, --meta or both")
    try:
        for _, folder, _, _ in jobs:  # before the work on the first, not after it
            refuse_existing(folder, args.overwrite)
        for source, folder, kind, num_shards in jobs:
            shard_file(
                source,
                folder,
                kind,
                num_shards,
                image_root=args.image_root,
                num_workers=args.num_workers,
                overwrite=args.overwrite,
            )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
