"""Configuration of the weights: how they are held, and how they are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import AtLeastOne, FlagGroup, Fraction, NotNegative, Positive, flag
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.activations import ACTIVATIONS
from dreamprm_dist.reweighters.features import FEATURES
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES
from dreamprm_dist.reweighters.schedules import SCHEDULES


@dataclass
class ReweighterConfig(FlagGroup):
    """The weights: how they are held."""

    _argument_group_name: ClassVar[str] = "reweighter"
    removed: ClassVar = {
        "row_update": {"adamw_lazy": "use normalized_sgd, which is better, or adamw"}
    }

    reweighter: str = flag(
        "instance_table",
        "How weights are held: one per instance, a net, one per data set, given, or all 1.",
        choices=REWEIGHTERS,
    )
    row_update: str = flag(
        "adamw",
        "Table: AdamW over all rows, or the hypergradient over its mean size.",
        choices=ROW_UPDATES,
    )
    decay_to_initialization: bool = flag(
        False, "Rows of the table decay towards initialization and not towards 0."
    )
    instance_net_input: str = flag(
        "step_probabilities", "What the instance net reads of an instance.", choices=FEATURES
    )
    hidden_dim: AtLeastOne = flag(10, "Width of the instance net's hidden layers.")
    num_layers: AtLeastOne = flag(1, "Hidden layers of the instance net.")
    differentiate_weights: bool = flag(
        False, "Instance net: the PRM is trained through its weights too, as the reference does."
    )
    activation_function: str = flag(
        "LeakyReLU",
        "From raw weights to weights; Project (table) keeps raw weights within the bounds.",
        choices=ACTIVATIONS,
    )
    weight_min: float = flag(-1.0, "Lower bound of Clip and Project.")
    weight_max: float = flag(3.0, "Upper bound of Clip and Project.")
    initialization: float = flag(1.0, "Raw weight of every instance (or data set) at the start.")
    initial_weights: str | None = flag(
        None, "Table: a Parquet file of the weights it starts from, in place of initialization."
    )
    instance_weights: str | None = flag(
        None, "Fixed: a Parquet file of the weights, as export/instance_weights.parquet of a run."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reweighter == "instance_net" and self.activation_function == "Project":
            raise InputError(
                "Project is for the table's rows; use Clip or sigmoid with instance_net"
            )
        if self.initial_weights and self.decay_to_initialization:
            raise InputError(
                "decay_to_initialization is for rows that start alike; leave it out with "
                "initial_weights"
            )
        starts_alike = not self.initial_weights
        if (
            starts_alike
            and self.activation_function in ("Clip", "Project")
            and not (self.weight_min <= self.initialization <= self.weight_max)
        ):
            raise InputError(
                f"initialization {self.initialization} lies outside weight_min {self.weight_min} "
                f"and weight_max {self.weight_max}"
            )

    @property
    def decay_target(self) -> float:
        """Where rows of the table decay to."""
        return self.initialization if self.decay_to_initialization else 0.0


@dataclass
class MetaOptimizerConfig(FlagGroup):
    """The optimizer of the weights, which follows their hypergradient."""

    _argument_group_name: ClassVar[str] = "meta optimizer"

    meta_lr: NotNegative = flag(1e-1, "Learning rate of the weights.")
    meta_momentum: Fraction = flag(0.9, "First beta of AdamW on the upper level.")
    meta_weight_decay: NotNegative = flag(
        1e-3, "Decoupled weight decay of raw weights, or of the net."
    )
    meta_gradient_clipping: NotNegative = flag(
        1.0, "Largest global norm of the hypergradient; 0: no clipping."
    )
    meta_scheduler_type: str = flag(
        "cosine_schedule_with_warmup", "Schedule of meta_lr (5 %% warm-up).", choices=SCHEDULES
    )
    meta_scheduler_step_size: AtLeastOne = flag(1000, "step_lr: upper steps between two decays.")
    meta_scheduler_gamma: Positive = flag(0.95, "step_lr: factor of a decay.")
