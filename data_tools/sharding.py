"""A shard folder in the making: a source is checked as a whole, then its shards are written.

The source is cut into blocks of lines. First every block is checked and its images are re-encoded,
then the accepted records are numbered, then the shards are put together from the blocks; both by
any number of workers. Every byte written depends on the input alone, and a run that was killed
goes on where it was when it is started again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL
import pyarrow as pa
from tqdm import tqdm

from data_tools.folders import claim_folder, move_into_place, refuse_existing, work_folder
from data_tools.reencode import ENCODING
from data_tools.shard_pieces import STEP_LABELS, Job, Shard, find_blocks, make_block, make_shard
from data_tools.source_kind import refuse_other_files
from data_tools.workers import InOrder
from dreamprm_dist.data.json_records import load_json_list, starts_with_bracket
from dreamprm_dist.data.shards import FORMAT_VERSION, MANIFEST, REJECTED, SCHEMAS
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import file_sha256, refuse_overwriting

logger = logging.getLogger(__name__)

_SHOWN_REJECTED = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A shard folder to make, refused where it cannot be made.

    Attributes:
        source: a JSON list or JSONL file.
        out_dir: the shard folder.
        kind: "training" or "meta".
        num_shards: the number of shards.
        or_fewer: a meta file with fewer questions gets the largest divisor of ``num_shards`` that
            they fill.
        image_root: where image paths start, by default the source's own folder.
        limit: take no more than so many records, the first ones.
        overwrite: replace a finished folder.
        dry_run: check and count, and write nothing.

    Raises:
        FileNotFoundError: no such source.
        InputError: ``out_dir`` is taken, the source lies in it or is no file of records.
    """

    source: Path
    out_dir: Path
    kind: str
    num_shards: int
    or_fewer: bool = False
    image_root: Path | None = None
    limit: int | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SCHEMAS:
            raise InputError(f"unknown kind {self.kind!r}; use one of {', '.join(SCHEMAS)}.")
        if self.num_shards < 1:
            raise InputError(f"the number of shards must be 1 or more, not {self.num_shards}.")
        refuse_other_files(self.source, self.kind)
        out = self.out_dir.resolve()
        leftovers = out.parent.glob(f"{out.name}.old-*")  # of a killed run, and cleared
        refuse_overwriting([self.out_dir, work_folder(out), *leftovers], [self.source, self.root])
        refuse_existing(self.out_dir, self.overwrite)

    @property
    def root(self) -> Path:
        """The folder that image paths start from."""
        return (self.source.parent if self.image_root is None else self.image_root).resolve()

    def manifest(self) -> dict:
        """The part of the manifest that does not depend on what is in the records."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "num_shards": self.num_shards,
            "source": {"path": self.source.name, "sha256": file_sha256(self.source)},
            "limit": self.limit,
        }


@dataclass
class Checked:
    """A source that was checked.

    Attributes:
        manifest: as it will be, but for the shards' files.
        rejected: an entry for each of the first rejected records.
    """

    plan: Plan
    manifest: dict
    rejected: list[dict]
    _job: Job
    _block_starts: list[int]  # the first sample_id of each block
    _group_ids: list[int]  # one per record of a meta file; empty for a training file

    def write(self, in_order: InOrder = map, progress: bool = True) -> None:
        """Write the shards and move the folder into place; completes the manifest."""
        make, entries = partial(make_shard, self._job, self._block_starts), []
        with _bar(self.manifest["num_rows"], "writing", progress) as bar:
            for entry in in_order(make, self._shards()):
                entries.append(entry)
                bar.update(entry["rows"])
        self.manifest["shards"] = entries
        text = json.dumps(self.manifest, indent=2) + "\n"
        (self._job.shards / MANIFEST).write_text(text, encoding="utf-8")
        move_into_place(self._job.shards, self.plan.out_dir.resolve())

    def _shards(self) -> Iterator[Shard]:
        group_ids, num_rows = self._group_ids, self.manifest["num_rows"]
        num_shards = self.manifest["num_shards"]
        if not group_ids:
            for index in range(num_shards):
                yield Shard(index, range(index, num_rows, num_shards), None)
            return
        # A stable sort: within a question the file's order stays.
        in_groups = sorted(range(num_rows), key=group_ids.__getitem__)
        for index in range(num_shards):
            sample_ids = [i for i in in_groups if group_ids[i] % num_shards == index]
            yield Shard(index, sample_ids, [group_ids[i] for i in sample_ids])


@contextmanager
def checked(plan: Plan, in_order: InOrder = map, progress: bool = True) -> Iterator[Checked]:
    """Check all records of a source; what is given can be written until the block ends.

    Until then the work lies in ``<out_dir>.partial``, where a later call with the same plan goes on
    from it; images that changed since are not noticed. Memory does not grow with the number of
    training records; of a meta file one number per record is held.

    Raises:
        InputError: nothing accepted, no step labelled, fewer records (questions) than shards,
            ``out_dir`` taken, or the source changed meanwhile.
    """
    before, manifest = plan.source.stat(), plan.manifest()
    with _work_folder(plan, manifest) as work:
        lines = _as_jsonl(plan.source, work)
        job = Job(plan.source.name, lines, plan.kind, plan.root, work, plan.dry_run)
        job.blocks.mkdir(exist_ok=True)
        job.shards.mkdir(exist_ok=True)
        result = _check(plan, manifest, job, in_order, progress)
        after = plan.source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{plan.source}: changed while it was being sharded; run again.")
        yield result


@contextmanager
def _work_folder(plan: Plan, manifest: dict) -> Iterator[Path]:
    if plan.dry_run:
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    # The libraries that encode are part of it: their next release may write other bytes.
    versions = {"pillow": PIL.__version__, "pyarrow": pa.__version__, "images": ENCODING}
    job = {**manifest, "image_root": str(plan.root), "versions": versions}
    work, lock = claim_folder(plan.out_dir.resolve(), plan.overwrite, job)
    try:
        yield work
        shutil.rmtree(work)
    except InputError:  # the input must change first, and then it is another job
        shutil.rmtree(work)
        raise
    finally:
        os.close(lock)


def _as_jsonl(source: Path, work: Path) -> Path:
    """The source, or a JSON list's entries as lines, so that every worker can read its own."""
    if not starts_with_bracket(source):
        return source.resolve()
    lines = work / "records.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in load_json_list(source))
    return lines


