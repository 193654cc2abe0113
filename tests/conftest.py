"""Fixtures shared by all tests: a tiny model, a small data set, the reference facts."""

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread per process, also in those that tests start: small tensors gain nothing from more, and
# on busy cores threads wait for each other for minutes. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest

from data_tools.demo_data import make_demo_data
from data_tools.demo_model import data_texts, make_tiny_model
from data_tools.shard import shard_file
from dreamprm_dist import distributed
from dreamprm_dist.training import strategy

# How long an example takes says nothing but how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Ranks run these together, see tests/distributed/test_on_ranks.py.
collect_ignore = [] if "TESTS_ON_RANKS" in os.environ else ["on_ranks"]


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set: 64 training records, 32 meta records, 12 test questions."""
    out = tmp_path_factory.mktemp("demo_data")
    make_demo_data(out, seed=0, num_train=64, num_meta=32, num_test=12)
    return out


@pytest.fixture(scope="session")
def tiny_prm_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data_dir: Path) -> Path:
    """A model folder: the demo's tiny InternVL with random weights, tokenizer and processor.

    Its config asks for dropout of every kind, as one that others have made may do.
    """
    folder = make_tiny_model(tmp_path_factory.mktemp("prm"), data_texts(tiny_data_dir), seed=0)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    kinds = ("attention_dropout", "hidden_dropout_prob", "projection_dropout")
    config["vision_config"] |= dict.fromkeys(kinds, 0.1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Facts computed with the reference implementation, which lie beside the project."""
    path = Path(__file__).resolve().parents[2] / "shared" / "reference"
    if not path.is_dir():
        pytest.skip(f"no reference facts at {path}")
    return path


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_data_dir: Path) -> Path:
    """The small demo data set in 4 shards per level: folders `train` and `meta`.

    The first meta question has one solution, the other seven have four. A few steps are unlabelled,
    of one training record all.
    """
    out = tmp_path_factory.mktemp("shards")
    train, meta = (
        json.loads((tiny_data_dir / f"{name}.json").read_text()) for name in ("train", "meta")
    )
    for record, steps in ((train[8], [2]), (train[21], [0, 1]), (train[34], [0, 1, 2])):
        unlabel(record, steps)
    unlabel(meta[5], [1])
    for name, kind, records in (("train", "training", train), ("meta", "meta", meta[3:])):
        source = out / f"{name}.json"
        source.write_text(json.dumps(records))
        shard_file(source, out / name, kind, 4, progress=False, image_root=tiny_data_dir)
    return out


@pytest.fixture(scope="session")
def half_text(
    tmp_path_factory: pytest.TempPathFactory, tiny_data_dir: Path, tiny_shards: Path
) -> Callable[[int], Path]:
    """Makes shards of which those of one of two ranks, by its number, are without images."""

    def make(rank: int) -> Path:
        out = tmp_path_factory.mktemp("half_text")
        records = json.loads((tiny_data_dir / "train.json").read_text())
        for record in records[rank::2]:
            del record["image"]
        source = out / "train.json"
        source.write_text(json.dumps(records))
        shard_file(source, out / "train", "training", 4, progress=False, image_root=tiny_data_dir)
        (out / "meta").symlink_to(tiny_shards / "meta")
        return out

    return make


@pytest.fixture
def small_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has ZeRO reduce buckets that a tiny model fills many times, and other settings of it."""

    def set_up(**zero: object) -> None:
        for file in strategy.DS_CONFIGS.iterdir():
            if file.name.endswith(".json"):
                settings = json.loads(file.read_text())
                settings["zero_optimization"] |= {"reduce_bucket_size": 1000, **zero}
                (tmp_path / file.name).write_text(json.dumps(settings))
        monkeypatch.setattr(strategy, "DS_CONFIGS", tmp_path)

    return set_up


def unlabel(record: dict, steps: list[int]) -> None:
    """Take the labels of some steps away from a record."""
    turns = [turn for turn in record["conversations"] if turn["from"] == "gpt"]
    for step in steps:
        turns[step]["value"] = None


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank on the CPU."""
    distributed.initialize("cpu")
    yield
    distributed.shutdown()


@pytest.fixture
def refused(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script in this process, which must end with exit code 2; returns what it says."""

    def run(script: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run
