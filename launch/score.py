"""Score solutions: JSONL in, JSONL out, one line for each line.

    python launch/score.py --model runs/instance_table/export --input in.jsonl --output out.jsonl
    torchrun --nproc_per_node 8 launch/score.py --model ... --input in.jsonl --output out.jsonl

A line in: `{"question": …, "image_path": path | list, "steps": [text, …]}`, or with
`"candidates": [text | [step, …], …]` in place of `steps`; other keys are ignored, but `id`. A line
out has `line`, `id` and `step_scores`; for candidates also their `scores` and the `best` one's
index. A line that cannot be scored has `error` instead, and scoring goes on. Started again after it
was stopped, on any number of processes, it scores what is left.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dreamprm_dist import PRM
from dreamprm_dist.data.schema import parse_scoring_record, read_json_records
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.score_journal import ScoreJournal
from dreamprm_dist.evaluation.scoring_config import ScoringConfig, prm_name
from dreamprm_dist.flags import flag, parse_args, run
from dreamprm_dist.prm.aggregation import AGGREGATIONS


@dataclass
class ScoreConfig(ScoringConfig):
    """Everything `launch/score.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    input: str = flag("./data/solutions.jsonl", "Questions with solutions, JSON or JSONL.")
    output: str = flag("./scores.jsonl", "JSONL file to write; an existing one is replaced.")
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the input file's own folder)."
    )
    aggregation_function: str = flag(
        "mean", f"How step scores become a candidate's score: {', '.join(AGGREGATIONS)}."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation_function not in AGGREGATIONS:
            raise InputError(
                f"unknown aggregation_function {self.aggregation_function!r}; choose from "
                f"{', '.join(AGGREGATIONS)}"
            )


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ScoreConfig,), argv, "Score solutions: JSONL in, JSONL out.")
    records = read_json_records(config.input)
    state = config.join_processes()
    # First, so that a mistaken model leaves nothing on disk.
    prm = config.load(PRM, config.model, state.device)
    name = prm_name(config.model)
    settings = config.settings({name: config.model}, {"input": config.input}, state.device)
    settings |= {
        "image_root": config.image_root,
        "aggregation_function": config.aggregation_function,
    }
    output = Path(config.output)
    parts = ScoreJournal(output.with_name(output.name + ".parts"), settings)
    done = parts.start(state)
    left = (each for each in records if each[:1] not in done)
    mine = islice(left, state.process_index, None, state.num_processes)
    for line, record in tqdm(mine, desc=name, unit="line", disable=not state.is_main_process):
        try:
            parts.write((line,), _score(prm, config, record))
        except RecordError as error:
            parts.write((line,), {"error": str(error)})
    parts.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(config, output, parts)
    state.destroy_process_group()


def _finish(config: ScoreConfig, output: Path, parts: ScoreJournal) -> None:
    """Put together what the processes wrote, in the order of the lines."""
    scored = parts.read()
    unfinished = output.with_name(output.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for line, record in read_json_records(config.input):
            source_id = record.get("id") if isinstance(record, dict) else None
            # Plain ASCII: half a surrogate pair in a record's id cannot be written as UTF-8.
            file.write(json.dumps({"line": line, "id": source_id} | scored[(line,)]) + "\n")
    unfinished.replace(output)
    parts.remove()
    failed = sum("error" in row for row in scored.values())
    print(f"{len(scored)} lines, {failed} of them not scored; {output}")


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
