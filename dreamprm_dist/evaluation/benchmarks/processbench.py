"""ProcessBench: the first wrong step of 3,400 solutions of mathematical problems, found by people.

Zheng et al., arXiv:2412.06559; `Qwen/ProcessBench` on the hub, a file for each subset (gsm8k, math,
olympiadbench, omnimath):

    {"id": "gsm8k-0", "generator": "…", "problem": "…", "steps": ["…"],
     "final_answer_correct": false, "label": 1}

`label` is the index of the first wrong step, counted from 0, or -1 where there is none. A PRM's
answer is the first step that it judges wrong, or -1. The metric of a subset is the harmonic mean
(F1) of two accuracies, on erroneous and on correct solutions; the average is the subsets' mean F1.
The subset is what the id says before its number, else the file's name. Steps behind the first wrong
one are not judged, and count nowhere.

The paper takes each PRM's threshold where F1 on the subset gsm8k is highest, and uses it on all
subsets; `--oracle_threshold` takes it where the average is highest.
"""

import re
from collections.abc import Sequence

import numpy as np

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.benchmarks.base import (
    Benchmark,
    LabelledSolution,
    Metrics,
    file_stem,
    is_whole,
    record_id,
    text,
    texts,
)
from dreamprm_dist.evaluation.benchmarks.counts import (
    RIGHT_HIT,
    RIGHT_MISSED,
    WRONG_HIT,
    WRONG_MISSED,
    first_error_outcomes,
    mean_of,
    quotient,
)

_SUBSET = re.compile(r"([A-Za-z]\w*)-\d+")


def parse(record: dict, file: str) -> LabelledSolution:
    """A record of one of the four files; raises RecordError for what is no such record."""
    problem, steps, label = text(record, "problem"), texts(record, "steps"), record.get("label")
    if not is_whole(label) or not -1 <= label < len(steps):
        raise RecordError(
            f"'label' must be the index of one of the {len(steps)} steps, from 0, or -1: "
            "the first wrong one, or none."
        )
    source_id = record_id(record)
    subset = _SUBSET.fullmatch(source_id)
    labels: list[str | None] = ["+"] * len(steps)
    if label >= 0:
        labels[label:] = ["-", *[None] * (len(steps) - label - 1)]
    return LabelledSolution(
        id=source_id,
        group=subset[1] if subset else file_stem(file),
        question=problem,
        steps=steps,
        labels=labels,
        cluster=problem,
        images=[],
        key=source_id or None,
    )


def measure(counts: np.ndarray, groups: Sequence[str]) -> list[tuple[str, Metrics]]:
    """Accuracies and their harmonic mean: the mean of the subsets, and each subset.

    What a subset lacks, erroneous or correct solutions, has no accuracy, and it no F1; the mean is
    that of the others.
    """
    rows = [_subset(counts[..., i, :]) for i in range(len(groups))]
    return [("mean of the subsets", mean_of(rows)), *zip(groups, rows, strict=True)]


def _subset(counts: np.ndarray) -> Metrics:
    erroneous, correct = (
        quotient(counts[..., hit], counts[..., hit] + counts[..., missed], np.nan)
        for hit, missed in ((WRONG_HIT, WRONG_MISSED), (RIGHT_HIT, RIGHT_MISSED))
    )
    return {
        "accuracy_erroneous": erroneous,
        "accuracy_correct": correct,
        "f1": quotient(2 * erroneous * correct, erroneous + correct),
    }


PROCESSBENCH = Benchmark(
    title="ProcessBench",
    paper="arXiv:2412.06559",
    parse=parse,
    outcomes=first_error_outcomes,
    measure=measure,
    groups="subset",
    metrics={"accuracy_erroneous": "erroneous", "accuracy_correct": "correct", "f1": "F1"},
    headline="f1",
)
