"""Each benchmark: its published form, its metrics by hand, and what all of them must hold."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from benchmark_files import EXAMPLES, prmbench, processbench, visualprocessbench, write_lines
from sklearn.metrics import f1_score

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.benchmarks import BENCHMARKS, measure
from dreamprm_dist.evaluation.benchmarks.base import (
    Benchmark,
    LabelledSolution,
    RejectedSolution,
    read_solutions,
)
from dreamprm_dist.evaluation.benchmarks.counts import Outcomes
from dreamprm_dist.evaluation.benchmarks.measure import group_sizes, measure_prms
from dreamprm_dist.evaluation.benchmarks.results import (
    BenchmarkResults,
    GroupSize,
    Judged,
    read_results,
)
from dreamprm_dist.evaluation.benchmarks.table import text_table
from dreamprm_dist.evaluation.results import write_results

EVERY = pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)


def of(name: str, *records: dict, file: str = "a/file.jsonl") -> list[LabelledSolution]:
    return [BENCHMARKS[name].parse(record, file) for record in records]


def table(
    name: str, solutions: Sequence[LabelledSolution], scores: Sequence[Sequence[float]]
) -> dict[str, dict[str, float | None]]:
    """The rows at a threshold of 0.5."""
    prms, _ = measure_prms(BENCHMARKS[name], solutions, {"prm": scores}, {"prm": (0.5, None)})
    return {
        row.name: {name: value.value for name, value in row.metrics.items()}
        for row in prms["prm"].judged.rows
    }


# --- VisualProcessBench ------------------------------------------------------------------------


def test_visualprocessbench_record() -> None:
    [solution] = of("visualprocessbench", EXAMPLES["visualprocessbench"])
    assert solution.labels == [None, "+", "-"] and solution.steps == ["So:", "1. Start.", "A"]
    assert solution.images == ["images/MathVision_MINI/15.png"]
    assert (solution.id, solution.group) == ("", "MathVision_MINI")
    assert "<image1>" in solution.question and "<image 2>" in solution.question
    several = EXAMPLES["visualprocessbench"] | {"image": ["a.png", "b.png"]}
    [solution] = of("visualprocessbench", several)
    assert solution.images == ["a.png", "b.png"] and solution.cluster == ("a.png", "b.png")
    [one, none] = of(
        "visualprocessbench",
        several | {"image": "a.png"},
        {k: v for k, v in several.items() if k not in ("image", "data_source")},
    )
    assert one.images == ["a.png"] and none.images == []
    assert none.cluster == none.question and none.group == "no data source"


def test_visualprocessbench_by_hand() -> None:
    """Two sources, of 5 and of 2 labelled steps; the neutral step's score means nothing."""
    solutions = of(
        "visualprocessbench",
        visualprocessbench(["a", "b", "c"], [1, -1, 0], data_source="WeMath"),
        visualprocessbench(["a", "b", "c"], [1, 1, -1], data_source="WeMath"),
        visualprocessbench(["a", "b"], [-1, 1], data_source="DynaMath"),
        visualprocessbench(["a"], [0], data_source="MMMU_DEV_VAL"),  # all neutral
    )
    rows = table(
        "visualprocessbench", solutions, [[0.9, 0.2, 0.1], [0.5, 0.4, 0.7], [0.1, 0.1], [1]]
    )
    # WeMath: right found 2 of 3 with 1 wrong one taken for right; wrong found 1 of 2.
    wemath = {"f1_right": 4 / (4 + 1 + 1), "f1_wrong": 2 / (2 + 1 + 1)}
    dynamath = {"f1_right": 0.0, "f1_wrong": 2 / (2 + 1 + 0)}
    wemath["macro_f1"], dynamath["macro_f1"] = fmean(wemath.values()), fmean(dynamath.values())
    assert rows["WeMath"] == pytest.approx(wemath)
    assert rows["DynaMath"] == pytest.approx(dynamath)
    assert set(rows["MMMU_DEV_VAL"].values()) == {None}
    weighted = {name: (5 * wemath[name] + 2 * dynamath[name]) / 7 for name in wemath}
    assert rows["sources weighted by steps"] == pytest.approx(weighted)
    # Pooled: 2 of 4 right, 2 of 3 wrong found.
    pooled = {"f1_right": 4 / (4 + 2 + 1), "f1_wrong": 4 / (4 + 1 + 2), "macro_f1": 4 / 7}
    assert rows["all steps pooled"] == pytest.approx(pooled)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (visualprocessbench(["a", "b"], [1]), "1 marks for 2 steps"),
        (visualprocessbench(["a"], [1, -1]), "2 marks for 1 steps"),
        (visualprocessbench(["a"], [2]), "list of 1, 0 and -1"),
        (visualprocessbench(["a"], [True]), "list of 1, 0 and -1"),
        (visualprocessbench([], []), "must be a list of texts, and not empty"),
        (visualprocessbench(["a"], [1], response="a"), "'response' must be an object"),
        (visualprocessbench(["a"], [1], question=None), "'question' must be a text"),
        (visualprocessbench([" ", ""], [1, 1]), "no text at all"),
    ],
)
def test_visualprocessbench_refuses(record: dict, why: str) -> None:
    with pytest.raises(RecordError, match=why):
        of("visualprocessbench", record)


