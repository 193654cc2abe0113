"""Turn training and meta records with their images into shard folders.

    python -m data_tools.shard --train train.jsonl --meta meta.jsonl --out shards --num_shards 64

The source is cut into blocks of lines. First every block is checked and its images are re-encoded,
then the accepted records are numbered, then the shards are put together from the blocks; both by
any number of workers. Every byte written depends on the input alone, and a run that was killed
goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import PIL
import pyarrow as pa
from tqdm import tqdm

from data_tools.folders import claim_folder, move_into_place, refuse_existing, work_folder
from data_tools.reencode import ENCODING
from data_tools.shard_pieces import Job, Shard, find_blocks, make_block, make_shard
from data_tools.workers import InOrder, start_workers
from dreamprm_dist.data.schema import load_json_list, require_file, starts_with_bracket
from dreamprm_dist.data.shards import FORMAT_VERSION, MANIFEST, REJECTED, SCHEMAS
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import file_sha256
from dreamprm_dist.flags import run

logger = logging.getLogger(__name__)


class _Accepted(NamedTuple):
    block_starts: list[int]  # the first sample_id of each block
    num_records: int
    group_ids: list[int]  # one per record of a meta file; empty for a training file
    num_rejected: int
    num_on_white: int


def shard_file(
    source: str | Path,
    out_dir: str | Path,
    kind: str,
    num_shards: int,
    image_root: str | Path | None = None,
    progress: bool = True,
    overwrite: bool = False,
    in_order: InOrder = map,
) -> dict:
    """Write one shard folder from a JSON list or JSONL file and return its manifest.

    Training: ``sample_id`` is dense in file order over the accepted records, the shard is
    ``sample_id % num_shards``, and row j of shard s has sample_id ``j * num_shards + s``.
    Meta: a question's solutions share a dense ``group_id`` in order of first appearance, the
    shard is ``group_id % num_shards``, rows are ordered by (group_id, file order).

    Image paths are relative to ``image_root``, by default the source's own folder. The folder
    appears at ``out_dir`` only when it is complete; ``overwrite`` replaces a finished one. Until
    then the work lies in ``<out_dir>.partial``, where a later call with the same arguments goes on
    from it; images that changed since are not noticed. Memory does not grow with the number of
    training records; of a meta file one number per record is held.

    Args:
        in_order: how a function is applied to many items, such as what `start_workers` gives.

    Raises:
        FileNotFoundError: no such source.
        InputError: nothing accepted, fewer records (questions) than shards, ``out_dir`` taken,
            or the source changed meanwhile.
    """
    source, out_dir = require_file(source), Path(out_dir).resolve()
    if kind not in SCHEMAS:
        raise InputError(f"unknown kind {kind!r}; use one of {', '.join(SCHEMAS)}.")
    if num_shards < 1:
        raise InputError("the number of shards must be 1 or more.")
    root = (source.parent if image_root is None else Path(image_root)).resolve()
    before = source.stat()
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "num_shards": num_shards,
        "source": {"path": source.name, "sha256": file_sha256(source)},
    }
    # The libraries that encode are part of it: their next release may write other bytes.
    versions = {"pillow": PIL.__version__, "pyarrow": pa.__version__, "images": ENCODING}
    work, lock = claim_folder(
        out_dir, overwrite, {**manifest, "image_root": str(root), "versions": versions}
    )
    try:
        job = Job(_as_jsonl(source, work), kind, root, work)
        job.blocks.mkdir(exist_ok=True)
        job.shards.mkdir(exist_ok=True)
        accepted = _make_blocks(job, source, in_order, progress)
        manifest |= {
            "num_rows": accepted.num_records,
            "num_groups": max(accepted.group_ids) + 1 if accepted.group_ids else None,
            "num_rejected": accepted.num_rejected,
            "num_on_white": accepted.num_on_white,
        }
        _refuse_empty_shards(source, manifest)
        manifest["shards"] = _make_shards(job, num_shards, accepted, in_order, progress)
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{source}: changed while it was being sharded; run again.")
        (job.shards / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        move_into_place(job.shards, out_dir)
        shutil.rmtree(work)
    except InputError:  # the input must change first, and then it is another job
        shutil.rmtree(work)
        raise
    finally:
        os.close(lock)
    return manifest


def _summary(out_dir: Path, manifest: dict) -> str:
    rejected, on_white = manifest["num_rejected"], manifest["num_on_white"]
    return (
        f"{out_dir}: {manifest['num_rows']} {manifest['kind']} records in "
        f"{manifest['num_shards']} shards, {rejected} rejected"
        + (f" (see {out_dir / REJECTED})" if rejected else "")
        + (f"; {on_white} have an image with transparency, now on white" if on_white else "")
    )


def cached_shards(
    source: str | Path, kind: str, num_shards: int, image_root: str | Path | None = None
) -> Path:
    """The shard folder of a raw JSON file, built once in ``.shards/`` beside it.

    The folder's name holds the source's SHA-256 (and a hash of ``image_root`` when given), so a
    changed file is sharded anew; images changed behind an unchanged file are not noticed.

    Raises:
        FileNotFoundError, InputError: as `shard_file`.
    """
    source = require_file(source)
    name = f"{source.stem}-{kind}-{num_shards}-{file_sha256(source)[:12]}"
    if image_root is not None:
        name += "-" + hashlib.sha256(os.fsencode(Path(image_root).resolve())).hexdigest()[:8]
    folder = source.parent / ".shards" / name
    if not (folder / MANIFEST).is_file():
        try:
            manifest = shard_file(source, folder, kind, num_shards, image_root)
            logger.info(_summary(folder, manifest))
        except InputError:
            if not (folder / MANIFEST).is_file():  # else another run has finished in between
                raise
    return folder


def _as_jsonl(source: Path, work: Path) -> Path:
    """The source, or a JSON list's entries as lines, so that every worker can read its own."""
    if not starts_with_bracket(source):
        return source.resolve()
    lines = work / "records.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in load_json_list(source))
    return lines


