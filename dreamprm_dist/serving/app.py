"""Routes of the service: the page, `POST /v1/score` for programs, `GET /health`.

Requests are scored one after another on a thread of their own, each of them one batch, while the
service goes on taking others. Whatever cannot be scored is answered with a status from 400 on and
`{"error": …}`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import re
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamprm_dist.api import PRM
from dreamprm_dist.data.images import MAX_IMAGE_BYTES
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.aggregation import AGGREGATIONS

PAGE = Path(__file__).with_name("page.html")
_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,")


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and of how many may wait.

    Attributes:
        body_bytes: of a request's body.
        candidates: of one question.
        images: of one question.
        characters: of the question and all candidates together.
        waiting: requests that wait or are being scored; one more is told to come again (503).
    """

    body_bytes: int = MAX_IMAGE_BYTES
    candidates: int = 64
    images: int = 8
    characters: int = 200_000
    waiting: int = 1024


class ScoreRequest(BaseModel):
    """A question and what is to be scored."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(min_length=1, description="With its options where it has any.")
    candidates: list[str | list[str] | None] = Field(
        min_length=1,
        description="Solutions: a text, split at blank lines, numbered lines and `Answer:`, "
        "or the list of its steps; null is an empty text.",
    )
    images: list[str] = Field([], description="Image files in base64, or data URLs.")
    aggregation: str = Field(
        "mean",
        description=f"How step scores become a candidate's score: {', '.join(AGGREGATIONS)}.",
    )


class ScoreResponse(BaseModel):
    """The scores, and the best candidate."""

    best: int | None = Field(description="Index of the candidate with the highest score.")
    scores: list[float | None] = Field(description="Of each candidate, in [0, 1].")
    steps: list[list[str]] = Field(description="Of each candidate, the texts of its steps.")
    step_scores: list[list[float] | None] = Field(description="Of each candidate, of each step.")
    errors: list[str | None] = Field(
        description="Of each candidate, why it has no score: it is empty or too long."
    )


class BodyLimit:
    """Middleware that reads no more than `most` bytes of a request's body."""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                most = f"{self._most / 2**20:g} MiB"
                raise HTTPException(413, f"the request is larger than {most}; make it smaller")
            return message

        await self._app(scope, counted, send)


def create_app(prm: PRM, name: str, limits: Limits | None = None) -> FastAPI:
    """The service.

    Args:
        prm: loaded, on its device.
        name: what the page and `/health` call it.
    """
    limits = limits or Limits()
    app = FastAPI(title="dreamprm_dist", description="Scores solutions step by step.")
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    one_at_a_time = CapacityLimiter(1)
    waiting = 0
    page, policy = _page(name)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return JSONResponse({"error": f"{place}: {first['msg']}"}, 422)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict:
        """Whether the service is up, and how many requests wait."""
        device = str(prm.module.model.device)
        return {"status": "ok", "model": name, "device": device, "waiting": waiting}

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        """Score each step of each candidate, and choose the best candidate."""
        nonlocal waiting
        _check(request, limits)
        images = [_decoded(i, text) for i, text in enumerate(request.images)]
        if waiting >= limits.waiting:
            raise HTTPException(
                503, "too many requests are waiting; try again", {"Retry-After": "5"}
            )
        waiting += 1
        try:
            best = await to_thread.run_sync(
                lambda: prm.best_of_n(
                    images,
                    request.question,
                    [candidate or "" for candidate in request.candidates],
                    request.aggregation,
                ),
                limiter=one_at_a_time,
            )
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            waiting -= 1
        return ScoreResponse(
            best=best.index,
            scores=best.scores,
            steps=best.steps,
            step_scores=best.step_scores,
            errors=best.errors,
        )

    return app


def _page(name: str) -> tuple[str, str]:
    """The page, and a policy that lets its own script and style run and nothing else."""
    options = "".join(f"<option>{aggregation}</option>" for aggregation in AGGREGATIONS)
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("$name", html.escape(name)).replace("$aggregations", options)

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
    return page, policy + "img-src data:; connect-src 'self'; base-uri 'none'"


def _check(request: ScoreRequest, limits: Limits) -> None:
    for what in ("candidates", "images"):
        count, most = len(getattr(request, what)), getattr(limits, what)
        if count > most:
            raise HTTPException(422, f"{what}: there are {count}; at most {most} are taken at once")
    texts = ["".join(candidate or "") for candidate in request.candidates]
    characters = len(request.question) + sum(map(len, texts))
    if characters > limits.characters:
        raise HTTPException(
            422,
            f"question and candidates have {characters} characters, more than "
            f"{limits.characters}; shorten them",
        )


def _decoded(index: int, text: str) -> bytes:
    match = _DATA_URL.match(text)
    try:
        return base64.b64decode(text[match.end() if match else 0 :], validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"images.{index}: not base64; send the encoded image file"
        raise HTTPException(422, message) from error
