"""The web service: the API's numbers, hundreds of requests at once, bad and slow clients."""

import base64
import contextlib
import html
import http.client
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dreamprm_dist import PRM

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from serving import served

from dreamprm_dist.serving.app import Limits, create_app
from dreamprm_dist.serving.docs import docs_page

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Is the digit even or odd?"
CANDIDATES = ["The digit is 3.\n\nIt is odd.\n\nAnswer: odd", ["The digit is 4.", "Answer: even"]]


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    return PRM.from_pretrained(tiny_prm_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def port(prm: PRM) -> Iterator[int]:
    limits = Limits(body_bytes=1 << 20, candidates=4, characters=1000)
    with served(create_app(prm, "tiny <b>", limits)) as port:
        yield port


@pytest.fixture(scope="module")
def image(tiny_data_dir: Path) -> bytes:
    question = json.loads((tiny_data_dir / "test.json").read_text())[0]
    return (tiny_data_dir / question["image_path"]).read_bytes()


def send(port: int, body: bytes | dict) -> tuple[int, dict]:
    """Status and JSON of the answer to a request to score."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/score", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def get(port: int, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer, answer.read()


def test_a_request_gets_the_numbers_of_the_api(port: int, prm: PRM, image: bytes) -> None:
    encoded = base64.b64encode(image).decode()
    for sent in (encoded, f"data:image/png;base64,{encoded}"):
        body = {"question": QUESTION, "candidates": CANDIDATES, "images": [sent]}
        status, found = send(port, body | {"aggregation": "min"})
        expected = prm.best_of_n(image, QUESTION, CANDIDATES, "min")
        assert status == 200
        assert found == {
            "best": expected.index,
            "scores": expected.scores,
            "steps": expected.steps,
            "step_scores": expected.step_scores,
            "errors": [None, None],
        }
    assert prm.best_of_n(None, QUESTION, CANDIDATES, "min").scores != expected.scores


def test_hundreds_of_requests_at_once_are_all_answered(port: int, prm: PRM) -> None:
    """Each with the answer to its own question, while slow and silent clients hold connections."""
    questions = [f"Is {i} even?" for i in range(300)]
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for client in silent:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    try:
        with ThreadPoolExecutor(100) as pool:
            bodies = ({"question": q, "candidates": ["Answer: yes"]} for q in questions)
            answers = list(pool.map(lambda body: send(port, body), bodies))
    finally:
        for client in silent:
            client.close()
    assert {status for status, _ in answers} == {200}
    for question, (_, found) in list(zip(questions, answers, strict=True))[::50]:
        assert found["scores"] == prm.best_of_n(None, question, ["Answer: yes"]).scores
    assert json.loads(get(port, "/health")[1])["waiting"] == 0


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
GOOD = {"question": QUESTION, "candidates": ["Answer: odd"]}
BAD = {
    "no json": (b"{", "not JSON: .*, at character 1$"),
    "half a json": (b'{"question": "Q", "candidates": ["x"', "not JSON: .* at character 36"),
    "more than a json": (b'{"question": "Q"} x', "not JSON: Extra data"),
    "nothing": (b"", "must be a JSON object, not null"),
    "null": (b"null", "must be a JSON object, not null"),
    "a list": (b"[1]", "must be a JSON object, not a list"),
    "a text": (b'"x"', "must be a JSON object, not a text"),
    "a number": (b"3", "must be a JSON object, not a number"),
    "question a number": (GOOD | {"question": 3}, "^question must be a text, not a number$"),
    "question null": (GOOD | {"question": None}, "^question must be a text, not null$"),
    "question empty": (GOOD | {"question": ""}, "^question is empty$"),
    "half a surrogate": (GOOD | {"question": "\ud800"}, "^question holds half a surrogate"),
    "candidates a text": (GOOD | {"candidates": "x"}, "^candidates must be a list, not a text$"),
    "a candidate a number": (
        GOOD | {"candidates": ["x", 3]},
        r"^candidates\[1\] must be a text or the list of its steps, not a number$",
    ),
    "a step an object": (
        GOOD | {"candidates": [["x", {}]]},
        r"^candidates\[0\]\[1\] must be a text, not an object$",
    ),
    "images a text": (GOOD | {"images": "x"}, "^images must be a list, not a text$"),
    "an image a number": (GOOD | {"images": [1]}, r"^images\[0\] must be a text, not a number$"),
    "an image's address": (GOOD | {"images": ["https://x/y.png"]}, r"^images\[0\]: not base64"),
    "an empty image": (GOOD | {"images": [""]}, r"^images\[0\]: not an image"),
    "aggregation a list": (GOOD | {"aggregation": ["mean"]}, "^aggregation must be a text"),
    "a long key": (GOOD | {"k" * 5000: 1}, "^k{80} is no field"),
    "braces": (GOOD | {"{kind}": 1}, "^{kind} is no field"),
    "no candidate": ({"question": QUESTION, "candidates": []}, "^candidates is empty$"),
    "no question": ({"candidates": ["x"]}, "^question is missing$"),
    "unknown key": (GOOD | {"image": "x"}, "image is no field"),
    "two marks for an image": (
        GOOD | {"question": "<image> <image>", "images": [PIXEL]},
        "2 <image> for 1 image",
    ),
    "unknown aggregation": (GOOD | {"aggregation": "median"}, "choose from mean"),
    "no base64": (GOOD | {"images": ["%%"]}, r"images\[0\]: not base64"),
    "no image": (GOOD | {"images": [base64.b64encode(b"GIF89a").decode()]}, "image"),
    "too many candidates": (GOOD | {"candidates": ["x"] * 5}, "at most 4"),
    "too long": (GOOD | {"question": "x" * 2000}, "shorten"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_one_clear_sentence(port: int, case: str) -> None:
    body, message = BAD[case]
    status, found = send(port, body)
    assert status == 422
    assert re.search(message, found["error"]), found
    assert send(port, GOOD)[0] == 200


def test_a_candidate_that_cannot_be_scored_costs_the_others_nothing(port: int, prm: PRM) -> None:
    candidates = [None, "Answer: odd<|im_end|>", ["\n", " "], "<image>\n\nAnswer: even"]
    status, found = send(port, GOOD | {"candidates": candidates})
    expected = prm.best_of_n(None, QUESTION, [candidates[1], candidates[3]])
    assert status == 200 and found["best"] == [1, 3][expected.index]
    assert found["scores"] == [None, expected.scores[0], None, expected.scores[1]]
    assert [bool(error) for error in found["errors"]] == [True, False, True, False]
    status, found = send(port, GOOD | {"candidates": [" "]})
    assert (status, found["best"], found["step_scores"]) == (200, None, [None])


def test_a_body_that_is_too_large_is_not_read(port: int) -> None:
    status, found = send(port, GOOD | {"images": ["A" * (3 << 19)]})
    assert (status, found["error"]) == (413, "the request is larger than 1 MiB; make it smaller")


def test_a_full_queue_says_so(prm: PRM) -> None:
    with served(create_app(prm, "tiny", Limits(waiting=0))) as port:
        status, found = send(port, GOOD)
    assert status == 503 and "try again" in found["error"]


def test_unknown_addresses_and_methods(port: int) -> None:
    for path, status in (("/v2", 404), ("/redoc", 404), ("/v1/score", 405)):
        answer, body = get(port, path)
        assert answer.status == status and "/docs" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "body",
    [b'{"question": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000, b"\x89PNG\r\n", b"\xed\xa0"],
)
def test_bytes_that_are_no_json(port: int, body: bytes) -> None:
    status, found = send(port, body)
    assert 400 <= status < 500 and found["error"].startswith("the body is not JSON: ")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "image/png", "x"]
)
def test_a_body_that_does_not_say_that_it_is_json(port: int, kind: str | None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        headers = {"Content-Type": kind} if kind else {}
        connection.request("POST", "/v1/score", json.dumps(GOOD).encode(), headers)
        answer = connection.getresponse()
        assert answer.status == 422
        assert "Content-Type: application/json" in json.loads(answer.read())["error"]


def test_base64_may_be_broken_into_lines(port: int, image: bytes) -> None:
    one, lines = (f(image).decode() for f in (base64.b64encode, base64.encodebytes))
    assert "\n" in lines.strip()
    assert send(port, GOOD | {"images": [lines]}) == send(port, GOOD | {"images": [one]})


def test_a_bug_is_an_answer_too(prm: PRM, monkeypatch) -> None:
    monkeypatch.setattr(prm, "best_of_n", lambda *_: 1 / 0)
    with served(create_app(prm, "tiny")) as port:
        status, found = send(port, GOOD)
    assert status == 500 and "its log says how" in found["error"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_docs_describe_the_service_and_load_nothing(port: int) -> None:
    answer, body = get(port, "/docs")
    page = body.decode()
    assert (
        answer.status == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    )
    assert "<script" not in page and "<link" not in page and "src=" not in page
    for word in ("POST /v1/score", "GET /health", "question", "log_mean", "step_scores", "error"):
        assert word in page
    commands = [html.unescape(c) for c in re.findall("<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]
    for command in commands:
        assert f"http://127.0.0.1:{port}/" in command
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert {"status", "best"} & {*json.loads(done.stdout)}


def test_an_address_in_docs_is_quoted(prm: PRM) -> None:
    page = docs_page(create_app(prm, "tiny").openapi(), "http://a;rm -rf <b>'$(x)'/")
    assert "<b>" not in page
    commands = re.findall("<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    for command in commands:
        words = shlex.split(html.unescape(command))
        assert words[:2] == ["curl", "-s"] and words[2].startswith("http://a;rm -rf <b>'$(x)'/")


def test_the_page_runs_only_its_own_script_and_names_the_model(port: int) -> None:
    answer, page = get(port, "/")
    assert answer.status == 200 and b"tiny &lt;b&gt;" in page
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert b"http://" not in page and b"https://" not in page


def test_the_service_as_a_user_starts_it(tiny_prm_dir: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--model", str(tiny_prm_dir)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--precision", "fp32", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        found = next(filter(None, (re.search(r":(\d+) \(", line) for line in process.stderr)))
        status, answer = send(int(found[1]), GOOD)
        assert status == 200 and answer["best"] == 0
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()
