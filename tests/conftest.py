"""Fixtures shared by all tests: a tiny model, a small data set, the reference facts."""

import json
import os
from collections.abc import Iterator
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

# How long an example takes says nothing but how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set: 64 training records, 32 meta records, 12 test questions."""
    out = tmp_path_factory.mktemp("demo_data")
    make_demo_data(out, seed=0, num_train=64, num_meta=32, num_test=12)
    return out


@pytest.fixture(scope="session")
def tiny_prm_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data_dir: Path) -> Path:
    """A model folder: the demo's tiny InternVL with random weights, tokenizer and processor."""
    return make_tiny_model(tmp_path_factory.mktemp("prm"), data_texts(tiny_data_dir), seed=0)


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

    The first meta question has one solution, the other seven have four.
    """
    out = tmp_path_factory.mktemp("shards")
    shard_file(tiny_data_dir / "train.json", out / "train", "training", 4, progress=False)
    meta = out / "meta.json"
    meta.write_text(json.dumps(json.loads((tiny_data_dir / "meta.json").read_text())[3:]))
    shard_file(meta, out / "meta", "meta", 4, progress=False, image_root=tiny_data_dir)
    return out


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank on the CPU."""
    distributed.initialize("cpu")
    yield
    distributed.shutdown()
