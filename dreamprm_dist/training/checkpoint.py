"""Checkpoints, from which a stopped run goes on: `<run>/checkpoints/iteration-N`.

All ranks write into `iteration-N.new`; when every rank has finished, a manifest with the SHA-256 of
every file is added and one rename makes the checkpoint visible. DeepSpeed's own files are pickles:
they are read only after the checksums of the whole folder have been verified.

At the same world size a run goes on bit for bit (on CUDA as far as its kernels repeat themselves).
At another one DeepSpeed's state goes through its universal checkpoint, and the table's rows are
read by their new owners.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import flush
from dreamprm_dist.training.checkpoint_files import (
    clear_leftovers,
    files_of,
    find_damage,
    flush_share,
    iteration_folder,
    iterations,
    on_all_ranks,
    remove,
    write_manifest,
)
from dreamprm_dist.training.engine import Engine

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE = "state.json"
LIBRARIES = ("torch", "deepspeed", "transformers")


class Stateful(Protocol):
    """The interface of a reweighter that a checkpoint needs."""

    def state_dict(self) -> dict[str, Tensor]:
        """`shard-S.*` for each shard S of this rank; everything else is equal on all ranks."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what this rank needs from the states that all ranks have saved."""


@dataclass
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        state: iteration, world_size, settings, global_batch_sizes, library versions and, where it
            was measured, meta_validation_loss, as `state.json` has them.
    """

    path: Path
    state: dict

    @property
    def iteration(self) -> int:
        """Outer iterations done."""
        return self.state["iteration"]


def save_checkpoint(
    run_folder: Path,
    state: dict,
    engine: Engine,
    reweighter: Stateful,
    *,
    keep_last: int,
    keep_best: int = 0,
) -> int:
    """Write a checkpoint on all ranks together, then remove those that are not to be kept.

    Args:
        state: see `Checkpoint`; world size and versions are added.
        keep_last: the newest that stay.
        keep_best: those of the lowest `meta_validation_loss` that stay beside them.

    Returns:
        Bytes of the checkpoint.

    Raises:
        OSError: on all ranks when one could not write; older checkpoints are untouched.
    """
    folder, is_main = run_folder / CHECKPOINTS, distributed.rank() == 0
    final = iteration_folder(folder, state["iteration"])
    new = final.with_name(final.name + ".new")

    def begin() -> None:
        if is_main:
            folder.mkdir(exist_ok=True)
            clear_leftovers(folder)
            new.mkdir()
            described = state | {
                "world_size": distributed.world_size(),
                "versions": library_versions(),
            }
            (new / STATE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def write() -> None:
        engine.save(new / "deepspeed")
        tensors = {f"rng.{name}": value for name, value in _rng_state(engine.device).items()}
        mine = reweighter.state_dict()
        tensors |= {
            f"reweighter.{name}": tensor
            for name, tensor in mine.items()
            if is_main or name.startswith("shard-")
        }
        save_file(tensors, _rank_file(new, distributed.rank()))

    def publish() -> None:
        if is_main:
            write_manifest(new, {k: v for part in parts for k, v in json.loads(part).items()})
            if final.exists():  # damaged: the run went on from an earlier one
                remove(final)
            new.rename(final)
            flush(folder)

    checksums: dict[str, str] = {}
    try:
        on_all_ranks(begin, run_folder)
        on_all_ranks(write, run_folder)
        files = json.loads(distributed.broadcast_text(json.dumps(files_of(new))))
        on_all_ranks(lambda: checksums.update(flush_share(new, files)), run_folder)
        parts = distributed.all_gather_texts(json.dumps(checksums))
        on_all_ranks(publish, run_folder)
    except OSError:
        if is_main:
            shutil.rmtree(new, ignore_errors=True)
        raise
    size = sum((final / name).stat().st_size for name in files)
    distributed.barrier()  # before anything is removed that another rank still looks at
    if is_main:
        # One beyond this iteration is damaged: the run went on from an earlier one.
        found = [i for i in iterations(folder) if i <= state["iteration"]]
        best = sorted(found, key=lambda i: _validation_loss(iteration_folder(folder, i)))
        for i in set(iterations(folder)) - {*found[:keep_last], *best[:keep_best]}:
            remove(iteration_folder(folder, i))
    distributed.barrier()
    return size


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all ranks; None where there is none at all.

    Raises:
        InputError: there are checkpoints, but every one is damaged.
    """
    folder = run_folder / CHECKPOINTS
    found = json.loads(distributed.broadcast_text(json.dumps(iterations(folder))))
    for iteration in found:
        path = iteration_folder(folder, iteration)
        problem = find_damage(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))
        logger.warning("checkpoint %s is damaged and skipped: %s", path, problem)
    if found:
        raise InputError(
            f"no checkpoint in {folder} is whole; choose another --out, or remove the run "
            "folder to start anew"
        )
    return None


def load_checkpoint(checkpoint: Checkpoint, engine: Engine, reweighter: Stateful) -> None:
    """Put all state back on this rank. The checkpoint comes from `newest_checkpoint`."""
    path, saved_by = checkpoint.path, checkpoint.state["world_size"]
    logger.info("resuming from %s", path)
    for name, saved in checkpoint.state["versions"].items():
        if library_versions()[name] != saved:
            logger.warning(
                "%s was made with %s %s, this is %s: results may differ in their last digits",
                *(path, name, saved, library_versions()[name]),
            )
    if saved_by == distributed.world_size():
        engine.load(path / "deepspeed")
    else:
        logger.info("from %d to %d rank(s)", saved_by, distributed.world_size())
        engine.load_universal(path / "deepspeed", path.with_name("universal.new"))
    files = [_rank_file(path, rank) for rank in range(saved_by)]
    reweighter.load_state_dict(SavedTensors(files, "reweighter."))
    # A rank that was not there before takes the generators of one that was.
    rng = SavedTensors([files[distributed.rank() % saved_by]], "rng.")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], engine.device)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide about last digits."""
    return {name: version(name) for name in LIBRARIES}


class SavedTensors(Mapping[str, Tensor]):
    """Tensors of several safetensors files by name without a prefix, read when asked for."""

    def __init__(self, files: list[Path], prefix: str):
        self._prefix = prefix
        self._files = {
            name: file
            for file in (safe_open(path, framework="pt") for path in files)
            for name in file.keys()  # noqa: SIM118 (not a dict)
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._prefix + name].get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._files)

    def __len__(self) -> int:
        return len(self._files)


def _validation_loss(path: Path) -> float:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        loss = float(state.get("meta_validation_loss", math.inf))
    except (OSError, ValueError):  # damaged, and so not the best
        return math.inf
    return math.inf if math.isnan(loss) else loss


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank}.safetensors"
