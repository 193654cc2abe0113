"""What a run says of itself: at its start, after its first iterations, and at its end."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.model_folder import EXPORT
from dreamprm_dist.training.config import BATCH_FLAGS, TrainConfig


def start_text(
    config: TrainConfig, train_shards: ShardFolder, meta_shards: ShardFolder | None, ranks: int
) -> str:
    """The size of a run: data, global batches, epochs, checkpoints."""
    run, steps = config.run, config.upper.unroll_steps
    data = f"{train_shards.num_rows:,} training instances in {train_shards.num_shards} shards"
    if meta_shards is not None:
        data += f", {meta_shards.num_rows:,} meta solutions of {meta_shards.num_groups:,} questions"
    values, sizes = config.as_dict(), config.global_batch_sizes(ranks)
    batches = [
        f"{total} = {ranks} rank(s) x {name} {values[name]} x "
        f"{BATCH_FLAGS[name]} {values[BATCH_FLAGS[name]]}"
        for name, total in sizes.items()
    ]
    epochs = run.iteration_num * steps * sizes["batch_size"] / train_shards.num_rows
    saves = math.ceil(run.iteration_num / run.save_every_iterations)
    return "\n".join(
        [
            f"{config.kind} in {run.weights_path}: {data}",
            f"global batch {batches[0]}",
            *(f"meta batch {text}" for text in batches[1:]),
            f"{run.iteration_num:,} iterations x {steps} lower step(s) = {epochs:.3g} epochs, "
            f"{saves:,} checkpoint(s), of which the newest {run.keep_last} stay",
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
