"""Candidates from servers that speak chat completions: one that fails in every way, a real one."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
from chat_server import EXPECTED, KEY, check_all_there
from json_lines import lines
from started_run import free_port
from transformers import Qwen2Config, Qwen2ForCausalLM

from data_tools.candidate_requests import FAILURES_IN_A_ROW, PROMPT
from data_tools.convert import main as convert
from data_tools.demo_model import train_tokenizer
from data_tools.generate import main
from dreamprm_dist.errors import InputError

REPO = Path(__file__).resolve().parents[2]


def outputs(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_candidates_of_each_question(server, command, tmp_path, capsys):
    main([*command, "--temperature", "0.3", "--prices", "1000", "10000"])
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    check_all_there(rows)
    assert Counter(server.answered) == {str(i): 3 for i in range(6)}
    assert rows[0] | {"response": ""} == {
        "id": "q0",
        "sample": 0,
        "response": "",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "model": "m",
        "temperature": 0.3,
        "max_tokens": 2048,
    }
    body, authorization = next(r for r in server.requests if "Question 1:" in str(r[0]))
    assert authorization == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 2048)
    image, text = body["messages"][0]["content"]
    assert text["text"] == f"{PROMPT}Question 1: what is in the image?"
    data = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()
    printed = capsys.readouterr().out
    assert "18 candidates, 180 + 90 tokens, cost 1.08, 0 rejected" in printed
    assert outputs(tmp_path) == ["candidates.jsonl", "candidates.rejected.jsonl"]


def test_the_candidates_are_what_convert_takes(server, command, questions, tmp_path):
    main(command)
    candidates = tmp_path / "out" / "candidates.jsonl"
    arguments = ["--candidates", str(candidates), "--kind", "test"]
    convert(["candidates", str(questions), *arguments, "--out", str(tmp_path / "test.jsonl")])
    (first, *_) = records = lines(tmp_path / "test.jsonl")
    assert len(records) == 6 and first["true_false"] == [True] * 3


@pytest.mark.parametrize("failure", [429, 500, 503, "hang", "cut"])
def test_what_fails_for_a_while_is_asked_again(server, command, tmp_path, failure):
    server.misbehave = lambda body, number: failure if number % 3 == 1 else None
    main(command)
    check_all_there(lines(tmp_path / "out" / "candidates.jsonl"))
    assert Counter(server.answered) == {str(i): 3 for i in range(6)}
    assert len(server.requests) > 18


ODD = [
    {},
    {"error": {"message": "Provider returned error", "code": 502}},
    {"choices": "abc"},
    {"choices": [None]},
    {"choices": [{"message": {"content": ["a", 1]}}]},
    {"choices": [{"message": {"content": "a"}}], "usage": "many"},
]


@pytest.mark.parametrize("failure", [500, "hang", "cut", "page", "broken", *ODD])
def test_what_keeps_failing_is_told_and_asked_for_by_the_next_run(
    server, command, tmp_path, failure
):
    server.misbehave = lambda body, number: failure if "Question 2:" in str(body) else None
    with pytest.raises(InputError, match=r"3 of 18 candidates did not come") as stopped:
        main([*command, "--retries", "1"])
    assert KEY not in str(stopped.value)
    assert outputs(tmp_path) == ["candidates.jsonl.partial"]
    server.misbehave = lambda body, number: None
    before = len(server.answered)
    main(command)
    check_all_there(lines(tmp_path / "out" / "candidates.jsonl"))
    assert before == 15
    assert Counter(server.answered[before:]) == {"2": 3}


def test_missing_candidates_may_be_allowed(server, command, tmp_path):
    server.misbehave = lambda body, number: {} if "Question 2:" in str(body) else None
    main([*command, "--allow_missing"])
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [e for e in EXPECTED if e[0] != "q2"]
    rejected = lines(tmp_path / "out" / "candidates.rejected.jsonl")
    assert [(entry["line"], entry["id"]) for entry in rejected] == [(3, "q2")] * 3
    assert rejected[1]["reason"] == "candidate 1: InputError: the answer is no chat completion"


@pytest.mark.parametrize("limit", ["1", "4", "100"])
def test_only_the_first_questions_are_asked(server, command, tmp_path, limit):
    main([*command, "--limit", limit])
    asked = min(int(limit), 6)
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == EXPECTED[: 3 * asked]
    assert len(server.requests) == 3 * asked


def test_a_run_stopped_by_hand_says_how_to_go_on(server, command, tmp_path):
    server.seconds = 0.1
    program = [sys.executable, "-m", "data_tools.generate", *command]
    process = subprocess.Popen(program, cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(server.answered) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    partial = tmp_path / "out" / "candidates.jsonl.partial"
    assert process.returncode == 130
    assert said == f"stopped; what has come is in {partial}: the same command goes on from it\n"
    kept = partial.read_text().splitlines()
    assert len(kept) >= 4
    main(command)
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    check_all_there(rows)
    assert all(json.loads(line) in rows for line in kept)


def test_what_the_server_will_never_answer_is_rejected(server, command, questions, tmp_path):
    with questions.open("a") as file:
        file.write('{"id": "q0", "question": "again"}\n{\n')
        file.write('{"id": "x", "question": "Question 8", "image_path": "none.png"}\n')
    server.misbehave = lambda body, number: 400 if "Question 2:" in str(body) else None
    main(command)
    rejected = lines(tmp_path / "out" / "candidates.rejected.jsonl")
    assert [(e["line"], e["id"]) for e in rejected] == [
        *[(7, "q0"), (8, None)],
        *[(3, "q2")] * 3,
        *[(9, "x")] * 3,
    ]
    assert "no such file" in rejected[-1]["reason"]
    assert "BadRequestError" in rejected[2]["reason"] and "***" in rejected[2]["reason"]
    assert len(server.requests) == 18  # a request that is refused is not sent again


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everything_is_not_asked_on(server, command, status):
    server.misbehave = lambda body, number: status
    with pytest.raises(InputError, match=r"check --model, --base_url and OPENAI_API_KEY") as stop:
        main(command)
    assert KEY not in str(stop.value)
    assert len(server.requests) <= 4


def test_a_server_that_is_down_is_not_asked_for_ever(server, command):
    server.close()
    with pytest.raises(InputError, match=f"{FAILURES_IN_A_ROW} requests in a row have failed"):
        main([*command, "--n", "100", "--retries", "0"])


def test_the_key_is_written_nowhere(server, command, tmp_path):
    server.misbehave = lambda body, number: [400, 500, None][number % 3]
    environment = os.environ | {"OPENAI_LOG": "info", "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-m", "data_tools.generate", *command, "--retries", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".partial")]
    written = [path.read_text() for path in files]
    assert not any(KEY in text for text in [run.stdout, run.stderr, *written])
    assert any("response" in text for text in written)


def test_a_run_killed_in_the_middle(server, command, tmp_path):
    server.seconds = 0.1
    journal = tmp_path / "out" / "candidates.jsonl.partial"
    process = subprocess.Popen([sys.executable, "-m", "data_tools.generate", *command], cwd=REPO)
    deadline = time.monotonic() + 60
    while len(server.answered) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"id": "q0", "sample": 0, "resp')  # as if it had died while writing
    answered = -1
    while answered < (answered := len(server.answered)):  # what was under way
        time.sleep(1)
    main(command)
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    check_all_there(rows)
    assert 3 <= len(kept.splitlines()) <= answered <= len(kept.splitlines()) + 4
    assert all(json.loads(line) in rows for line in kept.splitlines())
    assert len(server.answered) - answered == 18 - len(kept.splitlines())


def test_two_runs_at_once(server, command, tmp_path):
    server.seconds = 0.3
    thread = threading.Thread(target=main, args=[command])
    thread.start()
    while not (tmp_path / "out" / "candidates.jsonl.partial").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another run is writing it"):
        main(command)
    thread.join()
    check_all_there(lines(tmp_path / "out" / "candidates.jsonl"))


def test_a_journal_of_another_job_is_refused(server, command, tmp_path):
    server.misbehave = lambda body, number: {} if "Question 2:" in str(body) else None
    with pytest.raises(InputError, match="did not come"):
        main(command)
    for flags in (["--temperature", "1"], ["--model", "other"], ["--n", "1"]):
        with pytest.raises(InputError, match="was not asked for by this command"):
            main([*command, *flags])
    server.misbehave = lambda body, number: None
    main([*command, "--n", "4"])  # more of the same is no other job
    assert len(lines(tmp_path / "out" / "candidates.jsonl")) == 24


def test_what_is_there_is_not_replaced(command, tmp_path):
    main(command)
    with pytest.raises(InputError, match="--overwrite"):
        main(command)
    main([*command, "--overwrite", "--n", "1"])
    assert len(lines(tmp_path / "out" / "candidates.jsonl")) == 6


# A real server


@pytest.fixture
def transformers_serve(tmp_path):
    """The URL and the name of a tiny language model that `transformers serve` answers with."""
    tokenizer = train_tokenizer([PROMPT, "What is in the image?"])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    name = str(tmp_path / "model")
    Qwen2ForCausalLM(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"])
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
            time.sleep(0.5)
        yield f"http://localhost:{port}/v1", name
    finally:
        process.kill()
        process.wait()


def test_candidates_from_transformers_serve(transformers_serve, tmp_path, capsys):
    url, name = transformers_serve
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "a", "question": "What?"}\n{"id": "b", "question": "Why?"}\n')
    out = tmp_path / "candidates.jsonl"
    command = [str(path), "--base_url", url, "--model", name, "--out", str(out)]
    main([*command, "--n", "2", "--max_tokens", "7"])
    rows = lines(out)
    assert [(row["id"], row["sample"]) for row in rows] == list(product("ab", range(2)))
    assert all(row["response"] and row["completion_tokens"] <= 7 for row in rows)
    assert all(row["prompt_tokens"] > 20 for row in rows)
    assert "4 candidates" in capsys.readouterr().out
