"""Routes of the service: the page, `POST /v1/score` for programs, `GET /health`, `GET /docs`.

Requests are scored one after another on a thread of their own, each of them one batch, while the
service goes on taking others. Whatever cannot be scored is answered with a status from 400 on and
`{"error": …}`.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamprm_dist.api import PRM
from dreamprm_dist.data.images import MAX_IMAGE_BYTES
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.serving.docs import docs_page
from dreamprm_dist.serving.pages import page_response
from dreamprm_dist.serving.requests import REFUSALS, sentence

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

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "question": "Is 7 even?",
                "candidates": ["7 is odd.\n\nAnswer: no", ["7 is even.", "Answer: yes"]],
                "images": [],
            }
        },
    )

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


class Refusal(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="One sentence.")


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
    # FastAPI's own documentation loads its scripts from elsewhere.
    app = FastAPI(
        title="dreamprm_dist",
        description="Scores solutions step by step.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    one_at_a_time = CapacityLimiter(1)
    waiting = 0
    options = "".join(f"<option>{aggregation}</option>" for aggregation in AGGREGATIONS)
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("$name", html.escape(name)).replace("$aggregations", options)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        message = REFUSALS.get(error.status_code, error.detail)
        return JSONResponse({"error": message}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": sentence(error.errors())}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        message = "the service failed at this request; its log says how"
        return JSONResponse({"error": message}, 500)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return page_response(page)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return page_response(docs_page(app.openapi(), str(request.base_url)))

    @app.get("/health")
    async def health() -> dict:
        """Whether the service is up, and how many requests wait."""
        device = str(prm.module.model.device)
        return {"status": "ok", "model": name, "device": device, "waiting": waiting}

    @app.post("/v1/score", responses={code: {"model": Refusal} for code in (413, 422, 503)})
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
    encoded = "".join(text[match.end() if match else 0 :].split())  # `base64` breaks its lines
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"images[{index}]: not base64; send the encoded image file"
        raise HTTPException(422, message) from error
