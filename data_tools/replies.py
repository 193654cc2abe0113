"""What a server's reply to the request for one candidate says."""

from __future__ import annotations

import json

from dreamprm_dist.errors import InputError

_TEXT_PARTS = ("text", "output_text")


class ErrorReply(InputError):
    """An error that the server sent as if all were well."""


def read_reply(text: str, max_tokens: int) -> dict:
    """A chat completion as a candidate: one without text is empty, and ``empty`` says why.

    Args:
        text: the reply's body, of which nothing was checked.
        max_tokens: that were asked for.

    Returns:
        ``response``, ``finish_reason``, ``prompt_tokens`` and ``completion_tokens``.

    Raises:
        ErrorReply: the reply is an error.
        InputError: it is no chat completion.
    """
    try:
        reply = json.loads(text)
        _refuse_error(reply if reply.get("object") == "error" else reply.get("error"))
        choices, usage = reply["choices"], reply.get("usage") or {}
        choice = choices[0] if choices else {}
        _refuse_error(choice.get("error"))
        if "message" not in choice and choice.keys() & {"text", "delta"}:
            raise InputError("the answer is no chat completion, but one of another kind")
        message = choice.get("message") or {}
        response = _joined(message.get("content"))
        answer = {
            "response": response if response.strip() else "",
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "completion_tokens": int(usage.get("completion_tokens") or 0),
        }
        if not answer["response"]:
            answer["empty"] = _why_empty(choice, message, max_tokens)
    except InputError:
        raise
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError("the answer is no chat completion") from error
    return answer


def _refuse_error(error: object) -> None:
    if error:
        what = error.get("message", error) if isinstance(error, dict) else error
        raise ErrorReply(f"the server says: {what}")


def _joined(content: str | list[dict] | None) -> str:
    """The text of a message, which some servers cut into parts."""
    if isinstance(content, list):
        texts = (part for part in content if part.get("type", "text") in _TEXT_PARTS)
        return "".join(part["text"] or "" for part in texts)
    return "" + (content or "")  # a TypeError for what is no text


def _why_empty(choice: dict, message: dict, max_tokens: int) -> str:
    reason = choice.get("finish_reason")
    if not choice:
        return "the reply has no choices"
    if reason == "length":
        return (
            f"the reply was cut at --max_tokens {max_tokens} before any text came (finish_reason "
            "length); raise --max_tokens"
        )
    if reason == "content_filter":
        why = "a content filter kept the text back"
    elif message.get("refusal"):
        why = f"the model refused: {str(message['refusal'])[:200]}"
    elif message.get("tool_calls") or message.get("function_call"):
        why = "the reply calls a tool and has no text"
    elif message.get("reasoning_content") or message.get("reasoning"):
        why = "the reply holds reasoning and no text"
    else:
        why = "the reply has no text"
    return f"{why} (finish_reason {reason})"
