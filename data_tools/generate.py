"""Candidate solutions for questions, from any server that speaks OpenAI's chat completions.

    python -m data_tools.generate questions.jsonl --out candidates.jsonl --n 8 \\
        --base_url http://localhost:8000/v1 --model NAME

A key, where the server wants one, comes from the environment variable OPENAI_API_KEY and is written
nowhere. Each candidate is one request. What has come is kept in ``<out>.partial`` at once; the same
command again asks for the others.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

try:
    from openai import (
        APIStatusError,
        AsyncOpenAI,
        AuthenticationError,
        NotFoundError,
        OpenAIError,
        PermissionDeniedError,
    )
except ModuleNotFoundError:
    sys.exit("error: the openai client is not installed; pip install -e .[generate]")

from data_tools.journal import Journal
from data_tools.record_files import RecordWriter, add_output
from data_tools.reencode import shard_image
from dreamprm_dist.data.schema import parse_test_record, read_json_records, require_object
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import run

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionContentPartParam

PROMPT = """\
Solve the problem below, step by step. First write [Reasoning] and your reasoning, with a blank \
line between its steps. Then, after a blank line, write one last line "Answer: X", where X is the \
letter of the right option, or the final answer alone where there are no options.

"""
KEY_VARIABLE = "OPENAI_API_KEY"
FAILURES_IN_A_ROW = 20  # after which the server is taken to be down
# The next request would not be answered either; and this very one would never be.
_HOPELESS_SERVER = (AuthenticationError, PermissionDeniedError, NotFoundError)
_HOPELESS_REQUEST = (400, 413, 422)


@dataclass(frozen=True)
class Sampling:
    """Sampling of candidates, the same for all of a file.

    Attributes:
        model: the server's name of the model.
        temperature: 0 takes the likeliest token.
        max_tokens: length of the longest candidate in tokens.
    """

    model: str
    temperature: float
    max_tokens: int


class CandidateRequest(NamedTuple):
    """Sample number ``sample`` of the question at a line of its file."""

    line: int
    id: str
    sample: int
    question: str
    images: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        """The key of its answer in the journal."""
        return self.id, self.sample


def candidate_requests(questions: Path, n: int) -> tuple[list[CandidateRequest], list[tuple]]:
    """The requests, n per question, and (line, record, reason) of each record that is no question.

    Raises:
        FileNotFoundError: no such file.
    """
    requests: list[CandidateRequest] = []
    rejected: list[tuple] = []
    seen: set[str] = set()
    for line, raw in read_json_records(questions):
        try:
            no_candidates = {"candidates": [""], "true_false": [False]}
            record = parse_test_record(no_candidates | require_object(raw))
            if not record.id or record.id in seen:
                raise RecordError("every question needs an 'id' of its own.")
        except RecordError as error:
            rejected.append((line, raw, str(error)))
            continue
        seen.add(record.id)
        images = tuple(record.images)
        requests += [
            CandidateRequest(line, record.id, sample, record.question, images)
            for sample in range(n)
        ]
    return requests, rejected


class CandidateRequests:
    """The requests of one run, some of them at a time.

    Attributes:
        rejected: candidates that this server will never give, with the reason.
        failed: candidates that did not come, however often they were asked for.
    """

    def __init__(
        self, client: AsyncOpenAI, sampling: Sampling, image_root: Path, journal: Journal
    ) -> None:
        self.client, self.sampling, self.journal = client, sampling, journal
        self.image_root = image_root
        self.rejected: list[tuple[CandidateRequest, str]] = []
        self.failed: list[tuple[CandidateRequest, str]] = []
        self._failures_in_a_row = 0

    async def ask_all(self, requests: list[CandidateRequest], concurrency: int) -> None:
        """Ask for what the journal lacks.

        Raises:
            InputError: the server is down, or refuses whatever it is asked.
        """
        missing = [request for request in requests if request.key not in self.journal.rows]
        todo = iter(missing)
        done = len(requests) - len(missing)
        bar = tqdm(total=len(requests), initial=done, unit="candidate", disable=None)

        async def work() -> None:
            for request in todo:
                await self._ask(request)
                bar.update()

        with bar:
            async with self.client:
                tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

    async def _ask(self, request: CandidateRequest) -> None:
        try:
            answer = await self._answer(request)
        except RecordError as error:
            self.rejected.append((request, str(error)))
        except _HOPELESS_SERVER as error:
            raise InputError(
                f"the server refuses ({_shown(error)}); check --model, --base_url and "
                f"{KEY_VARIABLE}. What has come is kept: run again."
            ) from None
        except (OpenAIError, ValueError) as error:
            status = error.status_code if isinstance(error, APIStatusError) else None
            if status in _HOPELESS_REQUEST:
                self.rejected.append((request, _shown(error)))
                return
            self.failed.append((request, _shown(error)))
            self._failures_in_a_row += 1
            if self._failures_in_a_row == FAILURES_IN_A_ROW:
                raise InputError(
                    f"{FAILURES_IN_A_ROW} requests in a row have failed, the last one: "
                    f"{_shown(error)}. What has come is kept: run again when the server is up."
                ) from None
        else:
            self._failures_in_a_row = 0
            self.journal.add(
                {"id": request.id, "sample": request.sample, **answer, **asdict(self.sampling)}
            )

    async def _answer(self, request: CandidateRequest) -> dict:
        parts: list[ChatCompletionContentPartParam] = [
            {"type": "image_url", "image_url": {"url": _data_url(self.image_root / path, path)}}
            for path in request.images
        ]
        parts.append({"type": "text", "text": PROMPT + request.question})
        response = await self.client.chat.completions.create(
            messages=[{"role": "user", "content": parts}], **asdict(self.sampling)
        )
        try:  # the client does not check what a server answers
            choice, usage = response.choices[0], response.usage
            answer = {
                "response": choice.message.content,
                "finish_reason": choice.finish_reason,
                "prompt_tokens": int(usage.prompt_tokens) if usage else 0,
                "completion_tokens": int(usage.completion_tokens) if usage else 0,
            }
        except (AttributeError, IndexError, TypeError) as error:
            raise InputError("the answer is no chat completion") from error
        if not isinstance(answer["response"], str) or not answer["response"].strip():
            raise InputError("the answer has no text")
        return answer


@lru_cache(maxsize=32)  # all samples of a question send its images
def _data_url(path: Path, shown: str) -> str:
    data, _ = shard_image(path, shown)
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _shown(error: Exception) -> str:
    """An error in one line, without the key that a server may have sent back."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    key = os.environ.get(KEY_VARIABLE)
    return (text.replace(key, "***") if key else text)[:300]


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
    allow_missing: bool = False,
    overwrite: bool = False,
) -> RecordWriter:
    """Write n candidates of each question: ``{"id", "response", "sample", …}``, in order.

    Questions that cannot be asked and candidates that the server refuses are listed in
    ``<out>.rejected.jsonl``, and with ``allow_missing`` those that did not come.

    Args:
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
    writer = RecordWriter(out, overwrite)
    requests, no_questions = candidate_requests(questions, n)
    keys = {request.key for request in requests}
    partial = out.with_name(f"{out.name}.partial")
    with closing(Journal(partial, keys, asdict(sampling))) as journal:
        client = AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",  # a server of one's own wants none
            timeout=timeout,
            max_retries=retries,
        )
        asked = CandidateRequests(client, sampling, root, journal)
        asyncio.run(asked.ask_all(requests, concurrency))
        if asked.failed and not allow_missing:
            raise InputError(
                f"{len(asked.failed)} of {len(requests)} candidates did not come, the first "
                f"because: {asked.failed[0][1]}. The others are kept: run again, or with "
                "--allow_missing."
            )
        with writer:
            for line, record, reason in no_questions:
                writer.reject(questions, line, record, reason)
            for request in requests:
                if request.key in journal.rows:
                    writer.write(journal.rows[request.key])
            for request, reason in sorted(asked.rejected + asked.failed):
                reason = f"candidate {request.sample}: {reason}"
                writer.reject(questions, request.line, {"id": request.id}, reason)
        partial.unlink()
    return writer


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
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
    add("--allow_missing", action="store_true", help="write out although candidates did not come")
    add_output(parser)
    args = parser.parse_args(argv)
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
        allow_missing=args.allow_missing,
        overwrite=args.overwrite,
    )
    tokens = [0, 0]
    with args.out.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            tokens[0] += row["prompt_tokens"]
            tokens[1] += row["completion_tokens"]
    used = f"candidates, {tokens[0]:,} + {tokens[1]:,} tokens"
    if args.prices:
        used += f", cost {sum(t * p for t, p in zip(tokens, args.prices, strict=True)) / 1e6:.2f}"
    print(writer.summary(used))


if __name__ == "__main__":
    run(main)
