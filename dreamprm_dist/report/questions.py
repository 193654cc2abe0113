"""Test questions with images and candidates: each step's score, and which PRM picked what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path

from dreamprm_dist.data.images import image_bytes
from dreamprm_dist.data.schema import step_labels
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.questions import Question, read_test_questions
from dreamprm_dist.evaluation.results import Results
from dreamprm_dist.files import whole_lines
from dreamprm_dist.report.html import notes, thumbnail
from dreamprm_dist.report.style import label_of, shortened, significant
from dreamprm_dist.report.weights import QUESTION_TEXT, STEP_TEXT, question_and_steps

QUESTIONS = 4  # shown
CANDIDATES = 8  # of each


def question_cards(results: Results, scores: Path, file: Path, image_root: Path) -> str:
    """The first questions of an evaluation.

    The steps' scores are those of the PRM that picks a right solution most often.

    Args:
        results: of the evaluation.
        scores: its `scores.jsonl`.
        file: its questions.
        image_root: folder that their image paths start at.
    """
    if not (scores.is_file() and file.is_file()):
        lacking = file if scores.is_file() else scores
        return notes([f"Questions and candidates cannot be shown: there is no {lacking}."])
    read = enumerate(read_test_questions(str(file)))
    questions = {i: q for i, q in islice(read, 10 * QUESTIONS) if isinstance(q, Question)}
    rows: dict[int, dict[str, list[dict]]] = {}
    try:
        for row in map(json.loads, whole_lines(scores)):
            if row["question"] in questions:
                rows.setdefault(row["question"], {}).setdefault(row["prm"], []).append(row)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{scores} is no scores.jsonl of launch/evaluate.py ({error!r})"
        ) from error
    aggregations = {label: prm.aggregation for label, prm in results.prms.items()}
    best = max(aggregations, key=lambda label: results.accuracies(label)[aggregations[label]])
    shown = [i for i, q in questions.items() if _fits(q, rows.get(i, {}).get(best, []))][:QUESTIONS]
    if not shown:
        return notes([f"Questions cannot be shown: {scores} has no scores of those in {file}."])
    said = f"The first questions, in the file's order. Scores are those of {label_of(best)}."
    return notes([said]) + "".join(
        _question(questions[i], rows[i], best, aggregations, image_root) for i in shown
    )


def _fits(question: Question, rows: Sequence[Mapping]) -> bool:
    """Whether scores are of this question: its file may have changed since."""
    counts = [len(step_labels(turns)) for turns in question.conversations]
    return len(rows) == len(counts) and all(
        row["step_scores"] is None or len(row["step_scores"]) == count
        for row, count in zip(rows, counts, strict=True)
    )


def _question(
    question: Question,
    rows: Mapping[str, Sequence[Mapping]],
    best: str,
    aggregations: Mapping[str, str],
    image_root: Path,
) -> str:
    picks: dict[int, list[str]] = {}
    for label, candidates in rows.items():
        # A candidate that could not be scored has neither step scores nor aggregates.
        totals = {
            i: candidate["aggregates"][aggregations[label]]
            for i, candidate in enumerate(candidates)
            if candidate["step_scores"]
        }
        if totals:
            pick = max(totals, key=totals.__getitem__)
            picks.setdefault(pick, []).append(label_of(label))
    asked = question_and_steps(question.conversations[0])[0]
    items = "".join(
        _candidate(
            question,
            i,
            rows[best][i],
            aggregations[best],
            "all PRMs" if len(picks.get(i, [])) == len(rows) > 1 else ", ".join(picks.get(i, [])),
        )
        for i in range(min(CANDIDATES, len(rows[best])))
    )
    name = shortened(question.id or f"line {question.line}", QUESTION_TEXT)
    return (
        f'<article class="instance"><div class="images">{_images(question, image_root)}</div><div>'
        f"<h3>{escape(shortened(asked, QUESTION_TEXT))}</h3><p><small>{escape(name)}</small></p>"
        f'<ol class="candidates">{items}</ol></div></article>'
    )


def _candidate(
    question: Question, index: int, row: Mapping, aggregation: str, picked_by: str
) -> str:
    scores = row["step_scores"]
    steps = question_and_steps(question.conversations[index])[1]
    lines = ""
    for place, (text, _) in enumerate(steps):
        tone, score = "", ""
        if scores:
            tone = ' class="high"' if scores[place] >= 0.5 else ' class="low"'
            score = f"<b>{significant(scores[place])}</b>"
        lines += f"<li{tone}><span>{escape(shortened(text, STEP_TEXT))}</span>{score}</li>"
    verdict = "✓ right" if question.true_false[index] else "✗ wrong"
    total = (
        f"{aggregation} {significant(row['aggregates'][aggregation])}"
        if scores
        else f"not scored: {row.get('error', 'nothing says why')}"
    )
    picked = f"★ picked by {picked_by}" if picked_by else "not picked"
    return f"<li><b>{verdict}</b>, {escape(total)}, {escape(picked)}<ul>{lines}</ul></li>"


def _images(question: Question, root: Path) -> str:
    shown = ""
    for path in question.images:
        try:
            shown += thumbnail(image_bytes(root / path, path))
        except RecordError as error:
            shown += f"<p>{escape(str(error))}</p>"
    return shown
