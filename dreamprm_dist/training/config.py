"""Configuration of a training run: all flags of `launch/train.py`.

Each section is a dataclass beside what it configures, which checks it; `TrainConfig` composes them
and checks what they must agree on. Every flag of the reference implementation exists under its own
name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import write_whole
from dreamprm_dist.flags import (
    AtLeastOne,
    Count,
    FlagGroup,
    Fraction,
    NotNegative,
    Positive,
    flag,
    parse_args,
)
from dreamprm_dist.hypergradient import HypergradientConfig
from dreamprm_dist.losses import LowerLossConfig, MetaLossConfig
from dreamprm_dist.prm.model import ModelConfig
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig
from dreamprm_dist.reweighters.schedules import SCHEDULES
from dreamprm_dist.training.trackers import check_trackers


@dataclass
class DataConfig(FlagGroup):
    """The data, and how they become model inputs."""

    _argument_group_name: ClassVar[str] = "data"

    train_json_file: str = flag(
        "./data/train.json",
        "Training shards, or a small raw JSON/JSONL file, which one process then shards once.",
    )
    meta_json_file: str = flag("./data/meta.json", "Meta shards, or a small raw JSON/JSONL file.")
    meta_validation_fraction: Fraction = flag(
        0.0,
        "Part of the meta questions that is only measured on, at each checkpoint.",
    )
    train_on_meta: Literal["none", "steps", "answer"] = flag(
        "none",
        "The meta set also joins the lower level, its instances at weight 1: with the labels of "
        "their steps, or with the answer's as that of the last step. Held-out questions stay out.",
    )
    image_root: str | None = flag(
        None, "Folder that image paths of a raw file start at (default: the file's own folder)."
    )
    num_shards: AtLeastOne = flag(
        8,
        "Shards made of a raw file; a multiple of every number of ranks that will train on it.",
    )
    max_patch_num: AtLeastOne = flag(6, "Most tiles of an image, thumbnail not counted.")
    label_context: Literal["data", "plus"] = flag(
        "data",
        "Answers of earlier steps in the context: the given labels, or always + as in scoring.",
    )
    num_workers: Count = flag(2, "Processes per rank that read, tile and encode; 0: in the rank.")


@dataclass
class LowerConfig(FlagGroup):
    """Lower level: the PRM's own training."""

    _argument_group_name: ClassVar[str] = "lower level"

    batch_size: AtLeastOne = flag(1, "Instances per rank and micro-batch.")
    gradient_accumulation: AtLeastOne = flag(
        1, "Micro-batches per lower step.", aliases=["gradiant_accumulation"]
    )
    lr: NotNegative = flag(5e-5, "Learning rate of AdamW.")
    momentum: Fraction = flag(0.9, "First beta of AdamW.")
    weight_decay: NotNegative = flag(0.01, "Decoupled weight decay of AdamW.")
    gradient_clipping: NotNegative = flag(
        1.0,
        "Largest global gradient norm; 0: no clipping.",
        aliases=["gradiant_clipping"],
    )
    scheduler_type: str = flag(
        "cosine_schedule_with_warmup", "Schedule of lr (5 %% warm-up).", choices=SCHEDULES
    )
    scheduler_step_size: AtLeastOne = flag(1000, "step_lr: lower steps between two decays.")
    scheduler_gamma: Positive = flag(0.95, "step_lr: factor of a decay.")


@dataclass
class UpperConfig(FlagGroup):
    """Upper level: when the weights are learned, and on how much meta data."""

    _argument_group_name: ClassVar[str] = "upper level"

    unroll_steps: AtLeastOne = flag(1, "Lower steps before each upper step.")
    unroll_window: Literal["last", "all"] = flag(
        "last", "Lower batches of an unroll that receive a hypergradient."
    )
    meta_batch_size: AtLeastOne = flag(1, "Meta solutions (or questions) per rank and micro-batch.")
    group_meta_by_question: bool = flag(
        False,
        "Draw whole meta questions, counted by meta_batch_size; one vision pass for each image.",
    )
    meta_gradient_accumulation: AtLeastOne = flag(1, "Meta micro-batches per upper step.")
    rollback: bool = flag(
        False, "After the upper step, undo the unroll and take it again with the new weights."
    )


