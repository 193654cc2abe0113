"""The page about benchmarks: what results say, what was left out, and the oracles apart."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import processbench, visualprocessbench
from test_report import HOSTILE, SCRIPT, Outline

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks import BENCHMARKS
from dreamprm_dist.evaluation.benchmarks.measure import group_sizes, measure_prms
from dreamprm_dist.evaluation.benchmarks.results import (
    BenchmarkResults,
    Chosen,
    read_results,
)
from dreamprm_dist.evaluation.results import write_results
from dreamprm_dist.report.benchmark import write_benchmark_report
from dreamprm_dist.report.overview import write_run_report


def write(folder: Path, name: str, records: list[dict], scores: dict, **more) -> Path:
    folder.mkdir()
    benchmark = BENCHMARKS[name]
    solutions = [benchmark.parse(record, "gsm8k.json") for record in records]
    chosen = Chosen(macro_f1=0.625, num_solutions=8, num_unscored=2)
    thresholds = dict.fromkeys(scores, (0.5, None)) | {"my_table": (0.25, chosen)}
    prms, between = measure_prms(benchmark, solutions, scores, thresholds, oracle=True)
    results = BenchmarkResults(
        benchmark=name, threshold_chosen_on="meta.json", groups=group_sizes(solutions),
        prms=prms, between=between, **more,
    )  # fmt: skip
    write_results(folder / "results.json", results)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two benchmarks of a baseline and a table; one source is all neutral, another hostile."""
    visual = [
        visualprocessbench(["a", "b"], [1, -1], data_source=HOSTILE),
        visualprocessbench(["a", "b"], [1, 1], data_source="WeMath"),
        visualprocessbench(["a", "b"], [0, 0], data_source="MMMU_DEV_VAL"),
    ]
    process = [processbench(["a", "b"], 1), processbench(["a"], -1, id="gsm8k-1")]
    wrong, right = [[0.9, 0.9], [0.9, 0.1], [0.5, 0.5]], [[0.9, 0.2], [0.9, 0.3], [0.1, 0.1]]
    both = {HOSTILE: wrong, "my_table": right}
    left_out = {"num_rejected": 1234, "num_unscored": 7, "num_stray_marks": 3}
    return [
        write(tmp_path / "vpb", "visualprocessbench", visual, both, **left_out),
        write(tmp_path / "pb", "processbench", process, {"my_table": [[0.9, 0.1], [0.9]]}),
    ]


def test_page(folders: list[Path], tmp_path: Path) -> None:
    path = write_benchmark_report(folders, tmp_path / "page.html")
    page = path.read_text()
    assert write_benchmark_report(folders, tmp_path / "again.html").read_text() == page
    outline = Outline(page)
    assert outline.open == [] and len(outline.ids) == len(set(outline.ids))
    assert "<script" not in page and "://" not in page and '"&"' not in page
    assert page.count('role="img"') == 4  # intervals and calibration of each
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "VisualProcessBench", "VisualProcessBench, oracle thresholds",
        "ProcessBench", "ProcessBench, oracle thresholds",
    ]  # fmt: skip
    assert "<li>1,234 records were rejected.</li>" in page
    assert "<li>7 solutions could not be scored by at least one PRM" in page
    assert "<li>3 marks are of no step" in page
    assert page.count("no measurement of a PRM") == 2
    said = "My table, threshold 0.250, chosen on meta.json, macro-F1 there 62.5% over 8 solutions"
    assert page.count(f"<figcaption>{said} (2 could not be scored)") == 2
    # At 0.25 the table takes both right steps for right; there is no wrong one.
    assert ["WeMath", "1", "100.0%", "0.0%", "50.0%"] in outline.rows
    assert ["MMMU_DEV_VAL", "1", "–", "–", "–"] in outline.rows
    assert ["gsm8k", "2", "100.0%", "100.0%", "100.0%"] in outline.rows
    assert ["gsm8k", "2", "2", "1", "0"] in outline.rows  # what was scored
    [pooled] = [r for r in outline.rows if r[0] == "all steps pooled" and len(r) == 2]
    results = read_results(folders[0] / "results.json")
    difference = results.between[0].rows[1].metrics["macro_f1"].value
    assert pooled[1].startswith(f"{100 * difference:+.1f}")


def test_a_benchmark_twice_is_told_apart(folders: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    page = write_benchmark_report([folders[1], other], tmp_path / "page.html").read_text()
    assert (
        f"<h2>ProcessBench, {folders[1]}</h2>" in page and f"<h2>ProcessBench, {other}</h2>" in page
    )
    with pytest.raises(InputError, match="named twice"):
        write_benchmark_report([other, tmp_path / "." / "other"], tmp_path / "page.html")


def test_without_oracles_and_comparisons(folders: list[Path], tmp_path: Path) -> None:
    results = read_results(folders[1] / "results.json")
    prms = {label: replace(prm, oracle=None, chosen=None) for label, prm in results.prms.items()}
    write_results(folders[1] / "results.json", replace(results, prms=prms))
    page = write_benchmark_report(folders[1:], tmp_path / "page.html").read_text()
    assert "oracle" not in page and "against each other" not in page
    assert "My table, threshold 0.250, as given; below" in page


def test_command(folders: list[Path], tmp_path: Path) -> None:
    run = [sys.executable, SCRIPT]
    done = subprocess.run([*run, *folders], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {folders[0] / 'report.html'}\n")
    (tmp_path / "run").mkdir()
    done = subprocess.run([*run, folders[0], tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 2 and "name folders of benchmarks alone" in done.stderr


def test_results_of_another_kind_are_refused(folders: list[Path], tmp_path: Path) -> None:
    path = folders[0] / "results.json"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("lr: 1\n")
    with pytest.raises(InputError, match="is a benchmark's; its folder alone"):
        write_run_report([run], tmp_path / "page.html", path)
    values = json.loads(path.read_text())
    for changed, said in (
        ({"format_version": 9}, "format version 9, but this release reads 1"),
        ({"benchmark": "mmmu"}, "is no results.json of launch/benchmark.py"),
        ({"surprise": 1}, "is no results.json of launch/benchmark.py"),
        ({"prms": {"a": {}}}, "is no results.json of launch/benchmark.py"),
    ):
        path.write_text(json.dumps(values | changed))
        with pytest.raises(InputError, match=said):
            write_benchmark_report(folders, tmp_path / "page.html")
