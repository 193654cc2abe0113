"""VisualProcessBench: each step of 2,866 solutions of multimodal questions, judged by people.

Wang et al., arXiv:2503.10291, section 3.3; `OpenGVLab/VisualProcessBench` on the hub, `test.jsonl`:

    {"image": ["images/…"], "question": "…", "answer": "…", "policy_model": "…",
     "data_source": "…", "response": {"steps": ["…"], "process_correctness": [1, 0, -1]}}

A step marked 0 is neutral, neither right nor wrong, and does not count. The metric is the mean of
the F1 scores of right and of wrong steps (macro-F1). The paper's overall score is the micro average
over the data sources: their macro-F1 weighted by the number of their steps. Pooled over all steps
it is another number, which others publish; both are given.
"""

from collections.abc import Sequence

import numpy as np

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.benchmarks.base import (
    Benchmark,
    LabelledSolution,
    Metrics,
    is_whole,
    record_id,
    text,
    texts,
)
from dreamprm_dist.evaluation.benchmarks.counts import quotient, step_f1, step_outcomes

LABELS = {1: "+", 0: None, -1: "-"}


def parse(record: dict, file: str) -> LabelledSolution:
    """A line of `test.jsonl`; raises RecordError for what is no such line."""
    response = record.get("response")
    if not isinstance(response, dict):
        raise RecordError("'response' must be an object with 'steps' and 'process_correctness'.")
    steps, marks = texts(response, "steps"), response.get("process_correctness")
    if not isinstance(marks, list) or not all(is_whole(mark) and mark in LABELS for mark in marks):
        raise RecordError("'process_correctness' must be a list of 1, 0 and -1.")
    if len(marks) != len(steps):
        raise RecordError(
            f"'process_correctness' has {len(marks)} marks for {len(steps)} steps; which step a "
            "mark belongs to is not known."
        )
    paths = record.get("image")
    images = [] if paths is None else [paths] if isinstance(paths, str) else texts(record, "image")
    question = text(record, "question")
    return LabelledSolution(
        id=record_id(record),
        group=text(record, "data_source", default="no data source"),
        question=question,
        steps=steps,
        labels=[LABELS[mark] for mark in marks],
        cluster=tuple(images) or question,
        images=images,
    )


def measure(counts: np.ndarray, groups: Sequence[str]) -> list[tuple[str, Metrics]]:
    """F1 scores over sources weighted by their steps, pooled over all steps, and of each source."""
    by_source = [step_f1(counts[..., i, :]) for i in range(len(groups))]
    num_steps = np.stack([counts[..., i, :].sum(-1) for i in range(len(groups))])
    weighted = {
        name: quotient(
            sum(n * np.nan_to_num(row[name]) for n, row in zip(num_steps, by_source, strict=True)),
            num_steps.sum(0),
            np.nan,
        )
        for name in by_source[0]
    }
    return [
        ("sources weighted by steps", weighted),
        ("all steps pooled", step_f1(counts.sum(-2))),
        *zip(groups, by_source, strict=True),
    ]


VISUALPROCESSBENCH = Benchmark(
    title="VisualProcessBench",
    paper="arXiv:2503.10291",
    parse=parse,
    outcomes=step_outcomes,
    measure=measure,
    groups="data source",
    metrics={"f1_right": "F1 right", "f1_wrong": "F1 wrong", "macro_f1": "macro-F1"},
    headline="macro_f1",
)
