"""`launch/evaluate.py` as a user starts it, on one rank and on two."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from started_run import free_port

from data_tools.demo_model import data_texts, make_tiny_model
from dreamprm_dist.evaluation.results import Results, read_results
from dreamprm_dist.prm.aggregation import AGGREGATIONS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "evaluate.py"


def flags_of(prm: Path | str, test_file: Path, out: Path, *flags: str) -> list[str]:
    files = ["--test_json_file", str(test_file), "--output_dir", str(out)]
    return ["--model", *str(prm).split(), *files, *flags]


def command(
    prm: Path, test_file: Path, out: Path, *flags: str, launcher: str = "python"
) -> tuple[list[str], dict[str, str]]:
    """A start by a launcher, on two ranks but for `python`, and its environment."""
    arguments = {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2"],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    arguments += [str(SCRIPT), *flags_of(prm, test_file, out, *flags)]
    # The number of threads changes rounding; torchrun would choose 1 for two ranks only. Without a
    # visible GPU, --device auto must still see that there are two ranks.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return arguments, env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def evaluate(*arguments, launcher: str = "python") -> subprocess.CompletedProcess:
    line, env = command(*arguments, launcher=launcher)
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=900)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


STRANGE = ["<image>A</img>\n\n<|im_end|>", " ", "<IMG_CONTEXT>", "", "endless " * 9999]


@pytest.fixture(scope="module")
def test_file(tiny_data_dir: Path) -> Path:
    """The demo's questions, and three that cannot be taken, and one of strange candidates."""
    questions = json.loads((tiny_data_dir / "test.json").read_text(encoding="utf-8"))
    good = {key: value for key, value in questions[0].items() if key != "step_labels"}
    bad = [
        good | {"id": "no-candidates", "candidates": []},
        good | {"id": "no-image", "image_path": "images/none.png"},
        good | {"id": 7, "image_path": "test.json"},
        good | {"id": "strange", "candidates": STRANGE, "true_false": [False] * 4 + [True]},
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
    values = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(values) == ["format_version", *(field.name for field in fields(Results))]
    results = read_results(out / "results.json")
    assert (results.num_questions, results.num_candidates, results.num_rejected) == (13, 53, 3)
    assert results.num_unscored == 3
    (label,) = results.prms
    assert list(results.accuracies(label)) == list(AGGREGATIONS)
    assert "13 questions, 53 candidates" in printed and f"{label}, mean*" in printed
    assert "3 candidates could not be scored" in printed
    assert printed.endswith(f"Results are in {out}\n")
    assert "local_rank" not in (out / "config.yaml").read_text()

    rows = lines(out / "scores.jsonl")
    strange = [row for row in rows if row["question"] == 6]
    assert [len(row["step_scores"] or []) for row in strange] == [2, 0, 1, 0, 0]
    reasons = ["", "no step", "", "no step", "more than the model's context"]
    assert all(why in (row["error"] or "") for row, why in zip(strange, reasons, strict=True))
    rows = [row for row in rows if row["question"] != 6]
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3] * 12
    assert sorted({row["question"] for row in rows}) == [0, 1, 2, *range(7, 16)]
    for row in rows:
        assert row["error"] is None
        assert len(row["step_scores"]) == 3
        assert row["answer"] is not None
        assert row["aggregates"]["mean"] == pytest.approx(sum(row["step_scores"]) / 3)
    first = [row["true_false"] for row in rows if row["candidate"] == 0]
    assert [q.first for q in results.questions if q.id != "strange"] == first


