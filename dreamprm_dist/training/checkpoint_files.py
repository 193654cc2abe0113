"""A checkpoint as files: which are there, whether they are whole, and how they come and go.

A folder under its final name, `iteration-N`, is complete at every moment: it is written and removed
under other names. Whatever was altered in it later is found by the checksums in its manifest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from dreamprm_dist import distributed
from dreamprm_dist.files import file_sha256, flush

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


def iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iteration-{iteration}"


def iterations(folder: Path) -> list[int]:
    """Iterations of the visible checkpoints, newest first."""
    names = (re.fullmatch(r"iteration-(\d+)", path.name) for path in folder.glob("iteration-*"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def files_of(path: Path) -> list[str]:
    """All files below a folder, by their names from there."""
    files = (file for file in path.rglob("*") if not file.is_dir())
    return sorted(file.relative_to(path).as_posix() for file in files)


def clear_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were cut short have left behind."""
    for leftover in [*folder.glob("*.new"), *folder.glob("*.old")]:
        shutil.rmtree(leftover)


def on_all_ranks(write: Callable[[], None], folder: Path) -> None:
    """Run something that writes below a folder; what fails on one rank fails on all.

    Raises:
        OSError: naming the rank, and the space that is left.
    """
    problem = ""
    try:
        write()
    except (OSError, SafetensorError) as error:
        problem = f"rank {distributed.rank()}: {str(error).splitlines()[0]}"
    problems = [found for found in distributed.all_gather_texts(problem) if found]
    if problems:
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            distributed.broadcast_text(
                f"no checkpoint could be saved in {folder}, where {free:.0f} MiB are free "
                f"({problems[0]}); the checkpoints before it are whole: make room and start again"
            )
        )


def flush_share(path: Path, files: list[str]) -> dict[str, str]:
    """Have files on the disk itself; SHA-256 by file. Each rank takes its share of them."""
    share = _share(files)
    for name in share:
        flush(path / name)
    return {name: file_sha256(path / name) for name in share}


def write_manifest(path: Path, checksums: dict[str, str]) -> None:
    manifest = {"format_version": FORMAT_VERSION, "files": checksums}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush(path / MANIFEST)
    flush(path)


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, the same on all ranks; None when it is whole."""
    recorded, problem = {}, None
    if distributed.rank() == 0:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            recorded, found = dict(manifest["files"]), set(files_of(path)) - {MANIFEST}
            if manifest["format_version"] != FORMAT_VERSION:
                problem = f"format_version {manifest['format_version']} is unknown"
            elif odd := sorted(recorded.keys() ^ found):
                problem = f"{odd[0]} is {'missing' if odd[0] in recorded else 'not of it'}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    recorded, problem = json.loads(distributed.broadcast_text(json.dumps([recorded, problem])))
    if problem is None:
        wrong = [name for name in _share(sorted(recorded)) if not _matches(path, name, recorded)]
        parts = distributed.all_gather_texts(json.dumps(wrong))
        wrong = sorted(name for part in parts for name in json.loads(part))
        problem = f"the checksum of {wrong[0]} does not match" if wrong else None
    return problem


def remove(path: Path) -> None:
    """Remove a checkpoint: out of sight first."""
    hidden = path.with_name(path.name + ".old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _share(files: list[str]) -> list[str]:
    return files[distributed.rank() :: distributed.world_size()]


def _matches(path: Path, name: str, recorded: dict[str, str]) -> bool:
    try:
        return file_sha256(path / name) == recorded[name]
    except OSError:
        return False
