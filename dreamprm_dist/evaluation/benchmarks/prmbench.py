"""PRMBench: 6,216 solutions in which steps were changed for the worse, in nine ways.

Song et al., arXiv:2501.03124; `hitsmy/PRMBench_Preview` on the hub, or the files by category of
github.com/ssmisya/PRMBench:

    {"idx": "prm_test_p1_0", "classification": "confidence", "question": "…",
     "original_question": "…", "modified_question": "…", "original_process": ["…"],
     "modified_process": ["1. …"], "modified_steps": [5, 6], "error_steps": [5, 6], "reason": "…"}

What is read, and how it is counted, follows that repository (its task `prmtest_classified` and the
notebook that makes the tables):

- The PRM reads `modified_question` and `modified_process`. The steps that `error_steps` names,
  counted from 1, are wrong, all others right; a number beyond the last step, as 100 records have
  it, means nothing. All steps are compared, also those behind an error.
- PRM-Score is (F1 + F1_neg) / 2, F1 of finding right steps and F1_neg of finding wrong ones.
  Overall it is taken over the steps of all records together; a category's is the mean of its parts.
- `multi_solutions` (MS) has no wrong steps. As in the paper's tables, F1 of right steps stands for
  it; in the overall score its steps count as all others.
- A record with the `idx` and `classification` of one before it is left out: 5 of the 6,216.
- Original solutions, all of whose steps are right, are scored there for a measure of similarity;
  they are in no PRM-Score, and are not read here.

There a step is judged right when its score is above the threshold, here also when it equals it; and
a PRM that judges redundancy by a score of its own is asked for that in two categories, where P(+)
stands here, as for the PRMs there that have no such score.
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
from dreamprm_dist.evaluation.benchmarks.counts import mean_of, step_f1, step_outcomes

# Categories of the paper, their parts in its order, and what these are called in the files.
CATEGORIES = {
    "simplicity": {"NR": "redundency", "NCL": "circular"},
    "soundness": {
        "ES": "counterfactual",
        "SC": "step_contradiction",
        "DC": "domain_inconsistency",
        "CI": "confidence",
    },
    "sensitivity": {"PS": "missing_condition", "DR": "deception", "MS": "multi_solutions"},
}
NO_ERRORS = "MS multi_solutions"
_NAMES = {name: f"{short} {name}" for parts in CATEGORIES.values() for short, name in parts.items()}


def parse(record: dict, file: str) -> LabelledSolution:
    """A line of PRMBench's files; raises RecordError for what is no such line."""
    steps, marks = texts(record, "modified_process"), record.get("error_steps")
    if not isinstance(marks, list) or not all(map(is_whole, marks)):
        raise RecordError("'error_steps' must be a list of whole numbers; steps count from 1.")
    name, source_id = text(record, "classification"), record_id(record)
    question = text(record, "modified_question")
    wrong = set(marks)
    return LabelledSolution(
        id=source_id,
        group=_NAMES.get(name, name),
        question=question,
        steps=steps,
        labels=["-" if number in wrong else "+" for number in range(1, len(steps) + 1)],
        # The problem that all its variants were made of.
        cluster=text(record, "question", default=question),
        images=[],
        key=(name, source_id) if source_id else None,
        num_stray_marks=len(wrong - {*range(1, len(steps) + 1)}),
    )


def measure(counts: np.ndarray, groups: Sequence[str]) -> list[tuple[str, Metrics]]:
    """PRM-Scores: overall, of the three categories, and of their parts."""
    parts = {
        name: _prm_score(counts[..., i, :], name != NO_ERRORS) for i, name in enumerate(groups)
    }
    rows = [("overall", _prm_score(counts.sum(-2)))]
    for category, members in CATEGORIES.items():
        names = [_NAMES[name] for name in members.values() if _NAMES[name] in parts]
        if names:
            rows.append((category, mean_of([parts[name] for name in names])))
            rows += [(name, parts[name]) for name in names]
    return rows + [(name, row) for name, row in parts.items() if name not in _NAMES.values()]


def _prm_score(counts: np.ndarray, has_errors: bool = True) -> Metrics:
    scores = step_f1(counts)
    right, wrong, both = scores["f1_right"], scores["f1_wrong"], scores["macro_f1"]
    if has_errors:
        return {"f1_right": right, "f1_wrong": wrong, "prm_score": both}
    return {"f1_right": right, "f1_wrong": np.full_like(right, np.nan), "prm_score": right}


PRMBENCH = Benchmark(
    title="PRMBench",
    paper="arXiv:2501.03124",
    parse=parse,
    outcomes=step_outcomes,
    measure=measure,
    groups="category",
    metrics={"f1_right": "F1", "f1_wrong": "F1_neg", "prm_score": "PRM-Score"},
    headline="prm_score",
)
