"""`launch/export.py` as a user starts it: from one layout into the other and back."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from dreamprm_dist.evaluation.best_of_n import CandidateScores
from dreamprm_dist.evaluation.compare import compare
from dreamprm_dist.evaluation.results import Results, write_results
from dreamprm_dist.prm.model import load_prm, load_tokenizer

EXPORT = Path(__file__).resolve().parents[2] / "launch" / "export.py"


def export(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, EXPORT, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)


def evaluation(scores: dict[str, list[float]]) -> Results:
    """PRMs by what they give to the two candidates of a question, of which the second is right."""
    prms = {
        label: [
            CandidateScores(0, "", i, "", [score], "AB"[i], i == 1) for i, score in enumerate(pair)
        ]
        for label, pair in scores.items()
    }
    results = compare(prms, dict.fromkeys(prms, "mean"))
    return replace(results, test_json_file="test.json")


def test_there_and_back(tiny_prm_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "export").symlink_to(tiny_prm_dir)
    settings = {"reward_model": "base", "train_json_file": "shards/train", "reweighter": "table"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "metrics.jsonl").write_text('{"iteration": 7, "lower_loss": 0.25}\n{"iterat')
    # The first PRM is another one, which chooses the wrong candidate.
    results = evaluation({"unweighted": [0.9, 0.1], "table": [0.1, 0.9]})
    models = {"unweighted": "runs/baseline/export", "table": str(run / "export")}
    write_results(run / "results.json", replace(results, models=models))
    original, back = tmp_path / "original", tmp_path / "back"
    fp32 = ("--precision", "fp32")
    flags = ("--layout", "original", "--results", run / "results.json")
    done = export("--model", run / "export", "--output_dir", original, *flags, *fp32)
    assert done.returncode == 0, done.stderr
    assert json.loads((original / "config.json").read_text())["model_type"] == "internvl_chat"
    done = export("--model", original, "--output_dir", back, *fp32)
    assert done.returncode == 0, done.stderr

    before, after = (load_prm(str(f), "fp32").state_dict() for f in (tiny_prm_dir, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = "<|im_start|>user\nThe digit is 7.<|im_end|>\n"
    assert load_tokenizer(str(original)).encode(text) == load_tokenizer(str(back)).encode(text)
    for folder in (original, back):
        names = {path.name for path in folder.iterdir()}
        assert names >= {"README.md", "preprocessor_config.json", "chat_template.jinja"}
        assert not [name for name in names if name.endswith((".bin", ".pt", ".py"))]
    card = (original / "README.md").read_text()
    lines = ("base_model: base", "| train_json_file | `shards/train` |", "| lower_loss | `0.25` |")
    lines += ("| test file | `test.json` |", "| questions | `1` |", "| random | `50.0%` |")
    assert all(line in card for line in (*lines, "| PRM, mean | `100.0%` |", "| first | `0.0%` |"))


def test_bad_input(refused, tiny_prm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    flags = ("--model", tiny_prm_dir, "--output_dir")
    assert "already exists" in refused(EXPORT, *flags, tmp_path)
    flags += (tmp_path / "out", "--results")
    assert "no results.json" in refused(EXPORT, *flags, tmp_path / "results.json")
    results = replace(evaluation({"a": [0.1, 0.9]}), models={"a": "x/export"})
    write_results(tmp_path / "other.json", results)
    assert "evaluation of x/export" in refused(EXPORT, *flags, tmp_path / "other.json")
    assert not (tmp_path / "out").exists()