def _check(plan: Plan, manifest: dict, job: Job, in_order: InOrder, progress: bool) -> Checked:
    """Check every record; write the rejected ones to a file and count the others."""
    blocks = list(find_blocks(job.lines, plan.limit))
    if not blocks:
        raise InputError(f"{plan.source}: holds no record; give a file that has some.")
    rows, group_ids = [], []
    first_rejected: list[dict] = []
    counts: Counter[str] = Counter()
    steps = Counter(dict.fromkeys(STEP_LABELS, 0))
    group_of: dict[str, int] = {}
    total = sum(block.num_records for block in blocks)
    with (
        (job.shards / REJECTED).open("w", encoding="utf-8", newline="\n") as file,
        _bar(total, "checking", progress) as bar,
    ):
        for made in in_order(partial(make_block, job), blocks):
            rows.append(made["rows"])
            group_ids += [group_of.setdefault(key, len(group_of)) for key in made["group_keys"]]
            for entry in made["rejected"]:
                file.write(_json_text(entry) + "\n")
            first_rejected += made["rejected"][: _SHOWN_REJECTED - len(first_rejected)]
            counts["rejected"] += len(made["rejected"])
            counts.update(
                {key: made[key] for key in ("unlabelled", "counted_steps", "right", "on_white")}
            )
            steps.update(made["steps"])
            bar.update(made["rows"] + len(made["rejected"]))
    *starts, num_rows = accumulate(rows, initial=0)
    is_meta = plan.kind == "meta"
    manifest |= {
        "num_rows": num_rows,
        "num_groups": len(group_of) if is_meta else None,
        "num_rejected": counts["rejected"],
        "num_on_white": counts["on_white"],
        "num_steps": dict(steps),
        "num_counted_steps": counts["counted_steps"],
        "num_unlabelled": counts["unlabelled"],
        "num_right": counts["right"] if is_meta else None,
    }
    if not num_rows:
        raise InputError(
            f"{plan.source}: all {total} records were rejected, so there is nothing to write; the "
            f"first, at line {first_rejected[0]['line']}, because: {first_rejected[0]['reason']}"
        )
    _refuse_without_labels(plan, manifest)
    manifest["num_shards"] = _fitting_shards(plan, manifest)
    return Checked(plan, manifest, first_rejected, job, starts, group_ids)


def _json_text(entry: dict) -> str:
    """JSON that reads well, but for an id that is no valid Unicode and stays escaped."""
    text = json.dumps(entry, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _refuse_without_labels(plan: Plan, manifest: dict) -> None:
    """Refuse training data that teach nothing, and warn of data that teach one answer alone."""
    steps, num_rows = manifest["num_steps"], manifest["num_rows"]
    if plan.kind == "meta":
        if manifest["num_right"] in (0, num_rows):
            what = "right" if manifest["num_right"] else "wrong"
            logger.warning(
                "%s: all %d solutions are %s; a meta set needs both right and wrong ones",
                *(plan.source, num_rows, what),
            )
        return
    if not steps["+"] + steps["-"]:
        raise InputError(
            f"{plan.source}: no step of its {num_rows} records is labelled, so nothing could be "
            "learned from them; label steps + or -, or give a meta file as --meta."
        )
    if not (steps["+"] and steps["-"]):
        logger.warning(
            "%s: every labelled step is %s; a PRM learns nothing but this answer from them",
            *(plan.source, "+" if steps["+"] else "-"),
        )
    if count := manifest["num_unlabelled"]:
        logger.warning(
            "%s: %d of %d records have no labelled step, and nothing is learned from them",
            *(plan.source, count, num_rows),
        )


def _fitting_shards(plan: Plan, manifest: dict) -> int:
    """The number of shards, none of them empty."""
    what = "accepted records" if plan.kind == "training" else "questions"
    count, wanted = manifest["num_groups"] or manifest["num_rows"], plan.num_shards
    if count >= wanted:
        return wanted
    fitting = max(n for n in range(1, count + 1) if wanted % n == 0)
    if not plan.or_fewer:
        raise InputError(
            f"{plan.source}: {count} {what} cannot fill {wanted} shards; use at most {count} "
            f"shards, such as {fitting}, which divides {wanted}."
        )
    logger.info(
        "%s: %d %s cannot fill %d shards; it gets %d", plan.source, count, what, wanted, fitting
    )
    return fitting


def _bar(total: int, what: str, progress: bool) -> tqdm:
    # None: silent unless it writes to a terminal.
    return tqdm(total=total, desc=what, unit="rec", disable=None if progress else True)
