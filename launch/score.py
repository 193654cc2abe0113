"""Score solutions: JSONL in, JSONL out, one line for each line.

    python launch/score.py --model runs/instance_table/export --input in.jsonl --output out.jsonl

A line in: `{"question": …, "image_path": path | list, "steps": [text, …]}`, or with
`"candidates": [text | [step, …], …]` in place of `steps`; other keys are ignored, but `id`. A line
out has `line`, `id` and `step_scores`; for candidates also their `scores` and the `best` one's
index. A line that cannot be scored has `error` instead, and scoring goes on.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from dreamprm_dist import PRM
from dreamprm_dist.aggregation import AGGREGATIONS
from dreamprm_dist.config import flag, parse_args
from dreamprm_dist.data.schema import RecordError, parse_scoring_record, read_json_records


@dataclass
class ScoreConfig:
    """Everything `launch/score.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    input: str = flag("./data/solutions.jsonl", "Questions with solutions, JSON or JSONL.")
    output: str = flag("./scores.jsonl", "JSONL file to write; an existing one is replaced.")
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the input file's own folder)."
    )
    aggregation_function: str = flag("mean", "How step scores become a candidate's score.")
    max_patch_num: int = flag(12, "Most tiles of an image, thumbnail not counted.")
    score_over: Literal["vocabulary", "pair"] = flag(
        "vocabulary", "Softmax over all words, or over + and - alone as VisualPRM does."
    )
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")

    def __post_init__(self) -> None:
        if self.aggregation_function not in AGGREGATIONS:
            raise ValueError(
                f"unknown aggregation_function {self.aggregation_function!r}; choose from "
                f"{', '.join(AGGREGATIONS)}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU; use --device cpu")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ScoreConfig,), argv, "Score solutions: JSONL in, JSONL out.")
    records = read_json_records(config.input)
    prm = PRM.from_pretrained(
        config.model,
        precision=config.precision,
        device=None if config.device == "auto" else config.device,
        max_patch_num=config.max_patch_num,
        score_over=config.score_over,
    )
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
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
