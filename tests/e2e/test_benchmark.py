"""`launch/benchmark.py` as a user starts it: on one rank, killed, and gone on with on two."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_files import processbench, visualprocessbench, write_lines

from data_tools.demo_model import data_texts, make_tiny_model
from dreamprm_dist.evaluation.benchmarks.results import read_results
from dreamprm_dist.prm.solutions import split_steps

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "benchmark.py"


@pytest.fixture(scope="module")
def test_file(tiny_data_dir: Path) -> Path:
    """The demo's candidates in the form of VisualProcessBench, and bad lines."""
    records: list[dict] = []
    for question in json.loads((tiny_data_dir / "test.json").read_text(encoding="utf-8")):
        images = [question["image_path"]] * (1 + len(records) % 3 // 2)
        for candidate, labels in zip(question["candidates"], question["step_labels"], strict=True):
            marks = [{"+": 1, "-": -1}[label] for label in labels]
            marks[-1] *= len(records) % 5 > 0  # some are neutral
            records.append(
                visualprocessbench(
                    split_steps(candidate), marks, image=images, question=question["question"],
                    data_source=["WeMath", "DynaMath"][len(records) % 2],
                )
            )  # fmt: skip
    records.insert(5, records[5] | {"image": ["images/none.png"]})
    steps = ["endless " * 9999, "so"]
    records.insert(9, records[9] | {"response": {"steps": steps, "process_correctness": [1, 1]}})
    records.insert(11, {"question": "?"})
    write_lines(tiny_data_dir / "bench.jsonl", records)
    return tiny_data_dir / "bench.jsonl"


def command(prms: list[Path], test_file: Path, out: Path, launcher: str = "python") -> dict:
    """Arguments of `subprocess` for a start by a launcher, on two ranks but for `python`."""
    start = {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2"],
    }[launcher]
    flags = ["--benchmark=visualprocessbench", "--test_json_file", test_file, "--out", out]
    flags += ["--threshold_json_file", test_file.parent / "meta.json", "--oracle_threshold"]
    # The number of threads changes rounding; torchrun would choose 1 for two ranks only.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {
        "args": [*start, SCRIPT, "--model", *prms, *flags, "--precision=fp32"],
        "env": env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"},
    }


def test_stopped_and_gone_on_with_it_writes_the_same_bytes(
    tiny_prm_dir: Path, tiny_data_dir: Path, test_file: Path, tmp_path: Path
) -> None:
    prms = [tmp_path / name / "export" for name in ("baseline", "table")]
    shutil.copytree(tiny_prm_dir, prms[0])
    make_tiny_model(prms[1], data_texts(tiny_data_dir), seed=5)
    one, two = tmp_path / "one", tmp_path / "two"
    done = subprocess.run(
        **command(prms, test_file, one), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in one.iterdir()}
    assert names == {"config.yaml", "rejected.jsonl", "results.json", "scores.jsonl"}
    results = read_results(one / "results.json")
    assert [*results.groups] == ["DynaMath", "WeMath"] and [*results.prms] == ["baseline", "table"]
    assert (results.num_solutions, results.num_rejected, results.num_unscored) == (48, 1, 2)
    rejected = [json.loads(line) for line in (one / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [12, 6, 10]
    assert "none.png" in rejected[1]["reason"] and "context" in rejected[2]["reason"]
    for prm in results.prms.values():
        assert prm.chosen and prm.chosen.num_solutions == 32 and prm.oracle
        for row in (*prm.judged.rows, *prm.oracle.rows):
            assert row.metrics["macro_f1"].interval_95
            low, high = row.metrics["macro_f1"].interval_95
            assert 0 <= low <= row.metrics["macro_f1"].value <= high <= 1
    assert "table over baseline, macro-F1, " in done.stdout and done.stdout.count("ORACLE") == 2
    assert done.stdout.endswith(f"Results are in {one}\n")

    part = two / "parts" / "rank0.jsonl"
    start = command(prms, test_file, two)
    with subprocess.Popen(**start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while run.poll() is None and (not part.exists() or part.read_text().count("\n") < 3):
            time.sleep(0.002)
        run.kill()
    assert 3 <= part.read_text().count("\n") < 2 * (12 + 2 + 32)  # it was not finished
    part.write_text(part.read_text() + '{"key": ["baseline", "te')
    done = subprocess.run(
        **command(prms, test_file, two, "torchrun"), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results are in") == 1
    for name in ("results.json", "scores.jsonl", "rejected.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert not (two / "parts").exists()


def test_another_benchmark_is_refused_by_its_first_record(
    refused, tiny_prm_dir: Path, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "gsm8k.json", [processbench(["a"], 0)])
    flags = ["--benchmark=prmbench", "--test_json_file", file, "--model", tiny_prm_dir]
    said = refused(SCRIPT, *flags, "--out", tmp_path / "out", "--device=cpu")
    assert "no solution of PRMBench has a labelled step; 1 records were rejected" in said
    assert "'modified_process' must be a list of texts" in said
    assert not (tmp_path / "out").exists()