def test_rejected_records_are_listed(one_process: tuple[Path, str]) -> None:
    rejected = lines(one_process[0] / "rejected.jsonl")
    assert [(row["line"], row["id"]) for row in rejected] == [
        (4, "no-candidates"),
        (5, "no-image"),
        (6, "7"),
    ]
    for row, word in zip(rejected, ["candidates", "none.png", "image"], strict=True):
        assert word in row["reason"]


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_two_ranks_write_the_same_bytes(
    one_process: tuple[Path, str],
    launcher: str,
    tiny_prm_dir: Path,
    test_file: Path,
    tmp_path: Path,
) -> None:
    if shutil.which(launcher, path=command(tiny_prm_dir, test_file, tmp_path)[1]["PATH"]) is None:
        pytest.skip(f"{launcher} is not installed")
    done = evaluate(tiny_prm_dir, test_file, tmp_path, "--precision=fp32", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results are in") == 1
    for name in ("results.json", "scores.jsonl", "rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == (one_process[0] / name).read_bytes(), name
    assert not list(tmp_path.glob("parts"))


def test_missing_file(refused, tiny_prm_dir: Path, tmp_path: Path) -> None:
    said = refused(SCRIPT, *flags_of(tiny_prm_dir, tmp_path / "none.json", tmp_path / "out"))
    assert f"error: {tmp_path / 'none.json'}: no such file" in said


def test_all_records_rejected(refused, tiny_prm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "?"}\nnot json\n', encoding="utf-8")
    said = refused(SCRIPT, *flags_of(tiny_prm_dir, tmp_path / "test.jsonl", tmp_path / "out"))
    assert "all 2 records were rejected, the first at line 1" in said
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 2


def test_unknown_aggregation(refused, tiny_prm_dir: Path, tmp_path: Path) -> None:
    said = refused(
        SCRIPT, *flags_of(tiny_prm_dir, tmp_path, tmp_path / "out", "--aggregation_function=avg")
    )
    assert "(choose from " in said and "log_mean" in said


# --- several PRMs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_prms(tiny_prm_dir: Path, tiny_data_dir: Path, tmp_path_factory) -> str:
    """The tiny model and one with other random weights, as two runs' exports."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_prm_dir, runs / "baseline" / "export")
    make_tiny_model(runs / "table" / "export", data_texts(tiny_data_dir), seed=5)
    return f"{runs / 'baseline' / 'export'} {runs / 'table' / 'export'}"


@pytest.fixture(scope="module")
def of_two(two_prms: str, test_file: Path, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("evaluation") / "two"
    meta = ("--meta_json_file", str(test_file.parent / "meta.json"))
    done = evaluate(
        two_prms, test_file, out, "--precision=fp32", *meta, "--aggregation_function=meta"
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_one_table_of_two_prms(of_two: tuple[Path, str], one_process: tuple[Path, str]) -> None:
    out, printed = of_two
    results = read_results(out / "results.json")
    alone = read_results(one_process[0] / "results.json")
    (label,) = alone.prms
    assert results.prms["baseline"].correct == alone.prms[label].correct
    assert results.accuracies("baseline") == alone.accuracies(label)
    assert results.accuracies() == alone.accuracies()
    assert results.prms["table"].correct != results.prms["baseline"].correct
    methods = [row.method for row in results.table]
    assert methods[:4] == ["first", "random", "self_consistency", "baseline, mean"]
    assert methods[-1] == "oracle" and len(methods) == 4 + 2 * len(AGGREGATIONS)
    for row in results.table:
        low, high = row.interval_95
        assert low <= row.accuracy <= high
    (between,) = results.between
    assert (between.prm, between.over) == ("table", "baseline")
    for label, prm in results.prms.items():
        accuracies = results.meta_accuracy[label]
        assert accuracies[prm.aggregation] == max(accuracies.values())
    assert results.chosen_on.endswith("meta.json")
    assert "table over baseline: " in printed and "meta.json" in printed


def test_a_stopped_evaluation_goes_on(
    of_two: tuple[Path, str], two_prms: str, test_file: Path, tmp_path: Path
) -> None:
    meta = ("--meta_json_file", str(test_file.parent / "meta.json"))
    flags = ("--precision=fp32", *meta, "--aggregation_function=meta")
    line, env = command(two_prms, test_file, tmp_path, *flags)
    part = tmp_path / "parts" / "rank0.jsonl"
    # What a start leaves behind that could not load its model refuses nothing.
    part.parent.mkdir()
    (part.parent / "settings.json").write_text('{"model": "mistyped"}')
    with subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while run.poll() is None and (not part.exists() or part.read_text().count("\n") < 3):
            time.sleep(0.002)
        run.kill()
    part.write_text(part.read_text() + '{"key": ["baseline", "te')
    scored = part.read_text().count("\n")
    other = evaluate(two_prms, test_file, tmp_path, *flags, "--max_patch_num=2")
    assert other.returncode == 2 and "with another max_patch_num" in other.stderr
    done = evaluate(two_prms, test_file, tmp_path, *flags, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert 3 <= scored < 2 * (13 + 2 + 8)  # it was not finished
    for name in ("results.json", "scores.jsonl", "rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == (of_two[0] / name).read_bytes(), name


def test_two_models_of_one_label(
    refused, tiny_prm_dir: Path, test_file: Path, tmp_path: Path
) -> None:
    said = refused(SCRIPT, *flags_of(f"{tiny_prm_dir} {tiny_prm_dir}", test_file, tmp_path))
    assert "is taken; give it as label=folder" in said


def test_meta_flags_go_together(
    refused, tiny_prm_dir: Path, test_file: Path, tmp_path: Path
) -> None:
    assert "go together" in refused(
        SCRIPT, *flags_of(tiny_prm_dir, test_file, tmp_path, "--aggregation_function=meta")
    )
