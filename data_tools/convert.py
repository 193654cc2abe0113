"""Turn downloaded data files into the records that `data_tools.shard` and evaluation read.

    python -m data_tools.convert raw | conversations | reference | mmmu | candidates …
    python -m data_tools.convert stepwise | prm800k | math_shepherd | to_stepwise …

writes one JSONL file and, beside it, ``<name>.rejected.jsonl`` with the file, line, id and reason
of every record that was not taken. Records stream through: memory does not grow with the file.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools import stepwise_commands
from data_tools.mmmu import join_candidates, write_questions
from data_tools.record_files import (
    RecordWriter,
    add_limit,
    add_output,
    find_image,
    image_prefix,
    map_images,
    read_with_progress,
    with_prefix,
    with_source_id,
)
from dreamprm_dist.data.schema import (
    QUESTION_PREFIX,
    SOLUTION_MARK,
    MetaRecord,
    Turn,
    parse_counts,
    parse_meta_record,
    parse_training_record,
    require_object,
    step_labels,
)
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import CommandParser, run
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, step_turns

_ROUNDED = 0.01  # how far a score that was written with two decimals may be from its counts


def convert_raw(record: dict, threshold: float = 0.0, stop_at_first_minus: bool = False) -> dict:
    """A record of raw VisualPRM400K as a training record.

    A step is ``+`` when its score is above ``threshold``, and unlabelled when no roll-out ever
    visited it (``num_mc_total`` is 0). ``stop_at_first_minus`` ends the solution with its first
    ``-``: what follows an error is neither right nor wrong. The counts of roll-outs stay with their
    steps, from which training may take other labels.

    Raises:
        RecordError: no raw record, no question, no steps, a step without text or score, or counts
            that are impossible or contradict the score.
    """
    if "conversations" in record:
        raise RecordError("it has 'conversations', so it is not raw; use `convert conversations`.")
    question, steps = record.get("question"), record.get("steps_with_score")
    if not isinstance(question, str) or not question.strip():
        raise RecordError("'question' must be a text.")
    if not isinstance(steps, list) or not steps:
        raise RecordError("'steps_with_score' must be a non-empty list.")
    texts, labels, all_counts = [], [], []
    for i, step in enumerate(steps):
        text = step.get("step") if isinstance(step, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise RecordError(f"steps_with_score[{i}] has no text in 'step'.")
        texts.append(text)
        counts = _counts(step, f"steps_with_score[{i}]")
        labels.append(_label(step, counts, i, threshold))
        all_counts.append(counts)
        if stop_at_first_minus and labels[-1] == "-":
            break
    texts[0] = f"{QUESTION_PREFIX}{question}\n\n{SOLUTION_MARK}\n{texts[0]}"
    system: Turn = {"from": "system", "value": SYSTEM_PROMPT}
    turns: list = step_turns(texts, labels)
    for turn, counts in zip(turns[1::2], all_counts, strict=True):
        if counts is not None:
            turn["num_mc_correct"], turn["num_mc_total"] = counts
    return checked_training({**record, "conversations": [system, *turns]})


def _counts(step: dict, what: str) -> tuple[int, int] | None:
    # A step with one of the two was always taken, and its score is all that it says.
    keys = ("num_mc_correct", "num_mc_total")
    if any(step.get(key) is None for key in keys):
        return None
    # 3.0 is what a table with missing values makes of 3.
    whole = {
        key: int(n) if isinstance(n := step[key], float) and n.is_integer() else n for key in keys
    }
    correct, total = counts = parse_counts(whole, what) or (0, 0)
    score = step.get("score")
    if total and isinstance(score, int | float) and abs(score - correct / total) > _ROUNDED:
        raise RecordError(
            f"{what}: 'score' {score} is not the {correct} of {total} roll-outs that its counts "
            "say; correct one of them, or leave the counts out."
        )
    return counts


def _label(step: dict, counts: tuple[int, int] | None, index: int, threshold: float) -> str | None:
    total = step.get("num_mc_total")
    if total == 0 and not isinstance(total, bool):
        return None
    score = step.get("score")
    if score is None and counts is not None:
        score = counts[0] / counts[1]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise RecordError(f"steps_with_score[{index}]: 'score' must be a finite number.")
    return "+" if score > threshold else "-"


def checked_training(record: dict) -> dict:
    """A training record with nothing but its own keys; RecordError as `parse_training_record`.

    ``question_orig``, the question without the instructions that VisualPRM put around it, stays
    beside the conversation: `data_tools.decontaminate` compares it.
    """
    parsed = parse_training_record(record)
    result = {"id": -1 if record.get("id") is None else record["id"]}
    if parsed.images:
        result["image"] = parsed.images if len(parsed.images) > 1 else parsed.images[0]
    if parsed.dataset:
        result["dataset"] = parsed.dataset
    if isinstance(original := record.get("question_orig"), str):
        result["question_orig"] = original
    return {**result, "conversations": parsed.conversations}


def checked_meta(record: dict) -> dict:
    """A meta record with nothing but its own keys; RecordError as `parse_meta_record`."""
    parsed: MetaRecord = parse_meta_record(record)
    return {
        **checked_training(record),
        "true_false": parsed.true_false,
        "response": parsed.response,
    }


class Converted(NamedTuple):
    """What became of the records, for whoever ran the command.

    Attributes:
        writer: with the counts of records written and rejected.
        num_unlabelled: training records of which no step has a label.
        num_found: images that the rules of VisualPRM400K's archive found, by `ARCHIVE_RULES`.
    """

    writer: RecordWriter
    num_unlabelled: int
    num_found: Counter[int]

    def summary(self) -> str:
        parts = [self.writer.summary()]
        if self.num_unlabelled:
            parts.append(f"{self.num_unlabelled} without any label, of no use to training")
        names = ("images/… for VisualPRM400K…/…", "images/nlvr2/images/… for images/…")
        parts += [f"{self.num_found[i]} images found at {names[i]}" for i in sorted(self.num_found)]
        return ", ".join(parts)


def convert_files(
    inputs: list[Path],
    out: Path,
    convert: Callable[[dict], dict | list[dict]],
    *,
    name_dataset: bool,
    read: Callable[[Path, int | None], Iterable[tuple[str | Path, int, object]]] | None = None,
    image_root: Path | None = None,
    check_images: bool = True,
    overwrite: bool = False,
    limit: int | None = None,
) -> Converted:
    """Convert every record of ``inputs`` into the JSONL file ``out``, in order.

    Image paths start from ``image_root``, by default each input's own folder; they are written so
    that they start from ``out``'s folder, which is where `data_tools.shard` looks by default. The
    path in the record stays whole, unless the image lies where VisualPRM400K's archive has it
    (`find_image`). An image that is not there rejects its record.

    Args:
        convert: from a record to a training or meta record, or to several, of which the k-th
            without an id is named ``<file>:<line>.<k>``; it raises RecordError.
        name_dataset: a record without a ``dataset`` gets its file's name, less the extension.
        read: from an input and the limit to file, line and record, by default of JSON files.
        limit: the most records to read of each input.

    Raises:
        FileNotFoundError: an input is missing.
        InputError: two inputs would be the same data set, ``out`` is taken, or nothing converted.
    """
    names = [path.stem for path in inputs]
    if name_dataset and (twice := {name for name in names if names.count(name) > 1}):
        raise InputError(f"several inputs are named {min(twice)}; a data set needs its own name.")
    num_unlabelled = 0
    num_found: Counter[int] = Counter()
    with RecordWriter(out, overwrite, inputs) as writer:
        for path in inputs:
            root = path.parent if image_root is None else image_root
            prefix = image_prefix(root, out)
            for file, line, raw in (read or _read_json)(path, limit):
                try:
                    record = require_object(raw)
                    if name_dataset and not record.get("dataset"):
                        record["dataset"] = path.stem
                    converted = convert(record)
                    several = isinstance(converted, list)
                    made = converted if isinstance(converted, list) else [converted]
                    rules: list[int] = []
                    found = partial(_found, root, check_images, rules)
                    made = [map_images(one, found) for one in made]
                except RecordError as error:
                    writer.reject(file, line, raw, str(error))
                    continue
                num_found.update(rules)
                for k, one in enumerate(made, start=1):
                    place = f"{line}.{k}" if several else line
                    writer.write(with_prefix(with_source_id(one, file, place), prefix))
                    if "conversations" in one and "true_false" not in one:
                        num_unlabelled += not any(step_labels(one["conversations"]))
    return Converted(writer, num_unlabelled, num_found)


def _read_json(path: Path, limit: int | None) -> Iterable[tuple[Path, int, object]]:
    return ((path, line, record) for line, record in read_with_progress(path, limit))


def _found(root: Path, check: bool, rules: list[int], image: str) -> str:
    path, rule = find_image(image, root)
    if rule is not None:
        rules.append(rule)
    elif check and not os.path.isfile(root / path):
        raise RecordError(f"image {image!r}: not in {root}; correct the path or --image_root.")
    return path


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_tools.convert",
        description="Turn downloaded data files into records, as JSONL. What is not taken is "
        "listed in <out>.rejected.jsonl with file, line, id and reason.",
    )
    output = CommandParser(add_help=False)
    add_output(output)
    images = CommandParser(add_help=False)
    images.add_argument("inputs", type=Path, nargs="+", help="JSONL files or JSON lists")
    images.add_argument(
        "--image_root",
        type=Path,
        help="folder that image paths start from (default: each input's own folder)",
    )
    images.add_argument(
        "--no_image_check",
        action="store_true",
        help="take records whose image is not there (sharding rejects them)",
    )
    add_limit(images)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, *parents: CommandParser) -> CommandParser:
        return commands.add_parser(name, help=what, description=what, parents=[*parents, output])

    raw = command("raw", "raw VisualPRM400K, one file per data set, to training records", images)
    raw.add_argument("--threshold", type=float, default=0.0, help="+ above this score (default: 0)")
    raw.add_argument(
        "--stop_at_first_minus", action="store_true", help="end a solution at its first -"
    )
    command(
        "conversations",
        "VisualPRM conversations, one file per data set, to training records",
        images,
    )
    reference = command("reference", "train or meta JSON of the reference implementation", images)
    reference.add_argument("--kind", choices=("training", "meta"), required=True)
    stepwise_commands.add(command, images)
    mmmu = command("mmmu", "MMMU or MMMU-Pro, Parquet or a datasets folder, to questions")
    mmmu.add_argument("source", type=Path, help="a Parquet file, a folder of them, or save_to_disk")
    mmmu.add_argument("--split", help="validation, test, …; needed when the folder has several")
    add_limit(mmmu)
    mmmu.add_argument(
        "--image_dir", type=Path, help="folder for the images (default: <out>_images)"
    )
    candidates = command("candidates", "questions and their candidates to meta or test records")
    candidates.add_argument("questions", type=Path, help="what `mmmu` wrote")
    candidates.add_argument(
        "--candidates",
        type=Path,
        required=True,
        help='JSONL of {"id": question, "response": text, "true_false"?: bool}',
    )
    candidates.add_argument("--kind", choices=("meta", "test"), required=True)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    args = _parser().parse_args(argv)
    if args.command == "mmmu":
        writer = write_questions(
            args.source, args.out, args.split, args.image_dir, args.overwrite, args.limit
        )
        print(writer.summary())
    elif args.command == "candidates":
        writer, num_unparsed = join_candidates(
            args.questions, args.candidates, args.out, args.kind, args.overwrite
        )
        unparsed = f", {num_unparsed} candidates unparsed and so not right" if num_unparsed else ""
        print(writer.summary() + unparsed)
    elif args.command in stepwise_commands.NAMES:
        stepwise = stepwise_commands.Stepwise(args)
        converted = convert_files(
            args.inputs,
            args.out,
            stepwise.convert,
            name_dataset=args.command != "to_stepwise",
            read=stepwise.read,
            image_root=args.image_root,
            check_images=not args.no_image_check,
            overwrite=args.overwrite,
            limit=args.limit,
        )
        print(converted.summary() + stepwise.said())
    else:
        convert: Callable[[dict], dict] = checked_training
        if args.command == "raw":
            convert = partial(
                convert_raw,
                threshold=args.threshold,
                stop_at_first_minus=args.stop_at_first_minus,
            )
        elif args.command == "reference" and args.kind == "meta":
            convert = checked_meta
        converted = convert_files(
            args.inputs,
            args.out,
            convert,
            name_dataset=args.command != "reference",
            image_root=args.image_root,
            check_images=not args.no_image_check,
            overwrite=args.overwrite,
            limit=args.limit,
        )
        print(converted.summary())


if __name__ == "__main__":
    run(main)
