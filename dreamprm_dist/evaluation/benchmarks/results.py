"""`results.json` of a benchmark: how well PRMs judge labelled steps.

Format version 1 holds `format_version` and the fields of `BenchmarkResults`. What stands under a
PRM's `oracle` was chosen on the very solutions that it is measured on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from dreamprm_dist.evaluation.benchmarks import BENCHMARKS
from dreamprm_dist.evaluation.results import StepMetrics, read_outcome


@dataclass(kw_only=True)
class GroupSize:
    """A data source, subset or category: its solutions, and their steps by label."""

    num_solutions: int
    num_right: int
    num_wrong: int
    num_unlabelled: int


@dataclass(kw_only=True)
class Value:
    """A metric and its interval, both None where there is nothing to count."""

    value: float | None
    interval_95: list[float] | None


@dataclass(kw_only=True)
class Row:
    """A row of a benchmark's table: metrics by name."""

    name: str
    metrics: dict[str, Value]


@dataclass(kw_only=True)
class Judged:
    """A PRM's table at one threshold: a step is judged right when its score is at least that.

    Attributes:
        rows: the first one stands for the PRM.
    """

    threshold: float
    rows: list[Row]


@dataclass(kw_only=True)
class Chosen:
    """How a threshold was chosen: the macro-F1 there, on how many solutions, and those left out."""

    macro_f1: float
    num_solutions: int
    num_unscored: int


@dataclass(kw_only=True)
class PrmOutcome:
    """What a PRM is worth.

    Attributes:
        judged: at the threshold that was given, or chosen on other data.
        oracle: at the threshold that is best on these solutions themselves: never a fair
            measurement, only what some publish. None where it was not asked for.
        chosen: how the threshold of `judged` was chosen; None where it was given.
        steps: AUROC and calibration, which need no threshold.
    """

    judged: Judged
    oracle: Judged | None
    chosen: Chosen | None
    steps: StepMetrics


@dataclass(kw_only=True)
class Difference:
    """The headline metric of one PRM minus that of another, by row."""

    prm: str
    over: str
    rows: list[Row]


@dataclass(kw_only=True)
class BenchmarkResults:
    """A benchmark's outcome.

    Attributes:
        benchmark: a key of `BENCHMARKS`.
        models: by label, local folder or hub name of each PRM.
        threshold_chosen_on: the file on which thresholds were chosen, or that they were given.
        num_rejected: records of the files that are no solution here.
        num_unscored: solutions that at least one PRM could not score, left out for all.
        num_stray_marks: marks of records that no step belongs to.
        groups: sizes by name, of what was scored.
    """

    benchmark: str
    models: dict[str, str] = field(default_factory=dict)
    test_json_files: list[str] = field(default_factory=list)
    threshold_chosen_on: str = ""
    num_rejected: int = 0
    num_unscored: int = 0
    num_stray_marks: int = 0
    groups: dict[str, GroupSize]
    prms: dict[str, PrmOutcome]
    between: list[Difference]

    @property
    def num_solutions(self) -> int:
        return sum(group.num_solutions for group in self.groups.values())


def is_benchmark(path: Path) -> bool:
    """Whether a file is the `results.json` of a benchmark, of any version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "benchmark" in values


def read_results(path: Path) -> BenchmarkResults:
    """Read what `write_results` wrote of a benchmark; InputError as `read_outcome`."""
    return read_outcome(path, "launch/benchmark.py", _parsed)


def _parsed(values: dict) -> BenchmarkResults:
    if values["benchmark"] not in BENCHMARKS:
        raise KeyError(values["benchmark"])
    prms = {
        label: PrmOutcome(
            judged=_judged(prm["judged"]),
            oracle=prm["oracle"] and _judged(prm["oracle"]),
            chosen=prm["chosen"] and Chosen(**prm["chosen"]),
            steps=StepMetrics(**prm["steps"]),
        )
        for label, prm in values["prms"].items()
    }
    between = [Difference(**pair | {"rows": _rows(pair["rows"])}) for pair in values["between"]]
    groups = {name: GroupSize(**size) for name, size in values["groups"].items()}
    return BenchmarkResults(**values | {"groups": groups, "prms": prms, "between": between})


def _judged(values: dict) -> Judged:
    return Judged(threshold=values["threshold"], rows=_rows(values["rows"]))


def _rows(values: list[dict]) -> list[Row]:
    return [
        Row(
            name=row["name"],
            metrics={name: Value(**metric) for name, metric in row["metrics"].items()},
        )
        for row in values
    ]
