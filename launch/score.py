"""Score solutions: JSONL in, JSONL out, one line for each line.

    python launch/score.py --model runs/instance_table/export --input in.jsonl --output out.jsonl

A line in: `{"question": …, "image_path": path | list, "steps": [text, …]}`, or with
`"candidates": [text | [step, …], …]` in place of `steps`; other keys are ignored, but `id`. A line
out has `line`, `id` and `step_scores`; for candidates also their `scores` and the `best` one's
index. A line that cannot be scored has `error` instead, and scoring goes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dreamprm_dist import PRM
from dreamprm_dist.aggregation import AGGREGATIONS
from dreamprm_dist.command import run
from dreamprm_dist.config import flag, parse_args
from dreamprm_dist.data.schema import RecordError, parse_scoring_record, read_json_records
from dreamprm_dist.scoring_config import ScoringConfig


@dataclass
class ScoreConfig(ScoringConfig):
    """Everything `launch/score.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    input: str = flag("./data/solutions.jsonl", "Questions with solutions, JSON or JSONL.")
    output: str = flag("./scores.jsonl", "JSONL file to write; an existing one is replaced.")
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the input file's own folder)."
    )
    aggregation_function: str = flag("mean", "How step scores become a candidate's score.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation_function not in AGGREGATIONS:
            raise ValueError(
                f"unknown aggregation_function {self.aggregation_function!r}; choose from "
                f"{', '.join(AGGREGATIONS)}"
            )


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ScoreConfig,), argv, "Score solutions: JSONL in, JSONL out.")
    records = read_json_records(config.input)
    prm = config.load(config.model)
    count = failed = 0
    with Path(config.output).open("w", encoding="utf-8") as output:
        for line, record in tqdm(records, desc="lines"):
            row = {"line": line, "id": record.get("id") if isinstance(record, dict) else None}
            try:
                row |= _score(prm, config, record)
            except RecordError as error:
                row["error"] = str(error)
                failed += 1
            # Plain ASCII: half a surrogate pair in a record's id cannot be written as UTF-8.
            output.write(json.dumps(row) + "\n")
            count += 1
    print(f"{count} lines, {failed} of them not scored; {config.output}")


def _score(prm: PRM, config: ScoreConfig, record: dict | RecordError) -> dict:
    if isinstance(record, RecordError):
        raise record
    question, paths, solutions = parse_scoring_record(record)
    root = Path(config.image_root or Path(config.input).parent)
    result = prm.best_of_n(
        [root / path for path in paths], question, solutions, config.aggregation_function
    )
    if "steps" in record:
        return {"step_scores": result.step_scores[0]}
    return {"step_scores": result.step_scores, "scores": result.scores, "best": result.index}


if __name__ == "__main__":
    run(main)
