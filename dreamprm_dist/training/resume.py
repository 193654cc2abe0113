"""Resuming: a run goes on from its newest checkpoint, if that is the same run's, at any world size.

The global batch sizes are constants of a run. On another number of ranks the micro-batches follow
from them, and so every global batch holds the same instances.
"""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from dreamprm_dist import distributed
from dreamprm_dist.data.sampler import check_ranks
from dreamprm_dist.data.shards import MANIFEST as SHARD_MANIFEST
from dreamprm_dist.data.shards import ShardFolder, file_sha256
from dreamprm_dist.errors import InputError
from dreamprm_dist.training.checkpoint import Checkpoint, newest_checkpoint
from dreamprm_dist.training.config import BATCH_FLAGS, TrainConfig, parse_train_config
from dreamprm_dist.training.given_weights import WEIGHT_FILES, weight_files

logger = logging.getLogger(__name__)

# Settings in which a resumed run may differ from the one it goes on with. Data are compared by
# content and not by where they lie, batch sizes by the global ones.
MAY_CHANGE = {
    *("weights_path", "train_json_file", "meta_json_file", "image_root", "num_shards"),
    *WEIGHT_FILES,
    *("save_every_iterations", "keep_last", "keep_best", "resume", "log_every", "num_workers"),
    *("device", "local_rank", "max_bad_steps", "collective_timeout", "dry_run"),
    "export_losses",
}


def run_settings(
    config: TrainConfig, train_shards: ShardFolder, meta_shards: ShardFolder | None
) -> dict:
    """Settings, by flag, that must be equal for one run to go on with another's checkpoint."""
    data = {"train_json_file": train_shards, "meta_json_file": meta_shards}
    batches = {*BATCH_FLAGS, *BATCH_FLAGS.values()}
    settings = {n: v for n, v in _fixed(config.as_dict()).items() if n not in batches}
    for name, shards in data.items():
        if shards is not None:
            digest = file_sha256(shards.path / SHARD_MANIFEST)
            settings[name] = f"shards with SHA-256 {digest}"
    for name, path in weight_files(config.reweighter).items():
        settings[name] = f"a file with SHA-256 {file_sha256(path)}"
    return settings


def checkpoint_to_resume(config: TrainConfig, settings: dict, metrics: Path) -> Checkpoint | None:
    """The one to go on from; None for a run that starts at its beginning.

    Args:
        settings: from `run_settings`.
        metrics: the file that a run which has begun has written.

    Raises:
        InputError: the run folder is another run's, naming the first setting that differs.
    """
    folder, may_resume = metrics.parent, config.run.resume == "auto"
    checkpoint = newest_checkpoint(folder) if may_resume else None
    if checkpoint is not None:
        saved = _with_younger_flags(checkpoint.state["settings"], settings)
        for name, value in saved.items():
            if name == "iteration_num" and value < settings.get(name, value):
                logger.info(
                    "iteration_num is raised from %d to %d: schedules now end there, and learning "
                    "rates that had come down go on at their place in the longer schedule",
                    *(value, settings[name]),
                )
            elif value != settings.get(name):
                raise InputError(
                    f"{checkpoint.path} was made with {name} = {value}, but now it is "
                    f"{settings.get(name)}; set it back, or choose another --out for a new "
                    "run (iteration_num may be raised)"
                )
    elif metrics.exists() and not (may_resume and _is_same_run(config, folder / "config.yaml")):
        raise InputError(f"{folder} already holds a run; choose another --out or remove it")
    return checkpoint


def fit_to_ranks(
    config: TrainConfig,
    checkpoint: Checkpoint,
    train_shards: ShardFolder,
    meta_shards: ShardFolder | None,
) -> TrainConfig:
    """The configuration with micro-batches that make the run's global batches on these ranks.

    Raises:
        InputError: this number of ranks cannot share them, naming numbers that can.
    """
    sizes, ranks = checkpoint.state["global_batch_sizes"], distributed.world_size()
    folders = filter(None, (train_shards, meta_shards))
    check_ranks({f.path: f.num_shards for f in folders}, ranks, sizes.values())
    fitted = config.with_global_batch_sizes(sizes, ranks)
    if fitted != config:
        lower = fitted.lower
        logger.info(
            "the global batch of %d stays: now %d rank(s) x batch_size %d x "
            "gradient_accumulation %d",
            *(sizes["batch_size"], ranks, lower.batch_size, lower.gradient_accumulation),
        )
    return fitted


def _is_same_run(config: TrainConfig, file: Path) -> bool:
    """Whether a run folder's `config.yaml` is that of `config`, but for what may change."""
    if not file.is_file():
        return False
    settings = _fixed(config.as_dict())
    saved = _with_younger_flags(_fixed(yaml.safe_load(file.read_text())), settings)
    return saved | {"iteration_num": settings["iteration_num"]} == settings  # none is done


def _with_younger_flags(saved: dict, settings: dict) -> dict:
    """The saved settings, and flags that came later, as `settings` has them, at their defaults."""
    defaults = parse_train_config([]).as_dict()
    return {name: defaults.get(name) for name in settings} | saved


def _fixed(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE}
