"""What a server's reply is: a candidate, an empty one with the reason, an error, or no reply."""

import json

import pytest

from data_tools.replies import ErrorReply, read_reply
from dreamprm_dist.errors import InputError


def read(message: object, reason: object = "stop", **more: object) -> dict:
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return read_reply(json.dumps({"choices": [choice], **more}), max_tokens=64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Answer: B", "Answer: B"),
        ("  Answer: B\n", "  Answer: B\n"),
        ("0", "0"),
        ("<think>never ended", "<think>never ended"),
        ([{"type": "text", "text": "Answer"}, {"type": "text", "text": ": B"}], "Answer: B"),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "B"}], "B"),
        ([{"type": "output_text", "text": "B"}], "B"),
        ([{"text": "B"}, {"type": "text", "text": None}], "B"),
    ],
)
@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_text_is_a_candidate_however_it_ended(content: object, text: str, reason: str):
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    message = {"role": "assistant", "content": content, "reasoning_content": "Let me see"}
    assert read(message, reason, usage=usage) == {
        "response": text,
        "finish_reason": reason,
        **usage,
    }


@pytest.mark.parametrize(
    ("message", "reason", "why"),
    [
        ({"content": None}, "length", "cut at --max_tokens 64 before any text came (finish_reason"),
        ({"content": ""}, "length", "raise --max_tokens"),
        ({"content": None, "reasoning": "Hm"}, "length", "raise --max_tokens"),
        ({"content": [{"type": "thinking", "thinking": "Hm"}]}, "length", "raise --max_tokens"),
        ({"content": None}, "content_filter", "a content filter kept the text back"),
        ({}, "content_filter", "(finish_reason content_filter)"),
        (None, "content_filter", "a content filter"),
        ({"content": None, "refusal": "I cannot."}, "stop", "the model refused: I cannot. (finish"),
        (
            {"content": "", "tool_calls": [{"id": "1"}]},
            "tool_calls",
            "calls a tool and has no text",
        ),
        ({"content": None, "function_call": {"name": "f"}}, "function_call", "calls a tool"),
        ({"content": "", "reasoning_content": "Hm"}, "stop", "holds reasoning and no text (finish"),
        ({"content": None, "reasoning": "Hm"}, "stop", "holds reasoning and no text"),
        ({"content": " \n "}, "stop", "the reply has no text (finish_reason stop)"),
        ({"content": []}, None, "the reply has no text (finish_reason None)"),
    ],
)
def test_a_reply_without_text_says_why(message: object, reason: object, why: str):
    reply = read(message, reason)
    assert reply["response"] == "" and why in reply["empty"]
    assert reply["finish_reason"] == reason


@pytest.mark.parametrize("choices", [[], None])
def test_a_reply_without_choices_is_empty(choices: object):
    reply = read_reply(json.dumps({"choices": choices, "usage": None}), 64)
    assert (reply["response"], reply["empty"]) == ("", "the reply has no choices")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"message": "Provider returned error", "code": 502}, "the server says: Provider returned"),
        ({"code": 13}, "the server says: {'code': 13}"),
        ("overloaded", "the server says: overloaded"),
        (["a", "b"], "the server says: ['a', 'b']"),
        (True, "the server says: True"),
    ],
)
def test_an_error_that_came_as_a_reply_is_said(error: object, said: str):
    for more in ({}, {"choices": []}, {"choices": None}, {"choices": [{"message": None}]}):
        with pytest.raises(ErrorReply) as raised:
            read_reply(json.dumps({"error": error, **more}), 64)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    "reply",
    [
        {"object": "error", "message": "too long", "code": 400},
        {"choices": [{"message": {"content": ""}, "error": {"message": "too long"}}]},
        {"choices": [{"finish_reason": "error", "error": "too long"}]},
    ],
)
def test_errors_in_other_places_are_said(reply: dict):
    with pytest.raises(ErrorReply, match="the server says: too long"):
        read_reply(json.dumps(reply), 64)


@pytest.mark.parametrize(
    "text",
    [
        '{"choices": [{"text": "Answer: B"}]}',  # the other kinds of completions
        '{"choices": [{"delta": {"content": "B"}}]}',
        *("", "<html>", "[]", "null", '"text"', "{}", '{"error": null}', "[" * 100_000),
        *('{"choices": "abc"}', '{"choices": [null]}', '{"choices": [{"message": "text"}]}'),
        *('{"choices": [{"message": {"content": 1}}]}', '{"choices": {"a": 1}}'),
        '{"choices": [{"message": {"content": ["a", 1]}}]}',
        '{"choices": [{"message": {"content": "a"}}], "usage": "many"}',
        '{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}',
    ],
)
def test_what_is_no_chat_completion_is_refused(text: str):
    with pytest.raises(InputError, match="no chat completion") as raised:
        read_reply(text, 64)
    assert not isinstance(raised.value, ErrorReply)
