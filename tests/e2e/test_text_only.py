"""Solutions without images from TRL's format to scores, by the commands that users start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from json_lines import lines, write
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.")


def command(*parts: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [sys.executable, *map(str, parts)]
    done = subprocess.run(started, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def test_from_trls_format_to_scores(tmp_path: Path, tiny_prm_dir: Path):
    """Image parts do not move, for no gradient reaches them and they are not decayed here."""
    stepwise = [
        {
            "prompt": f"Is {i} even?",
            "completions": [f"the digit is {i}", "it is even"],
            "labels": [True, i % 2 == 0],
        }
        for i in range(8)
    ]
    meta = [
        {
            "id": i // 2,
            "conversations": [
                {"from": "human", "value": f"### Question:\nIs {i // 2} even?"},
                {"from": "human", "value": answer},
                {"from": "gpt", "value": None},
            ],
            "true_false": (answer == "yes") == (i // 2 % 2 == 0),
        }
        for i, answer in enumerate(["yes", "no"] * 4)
    ]
    test = [
        {
            "id": i,
            "question": f"Is {i} even?",
            "candidates": ["the digit is even\n\nAnswer: yes", "Answer: no"],
            "true_false": [i % 2 == 0, i % 2 == 1],
        }
        for i in range(4)
    ]
    write(tmp_path / "trl.jsonl", stepwise)
    write(tmp_path / "meta.jsonl", meta)
    write(tmp_path / "test.jsonl", test)
    train, run = tmp_path / "train.jsonl", tmp_path / "run"
    command("-m", "data_tools.convert", "stepwise", tmp_path / "trl.jsonl", "--out", train)
    command(
        *("launch/train.py", "--train_json_file", train, "--reward_model", tiny_prm_dir),
        *("--meta_json_file", tmp_path / "meta.jsonl", "--out", run, "--device", "cpu"),
        *("--precision", "fp32", "--num_workers", "0", "--num_shards", "4", "--batch_size", "4"),
        *("--meta_batch_size", "4", "--iteration_num", "2", "--lr", "1e-3", "--weight_decay", "0"),
    )
    before = load_file(tiny_prm_dir / "model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    kept = {name for name, tensor in before.items() if tensor.equal(after[name].to(tensor.dtype))}
    parts = {name for name in before if name.startswith(IMAGE_PARTS)}
    assert parts and parts <= kept and len(kept) < len(before)
    command(
        *("launch/score.py", "--model", run, "--input", tmp_path / "test.jsonl"),
        *("--out", tmp_path / "scores.jsonl"),
    )
    scored = lines(tmp_path / "scores.jsonl")
    assert len(scored) == 4
    assert all(error is None for line in scored for error in line["errors"])
    command(
        *("launch/evaluate.py", "--test_json_file", tmp_path / "test.jsonl"),
        *("--model", f"mine={run}", "--out", tmp_path / "evaluation", "--device", "cpu"),
    )
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())
    candidates = lines(tmp_path / "evaluation" / "scores.jsonl")
    assert len(candidates) == 8
    assert all(torch.tensor(line["step_scores"]).isfinite().all() for line in candidates)
