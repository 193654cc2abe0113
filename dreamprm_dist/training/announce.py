"""What a run says of itself: at its start, after its first iterations, and at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.attention import FLASH, attention_in_use
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.model_folder import EXPORT
from dreamprm_dist.training.checkpoint import library_versions
from dreamprm_dist.training.config import BATCH_FLAGS, TrainConfig
from dreamprm_dist.training.strategy import resolved_strategy


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run stands on.

    Attributes:
        ranks: their number.
        device: name of rank 0's GPU, or CPU.
        attention: transformers' name of the attention that trains.
        strategy: file of ds_configs/.
        trained, parameters: how many of the PRM's parameters are trained, and how many it has.
        versions: of each library that decides about numbers.
    """

    ranks: int
    device: str
    attention: str
    strategy: str
    trained: int
    parameters: int
    versions: Mapping[str, str]


def setting_of(prm: PRM, config: TrainConfig, device: torch.device, ranks: int) -> Setting:
    """The setting of a run whose PRM is loaded, frozen in parts, on this rank's device."""
    attention, versions = attention_in_use(prm.model), library_versions()
    if attention == FLASH:
        versions["flash-attn"] = version("flash_attn")
    return Setting(
        ranks=ranks,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        attention=attention,
        strategy=resolved_strategy(config.run.strategy, device),
        trained=sum(p.numel() for p in prm.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in prm.parameters()),
        versions=versions,
    )


def start_text(
    config: TrainConfig,
    train_shards: ShardFolder,
    meta_shards: ShardFolder | None,
    trained_rows: int,
    setting: Setting,
) -> str:
    """The size of a run (data, global batches, epochs, checkpoints), and what it stands on.

    Args:
        trained_rows: instances that the lower level draws from, those of the meta set among them.
    """
    run, steps = config.run, config.upper.unroll_steps
    data = f"{train_shards.num_rows:,} training instances in {train_shards.num_shards} shards"
    if meta_shards is not None:
        data += f", {meta_shards.num_rows:,} meta solutions of {meta_shards.num_groups:,} questions"
    if joined := trained_rows - train_shards.num_rows:
        data += f", {joined:,} of which train the PRM too"
    values, sizes = config.as_dict(), config.global_batch_sizes(setting.ranks)
    batches = [
        f"{total} = {setting.ranks} rank(s) x {name} {values[name]} x "
        f"{BATCH_FLAGS[name]} {values[BATCH_FLAGS[name]]}"
        for name, total in sizes.items()
    ]
    epochs = run.iteration_num * steps * sizes["batch_size"] / trained_rows
    saves = math.ceil(run.iteration_num / run.save_every_iterations)
    return "\n".join(
        [
            f"{config.kind} in {run.weights_path}: {data}",
            f"global batch {batches[0]}",
            *(f"meta batch {text}" for text in batches[1:]),
            f"{run.iteration_num:,} iterations x {steps} lower step(s) = {epochs:.3g} epochs, "
            f"{saves:,} checkpoint(s), of which the newest {run.keep_last} stay",
            f"on {setting.device}: precision {config.model.precision}, attention "
            f"{setting.attention}, strategy {setting.strategy}, {setting.trained:,} of "
            f"{setting.parameters:,} parameters trained",
            ", ".join(f"{name} {number}" for name, number in setting.versions.items()),
            *(["dry run: nothing is trained or written"] if run.dry_run else []),
        ]
    )


def time_text(seconds_per_iteration: float, left: int) -> str:
    """How long the rest of a run takes."""
    rest = timedelta(seconds=round(seconds_per_iteration * left))
    return f"{seconds_per_iteration:.3g} s per iteration: about {rest} to go"


def end_text(folder: Path) -> str:
    """Where the outcome is, and what to do with it."""
    export = folder / EXPORT
    return (
        f"the export is in {export}; next: python launch/evaluate.py --model {export} "
        "--test_json_file TEST.jsonl"
    )
