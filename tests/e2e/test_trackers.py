"""Trackers: what a run hands them is what it writes down; nothing is imported without them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dreamprm_dist.training.trackers import Trackers, check_trackers

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not has("tensorboard"), reason="no tensorboard")
def test_a_run_under_tensorboard(tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = [
        *("--train_json_file", tiny_shards / "train", "--meta_json_file", tiny_shards / "meta"),
        *("--reward_model", tiny_prm_dir, "--weights_path", run, "--precision", "fp32"),
        *("--device", "cpu", "--num_workers", "0", "--iteration_num", "2"),
        *("--batch_size", "4", "--meta_batch_size", "4", "--trackers", "tensorboard"),
    ]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [str(part) for part in (sys.executable, *launcher, TRAIN, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {*events.Tags()["scalars"]} >= rows[0].keys()
    for name in ("lower_loss", "meta_loss", "weight_mean"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["iteration"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    (settings,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "batch_size: 4" in settings.read_text()


@pytest.mark.skipif(not has("wandb"), reason="no wandb")
def test_wandb_stays_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trackers = Trackers("wandb", tmp_path, {"lr": 1e-4, "image_root": None})
    trackers.log({"iteration": 1, "lower_loss": 0.5}, 1)
    trackers.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_nothing_is_imported_without_a_name(tmp_path: Path) -> None:
    code = (
        "import sys, dreamprm_dist.training.run; from pathlib import Path; "
        "from dreamprm_dist.training.trackers import Trackers; "
        "t = Trackers(None, Path('.'), {}); t.log({'a': 1.0}, 1); t.close(); "
        "print({'tensorboard', 'wandb', 'mlflow'} & sys.modules.keys())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_accelerate_keeps_trackers_under_their_names() -> None:
    """`LOGGER_TYPE_TO_CLASS` is no public name of accelerate's."""
    for name in ("tensorboard", "wandb"):
        assert issubclass(LOGGER_TYPE_TO_CLASS[name], GeneralTracker)


def test_names() -> None:
    assert [*check_trackers(None), *check_trackers(" , ")] == []
    with pytest.raises(
        ValueError,
        match="unknown tracker 'tensorbord'; leave trackers out for none, or choose from aim",
    ):
        check_trackers("tensorbord")
    missing = next(name for name in ("clearml", "swanlab", "aim") if not has(name))
    with pytest.raises(ValueError, match="is not installed; pip install"):
        check_trackers(missing)
