"""Folders that appear only when they are complete, whatever kills the run that writes them."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from dreamprm_dist.data.shards import MANIFEST


def refuse_existing(out_dir: Path, overwrite: bool) -> None:
    """Raise ValueError when something is there that must not be replaced."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not (out_dir / MANIFEST).is_file():
        raise ValueError(f"{out_dir}: exists and is no shard folder; choose another place.")
    if not overwrite:
        raise ValueError(f"{out_dir}: already holds shards; pass --overwrite to replace them.")


def claim_folder(out_dir: Path, overwrite: bool) -> tuple[Path, int]:
    """Clear up after killed runs and make this run's temporary folder.

    Returns the folder and a descriptor that holds its lock: the system drops the lock when the
    run dies, which is how a killed run's folder is told from a live one's.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    siblings = sorted(out_dir.parent.iterdir())
    for leftover in (p for p in siblings if p.name.startswith(f"{out_dir.name}.tmp-")):
        try:
            os.close(_lock(leftover))
        except BlockingIOError:
            raise ValueError(f"{out_dir}: another run is writing it; wait for its end.") from None
        shutil.rmtree(leftover)
    for old in (p for p in siblings if p.name.startswith(f"{out_dir.name}.old-")):
        if out_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames of `move_into_place`
            old.rename(out_dir)
    refuse_existing(out_dir, overwrite)
    tmp = out_dir.with_name(f"{out_dir.name}.tmp-{secrets.token_hex(4)}")
    tmp.mkdir()
    return tmp, _lock(tmp)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def move_into_place(tmp: Path, out_dir: Path) -> None:
    """Rename ``tmp`` to ``out_dir``; an old folder there is kept aside until that is done."""
    old = None
    if out_dir.exists() and any(out_dir.iterdir()):
        old = out_dir.with_name(f"{out_dir.name}.old-{secrets.token_hex(4)}")
        out_dir.rename(old)
    try:
        tmp.rename(out_dir)
    except OSError:
        if old is not None:
            old.rename(out_dir)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
