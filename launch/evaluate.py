"""Best-of-N evaluation: a trained PRM chooses among candidate solutions.

    python launch/evaluate.py --model weights/export --test_json_file test.json --output_dir out
    torchrun --nproc_per_node 8 launch/evaluate.py ...   (or: accelerate launch)

Writes `results.json`, `scores.jsonl` (one line a candidate), `rejected.jsonl` and `config.yaml`.
The files are the same bytes for any number of processes as long as each has the same number of
threads (OMP_NUM_THREADS; torchrun sets it to 1): on a CPU that number changes rounding.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.aggregation import AGGREGATIONS
from dreamprm_dist.best_of_n import (
    CandidateScores,
    aggregate_candidates,
    clustered_bootstrap,
    judge,
)
from dreamprm_dist.config import flag, parse_args
from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.schema import (
    RecordError,
    parse_test_record,
    read_json_records,
)
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer
from dreamprm_dist.scoring import score_solutions
from dreamprm_dist.solutions import extract_answer, split_steps

# Processes finish at different times, for images have different sizes; the default of ten minutes
# would end a long evaluation at its last barrier.
TIMEOUT = timedelta(hours=12)


@dataclass
class EvaluateConfig:
    """Everything `launch/evaluate.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    test_json_file: str = flag("./data/test.json", "Questions with candidates, JSON or JSONL.")
    output_dir: str = flag("./evaluation", "Folder for the results; made when it is not there.")
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the test file's own folder)."
    )
    aggregation_function: str = flag("mean", "The headline's aggregation; all are reported.")
    max_patch_num: int = flag(12, "Most tiles of an image, thumbnail not counted.")
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")
    seed: int = flag(0, "Seed of the bootstrap.")

    def __post_init__(self) -> None:
        if self.aggregation_function not in AGGREGATIONS:
            raise ValueError(
                f"unknown aggregation_function {self.aggregation_function!r}; choose from "
                f"{', '.join(AGGREGATIONS)}"
            )
        if self.max_patch_num < 1:
            raise ValueError(f"max_patch_num is {self.max_patch_num}; it must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU; use --device cpu")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((EvaluateConfig,), argv, "Choose the best of N candidate solutions.")
    records = list(read_json_records(config.test_json_file))
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    # Without cpu=True a process on a machine without GPU takes itself for the only one.
    use_cpu = config.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu, timeout=TIMEOUT)
    prm = load_prm(config.model, config.precision, state.device)
    tokenizer = load_tokenizer(config.model)

    mine = range(state.process_index, len(records), state.num_processes)
    with _part(out, state.process_index).open("w", encoding="utf-8") as part:
        for question in tqdm(mine, desc="questions", disable=not state.is_main_process):
            line, record = records[question]
            try:
                rows = _score(config, prm, tokenizer, question, record)
            except RecordError as error:
                source_id = record.get("id") if isinstance(record, dict) else None
                rows = [{"question": question, "line": line, "id": source_id, "reason": str(error)}]
            part.writelines(_json_line(row) for row in rows)
            part.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        parts = [_part(out, rank) for rank in range(state.num_processes)]
        _finish(config, out, parts)
    state.destroy_process_group()


def _part(out: Path, rank: int) -> Path:
    return out / f"scores.rank{rank}.jsonl"


def _score(
    config: EvaluateConfig,
    prm: PRM,
    tokenizer: PreTrainedTokenizerBase,
    question: int,
    raw: dict | RecordError,
) -> list[dict]:
    """A line of `scores.jsonl` for each candidate of a question."""
    if isinstance(raw, RecordError):
        raise raw
    record = parse_test_record(raw)
    root = Path(config.image_root or Path(config.test_json_file).parent)
    images = [read_image(root / path, path)[0] for path in record.images]
    try:
        scores = score_solutions(
            prm,
            tokenizer,
            record.question,
            [split_steps(solution) for solution in record.candidates],
            images,
            max_tiles=config.max_patch_num,
        )
    except RecordError:
        raise
    except ValueError as error:
        raise ValueError(f"{config.test_json_file}, record {question + 1}: {error}") from error
    aggregates = aggregate_candidates(scores)
    return [
        asdict(
            CandidateScores(
                question=question,
                question_id=record.id,
                candidate=index,
                subject=record.subject,
                step_scores=scores[index],
                answer=extract_answer(solution),
                true_false=record.true_false[index],
                images=record.images,
            )
        )
        | {"aggregates": {name: values[index] for name, values in aggregates.items()}}
        for index, solution in enumerate(record.candidates)
    ]


def _finish(config: EvaluateConfig, out: Path, parts: list[Path]) -> None:
    """Merge what the processes wrote, in the order of the questions, and judge it."""
    rows = []
    for part in parts:
        with part.open(encoding="utf-8") as lines:
            rows += map(json.loads, lines)
    rows.sort(key=lambda row: row["question"])
    scored = [row for row in rows if "reason" not in row]
    rejected = [
        {key: row[key] for key in ("line", "id", "reason")} for row in rows if "reason" in row
    ]
    _write(out / "rejected.jsonl", "".join(map(_json_line, rejected)))
    if not scored:
        why = "all {} records were rejected, the first at line {line}: {reason}"
        raise ValueError(
            f"{config.test_json_file}: no question was scored; "
            + (why.format(len(rejected), **rejected[0]) if rejected else "it has no record")
        )
    names = [field.name for field in fields(CandidateScores)]
    results = judge(CandidateScores(**{name: row[name] for name in names}) for row in scored)
    results = {
        "model": config.model,
        "test_json_file": config.test_json_file,
        "headline": _headline(config, results),
        "num_rejected": len(rejected),
    } | results
    _write(out / "scores.jsonl", "".join(map(_json_line, scored)))
    _write(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _write(out / "config.yaml", yaml.safe_dump(vars(config), sort_keys=False, allow_unicode=True))
    for part in parts:
        part.unlink()
    print(_table(results), f"Results are in {out}", sep="\n")


def _headline(config: EvaluateConfig, results: dict) -> dict:
    """The chosen aggregation's accuracy and its gain over the first candidate."""
    name = config.aggregation_function
    pairs = zip(results["selected_correct"][name], results["first_correct"], strict=True)
    gain, low, high = clustered_bootstrap(
        [int(selected) - int(first) for selected, first in pairs],
        # A question without an image is a cluster of its own.
        [tuple(paths) or index for index, paths in enumerate(results["question_images"])],
        seed=config.seed,
    )
    return {
        "aggregation_function": name,
        "accuracy": results["accuracy"]["prm"][name],
        "gain_over_first": gain,
        "gain_interval_95": [low, high],
    }


def _table(results: dict) -> str:
    accuracy, headline = results["accuracy"], results["headline"]
    low, high = headline["gain_interval_95"]
    rows = [
        ("first candidate", accuracy["first"]),
        ("random candidate", accuracy["random"]),
        ("self-consistency", accuracy["self_consistency"]),
        *((f"PRM, {name}", value) for name, value in accuracy["prm"].items()),
        ("oracle", accuracy["oracle"]),
    ]
    return "\n".join(
        [
            f"{results['num_questions']} questions, {results['num_candidates']} candidates "
            f"({results['num_unparsed']} without a parsed answer), "
            f"{results['num_rejected']} records rejected",
            *(f"  {name:<18}{value:>7.1%}" for name, value in rows),
            f"{headline['aggregation_function']} over first: {headline['gain_over_first']:+.1%} "
            f"(95 % interval {low:+.1%} to {high:+.1%})",
        ]
    )


def _json_line(row: dict) -> str:
    # Plain ASCII: half a surrogate pair in a rejected id cannot be written as UTF-8.
    return json.dumps(row) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
