"""Candidate solutions for questions, from any server that speaks OpenAI's chat completions.

    python -m data_tools.generate questions.jsonl --out candidates.jsonl --n 8 \\
        --base_url http://localhost:8000/v1 --model NAME

A key, where the server wants one, comes from the environment variable OPENAI_API_KEY and is written
nowhere. Each candidate is one request. What has come is kept in ``<out>.partial`` at once; the same
command again asks for the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from data_tools.candidate_requests import (
    KEY_VARIABLE,
    CandidateRequests,
    Sampling,
    candidate_requests,
    connect,
)
from data_tools.journal import Journal
from data_tools.record_files import RecordWriter, add_limit, add_output
from dreamprm_dist.errors import INTERRUPTED, InputError
from dreamprm_dist.files import refuse_overwriting
from dreamprm_dist.flags import CommandParser, run

EMPTY = ("keep", "reject")


def unfinished(out: Path) -> Path:
    """Where candidates are kept until all have come."""
    return out.with_name(f"{out.name}.partial")


def generate_file(
    questions: Path,
    out: Path,
    sampling: Sampling,
    *,
    n: int,
    base_url: str,
    concurrency: int = 16,
    retries: int = 6,
    timeout: float = 600.0,
    image_root: Path | None = None,
    limit: int | None = None,
    empty: str = "keep",
    allow_missing: bool = False,
    overwrite: bool = False,
) -> RecordWriter:
    """Write n candidates of each question: ``{"id", "response", "sample", …}``, in order.

    Questions that cannot be asked and candidates that the server refuses are listed in
    ``<out>.rejected.jsonl``, and with ``allow_missing`` those that did not come.

    Args:
        empty: what becomes of replies without text: keep them, or reject them.
        limit: ask no more than so many questions, the first ones.
        retries: of a request, with growing pauses, after 429, 5xx, a broken connection or silence.
        timeout: seconds of silence after which a request is given up.
        image_root: where image paths start, by default the questions' own folder.

    Raises:
        FileNotFoundError: no such file.
        InputError: ``out`` is taken, the server cannot be used, or candidates did not come; what
            has come is kept.
    """
    for name, value in {"--n": n, "--concurrency": concurrency}.items():
        if value < 1:
            raise InputError(f"{name} must be 1 or more, not {value}.")
    root = questions.parent if image_root is None else image_root
    partial = unfinished(out)
    refuse_overwriting([partial], [questions])
    writer = RecordWriter(out, overwrite, [questions])
    requests, no_questions = candidate_requests(questions, n, limit)
    keys = {request.key for request in requests}
    with closing(Journal(partial, keys, asdict(sampling))) as journal:
        client = connect(base_url, timeout, retries)
        asked = CandidateRequests(client, sampling, root, journal)
        asked.ask_all(requests, concurrency)
        if asked.failed and not allow_missing:
            raise InputError(
                f"{len(asked.failed)} of {len(requests)} candidates did not come, the first "
                f"because: {asked.failed[0][1]}. The others are kept: run again, or with "
                "--allow_missing."
            )
        with writer:
            for line, record, reason in no_questions:
                writer.reject(questions, line, record, reason)
            without_text = []
            for request in requests:
                if row := journal.rows.get(request.key):
                    if "empty" in row and empty == "reject":
                        without_text.append((request, row["empty"]))
                    else:
                        writer.write(row)
            for request, reason in sorted(asked.rejected + asked.failed + without_text):
                reason = f"candidate {request.sample}: {reason}"
                writer.reject(questions, request.line, {"id": request.id}, reason)
        partial.unlink()
    return writer


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = CommandParser(
        prog="python -m data_tools.generate",
        description="Ask a server that speaks OpenAI's chat completions for candidate solutions. "
        f"Its key comes from {KEY_VARIABLE}. The same command again goes on where it was.",
    )
    add = parser.add_argument
    add("questions", type=Path, help="what `data_tools.convert mmmu` wrote")
    add("--base_url", required=True, help="of the server, such as http://localhost:8000/v1")
    add("--model", required=True, help="what the server calls the model")
    add("--n", type=int, default=8, help="candidates per question (default: 8)")
    add("--temperature", type=float, default=0.7, help="0: the likeliest token (default: 0.7)")
    add("--max_tokens", type=int, default=2048, help="longest candidate (default: 2048)")
    add("--concurrency", type=int, default=16, help="requests at a time (default: 16)")
    add("--retries", type=int, default=6, help="times a failed request is sent again (default: 6)")
    add("--timeout", type=float, default=600.0, help="seconds to wait for an answer (default: 600)")
    add("--image_root", type=Path, help="where image paths start (default: the file's folder)")
    prices = "of a million tokens read and a million written, to print the cost"
    add("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help=prices)
    add_limit(parser)
    add(
        "--empty",
        choices=EMPTY,
        default=EMPTY[0],
        help="a reply without text, cut while the model thought or filtered, is kept as an empty "
        "candidate, which is a wrong one, or rejected, which makes the others look better than "
        "the model is (default: keep)",
    )
    add("--allow_missing", action="store_true", help="write out although candidates did not come")
    add_output(parser)
    args = parser.parse_args(argv)
    try:
        writer = generate_file(
            args.questions,
            args.out,
            Sampling(args.model, args.temperature, args.max_tokens),
            n=args.n,
            base_url=args.base_url,
            concurrency=args.concurrency,
            retries=args.retries,
            timeout=args.timeout,
            image_root=args.image_root,
            limit=args.limit,
            empty=args.empty,
            allow_missing=args.allow_missing,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        kept = unfinished(args.out)
        sys.stderr.write(f"stopped; what has come is in {kept}: the same command goes on from it\n")
        sys.exit(INTERRUPTED)
    print(_summary(writer, args))


def _summary(writer: RecordWriter, args: argparse.Namespace) -> str:
    tokens, cut, empty = [0, 0], 0, []
    with args.out.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            tokens[0] += row["prompt_tokens"]
            tokens[1] += row["completion_tokens"]
            cut += row["finish_reason"] == "length"
            empty += [row["empty"]] if "empty" in row else []
    used = f"candidates, {tokens[0]:,} + {tokens[1]:,} tokens"
    if args.prices:
        used += f", cost {sum(t * p for t, p in zip(tokens, args.prices, strict=True)) / 1e6:.2f}"
    if cut:
        used += f", {cut} of them cut at --max_tokens {args.max_tokens}"
    if empty:
        used += f", {len(empty)} of them empty (the first: {empty[0]})"
    return writer.summary(used)


if __name__ == "__main__":
    run(main)