# --- ProcessBench ------------------------------------------------------------------------------


def test_processbench_record() -> None:
    wrong, right, last, unnamed = of(
        "processbench",
        EXAMPLES["processbench"],
        processbench(["a", " b\n"], -1, id="omnimath-17"),
        processbench(["a", "b"], 1, id="my_set-v2-3"),
        processbench(["a", "b"], 0, id=7),
        file="data/math.json",
    )
    assert wrong.labels == ["+", "-", None] and wrong.group == "gsm8k" and wrong.images == []
    assert right.labels == ["+", "+"] and right.steps == ["a", "b"] and right.group == "omnimath"
    assert last.labels == ["+", "-"] and last.group == "math"  # an id of another form
    assert unnamed.labels == ["-", None] and (unnamed.id, unnamed.group) == ("7", "math")
    assert wrong.cluster == wrong.question


def test_processbench_by_hand() -> None:
    """gsm8k: 1 of 3 errors and 1 of 2 correct found; math has erroneous solutions only."""
    records = [
        processbench(["a", "b", "c"], 1),  # found
        processbench(["a", "b", "c"], 2),  # found too early
        processbench(["a", "b"], 0),  # not found: the step's score equals the threshold
        processbench(["a", "b"], -1),  # found to be correct
        processbench(["a", "b"], -1),  # an error is found where none is
        processbench(["a"], 0, id="math-0"),
    ]
    scores = [[0.9, 0.4, 0.9], [0.9, 0.4, 0.3], [0.5, 0.9], [0.5, 0.9], [0.9, 0.1], [0.2]]
    rows = table("processbench", of("processbench", *records), scores)
    f1 = 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    gsm8k = {"accuracy_erroneous": 1 / 3, "accuracy_correct": 1 / 2, "f1": f1}
    assert rows["gsm8k"] == pytest.approx(gsm8k)
    assert rows["math"] == {"accuracy_erroneous": 1.0, "accuracy_correct": None, "f1": None}
    mean = {"accuracy_erroneous": 2 / 3, "accuracy_correct": 1 / 2, "f1": f1}
    assert rows["mean of the subsets"] == pytest.approx(mean)
    nothing = table(
        "processbench", of("processbench", *records[:5]), [[0.1] * 3] * 2 + [[0.9] * 2] * 3
    )
    assert nothing["gsm8k"] == {"accuracy_erroneous": 0, "accuracy_correct": 1, "f1": 0}
    none_at_all = table(
        "processbench", of("processbench", *records[:2], records[3]), [[0.9] * 3] * 2 + [[0.1] * 2]
    )
    assert none_at_all["gsm8k"] == {"accuracy_erroneous": 0, "accuracy_correct": 0, "f1": 0}


@pytest.mark.parametrize("label", [2, -2, 1.0, True, None, "1"])
def test_processbench_refuses_labels(label: object) -> None:
    with pytest.raises(RecordError, match="'label' must be the index of one of the 2 steps"):
        of("processbench", processbench(["a", "b"], 0) | {"label": label})


