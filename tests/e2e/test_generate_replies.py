"""Candidates from a server that answers, but without text, or with an error for an answer."""

import pytest
from chat_server import KEY
from json_lines import lines

from data_tools.candidate_requests import FAILURES_IN_A_ROW
from data_tools.generate import main
from dreamprm_dist.errors import InputError


def reply(content: str | None, reason: str) -> dict:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "finish_reason": reason, "message": message}]}


CUT = "the reply was cut at --max_tokens 2048 before any text came (finish_reason length); raise"


@pytest.mark.parametrize(
    ("empty", "said"),
    [
        (reply(None, "length"), CUT),
        (reply("", "stop"), "the reply has no text"),
        (reply(None, "content_filter"), "a content filter"),
        (reply("", "tool_calls"), "finish_reason tool_calls"),
        ({"choices": []}, "no choices"),
    ],
)
def test_a_server_that_answers_without_text_is_not_down(
    server, command, tmp_path, capsys, empty, said
):
    server.misbehave = lambda body, number: None if "Question 5:" in str(body) else empty
    n = FAILURES_IN_A_ROW // 4  # 25 empty ones, and one question with candidates
    main([*command, "--n", str(n)])
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert [bool(row["response"]) for row in rows] == [False] * 5 * n + [True] * n
    assert all(said in row["empty"] for row in rows[: 5 * n])
    assert len(server.requests) == 6 * n  # none is asked for twice
    assert f"{5 * n} of them empty (the first: {rows[0]['empty']})" in capsys.readouterr().out
    main([*command, "--n", str(n), "--overwrite", "--empty", "reject"])
    assert [row["id"] for row in lines(tmp_path / "out" / "candidates.jsonl")] == ["q5"] * n
    rejected = lines(tmp_path / "out" / "candidates.rejected.jsonl")
    assert len(rejected) == 5 * n and f"candidate 0: {rows[0]['empty']}" == rejected[0]["reason"]


def test_an_empty_reply_is_not_asked_for_again(server, command, tmp_path):
    def misbehave(body, number):
        if "Question 2:" in str(body):
            return reply(None, "length")
        return 500 if "Question 4:" in str(body) else None

    server.misbehave = misbehave
    with pytest.raises(InputError, match="3 of 18 candidates did not come"):
        main([*command, "--retries", "1"])
    server.misbehave = lambda body, number: None
    before = len(server.requests)
    main(command)
    assert len(server.requests) == before + 3
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert [row["id"] for row in rows if not row["response"]] == ["q2"] * 3


def test_errors_in_replies_are_told_and_do_not_end_the_run(server, command, tmp_path):
    error = {"error": {"message": f"no: {KEY}", "code": 502}}
    server.misbehave = lambda body, number: None if "Question 5:" in str(body) else error
    many = [*command, "--n", "10"]
    with pytest.raises(InputError, match=r"50 of 60 candidates did not come.*the server says: no"):
        main(many)
    assert len(server.answered) == 10
    main([*many, "--allow_missing"])
    rejected = (tmp_path / "out" / "candidates.rejected.jsonl").read_text()
    assert rejected.count("the server says: no: ***") == 50 and KEY not in rejected


def test_text_that_was_cut_is_a_candidate_and_counted(server, command, tmp_path, capsys):
    cut = reply("Half a thou", "length")
    server.misbehave = lambda body, number: cut if "Question 3:" in str(body) else None
    main([*command, "--max_tokens", "9"])
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert [r["response"] for r in rows if r["finish_reason"] == "length"] == ["Half a thou"] * 3
    assert "3 of them cut at --max_tokens 9, 0 rejected" in capsys.readouterr().out
