"""Configuration: dataclass defaults < YAML file < command line.

Each section below is owned by the part of the program that it names; `TrainConfig` is all of them
together. Every flag of the reference implementation exists under its own name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import write_whole
from dreamprm_dist.flags import flag, parse_args
from dreamprm_dist.training.trackers import check_trackers


@dataclass
class DataConfig:
    """What is read, and how it becomes model inputs."""

    _argument_group_name = "data"

    train_json_file: str = flag(
        "./data/train.json",
        "Training shards, or a small raw JSON/JSONL file, which one process then shards once.",
    )
    meta_json_file: str = flag("./data/meta.json", "Meta shards, or a small raw JSON/JSONL file.")
    meta_validation_fraction: float = flag(
        0.0, "Part of the meta questions that is only measured on, at each checkpoint."
    )
    image_root: str | None = flag(
        None, "Folder that image paths of a raw file start at (default: the file's own folder)."
    )
    num_shards: int = flag(
        8, "Shards made of a raw file; a multiple of every number of ranks that will train on it."
    )
    max_patch_num: int = flag(6, "Most tiles of an image, thumbnail not counted.")
    label_context: Literal["data", "plus"] = flag(
        "data",
        "Answers of earlier steps in the context: the given labels, or always + as in scoring.",
    )
    num_workers: int = flag(2, "Processes a rank that read, tile and encode; 0: in the rank.")


@dataclass
class ModelConfig:
    """The PRM and how it is held."""

    _argument_group_name = "model"

    reward_model: str = flag("OpenGVLab/InternVL3-1B", "Local folder or hub name to start from.")
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    freeze_vision_tower: bool = flag(False, "Do not train the vision tower.")
    freeze_language_model: bool = flag(False, "Do not train the language model.")
    gradient_checkpointing: bool = flag(False, "Recompute activations to save memory.")


@dataclass
class LowerConfig:
    """Lower level: the PRM's own training."""

    _argument_group_name = "lower level"

    batch_size: int = flag(1, "Instances a rank and micro-batch.")
    gradient_accumulation: int = flag(
        1, "Micro-batches a lower step.", aliases=["gradiant_accumulation"]
    )
    lr: float = flag(5e-5, "Learning rate of AdamW.")
    momentum: float = flag(0.9, "First beta of AdamW.")
    weight_decay: float = flag(0.01, "Decoupled weight decay of AdamW.")
    gradient_clipping: float = flag(
        1.0, "Largest global gradient norm; 0: no clipping.", aliases=["gradiant_clipping"]
    )
    scheduler_type: Literal["cosine_schedule_with_warmup", "step_lr", "constant"] = flag(
        "cosine_schedule_with_warmup", "Schedule of lr (5 %% warm-up)."
    )
    scheduler_step_size: int = flag(1000, "step_lr: lower steps between two decays.")
    scheduler_gamma: float = flag(0.95, "step_lr: factor of a decay.")


