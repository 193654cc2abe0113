"""`launch/train.py` under the real launcher, from raw files to an export that loads again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from started_run import free_port

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.metrics import FIELDS

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
FLAGS = [
    *("--precision", "fp32", "--num_workers", "1", "--num_shards", "4", "--device", "cpu"),
    *("--batch_size", "4", "--meta_batch_size", "4", "--iteration_num", "3"),
    *("--meta_lr", "0.1", "--label_context", "plus"),
]


def launch(launcher: list[str], *flags: object) -> subprocess.CompletedProcess:
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    command = [*launcher, TRAIN, *FLAGS, *flags]
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def table_run(tmp_path_factory, tiny_data_dir: Path, tiny_prm_dir: Path) -> Path:
    """The run folder of a table run on two ranks, started from raw JSON files."""
    folder = tmp_path_factory.mktemp("runs") / "table"
    done = launch(
        ["deepspeed", "--num_gpus", "2", "--master_port", free_port()],
        *("--train_json_file", tiny_data_dir / "train.json"),
        *("--meta_json_file", tiny_data_dir / "meta.json"),
        *("--reward_model", tiny_prm_dir, "--weights_path", folder),
        *("--meta_validation_fraction", "0.4", "--keep_best", "1"),
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stderr[-4000:]
    assert "64 training records in 4 shards" in done.stderr  # the cache says what it did
    return folder


def test_a_run_says_what_it_is_and_what_is_next(
    tiny_shards: Path, tiny_prm_dir: Path, tmp_path: Path, table_run: Path
):
    """A dry run says it of the folder that holds the shards of both kinds, and writes nothing."""
    folder = tmp_path / "run"
    done = launch(
        [sys.executable],
        *("--train_json_file", tiny_shards, "--meta_json_file", tiny_shards, "--dry_run"),
        *("--reward_model", tiny_prm_dir, "--weights_path", folder, "--unroll_window", "all"),
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.split("checking records")[-1]
    meta = ShardFolder(tiny_shards / "meta")
    data = f"64 training instances in 4 shards, {meta.num_rows} meta solutions of 8 questions"
    assert f"bi-level in {folder}: {data}\n" in said
    assert "global batch 4 = 1 rank(s) x batch_size 4 x gradient_accumulation 1\n" in said
    assert "meta batch 4 = 1 rank(s) x meta_batch_size 4 x meta_gradient_accumulation 1\n" in said
    assert "3 iterations x 1 lower step(s) = 0.188 epochs, 1 checkpoint(s)" in said
    stands_on = r"\non CPU: precision fp32, attention sdpa, strategy zero2_cpu, ([\d,]+) of \1 "
    assert re.search(stands_on + r"parameters trained\ntorch 2\S+, deepspeed 0\S+, transfor", said)
    assert "dry run: nothing is trained or written" in said
    assert not folder.exists()


def test_every_metric_is_documented_and_every_document_has_its_metric(table_run: Path):
    lines = [json.loads(line) for line in (table_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    quantiles = {f"weight_{q}" for q in ("min", "max", "q05", "q25", "q50", "q75", "q95")}
    of_other_lines = {"weight_domains", "seconds_checkpoint", "checkpoint_bytes"}
    of_other_lines |= {"meta_validation_loss"}
    assert lines[0].keys() == (FIELDS.keys() | quantiles) - of_other_lines
    assert lines[-1]["epoch"] == 3 * 8 / 64
    assert 0 < lines[-1]["meta_validation_loss"] < 2
    for line in lines:
        assert all(isinstance(v, int | float) for v in line.values())


def test_a_validation_loss_stands_in_the_line_of_its_iteration(
    tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path
):
    done = launch(
        [sys.executable],
        *("--train_json_file", tiny_shards / "train", "--meta_json_file", tiny_shards / "meta"),
        *("--reward_model", tiny_prm_dir, "--weights_path", tmp_path, "--iteration_num", "5"),
        *("--meta_validation_fraction", "0.4", "--save_every_iterations", "2", "--log_every", "3"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 3, 4, 5]
    losses = {
        x["iteration"]: x["meta_validation_loss"] for x in lines if "meta_validation_loss" in x
    }
    saved = (tmp_path / "checkpoints" / f"iteration-{i}" / "state.json" for i in (4, 5))
    states = [json.loads(path.read_text()) for path in saved]
    assert [*losses] == [2, 4, 5]
    assert [losses[i] for i in (4, 5)] == [state["meta_validation_loss"] for state in states]


def test_the_export_loads_again_and_differs_from_its_start(table_run: Path, tiny_prm_dir: Path):
    trained, start = (load_prm(str(path), "fp32") for path in (table_run / "export", tiny_prm_dir))
    assert any(
        not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)
    )
    text = "<|im_start|>user\nThe digit is 7.<|im_end|>"
    tokenizers = [load_tokenizer(str(p)) for p in (table_run / "export", tiny_prm_dir)]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].chat_template
    assert (table_run / "export" / "preprocessor_config.json").is_file()
    assert "instance_table" in (table_run / "export" / "README.md").read_text()


def test_the_run_exported_again_is_the_same_files(table_run: Path, tmp_path: Path):
    command = [sys.executable, TRAIN.with_name("export.py"), "--model", table_run, "--output_dir"]
    done = subprocess.run([*map(str, command), str(tmp_path / "out")], capture_output=True)
    assert done.returncode == 0, done.stderr
    first, again = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (table_run / "export", tmp_path / "out")
    )
    assert first == again
    card = first["README.md"].decode()
    assert "base_model" not in card and str(table_run.parent) not in card
    assert "| training instances | `64` |" in card and "| parity | `" in card


def test_every_instance_has_its_weight(table_run: Path, tiny_data_dir: Path):
    weights = pd.read_parquet(table_run / "export" / "instance_weights.parquet")
    records = json.loads((tiny_data_dir / "train.json").read_text())
    assert list(weights.columns) == ["sample_id", "source_id", "raw_weight", "weight"]
    assert weights.sample_id.tolist() == list(range(64))
    assert weights.source_id.tolist() == [record["id"] for record in records]
    # 24 of 64 instances were drawn; dense AdamW also decays the others a little.
    assert 8 < (weights.raw_weight.sub(1).abs() > 0.01).sum() <= 24


def test_the_configuration_is_saved_with_the_run(table_run: Path):
    config = parse_train_config(["--config", str(table_run / "config.yaml")])
    assert config.lower.batch_size == 4
    assert config.run.weights_path == str(table_run)


def test_baseline_and_cold_start_are_the_same_loop_without_weights(
    tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path
):
    losses = []
    for mode in ("--baseline", "--retrain"):
        folder = tmp_path / mode.strip("-")
        done = launch(
            [sys.executable],
            *(mode, "--train_json_file", tiny_shards / "train"),
            *("--reward_model", tiny_prm_dir, "--weights_path", folder),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert not (folder / "export" / "instance_weights.parquet").exists()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["lower_loss"] for line in lines])
        assert "meta_loss" not in json.loads(lines[0])
    assert losses[0] == losses[1]


def test_the_run_under_mpirun(tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path):
    """mpirun gives the ranks; the run is the one that deepspeed starts."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    done = launch(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
        *("--train_json_file", tiny_shards / "train", "--meta_json_file", tiny_shards / "meta"),
        *("--reward_model", tiny_prm_dir, "--weights_path", tmp_path),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["epoch"] == 8 / 64  # two ranks of four
