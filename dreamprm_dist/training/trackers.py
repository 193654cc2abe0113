"""Experiment trackers by accelerate's names: tensorboard, wandb, …; none unless asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dreamprm_dist.errors import InputError

PROJECT = "dreamprm_dist"


class Trackers:
    """The trackers of a run; on one rank only.

    Nothing of a tracker is imported where no name is given. wandb runs offline, in the run folder,
    unless WANDB_MODE says otherwise.

    Args:
        names: accelerate's names, separated by commas, or None.
        folder: run folder.
        settings: of the run, flat.

    Raises:
        InputError: a name is unknown, or its package is not installed.
    """

    def __init__(self, names: str | None, folder: Path, settings: Mapping[str, object]):
        self._trackers = []
        for name in check_trackers(names):
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            # accelerate's trackers log through it; it joins the process group that is there.
            PartialState(cpu=not torch.cuda.is_available())
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            if name == "wandb":
                os.environ.setdefault("WANDB_MODE", "offline")
                tracker = tracker_class(PROJECT, dir=str(folder), name=folder.name)
            elif tracker_class.requires_logging_directory:
                tracker = tracker_class(name, logging_dir=str(folder))
            else:
                tracker = tracker_class(PROJECT)
            # This is the only rank with trackers, whichever accelerate takes it for.
            tracker.main_process_only = False
            tracker.start()
            tracker.store_init_configuration(
                {key: value if _plain(value) else str(value) for key, value in settings.items()}
            )
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Hand a line of metrics to every tracker."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=iteration)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: str | None) -> Sequence[str]:
    """The single names.

    Raises:
        InputError: a name is unknown, or its package is not installed.
    """
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name.value) for name in get_available_trackers()}
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(
                f"unknown tracker {name!r}; leave trackers out for none, or choose from "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in available:
            raise InputError(
                f"tracker {name!r} is not installed; pip install -e .[track] has tensorboard and "
                "wandb, pip install its own package for another"
            )
    return wanted


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