def _make_blocks(job: Job, source: Path, in_order: InOrder, progress: bool) -> _Accepted:
    """Check every record; write the rejected ones to a file and say where the others are."""
    blocks = list(find_blocks(job.lines))
    if not blocks:
        raise InputError(f"{source}: holds no record; give a file that has some.")
    rows, group_ids, num_rejected, num_on_white, first = [], [], 0, 0, ""
    group_of: dict[str, int] = {}
    total = sum(block.num_records for block in blocks)
    with (
        (job.shards / REJECTED).open("w", encoding="utf-8", newline="\n") as file,
        tqdm(total=total, desc="checking", unit="rec", disable=_quiet(progress)) as bar,
    ):
        for made in in_order(partial(make_block, job), blocks):
            rows.append(made["rows"])
            group_ids += [group_of.setdefault(key, len(group_of)) for key in made["group_keys"]]
            for entry in made["rejected"]:
                file.write(_json_text(entry) + "\n")
                first = first or f"at line {entry['line']}, because: {entry['reason']}"
            num_rejected += len(made["rejected"])
            num_on_white += made["on_white"]
            bar.update(made["rows"] + len(made["rejected"]))
    if not any(rows):
        raise InputError(
            f"{source}: all {num_rejected} records were rejected, so there is nothing to write; "
            f"the first, {first}"
        )
    *starts, num_records = accumulate(rows, initial=0)
    return _Accepted(starts, num_records, group_ids, num_rejected, num_on_white)


