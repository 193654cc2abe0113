"""The private name of accelerate that trackers are found by."""

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker


def test_accelerates_trackers_are_named():
    for name in ("tensorboard", "wandb"):
        assert issubclass(LOGGER_TYPE_TO_CLASS[name], GeneralTracker)
