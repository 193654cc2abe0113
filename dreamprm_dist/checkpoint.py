"""Checkpoints, from which a stopped run goes on bit for bit: `<run>/checkpoints/iteration-N`.

All ranks write into `iteration-N.new`; when every rank has finished, a manifest with the SHA-256 of
every file is added and one rename makes the checkpoint visible. DeepSpeed's own files are pickles:
they are read only after the checksums of the whole folder have been verified.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.checkpoint_files import (
    clear_leftovers,
    damage,
    files_of,
    flush,
    flush_share,
    iteration_folder,
    iterations,
    on_all_ranks,
    remove,
    write_manifest,
)
from dreamprm_dist.config import TrainConfig
from dreamprm_dist.data.shards import MANIFEST as SHARD_MANIFEST
from dreamprm_dist.data.shards import ShardFolder, file_sha256
from dreamprm_dist.engine import Engine

CHECKPOINTS = "checkpoints"
STATE = "state.json"
# Settings in which a resumed run may differ from the one it goes on with. Data are compared by
# content and not by where they lie.
MAY_CHANGE = {
    *("weights_path", "train_json_file", "meta_json_file", "image_root", "num_shards"),
    *("save_every_iterations", "keep_last", "resume", "log_every", "num_workers"),
    *("device", "local_rank", "max_bad_steps", "collective_timeout"),
}
LIBRARIES = ("torch", "deepspeed", "transformers")


class Stateful(Protocol):
    """What a checkpoint asks of a reweighter: this rank's state as tensors, and back."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        state: iteration, world_size, settings and library versions, as `state.json` has them.
    """

    path: Path
    state: dict

    @property
    def iteration(self) -> int:
        """Outer iterations done."""
        return self.state["iteration"]


def run_settings(
    config: TrainConfig, train_shards: ShardFolder, meta_shards: ShardFolder | None
) -> dict:
    """What must be equal for one run to go on with another's checkpoint, by the flag's name."""
    data = {"train_json_file": train_shards, "meta_json_file": meta_shards}
    return _fixed(config.as_dict()) | {
        name: f"shards with SHA-256 {file_sha256(shards.path / SHARD_MANIFEST)}"
        for name, shards in data.items()
        if shards is not None
    }


def is_same_run(config: TrainConfig, file: Path) -> bool:
    """Whether a run folder's `config.yaml` is that of `config`, but for what may change."""
    return file.is_file() and _fixed(yaml.safe_load(file.read_text())) == _fixed(config.as_dict())


def save_checkpoint(
    run_folder: Path,
    state: dict,
    engine: Engine,
    reweighter: Stateful | None,
    keep_last: int,
) -> int:
    """Write a checkpoint on all ranks together, then remove all but the newest `keep_last`.

    Args:
        state: see `Checkpoint`; world size and versions are added.

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
            described = state | {"world_size": distributed.world_size(), "versions": _versions()}
            (new / STATE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def write() -> None:
        engine.save(new / "deepspeed")
        tensors = {f"rng.{name}": value for name, value in _rng_state(engine.device).items()}
        if reweighter is not None:
            tensors |= {f"reweighter.{name}": t for name, t in reweighter.state_dict().items()}
        save_file(tensors, _rank_file(new))

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
        older = [i for i in iterations(folder) if i <= state["iteration"]]
        for i in set(iterations(folder)) - set(older[:keep_last]):
            remove(iteration_folder(folder, i))
    distributed.barrier()
    return size


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all ranks; None where there is none at all.

    Raises:
        ValueError: there are checkpoints, but every one is damaged.
    """
    folder = run_folder / CHECKPOINTS
    found = json.loads(distributed.broadcast_text(json.dumps(iterations(folder))))
    for iteration in found:
        path = iteration_folder(folder, iteration)
        problem = damage(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))
        _say(f"warning: checkpoint {path} is damaged and skipped: {problem}")
    if found:
        raise ValueError(
            f"no checkpoint in {folder} is whole; choose another weights_path, or remove the run "
            "folder to start anew"
        )
    return None


def check_resumable(checkpoint: Checkpoint, settings: dict) -> None:
    """Refuse to go on with a checkpoint of another run.

    Raises:
        ValueError: naming the first setting that differs, or the world size.
    """
    saved = checkpoint.state["settings"]
    for name in {**settings, **saved}:
        if saved.get(name) != settings.get(name):
            raise ValueError(
                f"{checkpoint.path} was made with {name} = {saved.get(name)}, but now it is "
                f"{settings.get(name)}; set it back, or choose another weights_path for a new run"
            )
    world_size = checkpoint.state["world_size"]
    if world_size != distributed.world_size():
        raise ValueError(
            f"{checkpoint.path} was made by {world_size} rank(s) and cannot be resumed by "
            f"{distributed.world_size()}; start {world_size}"
        )


def load_checkpoint(checkpoint: Checkpoint, engine: Engine, reweighter: Stateful | None) -> None:
    """Put all state back on this rank. The checkpoint comes from `newest_checkpoint`."""
    _say(f"resuming from {checkpoint.path}")
    for name, saved in checkpoint.state["versions"].items():
        if _versions()[name] != saved:
            _say(
                f"warning: {checkpoint.path} was made with {name} {saved}, this is "
                f"{_versions()[name]}: results may differ in their last digits"
            )
    engine.load(checkpoint.path / "deepspeed")
    groups: dict[str, dict[str, Tensor]] = {"rng": {}, "reweighter": {}}
    for name, tensor in load_file(_rank_file(checkpoint.path)).items():
        group, _, key = name.partition(".")
        groups[group][key] = tensor
    if reweighter is not None:
        reweighter.load_state_dict(groups["reweighter"])
    torch.set_rng_state(groups["rng"]["cpu"])
    if "cuda" in groups["rng"]:
        torch.cuda.set_rng_state(groups["rng"]["cuda"], engine.device)


def _fixed(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _rank_file(path: Path) -> Path:
    return path / f"rank-{distributed.rank()}.safetensors"


def _say(message: str) -> None:
    if distributed.rank() == 0:
        print(message, file=sys.stderr, flush=True)
