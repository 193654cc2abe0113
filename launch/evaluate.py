"""Best-of-N evaluation: trained PRMs choose among candidate solutions, one table for all.

    python launch/evaluate.py --model runs/table/export --test_json_file test.json --output_dir out
    torchrun --nproc_per_node 8 launch/evaluate.py --model runs/table/export runs/net/export ...

Writes `results.json`, `scores.jsonl` (one line a PRM and candidate), `rejected.jsonl` and
`config.yaml`. The files are the same bytes for any number of processes, and for an evaluation that
was stopped and started again, as long as each process has the same number of threads
(OMP_NUM_THREADS; torchrun sets it to 1): on a CPU that number changes rounding.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml
from accelerate import PartialState
from tqdm import tqdm

from dreamprm_dist.data.images import read_image
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.best_of_n import CandidateScores, aggregate_candidates, judge
from dreamprm_dist.evaluation.compare import BASICS, compare
from dreamprm_dist.evaluation.questions import Question, read_meta_questions, read_test_questions
from dreamprm_dist.evaluation.score_journal import ScoreJournal
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.evaluation.scoring_config import ScoringConfig, prm_name
from dreamprm_dist.evaluation.table import text_table
from dreamprm_dist.flags import flag, parse_args, run
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.prm.model import load_tokenizer

ON_META = "meta"


@dataclass
class EvaluateConfig(ScoringConfig):
    """Everything `launch/evaluate.py` is told."""

    model: list[str] = field(
        default_factory=lambda: ["./weights/export"],
        metadata={"help": "PRMs: local folders or hub names, or label=folder."},
    )
    test_json_file: str = flag("./data/test.json", "Questions with candidates, JSON or JSONL.")
    output_dir: str = flag("./evaluation", "Folder for the results; made when it is not there.")
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the file's own folder)."
    )
    aggregation_function: str = flag(
        "mean",
        f"Aggregation that stands for a PRM: {', '.join(AGGREGATIONS)}, or meta: the best of "
        "them on meta_json_file.",
    )
    meta_json_file: str | None = flag(None, "Meta records, to choose the aggregation on.")
    seed: int = flag(0, "Seed of the bootstrap.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation_function not in (*AGGREGATIONS, ON_META):
            raise InputError(
                f"unknown aggregation_function {self.aggregation_function!r}; choose from "
                f"{', '.join(AGGREGATIONS)}, or {ON_META} with --meta_json_file"
            )
        if (self.aggregation_function == ON_META) != (self.meta_json_file is not None):
            raise InputError("--aggregation_function meta and --meta_json_file go together")


class Key(NamedTuple):
    """A question that a PRM scores: the PRM's label, `test` or `meta`, the question's index."""

    prm: str
    set: str
    question: int


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((EvaluateConfig,), argv, "Choose the best of N candidate solutions.")
    models = labelled(config.model)
    test = list(read_test_questions(config.test_json_file))
    questions = {"test": {i: q for i, q in enumerate(test) if isinstance(q, Question)}, "meta": {}}
    if config.meta_json_file:
        root = Path(config.image_root or Path(config.meta_json_file).parent)
        questions["meta"] = dict(enumerate(read_meta_questions(config.meta_json_file, root)))
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    state = config.join_processes()
    # All before the first is scored with: a mistaken one is better found now than hours later.
    for model in models.values():
        load_tokenizer(model)
    files = {"test_json_file": config.test_json_file, "meta_json_file": config.meta_json_file}
    settings = config.settings(models, files, state.device) | {"image_root": config.image_root}
    parts = ScoreJournal(out / "parts", settings)
    done = parts.start(state)
    for label, model in models.items():
        keys = [Key(label, name, i) for name, group in questions.items() for i in group]
        left = [key for key in keys if key not in done]
        if left:
            mine = left[state.process_index :: state.num_processes]
            _score_all(config, label, model, mine, questions, parts, state)
    parts.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(config, out, models, test, questions, parts)
    state.destroy_process_group()


def labelled(specifications: list[str]) -> dict[str, str]:
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


def _score_all(
    config: EvaluateConfig,
    label: str,
    model: str,
    keys: list[Key],
    questions: dict[str, dict[int, Question]],
    parts: ScoreJournal,
    state: PartialState,
) -> None:
    prm = config.load(Scorer, model, state.device)
    files = {"test": config.test_json_file, "meta": config.meta_json_file}
    for key in tqdm(keys, desc=label, disable=not state.is_main_process):
        question, file = questions[key.set][key.question], files[key.set]
        root = Path(config.image_root or Path(file).parent)
        try:
            images = [read_image(root / path, path)[0] for path in question.images]
            parts.write(key, {"scores": prm.score_conversations(question.conversations, images)})
        except RecordError as error:
            parts.write(key, {"error": str(error)})
        except InputError as error:
            raise InputError(f"{model}: {file}, record {question.line}: {error}") from error


def _finish(
    config: EvaluateConfig,
    out: Path,
    models: dict[str, str],
    test: list,
    questions: dict[str, dict[int, Question]],
    parts: ScoreJournal,
) -> None:
    """Put together what the processes wrote, in the order of the questions, and judge it."""
    scored = parts.read()
    rejected = []
    # A question that one PRM cannot take is left out for all: the comparison is paired.
    for index, question in enumerate(test):
        if not isinstance(question, Question):
            line, source_id, error = question
            rejected.append({"line": line, "id": source_id, "reason": str(error)})
            continue
        errors = (scored[Key(label, "test", index)].get("error") for label in models)
        if reason := next(filter(None, errors), None):
            rejected.append({"line": question.line, "id": question.id, "reason": reason})
            del questions["test"][index]
    _write(out / "rejected.jsonl", "".join(map(_json_line, rejected)))
    if not questions["test"]:
        why = "all {} records were rejected, the first at line {line}: {reason}"
        raise InputError(
            f"{config.test_json_file}: no question was scored; "
            + (why.format(len(rejected), **rejected[0]) if rejected else "it has no record")
        )
    prms = {label: _candidates(questions["test"], scored, label, "test") for label in models}
    aggregations, on_meta = dict.fromkeys(models, config.aggregation_function), {}
    if config.meta_json_file:
        for label in models:
            for index, question in questions["meta"].items():
                if reason := scored[Key(label, "meta", index)].get("error"):
                    where = f"{config.meta_json_file}, record {question.line}"
                    raise InputError(f"{where}: {label} cannot score its question: {reason}")
            meta = _candidates(questions["meta"], scored, label, "meta")
            on_meta[label] = judge(meta)["accuracy"]["prm"]
            aggregations[label] = max(on_meta[label], key=on_meta[label].__getitem__)
    compared = compare(prms, aggregations, config.seed)
    judged = compared.pop("judged")
    first = next(iter(models))
    headline = next(
        row for row in compared["table"]
        if (row["prm"], row["aggregation"]) == (first, aggregations[first])
    )  # fmt: skip
    results = {
        "models": models,
        "test_json_file": config.test_json_file,
        "aggregation": {
            "chosen_on": config.meta_json_file or "nothing: set by --aggregation_function",
            "by_prm": aggregations,
            "meta_accuracy": on_meta,
        },
        "headline": {
            "aggregation_function": aggregations[first],
            "accuracy": headline["accuracy"],
            "gain_over_first": headline["over_first"],
            "gain_interval_95": headline["over_first_interval_95"],
        },
        "num_rejected": len(rejected),
        # Of the first PRM, question by question; of the others under `prms`.
        **{name: value for name, value in judged[first].items() if name != "by_subject"},
        **compared,
        "prms": {
            label: {"accuracy": r["accuracy"]["prm"], "selected_correct": r["selected_correct"]}
            for label, r in judged.items()
        },
    }
    _write(out / "scores.jsonl", "".join(_score_lines(prms)))
    _write(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _write(out / "config.yaml", yaml.safe_dump(vars(config), sort_keys=False, allow_unicode=True))
    parts.remove()
    print(text_table(results), f"Results are in {out}", sep="\n")


def _candidates(
    questions: dict[int, Question], scored: dict[tuple, dict], label: str, name: str
) -> list[CandidateScores]:
    return [
        CandidateScores(
            question=index,
            question_id=question.id,
            candidate=candidate,
            subject=question.subject,
            step_scores=scores,
            answer=question.answers[candidate],
            true_false=question.true_false[candidate],
            images=question.images,
            step_labels=question.step_labels and question.step_labels[candidate],
        )
        for index, question in questions.items()
        for candidate, scores in enumerate(scored[Key(label, name, index)]["scores"])
    ]


def _score_lines(prms: dict[str, list[CandidateScores]]):
    for label, candidates in prms.items():
        for candidate in candidates:
            totals = aggregate_candidates([candidate.step_scores])
            aggregates = {name: values[0] for name, values in totals.items()}
            yield _json_line({"prm": label} | asdict(candidate) | {"aggregates": aggregates})


def _json_line(row: dict) -> str:
    # Plain ASCII: half a surrogate pair in a rejected id cannot be written as UTF-8.
    return json.dumps(row) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    run(main)
