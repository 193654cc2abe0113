"""What is wrong with a request, in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

PROBLEMS = {
    "missing": "is missing",
    "extra_forbidden": "is no field of a request; /docs lists them",
    "string_type": "must be a text, not {kind}",
    "list_type": "must be a list, not {kind}",
    "too_short": "is empty",
    "string_too_short": "is empty",
    "string_unicode": "holds half a surrogate pair; write it as valid Unicode",
}
# What FastAPI and Starlette say themselves.
REFUSALS = {
    400: "the body is not JSON: it is not UTF-8 text, or nested too deeply",
    404: "there is no such address; /docs lists them",
    405: "this address does not take this method; /docs lists them",
}
KINDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object", bytes: "bytes"}


def sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """Say what pydantic found first, `RequestValidationError.errors()`."""
    error = errors[0]
    place, given = error["loc"][1:], error.get("input")
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}, at character {place[0]}"
    if not place:
        # Without that header the body arrives as bytes.
        hint = "; send it with `Content-Type: application/json`" if isinstance(given, bytes) else ""
        return f"the body must be a JSON object, not {_kind(given)}{hint}"
    # Of a candidate that is neither a text nor a list of texts both are said to be wrong.
    found = [e for e in errors if e["loc"][:3] == error["loc"][:3]]
    deepest = max(found, key=lambda e: len(e["loc"]))
    if len(deepest["loc"]) > len(error["loc"]):
        error, place = deepest, deepest["loc"][1:]
        problem = PROBLEMS.get(error["type"], error["msg"])
    elif len({e["type"] for e in found} & {"string_type", "list_type"}) == 2:
        problem = "must be a text or the list of its steps, not {kind}"
    else:
        problem = PROBLEMS.get(error["type"], error["msg"])
    # The name of a union's member is no part of the place.
    name = str(place[0])[:80] + "".join(f"[{part}]" for part in place[1:] if isinstance(part, int))
    return f"{name} {problem.replace('{kind}', _kind(error.get('input')))}"


def _kind(value: object) -> str:
    return "null" if value is None else KINDS.get(type(value), "a number")
