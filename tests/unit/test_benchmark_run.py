"""A whole benchmark in this process, by PRMs whose scores are chosen here."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from benchmark_files import processbench, visualprocessbench, write_lines
from PIL import Image

from dreamprm_dist.data.schema import Turn
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.benchmarks import run
from dreamprm_dist.evaluation.benchmarks.batches import MOST_TOGETHER
from dreamprm_dist.evaluation.benchmarks.results import BenchmarkResults, read_results
from dreamprm_dist.evaluation.benchmarks.run import BenchmarkConfig, run_benchmark
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.prm.solutions import steps_conversation


class Reader(Scorer):
    """Gives each step the score that is its text, or one minus that; a word has no score.

    Attributes:
        asked: for each call the conversations, and how many bytes its images have.
    """

    asked: ClassVar[list[tuple[list[list[Turn]], list[int]]]] = []

    def __init__(self, inverted: bool = False):
        self.inverted = inverted

    def score_conversations(self, conversations, images) -> list[list[float] | RecordError]:
        def score(turns) -> list[float] | RecordError:
            steps = [step["value"] for step, turn in pairwise(turns) if turn["from"] == "gpt"]
            try:
                scores = list(map(float, steps))
            except ValueError:
                return RecordError(f"{steps[0]!r} is too long")
            return [1 - s for s in scores] if self.inverted else scores

        self.asked.append((list(conversations), [len(data) for data in images]))
        return list(map(score, conversations))


@pytest.fixture
def judged(tmp_path: Path, monkeypatch) -> Callable[..., tuple[str, Any]]:
    """Runs a benchmark on files; returns its text and results, if any."""
    monkeypatch.setattr(run, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(
        BenchmarkConfig, "load", lambda self, kind, model, device: Reader("b" in model)
    )
    Reader.asked.clear()
    for name, width in (("a.png", 3), ("b.png", 40)):
        Image.new("RGB", (width, width), "red").save(tmp_path / name)

    def judged(benchmark: str, *files: str, **more: Any) -> tuple[str, BenchmarkResults | None]:
        out = tmp_path / "out"
        more = {"model": ["prm=nowhere_a"]} | more
        text = run_benchmark(
            BenchmarkConfig(
                benchmark=benchmark, test_json_file=[*files], out=str(out), device="cpu", **more
            )
        )
        return text, read_results(out / "results.json") if out.exists() else None

    return judged


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def values(rows: list) -> dict[str, dict[str, float]]:
    return {row.name: {name: value.value for name, value in row.metrics.items()} for row in rows}


def solution(steps: list[float | str], marks: list[int], **fields: object) -> dict:
    return visualprocessbench([*map(str, steps)], marks, **{"image": ["a.png"], **fields})


def labelled(steps: list[float | str], labels: list[str | None]) -> dict:
    """A training record."""
    turns = [{"from": "human", "value": "Q"}]
    for step, label in zip(steps, labels, strict=True):
        turns += [{"from": "human", "value": str(step)}, {"from": "gpt", "value": label}]
    return {"id": "t", "conversations": turns}


def test_two_prms_on_visualprocessbench(judged, tmp_path: Path) -> None:
    """b says the contrary of a; what one cannot take is left out for both, and listed."""
    records = [
        solution([0.9, 0.2, 0.7], [1, -1, 0]),
        solution([0.9, 0.9], [1], id="fewer"),
        solution([0.5, 0.6], [1, -1], data_source="WeMath"),
        solution(["endless", 0.6], [1, -1], data_source="WeMath"),
        solution([0.9], [1], image=["none.png"]),
        {"question": "?"},
    ]
    file = write_lines(tmp_path / "test.jsonl", records)
    text, results = judged(
        "visualprocessbench", file, model=["a=nowhere_a", "b=nowhere_b"], threshold=0.5
    )
    assert results.num_solutions == 2
    assert (results.num_rejected, results.num_unscored) == (2, 2)
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [(row["file"], row["line"], row["id"]) for row in rejected] == [
        (file, 2, "fewer"), (file, 6, ""), (file, 4, ""), (file, 5, "")
    ]  # fmt: skip
    for row, why in zip(rejected, ["1 marks", "'response'", "too long", "none.png"], strict=True):
        assert why in row["reason"]
    a, b = (results.prms[label].judged for label in "ab")
    source, other = "MathVision_MINI", "WeMath"
    # a: both labelled steps of the first; of the second 0.5 counts as right, and so does 0.6.
    assert values(a.rows)[source] == {"f1_right": 1, "f1_wrong": 1, "macro_f1": 1}
    assert values(a.rows)[other] == pytest.approx(
        {"f1_right": 2 / 3, "f1_wrong": 0, "macro_f1": 1 / 3}
    )
    # b: nothing of the first; of the second 0.5 is right, 0.4 wrong.
    assert values(b.rows)[source] == {"f1_right": 0, "f1_wrong": 0, "macro_f1": 0}
    assert values(b.rows)[other] == {"f1_right": 1, "f1_wrong": 1, "macro_f1": 1}
    [between] = results.between
    headline = values(between.rows)["sources weighted by steps"]
    assert headline == pytest.approx({"macro_f1": (0 + 1) / 2 - (1 + 1 / 3) / 2})
    assert "b over a, macro-F1, sources weighted by steps: -16.7%" in text
    assert "2 solutions, 2 right and 2 wrong steps, 1 without a label; 2 records rejected" in text
    assert "2 solutions could not be scored and are left out for all PRMs" in text
    assert "ORACLE" not in text and results.prms["a"].oracle is None
    scores = lines(tmp_path / "out" / "scores.jsonl")
    assert [(row["prm"], row["solution"], row["line"]) for row in scores] == [
        ("a", 0, 1), ("a", 1, 3), ("b", 0, 1), ("b", 1, 3)
    ]  # fmt: skip
    assert scores[0]["step_scores"] == [0.9, 0.2, 0.7]
    assert scores[0]["step_labels"] == ["+", "-", None]
    # Neutral steps are in no step metric either.
    assert results.prms["a"].steps.num_steps == 4
    assert results.prms["a"].steps.brier == pytest.approx((0.1**2 + 0.2**2 + 0.5**2 + 0.6**2) / 4)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["test_json_file"] == [file] and "local_rank" not in config
    assert not (tmp_path / "out" / "parts").exists()


def test_what_the_prm_reads(judged, tmp_path: Path) -> None:
    """Best-of-N's conversations; images in their order; a question's solutions together."""
    first = solution([" 0.9 ", 0.1], [1, -1], image=["b.png", "a.png"])
    records = [first, solution([0.5], [1]), solution([0.7], [1], image=["b.png", "a.png"])]
    judged("visualprocessbench", write_lines(tmp_path / "t.jsonl", records))
    (two, sizes), (one, size) = Reader.asked
    assert two == [
        steps_conversation(first["question"], steps) for steps in (["0.9", "0.1"], ["0.7"])
    ]
    assert one == [steps_conversation(first["question"], ["0.5"])]
    assert sizes == [(tmp_path / name).stat().st_size for name in ("b.png", "a.png")]
    assert size == sizes[1:]
    turns = [turn["from"] for turn in two[0]]
    assert turns == ["system", "human", "human", "gpt", "human", "gpt"]


def test_text_needs_no_image_and_long_batches_are_cut(judged, tmp_path: Path) -> None:
    records = [processbench(["0.9"], -1, id=f"gsm8k-{i}") for i in range(MOST_TOGETHER + 2)]
    _, results = judged("processbench", write_lines(tmp_path / "t.jsonl", records))
    assert [(len(part), images) for part, images in Reader.asked] == [(MOST_TOGETHER, []), (2, [])]
    assert results.groups["gsm8k"].num_solutions == MOST_TOGETHER + 2


def test_several_files_are_several_subsets(judged, tmp_path: Path) -> None:
    gsm8k = [processbench(["0.9", "0.1"], 1), processbench(["0.9"], -1, id="gsm8k-1")]
    (tmp_path / "gsm8k.json").write_text(json.dumps(gsm8k))
    math = [processbench(["0.1"], -1, id="math-0"), processbench(["0.1"], 0, id="math-1")]
    (tmp_path / "math.json").write_text(json.dumps(math))
    files = [str(tmp_path / name) for name in ("gsm8k.json", "math.json")]
    text, results = judged("processbench", *files)
    assert results.test_json_files == files
    found = values(results.prms["prm"].judged.rows)
    assert found["mean of the subsets"]["f1"] == (1 + 0) / 2
    assert "ProcessBench: 4 solutions" in text


def test_the_threshold_is_chosen_on_other_data(judged, tmp_path: Path) -> None:
    """There 0.25 divides best, and here 0.75: it is 0.25 that is taken, for b its own."""
    test = write_lines(tmp_path / "t.jsonl", [solution([0.9, 0.6, 0.3], [1, -1, -1])])
    records = [
        labelled([0.3, 0.2, 0.9], ["+", "-", None]),
        labelled([0.9], [None]),  # without any label
        labelled(["endless"], ["-"]),
    ]
    chosen_on = write_lines(tmp_path / "meta.jsonl", records)
    prms = ["a=nowhere_a", "b=nowhere_b"]
    text, results = judged(
        "visualprocessbench", test, model=prms, threshold_json_file=chosen_on, oracle_threshold=True
    )
    a, b = (results.prms[label] for label in "ab")
    assert a.judged.threshold == pytest.approx(0.25) and a.chosen.macro_f1 == 1
    assert (a.chosen.num_solutions, a.chosen.num_unscored) == (1, 1)
    # Of b's 0.7 (right) and 0.8 (wrong) one is found where both are taken for the same.
    assert b.judged.threshold != a.judged.threshold and b.chosen.macro_f1 == pytest.approx(1 / 3)
    assert results.threshold_chosen_on == chosen_on
    assert values(a.judged.rows)["all steps pooled"] == pytest.approx(
        {"f1_right": 0.5, "f1_wrong": 0, "macro_f1": 0.25}
    )
    assert a.oracle.threshold == pytest.approx(0.75)
    assert values(a.oracle.rows)["all steps pooled"]["macro_f1"] == 1
    assert f"a, threshold 0.25, chosen on {chosen_on}: macro-F1 100.0% over 1 solutions" in text
    assert "a, threshold 0.75, ORACLE, chosen on the test solutions themselves" in text
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["prms"]["a"]["oracle"]["threshold"] == pytest.approx(0.75)
    # Without either flag, the same scores at 0.5.
    _, results = judged("visualprocessbench", test)
    assert results.prms["prm"].judged.threshold == 0.5 and results.prms["prm"].chosen is None
    assert results.threshold_chosen_on == "nothing: set by --threshold"


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([labelled([0.3], ["+"])], "not both right and wrong steps"),
        ([labelled([0.3], ["+"]), {"question": "?"}], "record 2: it is a question without"),
        ([labelled([0.3], ["+"]), labelled(["endless"], ["-"])], "1 of its 2 records could not be"),
    ],
)
def test_threshold_files_that_say_nothing(judged, tmp_path: Path, records, why: str) -> None:
    test = write_lines(tmp_path / "t.jsonl", [solution([0.9], [1])])
    chosen_on = write_lines(tmp_path / "meta.jsonl", records)
    with pytest.raises(InputError, match=why):
        judged("visualprocessbench", test, threshold_json_file=chosen_on)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([solution([0.9], [0])], "no solution with a labelled step"),
        ([{}, solution([0.9], [0])], "1 records were rejected, the first at line 1 of"),
        ([], "no solution with a labelled step"),
        (
            [solution(["endless"], [1])],
            "no solution with a labelled step could be scored.*too long",
        ),
    ],
)
def test_nothing_to_measure(judged, tmp_path: Path, records: list, why: str) -> None:
    with pytest.raises(InputError, match=why):
        judged("visualprocessbench", write_lines(tmp_path / "t.jsonl", records))


def test_flags_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not both"):
        BenchmarkConfig(threshold=0.3, threshold_json_file="meta.json")
    with pytest.raises(InputError, match="named twice"):
        BenchmarkConfig(test_json_file=["a.json", "./a.json"])
    for threshold in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="threshold is"):
            BenchmarkConfig(threshold=threshold)
    with pytest.raises(InputError, match="benchmark 'mmmu' is unknown"):
        BenchmarkConfig(benchmark="mmmu")


def test_a_dry_run_says_what_there_is(judged, tmp_path: Path) -> None:
    records = [solution([0.9, 0.1], [1, -1]), {}, solution([0.5], [0], data_source="WeMath")]
    test = write_lines(tmp_path / "t.jsonl", records)
    chosen_on = write_lines(tmp_path / "m.jsonl", [labelled([0.3, 0.2], ["+", "-"])])
    flags = {"threshold_json_file": chosen_on, "dry_run": True}
    text, results = judged("visualprocessbench", test, **flags)
    assert results is None and Reader.asked == []
    assert "MathVision_MINI: 1 solutions, 1 right and 1 wrong steps, 0 without a label" in text
    assert "1 records rejected, the first at line 2" in text
    assert f"{chosen_on}: 1 solutions to choose the threshold on" in text
    assert text.endswith("nothing was written\n")
