"""What `make shard-data` calls."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
TRAIN, META = ["--train", "data/train.jsonl"], ["--meta", "data/meta.jsonl"]


@pytest.mark.parametrize(
    ("there", "variables", "expected"),
    [
        ("train meta", [], [*TRAIN, *META]),
        ("train", [], TRAIN),
        ("meta", [], META),
        ("train meta", ["META="], TRAIN),
        ("train meta", ["TRAIN="], META),
        ("train", ["META=my meta.json"], [*TRAIN, "--meta", "my meta.json"]),
        ("", ["META=m.json"], ["--meta", "m.json"]),
        ("", ["TRAIN=t.json", "META=m.json"], ["--train", "t.json", "--meta", "m.json"]),
        ("train", ["OVERWRITE=1"], [*TRAIN, "--overwrite"]),
        ("train", ["OVERWRITE=0"], TRAIN),
        ("train meta", ["META_NUM_SHARDS=4"], [*TRAIN, *META, "--meta_num_shards", "4"]),
        ("train", ["DRY_RUN=1", "LIMIT=9"], [*TRAIN, "--limit", "9", "--dry_run"]),
    ],
)
def test_shard_data_passes_on_what_it_is_told(
    tmp_path: Path, there: str, variables: list[str], expected: list[str]
):
    for name in ("data", ".venv"):
        (tmp_path / name).mkdir()
    for name in ("setup.py", ".venv/.installed"):  # the environment is there
        (tmp_path / name).touch()
    for name in there.split():
        (tmp_path / "data" / f"{name}.jsonl").touch()
    command = ["make", "--dry-run", "--file", MAKEFILE, "shard-data", "NUM_SHARDS=64", *variables]
    environment = {"PATH": os.environ["PATH"]}  # none of an outer make's
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = run.stdout
    arguments = shlex.split(said[said.index("-m data_tools.shard") :].replace("\\\n", " "))[2:]
    fixed = ["--out", "data/shards", "--num_shards", "64", "--workers", "4"]
    assert arguments == [*expected, *fixed]
