"""`results.json` of an evaluation: what PRMs are worth on the same questions.

Every number stands in one place. Format version 1 holds `format_version` and the fields of
`Results`; its lists hold `TableRow`, `Difference` and `QuestionOutcome`, and `prms` a `PrmOutcome`
for each label. Accuracies are in `table`; they are means of the outcomes in `questions` and, for
PRMs, of those under `prms`, which are in the order of the questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import write_whole

FORMAT_VERSION = 1  # of this file and that of benchmarks
Outcome = TypeVar("Outcome")


@dataclass(kw_only=True)
class TableRow:
    """One way to choose among the candidates of each question.

    Attributes:
        method: `first`, `random`, `self_consistency` or `oracle`, or a PRM's label and aggregation.
        prm: the label, "" where no PRM chooses; and so `aggregation`.
        accuracy: part of the questions with a right choice.
        over_first: accuracy minus that of the first candidate.
        interval_95, over_first_interval_95: low and high.
    """

    method: str
    prm: str
    aggregation: str
    accuracy: float
    interval_95: list[float]
    over_first: float
    over_first_interval_95: list[float]


@dataclass(kw_only=True)
class Difference:
    """The accuracy of one PRM minus that of another, each with the aggregation it stands for."""

    prm: str
    over: str
    difference: float
    interval_95: list[float]


@dataclass(kw_only=True)
class QuestionOutcome:
    """Which choices without a PRM are right for a question; `random` is an expectation."""

    id: str
    images: list[str]
    subject: str
    first: bool
    random: float
    self_consistency: bool
    oracle: bool


@dataclass(kw_only=True)
class StepMetrics:
    """Step scores against the labels of steps.

    Attributes:
        num_steps: labelled steps.
        auroc: how often a right step scores above a wrong one; None when all are of one kind.
        brier: mean squared error.
        calibration_error: expected calibration error over 10 equal bins (Guo et al.,
            arXiv:1706.04599).
        bins: for each that is not empty its `count`, mean `score` and share of `right` steps.
    """

    num_steps: int
    auroc: float | None
    brier: float
    calibration_error: float
    bins: list[dict]


@dataclass(kw_only=True)
class PrmOutcome:
    """A PRM's choices.

    Attributes:
        aggregation: the one that stands for the PRM in `between`, `by_subject` and `by_n`.
        correct: by aggregation, for each question whether the choice is right.
        steps: None where no step has a label.
    """

    aggregation: str
    correct: dict[str, list[bool]]
    steps: StepMetrics | None


@dataclass(kw_only=True)
class Results:
    """An evaluation's outcome.

    Attributes:
        models: by label, local folder or hub name of each PRM.
        test_json_file: where the questions are from.
        chosen_on: the file on which aggregations were chosen, or that they were given.
        meta_accuracy: accuracies there, by label and aggregation.
        num_unparsed: candidates without an answer that could be parsed.
        num_rejected: records of the file that are no question here.
        num_unscored: candidates that at least one PRM could not score and so did not choose.
        by_subject: by subject `num_questions`, and accuracies by method or label.
        by_n: the same accuracies by number of candidates, drawn at random.
    """

    models: dict[str, str] = field(default_factory=dict)
    test_json_file: str = ""
    chosen_on: str = ""
    meta_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    num_rejected: int = 0
    num_unscored: int = 0
    num_questions: int
    num_candidates: int
    num_unparsed: int
    table: list[TableRow]
    between: list[Difference]
    by_subject: dict[str, dict[str, float]]
    by_n: dict[str, dict[str, float]]
    questions: list[QuestionOutcome]
    prms: dict[str, PrmOutcome]

    def accuracies(self, prm: str = "") -> dict[str, float]:
        """Accuracies by aggregation of the PRM of a label; without one by method."""
        rows = (row for row in self.table if row.prm == prm)
        return {row.aggregation or row.method: row.accuracy for row in rows}


def write_results(path: Path, results: Any) -> None:
    """Write the outcome of a command, a dataclass."""
    values = {"format_version": FORMAT_VERSION} | asdict(results)
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote of an evaluation; InputError as `read_outcome`."""
    return read_outcome(path, "launch/evaluate.py", _parsed)


def read_outcome(path: Path, command: str, parse: Callable[[dict], Outcome]) -> Outcome:
    """Read what `write_results` wrote.

    Args:
        command: that wrote it.
        parse: from the file's values to the outcome; it may raise what a lookup or a call raises.

    Raises:
        InputError: the file is something else, or has another format version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format_version")) == FORMAT_VERSION:
            return parse(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no results.json of {command}, or one of another release ({error!r}); run "
            "it again"
        ) from error
    raise InputError(
        f"{path}: format version {version!r}, but this release reads {FORMAT_VERSION}; run "
        f"{command} again, or use the release that wrote it"
    )


def _parsed(values: dict) -> Results:
    rows = {"table": TableRow, "between": Difference, "questions": QuestionOutcome}
    lists = {name: [row(**fields) for fields in values[name]] for name, row in rows.items()}
    prms = {
        label: PrmOutcome(**prm | {"steps": prm["steps"] and StepMetrics(**prm["steps"])})
        for label, prm in values["prms"].items()
    }
    return Results(**values | lists | {"prms": prms})