@dataclass
class RunConfig(FlagGroup):
    """The run as a whole."""

    _argument_group_name: ClassVar[str] = "run"

    weights_path: str = flag(
        "./weights",
        "Run folder, also as --out: config, metrics, checkpoints, export.",
        aliases=["out"],
    )
    iteration_num: AtLeastOne = flag(
        100_000, "Outer iterations: unroll_steps lower steps, one upper."
    )
    save_every_iterations: AtLeastOne = flag(
        1000, "Iterations between two checkpoints; the last is always saved."
    )
    keep_last: AtLeastOne = flag(2, "Checkpoints kept, the newest ones.")
    keep_best: Count = flag(0, "Checkpoints kept beside them, of the lowest meta validation loss.")
    resume: Literal["auto", "never"] = flag(
        "auto", "auto: go on from the newest whole checkpoint; never: refuse a taken run folder."
    )
    dry_run: bool = flag(False, "Check everything, say what the run would be, and write nothing.")
    retrain: bool = flag(False, "Cold start: plain fine-tuning, reweighter uniform.")
    baseline: bool = flag(
        False, "Plain fine-tuning that weights are held against, reweighter uniform."
    )
    strategy: Literal["default", "zero1", "zero2", "zero2_offload", "zero2_cpu"] = flag(
        "default", "File in ds_configs/; default is zero2 (zero2_cpu without a GPU)."
    )
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")
    seed: Count = flag(1, "Seed of data order and initialisation.")
    local_rank: int = flag(-1, "Set by launchers; the environment counts.")
    log_every: AtLeastOne = flag(1, "Iterations between two lines of metrics.jsonl.")
    collective_timeout: Positive = flag(
        30.0, "Minutes that a rank waits for the others before the run ends."
    )
    max_bad_steps: AtLeastOne = flag(
        10,
        "Iterations in a row with a NaN or infinite loss or gradient that end the run.",
    )
    export_losses: bool = flag(
        False,
        "At the end also write export/instance_losses.parquet: each training instance's loss.",
    )
    trackers: str | None = flag(
        None,
        "Experiment trackers by accelerate's names, separated by commas: tensorboard, wandb "
        "(offline unless WANDB_MODE says otherwise), …",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retrain and self.baseline:
            raise InputError("retrain and baseline are the same loop; choose one of the two")
        check_trackers(self.trackers)


@dataclass(kw_only=True)
class TrainConfig:
    """Everything `launch/train.py` is told."""

    data: DataConfig
    model: ModelConfig
    lower: LowerConfig
    lower_loss: LowerLossConfig
    upper: UpperConfig
    meta_loss: MetaLossConfig
    hypergradient: HypergradientConfig
    reweighter: ReweighterConfig
    meta_optimizer: MetaOptimizerConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if self.run.retrain or self.run.baseline:
            self.reweighter = dataclasses.replace(self.reweighter, reweighter="uniform")
        self._check_given_weights()
        if self.reweighter.differentiate_weights and not (
            self.hypergradient.estimator.differentiates_features
        ):
            raise InputError(
                f"{self.hypergradient.hypergradient} gives derivatives of losses alone, and cannot "
                "differentiate weights that depend on the PRM; use jvp, or leave "
                "differentiate_weights out"
            )
        if self.run.keep_best and not self.data.meta_validation_fraction:
            raise InputError("keep_best needs a meta_validation_fraction above 0")

    def _check_given_weights(self) -> None:
        name, config = self.reweighter.reweighter, self.reweighter
        if name == "fixed" and not config.instance_weights:
            raise InputError(
                "reweighter fixed trains on given weights; name their file with instance_weights"
            )
        for file, user in (("instance_weights", "fixed"), ("initial_weights", "instance_table")):
            if getattr(config, file) and name != user:
                raise InputError(
                    f"{file} is for reweighter {user}, and the reweighter is {name}; leave it out, "
                    f"or use {user}"
                )

    @property
    def kind(self) -> str:
        """What the run is called."""
        if self.run.retrain:
            return "cold start"
        if self.reweighter.reweighter == "fixed":
            return "fixed weights"
        return "baseline" if self.run.baseline else "bi-level"

    @property
    def learns(self) -> bool:
        """Whether there are weights to learn."""
        return REWEIGHTERS[self.reweighter.reweighter].learns

    @property
    def reads_meta(self) -> bool:
        """Whether the meta set is used: to learn weights from, to train on, or to measure on."""
        data = self.data
        return self.learns or data.meta_validation_fraction > 0 or data.train_on_meta != "none"

    def global_batch_sizes(self, world_size: int) -> dict[str, int]:
        """Instances of a lower step and, if there is one, of an upper step, over all ranks."""
        values, levels = self.as_dict(), list(BATCH_FLAGS.items())
        return {
            size: values[size] * values[accumulation] * world_size
            for size, accumulation in (levels if self.learns else levels[:1])
        }

    def with_global_batch_sizes(self, sizes: dict[str, int], world_size: int) -> TrainConfig:
        """The same run on `world_size` ranks, which divides the sizes.

        A rank's part is cut into the fewest equal micro-batches that are not larger than before.
        """
        values, flags = self.as_dict(), {}
        for size, global_size in sizes.items():
            part = global_size // world_size
            flags[size] = max(b for b in range(1, values[size] + 1) if part % b == 0)
            flags[BATCH_FLAGS[size]] = part // flags[size]

        return self.with_flags(flags)

    def with_flags(self, flags: Mapping[str, Any]) -> TrainConfig:
        """The same run with other values of some flags."""

        def changed(section: Any) -> Any:
            names = {field.name for field in dataclasses.fields(section)}
            return dataclasses.replace(section, **{k: v for k, v in flags.items() if k in names})

        sections = {f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return TrainConfig(**sections)

    def as_dict(self) -> dict[str, Any]:
        """All flags, flat, as a recipe has them."""
        sections = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {name: value for section in sections for name, value in vars(section).items()}


# Micro-batch sizes, lower level first, and how many micro-batches make a rank's part of a step.
BATCH_FLAGS = {
    "batch_size": "gradient_accumulation",
    "meta_batch_size": "meta_gradient_accumulation",
}


def parse_train_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """`launch/train.py`'s command line; see `parse_args`."""
    return parse_with_train_config((), argv, "Train a process reward model.")[0]


def parse_with_train_config(
    others: tuple[type, ...], argv: Sequence[str] | None, description: str
) -> tuple[Any, ...]:
    """A command line of all training flags and those of other sections.

    Returns:
        The training configuration, then the other sections; see `parse_args`.
    """
    sections = get_type_hints(TrainConfig)
    parsed = parse_args((*sections.values(), *others), argv, description)
    train = TrainConfig(**dict(zip(sections, parsed, strict=False)))
    return train, *parsed[len(sections) :]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that starts the same run again.

    It names no meta set that the run does not read.
    """
    settings = config.as_dict()
    if not config.reads_meta:
        del settings["meta_json_file"]
    write_whole(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
