"""Folders that appear only when they are complete, and work that a killed run leaves to the next.

A run works in ``<out>.partial`` beside its output. What it has finished there is kept with its
SHA-256, so that a run of the same job goes on from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from dreamprm_dist.data.shards import MANIFEST
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import (
    LOCK,
    file_sha256,
    in_use,
    json_line,
    this_process,
    whole_file,
    write_whole,
)

_JOB = "job.json"


def refuse_existing(out_dir: Path, overwrite: bool) -> None:
    """Raise InputError when something is there that must not be replaced."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not (out_dir / MANIFEST).is_file():
        raise InputError(f"{out_dir}: exists and is no shard folder; choose another place.")
    if not overwrite:
        raise InputError(
            f"{out_dir}: already holds shards; leave out their source to keep them, or pass "
            "--overwrite (to make: OVERWRITE=1) to replace them."
        )


def work_folder(out_dir: Path) -> Path:
    """The folder that a run works in until ``out_dir`` is complete."""
    return out_dir.with_name(f"{out_dir.name}.partial")


def claim_folder(out_dir: Path, overwrite: bool, job: dict) -> tuple[Path, int]:
    """Take over the work folder of a killed run of the same job, or make an empty one.

    Args:
        job: all that the finished pieces depend on, as JSON.

    Returns:
        The folder and a descriptor that holds its lock: the system drops the lock when the run
        dies, which is how a killed run's folder is told from a live one's.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = work_folder(out_dir)
    try:
        lock = _lock(work)
    except BlockingIOError:
        try:
            holder = (work / LOCK).read_text(encoding="utf-8")
        except FileNotFoundError:  # it has only just begun
            holder = ""
        raise in_use(out_dir, holder) from None
    try:  # only now, for another run may have finished a moment ago
        for old in sorted(out_dir.parent.glob(f"{out_dir.name}.old-*")):
            if out_dir.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:  # killed between the two renames of `move_into_place`
                old.rename(out_dir)
        refuse_existing(out_dir, overwrite)
    except (InputError, OSError):
        with contextlib.suppress(OSError):  # it holds what a killed run has finished
            work.rmdir()
        os.close(lock)
        raise
    (work / LOCK).write_text(this_process(), encoding="utf-8")
    if _read_note(work / _JOB) != job:
        for path in set(work.iterdir()) - {work / LOCK}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_whole(work / _JOB, json_line(job))
    return work, lock


def _lock(folder: Path) -> int:
    """Make the folder where it is not, and lock it."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the run that had it has just removed it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def make_once(path: Path, note: Path, make: Callable[[Path], dict]) -> dict:
    """Make a file, unless an earlier run finished it and it still has the SHA-256 of then.

    Args:
        note: where its hash is kept, and what ``make`` returned.
        make: writes the file at the place that it is given.

    Returns:
        What ``make`` returned, with the file's ``sha256``.
    """
    noted = _read_note(note)
    if noted is not None and path.is_file() and file_sha256(path) == noted["sha256"]:
        return noted
    # A name of its own: a killed run's worker may still be writing.
    own = note.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with whole_file(path, own) as unfinished:
        noted = {**make(unfinished), "sha256": file_sha256(unfinished)}
    with whole_file(note, own) as unfinished:
        unfinished.write_text(json_line(noted))
    return noted


def _read_note(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def move_into_place(finished: Path, out_dir: Path) -> None:
    """Rename ``finished`` to ``out_dir``; an old folder there is kept aside until that is done."""
    old = None
    if out_dir.exists() and any(out_dir.iterdir()):
        old = out_dir.with_name(f"{out_dir.name}.old-{secrets.token_hex(4)}")
        out_dir.rename(old)
    try:
        finished.rename(out_dir)
    except OSError:
        if old is not None:
            old.rename(out_dir)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
