"""Small batches and reweighters in small runs."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.batch import Batch, InputFormat
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.base import Reweighter, ReweighterContext
from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig
from dreamprm_dist.training.loader import RankBatches

NO_FEATURES = torch.zeros(0, 0)


def reweighter_of(
    rows_per_shard: list[int],
    num_steps: int = 1,
    hidden_size: int = 8,
    label_ids: dict[str, int] | None = None,
    context: dict | None = None,
    **settings,
) -> Reweighter:
    """A reweighter by its flags; the `dataset` is "a" in even shards and "b" in odd ones."""
    values = {
        "rows_per_shard": rows_per_shard,
        "read_datasets": lambda shard: ["ab"[shard % 2]] * rows_per_shard[shard],
        "num_steps": num_steps,
        "device": torch.device("cpu"),
        "hidden_size": hidden_size,
        "label_ids": label_ids or {"+": 0, "-": 1},
        "seed": 1,
    }
    configs = [
        group(**{f.name: settings[f.name] for f in fields(group) if f.name in settings})
        for group in (ReweighterConfig, MetaOptimizerConfig)
    ]
    assert settings.keys() <= {f.name for config in configs for f in fields(config)}
    return REWEIGHTERS[configs[0].reweighter](
        *configs, ReweighterContext(**values | (context or {}))
    )


def batch_of(ids: list[int] | Tensor) -> Batch:
    """Instances of one labelled step each, without inputs."""
    ids = torch.as_tensor(ids)
    rows = torch.arange(len(ids))
    return Batch(
        input_ids=rows[:, None],
        pixel_values=None,
        shown_tiles=rows[:0],
        step_rows=rows,
        step_positions=rows * 0,
        step_targets=rows * 0,
        step_counts=torch.zeros(len(ids), 2, dtype=torch.long),
        sample_ids=ids,
        true_false=torch.zeros(len(ids)),
    )


def steps_of(
    targets: Tensor, rows: Tensor, num_rows: int, counts: list[tuple[int, int]] | None = None
) -> Batch:
    """Instances of steps with these labels and roll-outs, without inputs."""
    return replace(
        batch_of(list(range(num_rows))),
        step_rows=rows,
        step_positions=rows * 0,
        step_targets=targets,
        step_counts=torch.tensor(counts or [(0, 0)] * len(rows)),
    )


def rank_batches(
    folder: Path, tokenizer, format: InputFormat, size: int, level: int = 0, **settings
) -> RankBatches:
    """The batches of a run on one rank, each one micro-batch."""
    return RankBatches(
        shards=ShardFolder(folder),
        tokenizer=tokenizer,
        format=format,
        global_batch_size=size,
        micro_batch_size=size,
        seed=1,
        level=level,
        rank=0,
        world_size=1,
        **settings,
    )