# --- PRMBench ----------------------------------------------------------------------------------


def test_prmbench_record() -> None:
    [solution] = of("prmbench", EXAMPLES["prmbench"])
    assert solution.labels == ["+", "-", "+"]  # steps count from 1
    assert solution.question == "What is the cost of a pencil?"  # the modified one
    assert solution.steps == EXAMPLES["prmbench"]["modified_process"]
    assert solution.cluster == EXAMPLES["prmbench"]["question"]
    assert (solution.id, solution.group) == ("prm_test_p1_0", "NR redundency")
    beyond, none = of(
        "prmbench",
        prmbench(["a", "b"], [0, 2, 2, 3], classification="confidence"),
        prmbench(["a", "b"], [], classification="multi_solutions"),
    )
    assert beyond.labels == ["+", "-"] and beyond.num_stray_marks == 2
    assert none.labels == ["+", "+"] and none.group == "MS multi_solutions"


def test_prmbench_by_hand() -> None:
    records = [
        prmbench(["a", "b", "c"], [2]),
        prmbench(["a", "b"], [1, 2], classification="circular"),
        prmbench(["a", "b", "c", "d"], [], classification="multi_solutions"),
        prmbench(["a", "b"], [2], classification="my_own"),
    ]
    scores = [[0.9, 0.1, 0.1], [0.1, 0.9], [0.9, 0.9, 0.9, 0.1], [0.9, 0.1]]
    rows = table("prmbench", of("prmbench", *records), scores)
    nr = {"f1_right": 2 / 3, "f1_wrong": 2 / 3, "prm_score": 2 / 3}
    ncl = {"f1_right": 0.0, "f1_wrong": 2 / 3, "prm_score": 1 / 3}
    # No wrong steps: F1 of the right ones stands for it, 3 of 4 found.
    ms = {"f1_right": 6 / 7, "f1_wrong": None, "prm_score": 6 / 7}
    assert list(rows) == [
        "overall", "simplicity", "NR redundency", "NCL circular",
        "sensitivity", "MS multi_solutions", "my_own",
    ]  # fmt: skip
    assert rows["NR redundency"] == pytest.approx(nr)
    assert rows["NCL circular"] == pytest.approx(ncl)
    assert rows["MS multi_solutions"] == pytest.approx(ms) == rows["sensitivity"]
    assert rows["my_own"] == {"f1_right": 1, "f1_wrong": 1, "prm_score": 1}
    assert rows["simplicity"] == pytest.approx({n: (nr[n] + ncl[n]) / 2 for n in nr})
    # Overall, of all steps: 5 of 7 right and 3 of 4 wrong ones found.
    right, wrong = 10 / (10 + 2 + 1), 6 / (6 + 1 + 2)
    overall = {"f1_right": right, "f1_wrong": wrong, "prm_score": (right + wrong) / 2}
    assert rows["overall"] == pytest.approx(overall)


def test_prmbench_takes_no_record_twice(tmp_path: Path) -> None:
    again = prmbench(["c"], [1])
    other = prmbench(["a"], [1], classification="circular")
    file = write_lines(tmp_path / "a.jsonl", [EXAMPLES["prmbench"], other, again])
    first, second, rejected = read_solutions(BENCHMARKS["prmbench"], [file])
    assert isinstance(first, LabelledSolution) and isinstance(second, LabelledSolution)
    assert rejected == RejectedSolution(file, 3, "prm_test_p1_0", f"it repeats record 1 of {file}.")


# --- all ---------------------------------------------------------------------------------------