@dataclass
class UpperConfig:
    """Upper level: the instance weights."""

    _argument_group_name = "upper level"

    reweighter: Literal["instance_table", "instance_net", "domain_table", "uniform"] = flag(
        "instance_table",
        "How weights are held: one an instance, a net, one a data set, or all 1.",
    )
    hypergradient: Literal["jvp", "finite_difference", "sama", "gradient_dot"] = flag(
        "jvp", "Estimator of the hypergradient."
    )
    hypergradient_scope: str = flag(
        "all",
        "Parameters that v covers: all, language_model, or last_N_layers such as last_4_layers.",
    )
    unroll_steps: int = flag(1, "Lower steps before each upper step.")
    unroll_window: Literal["last", "all"] = flag(
        "last", "Lower batches of an unroll that receive a hypergradient."
    )
    meta_batch_size: int = flag(1, "Meta solutions (or questions) a rank and micro-batch.")
    group_meta_by_question: bool = flag(
        False,
        "Draw whole meta questions, counted by meta_batch_size; one vision pass for each image.",
    )
    meta_gradient_accumulation: int = flag(1, "Meta micro-batches an upper step.")
    meta_lr: float = flag(1e-1, "Learning rate of the weights.")
    meta_momentum: float = flag(0.9, "First beta of AdamW on the upper level.")
    meta_weight_decay: float = flag(1e-3, "Decoupled weight decay of raw weights, or of the net.")
    decay_to_initialization: bool = flag(
        False, "Rows of the table decay towards initialization and not towards 0."
    )
    meta_gradient_clipping: float = flag(
        1.0, "Largest global norm of the hypergradient; 0: no clipping."
    )
    meta_scheduler_type: Literal["cosine_schedule_with_warmup", "step_lr", "constant"] = flag(
        "cosine_schedule_with_warmup", "Schedule of meta_lr (5 %% warm-up)."
    )
    meta_scheduler_step_size: int = flag(1000, "step_lr: upper steps between two decays.")
    meta_scheduler_gamma: float = flag(0.95, "step_lr: factor of a decay.")
    row_update: Literal["adamw", "adamw_lazy", "normalized_sgd"] = flag(
        "adamw",
        "Table: AdamW over all rows, over drawn rows, or the hypergradient over its mean size.",
    )
    instance_net_input: Literal["step_probabilities", "representation", "loss"] = flag(
        "step_probabilities", "What the instance net reads of an instance."
    )
    hidden_dim: int = flag(10, "Width of the instance net's hidden layers.")
    num_layers: int = flag(1, "Hidden layers of the instance net.")
    differentiate_weights: bool = flag(
        False, "Instance net: the PRM is trained through its weights too, as the reference does."
    )
    activation_function: Literal["LeakyReLU", "ReLU", "No", "sigmoid", "Clip", "Project"] = flag(
        "LeakyReLU",
        "From raw weights to weights; Project (table) keeps raw weights within the bounds.",
    )
    weight_min: float = flag(-1.0, "Lower bound of Clip and Project.")
    weight_max: float = flag(3.0, "Upper bound of Clip and Project.")
    initialization: float = flag(1.0, "Raw weight of every instance (or data set) at the start.")
    aggregation_function: Literal["mean", "min", "max", "log_mean", "product", "last"] = flag(
        "mean", "How step scores become a solution's score."
    )
    loss_target: Literal["+", "both"] = flag(
        "both", "Meta loss: of P(+) against the answer, or of P(the right sign) against 1."
    )
    meta_error: Literal["squared", "absolute"] = flag(
        "squared", "Error of the meta loss; with absolute and loss_target + random answers cancel."
    )
    score_over: Literal["vocabulary", "pair"] = flag(
        "vocabulary", "Step scores of the meta loss: softmax over all words, or over + and -."
    )
    rollback: bool = flag(
        False, "After the upper step, undo the unroll and take it again with the new weights."
    )


@dataclass
class RunConfig:
    """The run as a whole."""

    _argument_group_name = "run"

    weights_path: str = flag("./weights", "Run folder: config, metrics, checkpoints, export.")
    iteration_num: int = flag(100_000, "Outer iterations: unroll_steps lower steps, one upper.")
    save_every_iterations: int = flag(
        1000, "Iterations between two checkpoints; the last is always saved."
    )
    keep_last: int = flag(2, "Checkpoints kept, the newest ones.")
    keep_best: int = flag(0, "Checkpoints kept beside them, of the lowest meta validation loss.")
    resume: Literal["auto", "never"] = flag(
        "auto", "auto: go on from the newest whole checkpoint; never: refuse a taken run folder."
    )
    retrain: bool = flag(False, "Cold start: plain fine-tuning, no weights are learned.")
    baseline: bool = flag(False, "Plain fine-tuning as the baseline that weights are held against.")
    strategy: Literal["default", "zero1", "zero2", "zero2_offload", "zero2_cpu"] = flag(
        "default", "File in ds_configs/; default is zero2 (zero2_cpu without a GPU)."
    )
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")
    seed: int = flag(1, "Seed of data order and initialisation.")
    local_rank: int = flag(-1, "Set by launchers; the environment counts.")
    log_every: int = flag(1, "Iterations between two lines of metrics.jsonl.")
    collective_timeout: float = flag(
        30.0, "Minutes that a rank waits for the others before the run ends."
    )
    max_bad_steps: int = flag(
        10, "Iterations in a row with a NaN or infinite loss or gradient that end the run."
    )
    trackers: str | None = flag(
        None,
        "Experiment trackers by accelerate's names, separated by commas: tensorboard, wandb "
        "(offline unless WANDB_MODE says otherwise), …",
    )


