"""An evaluation from its files to its results: PRMs choose among candidate solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
import yaml

from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.schema import Turn
from dreamprm_dist.distributed import rank
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.best_of_n import CandidateScores, aggregate_candidates, judge
from dreamprm_dist.evaluation.compare import BASICS, compare
from dreamprm_dist.evaluation.questions import (
    Question,
    Rejected,
    read_meta_questions,
    read_test_questions,
)
from dreamprm_dist.evaluation.results import write_results
from dreamprm_dist.evaluation.score_journal import ScoreJournal
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.evaluation.scoring_config import ComparisonConfig, prm_name
from dreamprm_dist.evaluation.table import text_table
from dreamprm_dist.files import json_line, refuse_overwriting, write_whole
from dreamprm_dist.flags import flag
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.prm.model import load_tokenizer
from dreamprm_dist.prm.model_folder import EXPORT

ON_META = "meta"
RESULTS, SCORES, REJECTED = "results.json", "scores.jsonl", "rejected.jsonl"
CONFIG, PARTS = "config.yaml", "parts"
Config = TypeVar("Config", bound=ComparisonConfig)
Scored = TypeVar("Scored")


@dataclass
class EvaluateConfig(ComparisonConfig):
    """Everything `launch/evaluate.py` is told."""

    test_json_file: str = flag("./data/test.json", "Questions with candidates, JSON or JSONL.")
    out: str = flag(
        "./evaluation",
        "Folder for the results; made when it is not there.",
        aliases=["output_dir"],
    )
    aggregation_function: str = flag(
        "mean",
        "Aggregation that stands for a PRM; meta: the best of them on meta_json_file.",
        choices=(*AGGREGATIONS, ON_META),
    )
    meta_json_file: str | None = flag(None, "Meta records, to choose the aggregation on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.aggregation_function == ON_META) != (self.meta_json_file is not None):
            raise InputError("--aggregation_function meta and --meta_json_file go together")


class Key(NamedTuple):
    """A question that a PRM scores: the PRM's label, `test` or `meta`, the question's index."""

    prm: str
    set: str
    question: int


def evaluate(config: EvaluateConfig) -> str:
    """Score, compare and write the files that `launch/evaluate.py` names; by all ranks.

    Returns:
        The outcome as text on rank 0; nothing ("") elsewhere.

    Raises:
        InputError: a flag, a file or a model cannot be used, or no question was scored.
    """
    models, out = labelled(config.model), Path(config.out)
    refuse_own_inputs(out, models, [config.test_json_file, config.meta_json_file])
    test = list(islice(read_test_questions(config.test_json_file), config.limit))
    meta = []
    if config.meta_json_file:
        meta = read_meta_questions(config.meta_json_file, _root(config, config.meta_json_file))
    if not config.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    with config.joined() as device:
        # All before the first is scored with: a mistaken one is better found now than hours later.
        for model in models.values():
            load_tokenizer(model)
        if config.dry_run:
            return _plan(config, models, test, meta) if rank() == 0 else ""
        files = {"test_json_file": config.test_json_file, "meta_json_file": config.meta_json_file}
        settings = config.settings(models, files, device) | {"image_root": config.image_root}
        journal = ScoreJournal(out / PARTS, settings)
        journal.start()

        def questions(label: str) -> Iterator[tuple[Key, Question]]:
            for name, records in (("test", test), ("meta", meta)):
                for index, question in enumerate(records):
                    if isinstance(question, Question):
                        yield Key(label, name, index), question

        score_with_each(config, models, device, journal, questions, _score)
        return journal.finish(partial(_write, config, models, test, meta))


def refuse_own_inputs(
    out: Path, models: Mapping[str, str], files: Sequence[str | Path | None]
) -> None:
    """Raise InputError where results in a folder would replace what they are made of."""
    of_runs = [Path(model, name) for model in models.values() for name in (EXPORT, f"../{CONFIG}")]
    refuse_overwriting(
        (out / name for name in (RESULTS, SCORES, REJECTED, CONFIG, PARTS)),
        [*files, *models.values(), *of_runs],
        into=out,
    )


def score_with_each(
    config: Config,
    models: Mapping[str, str],
    device: torch.device,
    journal: ScoreJournal,
    keyed: Callable[[str], Iterable[tuple[tuple, Scored]]],
    score: Callable[[Config, str, Scorer, Scored], dict],
) -> None:
    """Score this rank's part of all that is not scored yet, PRM by PRM.

    Args:
        keyed: from a PRM's label to what it scores, each with its key; all ranks give the same.
        score: gives a row of the journal, see `ScoreJournal.score`.
    """
    for label, model in models.items():
        if mine := list(journal.mine(keyed(label))):
            # Nothing here holds the PRM, so that two are never in memory.
            journal.score(
                label, mine, partial(score, config, model, config.load(Scorer, model, device))
            )


def _plan(
    config: EvaluateConfig,
    models: Mapping[str, str],
    test: Sequence[Question | Rejected],
    meta: Sequence[Question],
) -> str:
    questions = {config.test_json_file: [q for q in test if isinstance(q, Question)]}
    if config.meta_json_file:
        questions[config.meta_json_file] = list(meta)
    rejected = [record for record in test if isinstance(record, Rejected)]
    lines = [
        f"{file}: {len(found)} questions with {sum(len(q.true_false) for q in found)} candidates"
        for file, found in questions.items()
    ]
    if rejected:
        why = f"{len(rejected)} records rejected, the first at line {rejected[0].line}"
        lines[0] += f", {why}: {rejected[0].reason}"
    lines += [f"{label}: {model}" for label, model in models.items()]
    return "\n".join(lines) + f"\nResults would go to {config.out}; nothing was written\n"


def labelled(specifications: Sequence[str]) -> dict[str, str]:
    """Label -> model; a run's `export` folder is called as its run.

    Raises:
        InputError: two models have one label, or a label has another meaning in the table.
    """
    models: dict[str, str] = {}
    for text in specifications:
        label, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            label, model = prm_name(text), text
        if not label or label in models or label in BASICS:
            raise InputError(f"model {text}: the label {label!r} is taken; give it as label=folder")
        models[label] = model
    return models


def _root(config: EvaluateConfig, file: str) -> Path:
    return Path(config.image_root or Path(file).parent)


def _score(config: EvaluateConfig, model: str, scorer: Scorer, question: Question) -> dict:
    scores = score_files(_root(config, question.file), model, scorer, question)
    if all(isinstance(found, str) for found in scores):
        raise RecordError(f"no candidate can be scored; the first: {scores[0]}")
    return {"scores": scores}


class InFiles(Protocol):
    """Conversations about images that lie in files, and the record that they are from."""

    file: str
    line: int
    images: list[str]
    conversations: list[list[Turn]]


def score_files(
    root: Path, model: str, scorer: Scorer, question: InFiles
) -> list[list[float] | str]:
    """For each conversation its step scores, or in their place why there are none.

    Args:
        root: folder that image paths start at.

    Raises:
        RecordError: no conversation can be scored, for their question or an image is at fault.
        InputError: a score is not a number; the record is named.
    """
    try:
        images = [read_image(root / path, path)[0] for path in question.images]
        scores = scorer.score_conversations(question.conversations, images)
    except RecordError:
        raise
    except InputError as error:
        raise InputError(f"{model}: {question.file}, record {question.line}: {error}") from error
    return [str(found) if isinstance(found, RecordError) else found for found in scores]


def _write(
    config: EvaluateConfig,
    models: dict[str, str],
    test: Sequence[Question | Rejected],
    meta: Sequence[Question],
    scored: Mapping[tuple, dict],
) -> str:
    """Judge all scores, in the order of the questions, and write the files."""
    out = Path(config.out)
    questions: dict[int, Question] = {}
    rejected: list[Rejected] = []
    for index, question in enumerate(test):
        if isinstance(question, Question):
            # One that a single PRM cannot take is left out for all: the comparison is paired.
            errors = (scored[Key(label, "test", index)].get("error") for label in models)
            if not (reason := next(filter(None, errors), None)):
                questions[index] = question
                continue
            question = Rejected(question.line, question.id, reason)
        rejected.append(question)
    write_whole(out / REJECTED, "".join(json_line(r._asdict()) for r in rejected))
    if not questions:
        why = "all {} records were rejected, the first at line {}: {}"
        raise InputError(
            f"{config.test_json_file}: no question was scored; "
            + (why.format(len(rejected), rejected[0].line, rejected[0].reason)
               if rejected else "it has no record")
        )  # fmt: skip
    prms = {label: _candidates(questions, scored, label, "test") for label in models}
    on_meta = {label: _accuracies_on_meta(meta, scored, label) for label in models if meta}
    chosen = {label: max(found, key=found.__getitem__) for label, found in on_meta.items()}
    results = replace(
        compare(prms, chosen or dict.fromkeys(models, config.aggregation_function), config.seed),
        models=models,
        test_json_file=config.test_json_file,
        chosen_on=config.meta_json_file or "nothing: set by --aggregation_function",
        meta_accuracy=on_meta,
        num_rejected=len(rejected),
        num_unscored=len({(c.question, c.candidate) for p in prms.values() for c in p if c.error}),
    )
    write_whole(out / SCORES, "".join(_score_lines(prms)))
    write_results(out / RESULTS, results)
    flags = {name: value for name, value in vars(config).items() if name != "local_rank"}
    write_whole(out / CONFIG, yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
    return f"{text_table(results)}\nResults are in {out}\n"


def _accuracies_on_meta(
    meta: Sequence[Question], scored: Mapping[tuple, dict], label: str
) -> dict[str, float]:
    for index, question in enumerate(meta):
        if reason := scored[Key(label, "meta", index)].get("error"):
            where = f"{question.file}, record {question.line}"
            raise InputError(f"{where}: {label} cannot score its question: {reason}")
    return judge(_candidates(dict(enumerate(meta)), scored, label, "meta")).accuracies()


def _candidates(
    questions: Mapping[int, Question], scored: Mapping[tuple, dict], label: str, name: str
) -> list[CandidateScores]:
    return [
        CandidateScores(
            question=index,
            question_id=question.id,
            candidate=candidate,
            subject=question.subject,
            step_scores=None if isinstance(found, str) else found,
            answer=question.answers[candidate],
            true_false=question.true_false[candidate],
            images=question.images,
            step_labels=question.step_labels[candidate] if question.step_labels else None,
            error=found if isinstance(found, str) else None,
        )
        for index, question in questions.items()
        for candidate, found in enumerate(scored[Key(label, name, index)]["scores"])
    ]


def _score_lines(prms: Mapping[str, list[CandidateScores]]) -> Iterator[str]:
    for label, candidates in prms.items():
        for candidate in candidates:
            aggregates = dict.fromkeys(AGGREGATIONS)
            if candidate.step_scores is not None:
                totals = aggregate_candidates([candidate.step_scores])
                aggregates = {name: values[0] for name, values in totals.items()}
            yield json_line({"prm": label} | asdict(candidate) | {"aggregates": aggregates})
