"""`launch/evaluate.py` as a user starts it, with one process and with two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamprm_dist.aggregation import AGGREGATIONS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "evaluate.py"


def evaluate(
    prm: Path, test_file: Path, out: Path, *flags: str, processes: int = 1
) -> subprocess.CompletedProcess:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={processes}"] if launcher else []
    command = [sys.executable, *launcher, str(SCRIPT), "--model", str(prm)]
    command += ["--test_json_file", str(test_file), "--output_dir", str(out), *flags]
    # The number of threads changes rounding; torchrun would choose 1 for two processes only.
    # Without a visible GPU, --device auto must still see that there are two processes.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def test_file(tiny_data_dir: Path) -> Path:
    """The demo's questions, and four that cannot be taken."""
    questions = json.loads((tiny_data_dir / "test.json").read_text(encoding="utf-8"))
    good = questions[0]
    bad = [
        good | {"id": "no-candidates", "candidates": []},
        good | {"id": "no-image", "image_path": "images/none.png"},
        good | {"id": 7, "image_path": "test.json"},
        good | {"id": "empty", "candidates": ["A", " "], "true_false": [True, False]},
    ]
    path = tiny_data_dir / "with_bad_records.json"
    path.write_text(json.dumps([*questions[:3], *bad, *questions[3:]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_process(
    tiny_prm_dir: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("evaluation") / "one"
    done = evaluate(tiny_prm_dir, test_file, out, "--precision=fp32")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_files(one_process: tuple[Path, str]) -> None:
    out, printed = one_process
    names = {path.name for path in out.iterdir()}
    assert names == {"config.yaml", "rejected.jsonl", "results.json", "scores.jsonl"}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (results["num_questions"], results["num_candidates"]) == (12, 48)
    assert results["num_rejected"] == 4
    assert list(results["accuracy"]["prm"]) == list(AGGREGATIONS)
    assert results["headline"]["accuracy"] == results["accuracy"]["prm"]["mean"]
    assert "12 questions, 48 candidates" in printed and "PRM, mean" in printed

    rows = lines(out / "scores.jsonl")
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3] * 12
    assert sorted({row["question"] for row in rows}) == [0, 1, 2, *range(7, 16)]
    for row in rows:
        assert len(row["step_scores"]) == 3
        assert row["answer"] is not None
        assert row["aggregates"]["mean"] == pytest.approx(sum(row["step_scores"]) / 3)
    first = [row["true_false"] for row in rows if row["candidate"] == 0]
    assert results["first_correct"] == first


def test_rejected_records_are_listed(one_process: tuple[Path, str]) -> None:
    rejected = lines(one_process[0] / "rejected.jsonl")
    assert [(row["line"], row["id"]) for row in rejected] == [
        (4, "no-candidates"),
        (5, "no-image"),
        (6, 7),
        (7, "empty"),
    ]
    for row, word in zip(rejected, ["candidates", "none.png", "image", "no step"], strict=True):
        assert word in row["reason"]


def test_two_processes_write_the_same_bytes(
    one_process: tuple[Path, str], tiny_prm_dir: Path, test_file: Path, tmp_path: Path
) -> None:
    done = evaluate(tiny_prm_dir, test_file, tmp_path, "--precision=fp32", processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "scores.jsonl", "rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == (one_process[0] / name).read_bytes(), name
    assert not list(tmp_path.glob("scores.rank*"))


def test_missing_file(tiny_prm_dir: Path, tmp_path: Path) -> None:
    done = evaluate(tiny_prm_dir, tmp_path / "none.json", tmp_path / "out")
    assert done.returncode == 1
    assert f"error: {tmp_path / 'none.json'}: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_records_rejected(tiny_prm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "?"}\nnot json\n', encoding="utf-8")
    done = evaluate(tiny_prm_dir, tmp_path / "test.jsonl", tmp_path / "out")
    assert done.returncode == 1
    assert "all 2 records were rejected, the first at line 1" in done.stderr
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 2


def test_unknown_aggregation(tiny_prm_dir: Path, tmp_path: Path) -> None:
    done = evaluate(tiny_prm_dir, tmp_path, tmp_path / "out", "--aggregation_function=avg")
    assert done.returncode == 1
    assert "choose from mean, min" in done.stderr
