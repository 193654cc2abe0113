"""Weights in a file: which row is whose, and what is refused by file and id."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_tools.shard import shard_file
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.reweighters.config import ReweighterConfig
from dreamprm_dist.training.given_weights import given_weights

ROWS = 7
WEIGHTS = np.linspace(0.25, 1.75, ROWS)  # exact in float32


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[list[str]], ShardFolder]:
    """Makes two shards of records with some ids."""

    def make(ids: list[str]) -> ShardFolder:
        turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "+"}]
        file, out = tmp_path / "records.json", tmp_path / f"shards-{len({*ids})}"
        file.write_text(json.dumps([{"id": i, "conversations": turns} for i in ids]))
        shard_file(file, out, "training", 2, progress=False)
        return ShardFolder(out)

    return make


@pytest.fixture
def own(shards) -> ShardFolder:
    return shards([f"q{i}" for i in range(ROWS)])


@pytest.fixture
def doubled(shards) -> ShardFolder:
    return shards([f"q{i // 2}" for i in range(ROWS)])


def rows(**columns) -> pd.DataFrame:
    """As a run exports them, with other columns in place of some; None: without it."""
    usual = {
        "sample_id": range(ROWS),
        "source_id": [f"q{i}" for i in range(ROWS)],
        "raw_weight": -WEIGHTS,
        "weight": WEIGHTS,
    }
    return pd.DataFrame({k: v for k, v in (usual | columns).items() if v is not None})


def read(table: pd.DataFrame, shards: ShardFolder, folder: Path, **settings) -> np.ndarray:
    """Weights by sample ID, from a file whose rows are in another order.

    Args:
        settings: of a table that starts from them; without any they are fixed.
    """
    file = folder / "weights.parquet"
    table.iloc[::-1].to_parquet(file, index=False)
    flag = "initial_weights" if settings else "instance_weights"
    of_shard = given_weights(ReweighterConfig(**{flag: str(file)} | settings), shards)
    assert of_shard is not None
    found = np.empty(shards.num_rows, dtype=np.float32)
    for shard in range(shards.num_shards):
        found[shard :: shards.num_shards] = of_shard(shard)
    return found


def test_no_file_no_weights(own: ShardFolder):
    assert given_weights(ReweighterConfig(), own) is None


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"sample_id": None},
        {"source_id": None},
        {"raw_weight": None},
        {"sample_id": [4, 4, 100, -1, 0, 2, 3]},  # of other shards: the source IDs are unique
        {"weight": WEIGHTS.astype(np.float32)},
        {"sample_id": np.arange(ROWS, dtype=np.int16)},
        {"source_id": pd.Categorical([f"q{i}" for i in range(ROWS)])},
    ],
)
def test_each_row_finds_its_instance(columns: dict, own: ShardFolder, tmp_path: Path):
    assert read(rows(**columns), own, tmp_path).tolist() == WEIGHTS.tolist()


def test_instances_that_share_a_source_id_are_found_by_sample_id(
    doubled: ShardFolder, own: ShardFolder, tmp_path: Path
):
    names = [f"q{i // 2}" for i in range(ROWS)]
    for source_id in (names, None):
        found = read(rows(source_id=source_id), doubled, tmp_path)
        assert found.tolist() == WEIGHTS.tolist()
    with pytest.raises(InputError, match=r"sample_id \d is 'q\d' there and 'q\d' in .*shards-4;"):
        read(rows(), doubled, tmp_path)
    with pytest.raises(InputError, match=r"sample_id \d is 'q\d' there and 'q\d' in .*shards-7;"):
        read(rows(source_id=names), own, tmp_path)
    for shards in (doubled, own):
        with pytest.raises(
            InputError, match=r"weights.parquet: source_id 'q\d' is that of several"
        ):
            read(rows(source_id=names, sample_id=None), shards, tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rows()[2:], r"has no weight for source_id 'q0' and 1 more of .*shards-7; add a row"),
        (rows(source_id=None)[:-1], r"has no weight for sample_id 6 of .*shards-7; add a row"),
        (
            pd.concat([rows(), rows(source_id=["x", "y", *"abcde"])[:2]]),
            r"source_id 'y' and 1 more is not in .*shards-7; leave such rows out",
        ),
        (
            pd.concat([rows(source_id=None), rows(source_id=None, sample_id=range(-1, 6))[:1]]),
            r"sample_id -1 is not in .*shards-7; leave such rows out",
        ),
        (
            pd.concat([rows(source_id=None), rows(source_id=None)[3:4]]),
            "sample_id 3 has several rows; leave one of them",
        ),
        (
            pd.concat([rows(), rows()[3:4]]),
            "sample_id 3 has several rows; leave one of them",
        ),
        (rows(weight=None), r"has no column 'weight' \(sample_id, source_id, raw_weight are there"),
        (rows(sample_id=None, source_id=None), "has neither sample_id nor source_id; add one"),
        (rows(weight=["1"] * 6 + ["a lot"]), "weight must hold numbers"),
        (rows(sample_id=WEIGHTS), "sample_id must hold integers"),
        (rows(source_id=["q0", None, *"abcde"]), "row 6 has no source_id; give every row its own"),
    ],
)
def test_what_does_not_fit_is_named(table: pd.DataFrame, message: str, own, tmp_path: Path):
    with pytest.raises(InputError, match=rf"weights\.parquet: {message}"):
        read(table, own, tmp_path)


@pytest.mark.parametrize(
    ("weight", "shown"), [(math.nan, "nan"), (None, "nan"), (math.inf, "inf"), (-1e39, "-inf")]
)
def test_a_weight_that_is_not_finite_is_named(weight, shown: str, own, tmp_path: Path):
    table = rows(weight=[1.0, 1.0, 1.0, weight, 1.0, weight, 1.0])
    message = rf"sample_id 3 \(id 'q3'\) is {shown} \(2 such weights\); it must be a finite number"
    with pytest.raises(InputError, match=message):
        read(table, own, tmp_path)


@pytest.mark.parametrize(
    ("activation", "bad", "must"),
    [
        ("ReLU", -0.5, "0 or more for activation_function ReLU"),
        ("sigmoid", 1.0, "above 0 and below 1 for activation_function sigmoid"),
        ("Clip", 2.5, r"from weight_min 0\.0 to weight_max 2\.0 for activation_function Clip"),
        ("Project", -0.5, r"from weight_min 0\.0 to weight_max 2\.0 for activation_function Proj"),
    ],
)
def test_a_table_starts_from_weights_that_its_activation_gives(
    activation: str, bad: float, must: str, own, tmp_path: Path
):
    settings = {"activation_function": activation, "weight_min": 0.0, "weight_max": 2.0}
    fine = rows(weight=WEIGHTS / 2)
    assert read(fine, own, tmp_path, **settings).tolist() == (WEIGHTS / 2).tolist()
    table = rows(weight=[0.5, 0.5, bad, *[0.5] * 4])
    with pytest.raises(InputError, match=rf"\(id 'q2'\) is {bad:g}; it must be {must}"):
        read(table, own, tmp_path, **settings)


def test_negative_weights_are_warned_of(own, tmp_path: Path, caplog):
    read(rows(), own, tmp_path)
    assert not caplog.text
    read(rows(weight=WEIGHTS - 1), own, tmp_path)
    assert "3 of 7 weights are negative: the lower level climbs" in caplog.text


def test_a_file_that_is_no_parquet(own, tmp_path: Path):
    file = tmp_path / "weights.parquet"
    file.write_text("sample_id,weight\n0,1.0\n")
    with pytest.raises(InputError, match=r"weights.parquet: cannot be read as Parquet"):
        given_weights(ReweighterConfig(instance_weights=str(file)), own)
