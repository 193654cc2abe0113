"""A server that can be told to misbehave, and the command that asks it for candidates."""

import json

import pytest
from chat_server import KEY, Server
from PIL import Image


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def questions(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    records = [
        {
            "id": f"q{i}",
            "question": f"Question {i}: what is in the image?",
            "image_path": ["a.png"] if i % 2 else None,
            "options": ["a", "b"],
            "answer": "B",
        }
        for i in range(6)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def command(server, questions, tmp_path):
    out = tmp_path / "out" / "candidates.jsonl"
    fixed = [str(questions), "--base_url", server.url, "--model", "m", "--out", str(out)]
    return [*fixed, "--n", "3", "--concurrency", "4", "--timeout", "3"]