@dataclass
class TrainConfig:
    """Everything `launch/train.py` is told."""

    data: DataConfig
    model: ModelConfig
    lower: LowerConfig
    upper: UpperConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if self.run.retrain and self.run.baseline:
            raise InputError("retrain and baseline are the same loop; choose one of the two")
        upper = self.upper
        if not re.fullmatch(r"all|language_model|last_[1-9]\d*_layers", upper.hypergradient_scope):
            raise InputError(
                f"hypergradient_scope {upper.hypergradient_scope!r} is unknown; use all, "
                "language_model, or last_N_layers such as last_4_layers"
            )
        if upper.hypergradient == "gradient_dot" and upper.differentiate_weights:
            raise InputError(
                "gradient_dot cannot differentiate weights that depend on the PRM; use jvp, or "
                "leave differentiate_weights out"
            )
        if upper.reweighter == "instance_net" and upper.activation_function == "Project":
            raise InputError(
                "Project is for the table's rows; use Clip or sigmoid with instance_net"
            )
        check_trackers(self.run.trackers)
        fraction = self.data.meta_validation_fraction
        if not 0 <= fraction < 1:
            raise InputError(f"meta_validation_fraction is {fraction}; it lies from 0 to below 1")
        if self.run.keep_best and (self.unweighted or not fraction):
            raise InputError("keep_best needs a meta set and a meta_validation_fraction above 0")
        if self.run.collective_timeout <= 0:
            raise InputError(
                f"collective_timeout is {self.run.collective_timeout} minutes; it must be above 0"
            )
        if self.upper.activation_function in ("Clip", "Project") and not (
            self.upper.weight_min <= self.upper.initialization <= self.upper.weight_max
        ):
            raise InputError(
                f"initialization {self.upper.initialization} lies outside weight_min "
                f"{self.upper.weight_min} and weight_max {self.upper.weight_max}"
            )
        for section in (self.data, self.lower, self.upper, self.run):
            for name in _AT_LEAST_ONE & vars(section).keys():
                if getattr(section, name) < 1:
                    raise InputError(f"{name} is {getattr(section, name)}; it must be at least 1")

    @property
    def unweighted(self) -> bool:
        """Plain fine-tuning: no weights are learned."""
        return self.run.retrain or self.run.baseline

    def global_batch_sizes(self, world_size: int) -> dict[str, int]:
        """Instances of a lower step and, if there is one, of an upper step, over all ranks."""
        values, levels = self.as_dict(), list(BATCH_FLAGS.items())
        return {
            size: values[size] * values[accumulation] * world_size
            for size, accumulation in (levels[:1] if self.unweighted else levels)
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
        replaced = {
            name: dataclasses.replace(
                section, **{flag: flags[flag] for flag in flags if hasattr(section, flag)}
            )
            for name, section in (("lower", self.lower), ("upper", self.upper))
        }
        return dataclasses.replace(self, **replaced)

    def as_dict(self) -> dict:
        """All flags, flat, as a recipe has them."""
        sections = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {name: value for section in sections for name, value in vars(section).items()}


# Micro-batch sizes, lower level first, and how many micro-batches make a rank's part of a step.
BATCH_FLAGS = {
    "batch_size": "gradient_accumulation",
    "meta_batch_size": "meta_gradient_accumulation",
}
_AT_LEAST_ONE = {
    "batch_size",
    "gradient_accumulation",
    "meta_batch_size",
    "meta_gradient_accumulation",
    "unroll_steps",
    "hidden_dim",
    "num_layers",
    "iteration_num",
    "save_every_iterations",
    "keep_last",
    "max_bad_steps",
    "max_patch_num",
    "num_shards",
    "log_every",
}


def parse_train_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """`launch/train.py`'s command line; see `parse_args`."""
    sections = (DataConfig, ModelConfig, LowerConfig, UpperConfig, RunConfig)
    return TrainConfig(*parse_args(sections, argv, "Train a process reward model."))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that starts the same run again."""
    write_whole(path, yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
