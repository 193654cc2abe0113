"""Turn training and meta records with their images into shard folders.

    python -m data_tools.shard --train train.jsonl --meta meta.jsonl --out shards --num_shards 64

Both files are checked as a whole before a shard of either is written; see `sharding`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from contextlib import ExitStack
from pathlib import Path

from data_tools.folders import work_folder
from data_tools.record_files import add_limit
from data_tools.sharding import Checked, Plan, checked
from data_tools.workers import InOrder, start_workers
from dreamprm_dist.data.json_records import require_file
from dreamprm_dist.data.sampler import ranks_that_work
from dreamprm_dist.data.shards import BELOW, FORMAT_VERSION, MANIFEST, REJECTED
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import file_sha256
from dreamprm_dist.flags import CommandParser, run

logger = logging.getLogger(__name__)


def shard_file(
    source: str | Path,
    out_dir: str | Path,
    kind: str,
    num_shards: int,
    image_root: str | Path | None = None,
    progress: bool = True,
    overwrite: bool = False,
    in_order: InOrder = map,
    or_fewer: bool = False,
) -> dict:
    """Write one shard folder from a JSON list or JSONL file and return its manifest.

    Training: ``sample_id`` is dense in file order over the accepted records, the shard is
    ``sample_id % num_shards``, and row j of shard s has sample_id ``j * num_shards + s``.
    Meta: a question's solutions share a dense ``group_id`` in order of first appearance, the
    shard is ``group_id % num_shards``, rows are ordered by (group_id, file order).

    Args:
        in_order: how a function is applied to many items, such as what `start_workers` gives.
        others: as in `Plan`.

    Raises:
        FileNotFoundError, InputError: as `Plan` and `checked`.
    """
    plan = Plan(
        source=Path(source),
        out_dir=Path(out_dir),
        kind=kind,
        num_shards=num_shards,
        or_fewer=or_fewer,
        image_root=None if image_root is None else Path(image_root),
        overwrite=overwrite,
    )
    with checked(plan, in_order, progress) as found:
        found.write(in_order, progress)
    return found.manifest


def cached_shards(
    source: str | Path, kind: str, num_shards: int, image_root: str | Path | None = None
) -> Path:
    """The shard folder of a raw JSON file, built once in ``.shards/`` beside it.

    A meta file with fewer questions than shards gets fewer shards, as with `Plan.or_fewer`. The
    folder's name holds the source's SHA-256, the format (and a hash of ``image_root`` when given),
    so a changed file is sharded anew; images changed behind an unchanged file are not noticed.

    Raises:
        FileNotFoundError, InputError: as `shard_file`.
    """
    source = require_file(source)
    name = f"{source.stem}-{kind}-{num_shards}-{file_sha256(source)[:12]}-v{FORMAT_VERSION}"
    if image_root is not None:
        name += "-" + hashlib.sha256(os.fsencode(Path(image_root).resolve())).hexdigest()[:8]
    folder = source.parent / ".shards" / name
    if not (folder / MANIFEST).is_file():
        try:
            manifest = shard_file(
                source, folder, kind, num_shards, image_root, or_fewer=kind == "meta"
            )
            logger.info(summary(folder, manifest))
        except InputError:
            if not (folder / MANIFEST).is_file():  # else another run has finished in between
                raise
    return folder


def summary(folder: Path, manifest: dict) -> str:
    """What a manifest says, for whoever ran the command."""
    rows, rejected = manifest["num_rows"], manifest["num_rejected"]
    limit, num_shards = manifest["limit"], manifest["num_shards"]
    facts = {
        "source": manifest["source"]["path"] + (f", first {limit} records" if limit else ""),
        "records": f"{rows} taken, {rejected} rejected",
        "steps": ", ".join(f"{count} {label}" for label, count in manifest["num_steps"].items()),
        "ranks": f"{ranks_that_work(num_shards)} can share it",
    }
    if counted := manifest["num_counted_steps"]:
        facts["steps"] += f"; {counted} with roll-outs"
    if manifest["kind"] == "meta":
        right = manifest["num_right"]
        facts["questions"] = f"{manifest['num_groups']}; {right} right, {rows - right} wrong"
    elif manifest["num_unlabelled"]:
        facts["steps"] += f"; {manifest['num_unlabelled']} records without any label"
    if on_white := manifest["num_on_white"]:
        facts["images"] = f"{on_white} have an image with transparency, now on white"
    if rejected:
        facts["records"] += f" (see {folder / REJECTED})"
    head = f"{folder}: {rows} {manifest['kind']} records in {num_shards} shards"
    return "\n".join([head, *(f"  {name + ':':10} {fact}" for name, fact in facts.items())])


def _plans(args: argparse.Namespace) -> list[Plan]:
    """What to make, the meta set first: it is checked soon, and may be the one that is wrong."""
    if args.train and args.meta and args.meta.exists() and args.meta.samefile(args.train):
        raise InputError(f"--train and --meta are one file, {args.meta}; a meta set is held apart.")
    meta_shards = args.num_shards if args.meta_num_shards is None else args.meta_num_shards
    jobs = [("meta", args.meta, meta_shards), ("training", args.train, args.num_shards)]
    folders = {kind: args.out / name for kind, name in BELOW.items()}
    jobs = [job for job in jobs if job[1] is not None]
    # Of a command that was killed in its second job the first one is done.
    if not args.overwrite and any(work_folder(folders[kind]).exists() for kind, _, _ in jobs):
        jobs = [job for job in jobs if not (folders[job[0]] / MANIFEST).is_file()]
    return [
        Plan(
            source=source,
            out_dir=folders[kind],
            kind=kind,
            num_shards=num_shards,
            or_fewer=kind == "meta" and args.meta_num_shards is None,
            image_root=args.image_root,
            limit=args.limit,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
        )
        for kind, source, num_shards in jobs
    ]


def _check_all_then_write(plans: list[Plan], in_order: InOrder) -> None:
    with ExitStack() as stack:
        found: list[tuple[Checked, ExitStack]] = []
        for plan in plans:
            own = stack.enter_context(ExitStack())
            found.append((own.enter_context(checked(plan, in_order)), own))
        for result, own in found:
            if result.plan.dry_run:
                print(f"Would be written:\n{summary(result.plan.out_dir, result.manifest)}")
                for entry in result.rejected:
                    print(f"    line {entry['line']} ({entry['id']}): {entry['reason']}")
            else:
                result.write(in_order)
                own.close()
                print(summary(result.plan.out_dir, result.manifest))
    num_shards = [result.manifest["num_shards"] for result, _ in found]
    if len(set(num_shards)) > 1:
        print(f"{ranks_that_work(*num_shards)} can train on both")


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = CommandParser(
        prog="python -m data_tools.shard",
        description="Check training and meta records, and pack them with their images into the "
        "shard folders OUT/train and OUT/meta that training reads. A record that cannot be taken "
        "is listed with its reason in rejected.jsonl there; nothing is dropped silently. A run "
        "that was killed goes on where it was when it is started again. Under mpirun the ranks "
        "are the workers, on as many machines as see the same files.",
        epilog="example: python -m data_tools.shard --train train.jsonl --meta meta.jsonl "
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
    add(
        "--meta_num_shards",
        type=int,
        help="shards of the meta folder (default: --num_shards, or with fewer questions its "
        "largest divisor that they fill)",
    )
    add(
        "--image_root",
        type=Path,
        help="folder that image paths start from (default: the JSON file's own folder)",
    )
    add("--workers", type=int, default=1, help="processes on this machine (default: 1)")
    add_limit(parser)
    add("--dry_run", action="store_true", help="check and count everything, and write nothing")
    add("--overwrite", action="store_true", help="replace shard folders that are there already")
    args = parser.parse_args(argv)
    if not (args.train or args.meta):
        parser.error("give --train, --meta or both")
    with start_workers(args.workers) as in_order:
        if in_order is not None:  # else one of mpirun's other ranks, which has done its work
            _check_all_then_write(_plans(args), in_order)


if __name__ == "__main__":
    run(main)