def _json_text(entry: dict) -> str:
    """JSON that reads well, but for an id that is no valid Unicode and stays escaped."""
    text = json.dumps(entry, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _refuse_empty_shards(source: Path, manifest: dict) -> None:
    what = "accepted records" if manifest["kind"] == "training" else "questions"
    count = manifest["num_groups"] or manifest["num_rows"]
    if count < manifest["num_shards"]:
        raise InputError(
            f"{source}: {count} {what} cannot fill {manifest['num_shards']} shards; use at most "
            f"{count} shards."
        )


def _make_shards(
    job: Job, num_shards: int, accepted: _Accepted, in_order: InOrder, progress: bool
) -> list[dict]:
    made = []
    make = partial(make_shard, job, accepted.block_starts)
    total = accepted.num_records
    with tqdm(total=total, desc="writing", unit="rec", disable=_quiet(progress)) as bar:
        for entry in in_order(make, _shards(num_shards, accepted)):
            made.append(entry)
            bar.update(entry["rows"])
    return made


def _shards(num_shards: int, accepted: _Accepted) -> Iterator[Shard]:
    group_ids = accepted.group_ids
    if not group_ids:
        for index in range(num_shards):
            yield Shard(index, range(index, accepted.num_records, num_shards), None)
        return
    # A stable sort: within a question the file's order stays.
    in_groups = sorted(range(accepted.num_records), key=group_ids.__getitem__)
    for index in range(num_shards):
        sample_ids = [i for i in in_groups if group_ids[i] % num_shards == index]
        yield Shard(index, sample_ids, [group_ids[i] for i in sample_ids])


def _quiet(progress: bool) -> bool | None:
    return None if progress else True  # None: tqdm stays silent unless it writes to a terminal


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.shard",
        description="Check training and meta records, and pack them with their images into the "
        "shard folders OUT/train and OUT/meta that training reads. A record that cannot be taken "
        "is listed with its reason in rejected.jsonl there; nothing is dropped silently. A run "
        "that was killed goes on where it was when it is started again. Under mpirun the ranks "
        "are the workers, on as many machines as see the same files.",
        epilog="example: python -m data_tools.shard --train train.json --meta meta.json "
        "--out shards --num_shards 8 --workers 4",
    )
    add = parser.add_argument
    add("--train", type=Path, help="training records, a JSON list or JSONL")
    add("--meta", type=Path, help="meta records (with true_false), a JSON list or JSONL")
    add("--out", type=Path, required=True, help="folder to write train/ and meta/ into")
    add(
        "--num_shards",
        type=int,
        default=8,
        help="shards per folder; the number of ranks must divide it (default: 8)",
    )
    add("--meta_num_shards", type=int, help="shards of the meta folder (default: --num_shards)")
    add(
        "--image_root",
        type=Path,
        help="folder that image paths start from (default: the JSON file's own folder)",
    )
    add("--workers", type=int, default=1, help="processes on this machine (default: 1)")
    add("--overwrite", action="store_true", help="replace shard folders that are there already")
    args = parser.parse_args(argv)
    jobs = [
        (args.train, args.out / "train", "training", args.num_shards),
        (args.meta, args.out / "meta", "meta", args.meta_num_shards or args.num_shards),
    ]
    jobs = [job for job in jobs if job[0] is not None]
    if not jobs:
        parser.error("give --train, --meta or both")
    with start_workers(args.workers) as in_order:
        if in_order is None:  # one of mpirun's other ranks, which has done its work
            return
        if not args.overwrite and any(work_folder(folder).exists() for _, folder, _, _ in jobs):
            jobs = [job for job in jobs if not (job[1] / MANIFEST).is_file()]
        for _, folder, _, _ in jobs:  # before the work on the first, not after it
            refuse_existing(folder, args.overwrite)
        for source, folder, kind, num_shards in jobs:
            manifest = shard_file(
                source,
                folder,
                kind,
                num_shards,
                image_root=args.image_root,
                overwrite=args.overwrite,
                in_order=in_order,
            )
            print(_summary(folder, manifest))


if __name__ == "__main__":
    run(main)
