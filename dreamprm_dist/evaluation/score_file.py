"""Solutions of a file, scored into JSONL: one line for each record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import parse_scoring_record
from dreamprm_dist.distributed import rank
from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.score_journal import ScoreJournal
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.evaluation.scoring_config import FileScoringConfig, prm_name
from dreamprm_dist.files import json_line, refuse_overwriting, whole_file
from dreamprm_dist.flags import flag
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.prm.model import load_tokenizer
from dreamprm_dist.prm.model_folder import EXPORT


@dataclass
class ScoreConfig(FileScoringConfig):
    """Everything `launch/score.py` is told."""

    model: str = flag("./weights/export", "Local folder, run folder or hub name of the PRM.")
    input: str = flag("./data/solutions.jsonl", "Questions with solutions, JSON or JSONL.")
    out: str = flag(
        "./scores.jsonl", "JSONL file to write; an existing one is replaced.", aliases=["output"]
    )
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the input file's own folder)."
    )
    aggregation_function: str = flag(
        "mean", "How step scores become a candidate's score.", choices=AGGREGATIONS
    )


def score_file(config: ScoreConfig) -> str:
    """Score all records of a file, by all ranks; see `launch/score.py` for the two formats.

    Returns:
        What was done, on rank 0; nothing ("") elsewhere.

    Raises:
        InputError: a flag or the model cannot be used, or a score is not a number.
    """
    output, name = Path(config.out), prm_name(config.model)
    parts = output.with_name(output.name + ".parts")
    inputs: list[str | Path] = [config.input, config.model, Path(config.model, EXPORT)]
    refuse_overwriting([output, parts], inputs, into=output.parent)
    records = _records(config)
    with config.joined() as device:
        if config.dry_run:
            load_tokenizer(config.model)
            return _plan(config) if rank() == 0 else ""
        # First, so that a mistaken model leaves nothing on disk.
        scorer = config.load(Scorer, config.model, device)
        settings = config.settings({name: config.model}, {"input": config.input}, device)
        settings |= {
            "image_root": config.image_root,
            "aggregation_function": config.aggregation_function,
        }
        journal = ScoreJournal(parts, settings)
        journal.start()
        mine = journal.mine(((line,), record) for line, record in records)
        journal.score(name, mine, partial(_score, config, scorer))
        return journal.finish(partial(_write, config, output))


def _records(config: ScoreConfig) -> Iterator[tuple[int, dict | RecordError]]:
    return islice(read_json_records(config.input), config.limit)


def _plan(config: ScoreConfig) -> str:
    lines, solutions, errors = 0, 0, []
    for line, record in _records(config):
        lines += 1
        try:
            solutions += len(parse_scoring_record(record)[2])
        except RecordError as error:
            errors.append(f"line {line}: {error}")
    bad = f"; {len(errors)} lines cannot be scored, the first is {errors[0]}" if errors else ""
    return (
        f"{config.input}: {lines} lines with {solutions} solutions{bad}\n"
        f"{config.model} would score them into {config.out}; nothing was written\n"
    )


def _score(config: ScoreConfig, scorer: Scorer, record: dict | RecordError) -> dict:
    question, paths, solutions = parse_scoring_record(record)
    root = Path(config.image_root or Path(config.input).parent)
    images = [read_image(root / path, str(root / path))[0] for path in paths]
    result = scorer.choose(question, solutions, images, config.aggregation_function)
    if isinstance(record, dict) and "steps" in record:
        if result.errors[0]:
            raise RecordError(result.errors[0])
        return {"step_scores": result.step_scores[0]}
    return {
        "step_scores": result.step_scores,
        "scores": result.scores,
        "best": result.index,
        "errors": result.errors,
    }


def _write(config: ScoreConfig, output: Path, scored: Mapping[tuple, dict]) -> str:
    """Write a line for each record, in the order of the records."""
    lines = failed = candidates = 0
    with whole_file(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for line, record in _records(config):
            source_id = record.get("id") if isinstance(record, dict) else None
            row = scored[(line,)]
            file.write(json_line({"line": line, "id": source_id} | row))
            lines += 1
            failed += "error" in row
            candidates += sum(error is not None for error in row.get("errors", []))
    unscored = f", {candidates} candidates not scored" if candidates else ""
    return f"{lines} lines, {failed} of them not scored{unscored}; {output}\n"
