"""Weights that a run is given as a file, to train on or to start from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamprm_dist.data.instance_values import InstanceValues, source_ids_of
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.reweighters.activations import ACTIVATIONS, raw_weights_for
from dreamprm_dist.reweighters.config import ReweighterConfig

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("instance_weights", "initial_weights")  # flags, of which a run has one at most


def weight_files(config: ReweighterConfig) -> dict[str, Path]:
    """The files of weights that a run is given, by flag; InputError where one is not there."""
    files = {name: Path(path) for name in WEIGHT_FILES if (path := getattr(config, name))}
    for name, path in files.items():
        if not path.is_file():
            raise InputError(
                f"{name} {path} is no file; give a Parquet file of weights, such as a run's "
                "export/instance_weights.parquet"
            )
    return files


def given_weights(config: ReweighterConfig, shards: ShardFolder) -> Callable[[int], Tensor] | None:
    """The weights of a shard's rows (rows,) in float32; None where the run is given none.

    Every rank reads the file and the source IDs of all shards, so that all find the same mistake.

    Raises:
        InputError: as `InstanceValues`; a weight is not finite or, to start from, none that the
            activation gives.
    """
    path = next(iter(weight_files(config).values()), None)
    if path is None:
        return None
    values = InstanceValues.read(path, "weight").by_sample_id(shards)
    with np.errstate(over="ignore"):  # beyond float32: infinite, which is refused
        weights = torch.from_numpy(values.astype(np.float32))
    _refuse(path, shards, weights, ~weights.isfinite(), "a finite number")
    if config.initial_weights:
        gives = ACTIVATIONS[config.activation_function].gives.format(**vars(config))
        lacking = raw_weights_for(weights, config).isnan()
        what = f"{gives} for activation_function {config.activation_function}"
        _refuse(path, shards, weights, lacking, what)
    elif below := int((weights < 0).sum()):  # of a table that learns, its metrics warn
        logger.warning(
            "%s: %d of %d weights are negative: the lower level climbs on their instances; give "
            "weights of 0 or more to prevent it",
            *(path, below, len(weights)),
        )
    return lambda shard: weights[shard :: shards.num_shards]


def _refuse(path: Path, shards: ShardFolder, weights: Tensor, bad: Tensor, what: str) -> None:
    if bad.any():
        first, count = int(bad.nonzero()[0]), int(bad.sum())
        more = f" ({count} such weights)" if count > 1 else ""
        raise InputError(
            f"{path}: the weight of sample_id {first} (id {source_ids_of(shards)[first]!r}) is "
            f"{float(weights[first]):g}{more}; it must be {what}"
        )
