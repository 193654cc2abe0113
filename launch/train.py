"""Train a process reward model: `deepspeed --num_gpus 8 launch/train.py --config recipe.yaml`."""

from pathlib import Path

import torch

from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder, shards_at
from dreamprm_dist.errors import InputError
from dreamprm_dist.files import refuse_overwriting
from dreamprm_dist.flags import run
from dreamprm_dist.prm.model_folder import EXPORT
from dreamprm_dist.training.config import DataConfig, TrainConfig, parse_train_config
from dreamprm_dist.training.given_weights import weight_files
from dreamprm_dist.training.run import METRICS, TrainingRun


def open_shards(path: str, kind: str, config: DataConfig) -> ShardFolder:
    """The shards at `path`, or below it; a raw JSON file is sharded first, by rank 0."""
    if Path(path).is_file():
        from data_tools.shard import cached_shards

        path = distributed.text_of_long_work(
            lambda: str(cached_shards(path, kind, config.num_shards, config.image_root))
        )
    shards = ShardFolder(shards_at(Path(path), kind))
    if shards.kind != kind:
        raise InputError(f"{shards.path} holds {shards.kind} shards where {kind} shards are needed")
    return shards


def train(config: TrainConfig, device: torch.device) -> None:
    data, folder = config.data, Path(config.run.weights_path)
    model = config.model.reward_model
    refuse_overwriting(
        (folder / name for name in (EXPORT, "checkpoints", "config.yaml", METRICS)),
        [
            *(model, Path(model, EXPORT), data.train_json_file, data.meta_json_file),
            *weight_files(config.reweighter).values(),
        ],
        into=folder,
    )
    train_shards = open_shards(data.train_json_file, "training", data)
    meta_shards = None
    if config.reads_meta:
        meta_shards = open_shards(data.meta_json_file, "meta", data)
    if config.run.dry_run:
        TrainingRun(config, train_shards, meta_shards, device)
        return
    with distributed.sole_use(folder):
        TrainingRun(config, train_shards, meta_shards, device).train()


def main() -> None:
    config = parse_train_config()
    with distributed.joined(config.run.device, config.run.collective_timeout) as device:
        train(config, device)


if __name__ == "__main__":
    run(main)
