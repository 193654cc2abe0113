"""Bad input is one sentence, with the file and the id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"


@pytest.fixture
def train(refused, tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path):
    """Runs `launch/train.py` in this process and returns the sentence that it ends with."""

    def run(**flags) -> str:
        flags = {
            "train_json_file": tiny_shards / "train",
            "meta_json_file": tiny_shards / "meta",
            "reward_model": tiny_prm_dir,
            "weights_path": tmp_path / "run",
            "precision": "fp32",
            "num_workers": 0,
            "iteration_num": 1,
        } | flags
        said = refused(TRAIN, *(part for k, v in flags.items() for part in (f"--{k}", v)))
        message = said.split("\r")[-1]  # behind the bars of progress
        assert "error: " in message and message.endswith("\n") and message.count("\n") == 1
        return message

    return run


def records(tiny_data_dir: Path, count: int = 8) -> list[dict]:
    return [
        record | {"image": str(tiny_data_dir / record["image"])}
        for record in json.loads((tiny_data_dir / "train.json").read_text())[:count]
    ]


def test_a_missing_file(train, tmp_path: Path):
    message = train(train_json_file=tmp_path / "none.json")
    assert "none.json" in message


def test_a_malformed_list(train, tmp_path: Path):
    file = tmp_path / "train.json"
    file.write_text('[{"id": 1},\n {"id" 2}]')
    message = train(train_json_file=file)
    assert "train.json, line 2, column" in message


def test_bad_records_are_listed_and_the_run_goes_on(tmp_path: Path, tiny_data_dir: Path):
    from data_tools.shard import shard_file

    good = records(tiny_data_dir)
    broken = [
        good[0] | {"id": "label", "conversations": [{"from": "human", "value": "s"}] * 2},
        good[0] | {"id": "image", "image": "nowhere.png"},
        good[0] | {"id": "sign"},
    ]
    broken[2]["conversations"] = [*good[0]["conversations"], {"from": "gpt", "value": "maybe"}]
    file = tmp_path / "train.jsonl"
    lines = [json.dumps(record) for record in [*good, *broken]]
    file.write_text("\n".join([*lines[:3], '{"id": broken', *lines[3:]]))
    manifest = shard_file(file, tmp_path / "out", "training", 2, progress=False)
    assert (manifest["num_rows"], manifest["num_rejected"]) == (8, 4)
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    reasons = {r["id"]: (r["line"], r["reason"]) for r in map(json.loads, rejected)}
    assert reasons["train.jsonl:4"][0] == 4 and "not valid JSON" in reasons["train.jsonl:4"][1]
    assert "no step" in reasons["label"][1]
    assert "nowhere.png" in reasons["image"][1]
    assert "'maybe'" in reasons["sign"][1]


def test_an_empty_meta_set(train, tmp_path: Path):
    file = tmp_path / "meta.json"
    file.write_text("[]")
    assert "meta.json: holds no record" in train(meta_json_file=file)


def test_training_shards_given_as_meta_shards(train, tiny_shards: Path):
    assert "holds training shards" in train(meta_json_file=tiny_shards / "train")


def test_a_record_longer_than_the_context(train, tmp_path: Path, tiny_data_dir: Path):
    long = records(tiny_data_dir)
    turn = {"from": "human", "value": "The digit is 4. " * 3000}
    long[5] = long[5] | {"id": "long", "conversations": [turn, *long[5]["conversations"]]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps(long))
    message = train(train_json_file=file, num_shards=4)
    assert "sample_id 5 (id 'long')" in message and "tokens are more than" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the GPU that is asked for")
def test_a_gpu_that_is_not_there(train):
    assert "rank 0 finds no GPU on " in train(device="cuda")


def test_a_run_folder_that_is_a_file(train, tmp_path: Path):
    (tmp_path / "run").touch()
    assert f"{tmp_path / 'run'} is a file; give a folder" in train()


def unlabelled(turn: dict) -> dict:
    return turn | {"value": None} if turn["from"] == "gpt" else turn


@pytest.mark.parametrize("kind", [{"retrain": True}, {"baseline": True}, {}])
def test_nothing_to_learn_from(train, tmp_path: Path, tiny_data_dir: Path, kind: dict):
    none = records(tiny_data_dir)
    for record in none:
        record["conversations"] = list(map(unlabelled, record["conversations"]))
    file = tmp_path / "train.json"
    file.write_text(json.dumps(none))
    assert "labelled" in train(train_json_file=file, num_shards=4, **kind)


def test_a_global_batch_larger_than_the_data(train):
    assert "a global batch of 128 is larger than the data, 64 records; lower" in train(
        batch_size=64, gradient_accumulation=2
    )
    said = train(meta_batch_size=16, group_meta_by_question=True)
    assert "a global batch of 16 is larger than the data, 8 questions" in said


def test_an_unroll_that_would_leave_rows_without_a_weight(train):
    assert "same 2 of 4 shards" in train(unroll_steps=2)


def test_a_model_folder_that_is_none(train, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    message = train(reward_model=tmp_path)
    assert "model_type 'qwen2_vl'" in message and "InternVL3 checkpoint" in message


def test_a_model_that_is_nowhere(train, tmp_path: Path):
    assert "no-model" in train(reward_model=tmp_path / "no-model")


def test_a_run_folder_that_is_taken(train, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "already holds a run" in train()


SMALL = """
mount -t tmpfs -o size=256k tmpfs /dev/shm || exit 77
exec "$@"
"""


def test_shared_memory_too_small_for_a_batch(tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path):
    """As a container's 64 MB are for real tiles: the batch would else be waited for without end."""
    flags = [
        *("--train_json_file", tiny_shards / "train", "--meta_json_file", tiny_shards / "meta"),
        *("--reward_model", tiny_prm_dir, "--weights_path", tmp_path / "run", "--device", "cpu"),
        *("--batch_size", 32, "--meta_batch_size", 8, "--num_workers", 1, "--iteration_num", 1),
    ]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL, "sh"]
    try:
        done = subprocess.run(
            [str(part) for part in (*command, sys.executable, TRAIN, *flags)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no /dev/shm of one's own: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr[-4000:]
    message = done.stderr.split("\r")[-1]
    assert "error: the data workers have no room left in /dev/shm" in message
    assert "--num_workers 0" in message and "Traceback" not in done.stderr