@EVERY
def test_files_are_json_lists_or_lines(benchmark: Benchmark, tmp_path: Path) -> None:
    name = next(key for key, value in BENCHMARKS.items() if value is benchmark)
    good = EXAMPLES[name]
    other = good | {"id": "gsm8k-1", "idx": "other"}
    write_lines(tmp_path / "a.jsonl", [good, {"question": "?"}, 7])
    (tmp_path / "b.json").write_text(json.dumps([other, good | {"id": "x-1", "idx": 0}]))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")]
    records = list(read_solutions(benchmark, files))
    kinds = [type(record).__name__[0] for record in records]
    assert kinds == ["L", "R", "R", "L", "L"]
    assert [(Path(r.file).name, r.line) for r in records] == [
        ("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 3), ("b.json", 1), ("b.json", 2)
    ]  # fmt: skip
    limited = read_solutions(benchmark, files, limit=1)
    assert [(Path(r.file).name, r.line) for r in limited] == [("a.jsonl", 1), ("b.json", 1)]


@EVERY
def test_nothing_in_a_record_ends_a_run(benchmark: Benchmark, tmp_path: Path) -> None:
    """Each field of a record, replaced by each of several values, is taken or rejected."""
    name = next(key for key, value in BENCHMARKS.items() if value is benchmark)
    odd = [
        None,
        True,
        7,
        1.5,
        "",
        "<image>",
        "\ud800",
        [],
        [None],
        {},
        [[]],
        ["\ud800"],
        -1,
        10**30,
    ]
    records = [EXAMPLES[name] | {key: value} for key in EXAMPLES[name] for value in odd]
    found = list(read_solutions(benchmark, [write_lines(tmp_path / "a.jsonl", records)]))
    assert len(found) == len(records)
    reasons = [record.reason for record in found if isinstance(record, RejectedSolution)]
    assert reasons and all(reason.strip() for reason in reasons)
    for record in found:
        if isinstance(record, LabelledSolution):
            assert len(record.steps) == len(record.labels) > 0
            record.group.encode()  # it is printed


def random_solutions(count: int, seed: int = 0) -> tuple[list[LabelledSolution], list[list[float]]]:
    """Solutions in three groups about a third as many problems, and scores that say something."""
    random = np.random.default_rng(seed)
    solutions, scores = [], []
    for index in range(count):
        labels = ["+-"[int(wrong)] for wrong in random.random(random.integers(1, 6)) < 0.4]
        labels = [None if random.random() < 0.1 else label for label in labels]
        noise = random.random(len(labels))
        solutions.append(
            LabelledSolution(
                id=str(index), group="abc"[index % 3], question="?", steps=["s"] * len(labels),
                labels=labels, cluster=int(random.integers(count // 3)), images=[],
            )
        )  # fmt: skip
        scores.append([0.4 * (y == "+") + 0.6 * n for y, n in zip(labels, noise, strict=True)])
    return solutions, scores


@EVERY
def test_a_perfect_prm_has_everything(benchmark: Benchmark) -> None:
    solutions, _ = random_solutions(60)
    solutions.append(replace(solutions[0], labels=["+", "+"], steps=["a", "b"], group="a"))
    scores = [[{"+": 0.9, "-": 0.1, None: 0.5}[y] for y in s.labels] for s in solutions]
    prms, _ = measure_prms(benchmark, solutions, {"prm": scores}, {"prm": (0.5, None)}, oracle=True)
    for judged in (prms["prm"].judged, prms["prm"].oracle):
        assert judged and {row.metrics[benchmark.headline].value for row in judged.rows} == {1.0}
        for row in judged.rows:
            assert list(row.metrics) == list(benchmark.metrics)
            assert row.metrics[benchmark.headline].interval_95 == [1, 1]
    assert prms["prm"].steps.auroc == 1


@EVERY
def test_metrics_are_taken_of_many_counts_at_once(benchmark: Benchmark) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (5, 7, 3, 4)).astype(float)
    together = benchmark.measure(counts, "abc")
    assert benchmark.headline in benchmark.metrics
    for i, j in np.ndindex(5, 7):
        alone = benchmark.measure(counts[i, j], "abc")
        assert [name for name, _ in alone] == [name for name, _ in together]
        for (_, one), (_, many) in zip(alone, together, strict=True):
            assert list(one) == list(benchmark.metrics) == list(many)
            for name in one:
                assert many[name].shape == (5, 7)
                np.testing.assert_array_equal(one[name], many[name][i, j])
                assert isnan(one[name]) or 0 <= one[name] <= 1


@EVERY
def test_intervals_are_those_of_whole_clusters_drawn_again(benchmark, monkeypatch) -> None:
    """Against a bootstrap that copies the solutions of each cluster as often as it was drawn."""
    monkeypatch.setattr(measure, "NUM_SAMPLES", 60)
    solutions, scores = random_solutions(30)
    other = [[1 - s for s in steps] for steps in scores]
    prms, [between] = measure_prms(
        benchmark, solutions, {"a": scores, "b": other}, {"a": (0.5, None), "b": (0.4, None)}
    )
    clusters = list(dict.fromkeys(s.cluster for s in solutions))
    draws = np.random.default_rng(0).multinomial(
        len(clusters), [1 / len(clusters)] * len(clusters), 60
    )
    values: list[list[list[float]]] = []
    for draw in draws:
        times = dict(zip(clusters, draw, strict=True))
        chosen = [i for i, s in enumerate(solutions) for _ in range(times[s.cluster])]
        values.append([])
        for of_prm, threshold in ((scores, 0.5), (other, 0.4)):
            rows = [
                ("abc".index(solutions[i].group), solutions[i].labels, of_prm[i]) for i in chosen
            ]
            counts = Outcomes(benchmark.outcomes, rows, 3).counts(threshold).sum(0)
            values[-1].append(
                [row[benchmark.headline] for _, row in benchmark.measure(counts, "abc")]
            )
    a, b = np.array(values).transpose(1, 2, 0)
    for label, expected in (("a", a), ("b", b)):
        for row, samples in zip(prms[label].judged.rows, expected, strict=True):
            interval = np.percentile(samples[~np.isnan(samples)], [2.5, 97.5])
            assert row.metrics[benchmark.headline].interval_95 == pytest.approx(interval)
    for row, samples in zip(between.rows, b - a, strict=True):
        interval = np.percentile(samples[~np.isnan(samples)], [2.5, 97.5])
        assert row.metrics[benchmark.headline].interval_95 == pytest.approx(interval)
    assert (between.prm, between.over) == ("b", "a")


@EVERY
def test_the_oracle_is_never_below(benchmark: Benchmark) -> None:
    solutions, scores = random_solutions(40, seed=1)

    def headline(judged: Judged) -> float:
        value = judged.rows[0].metrics[benchmark.headline].value
        assert value is not None
        return value

    best = None
    for threshold in np.arange(0.05, 1, 0.05):
        prms, _ = measure_prms(
            benchmark, solutions, {"prm": scores}, {"prm": (threshold, None)}, oracle=True
        )
        assert prms["prm"].oracle and headline(prms["prm"].judged) <= headline(prms["prm"].oracle)
        best = best or prms["prm"].oracle
        assert prms["prm"].oracle == best  # whatever threshold was given


def test_pooled_f1_is_that_of_scikit_learn() -> None:
    solutions, scores = random_solutions(60)
    rows = table("visualprocessbench", solutions, scores)
    pairs = [
        (y == "+", score >= 0.5)
        for s, steps in zip(solutions, scores, strict=True)
        for y, score in zip(s.labels, steps, strict=True)
        if y
    ]
    expected = f1_score(*zip(*pairs, strict=True), average="macro")
    assert rows["all steps pooled"]["macro_f1"] == pytest.approx(expected)
    assert table("prmbench", solutions, scores)["overall"]["prm_score"] == pytest.approx(expected)


def test_group_sizes() -> None:
    solutions = of(
        "visualprocessbench", EXAMPLES["visualprocessbench"], visualprocessbench(["a"], [1])
    )
    size = GroupSize(num_solutions=2, num_right=2, num_wrong=1, num_unlabelled=1)
    assert group_sizes(solutions) == {"MathVision_MINI": size}


@EVERY
def test_results_are_written_and_read(benchmark: Benchmark, tmp_path: Path) -> None:
    name = next(key for key, value in BENCHMARKS.items() if value is benchmark)
    solutions, scores = random_solutions(30)
    prms, between = measure_prms(
        benchmark,
        solutions,
        {"a": scores, "b": scores[::1]},
        {"a": (0.5, None), "b": (0.4, None)},
        True,
    )
    results = BenchmarkResults(
        benchmark=name, groups=group_sizes(solutions), prms=prms, between=between
    )
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    text = text_table(results)
    assert f"{benchmark.title}: 30 solutions" in text and text.count("ORACLE") == 2
