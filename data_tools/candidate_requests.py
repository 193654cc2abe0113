"""Requests for candidates: made from questions, some of them under way at a time."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
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
from data_tools.reencode import shard_image
from data_tools.replies import ErrorReply, read_reply
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import parse_question_record
from dreamprm_dist.errors import InputError, RecordError

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


def candidate_requests(
    questions: Path, n: int, limit: int | None = None
) -> tuple[list[CandidateRequest], list[tuple]]:
    """The requests, n per question, and (line, record, reason) of each record that is no question.

    Args:
        limit: read no more than so many records, the first ones.

    Raises:
        FileNotFoundError: no such file.
    """
    requests: list[CandidateRequest] = []
    rejected: list[tuple] = []
    seen: set[str] = set()
    for line, raw in islice(read_json_records(questions), limit):
        try:
            record = parse_question_record(raw)
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


def connect(base_url: str, timeout: float, retries: int) -> AsyncOpenAI:
    """A client of the server, with the key from the environment."""
    return AsyncOpenAI(
        base_url=base_url,
        api_key=os.environ.get(KEY_VARIABLE) or "none",  # a server of one's own wants none
        timeout=timeout,
        max_retries=retries,
    )


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

    def ask_all(self, requests: list[CandidateRequest], concurrency: int) -> None:
        """Ask for what the journal lacks.

        Raises:
            InputError: the server is down, or refuses whatever it is asked.
            KeyboardInterrupt: after Ctrl-C, of which only the main thread hears.
        """
        try:
            asyncio.run(self._ask_all(requests, concurrency))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    async def _ask_all(self, requests: list[CandidateRequest], concurrency: int) -> None:
        this = asyncio.current_task()
        assert this is not None
        # Between two steps of the loop: asyncio's own handler cancels in the midst of one, which
        # then may fail.
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, this.cancel)
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
        except ErrorReply as error:  # of this request: the server is up
            self._failures_in_a_row = 0
            self.failed.append((request, _shown(error)))
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
        # Raw: the client does not check what a server answers.
        response = await self.client.chat.completions.with_raw_response.create(
            messages=[{"role": "user", "content": parts}], **asdict(self.sampling)
        )
        return read_reply(response.text, self.sampling.max_tokens)


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
