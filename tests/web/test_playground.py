"""The playground in headless Chromium: it works, is accessible, and fits phone and desktop."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NEEDS_BROWSER, framed, probed, visit
from fastapi.responses import HTMLResponse
from serving import served

from dreamprm_dist import PRM
from dreamprm_dist.report.style import significant
from dreamprm_dist.serving.app import create_app
from dreamprm_dist.serving.docs import docs_page

pytestmark = NEEDS_BROWSER

USE = """
  $("question").value = "%s";
  const areas = document.querySelectorAll("#candidates textarea");
  areas[0].value = "The digit is 3.\\n\\nAnswer: odd";
  areas[1].value = "Answer: %s";
  images.push("%s");
  show();
  $("form").requestSubmit();
  while (!$("result").children.length) await new Promise(done => setTimeout(done, 50));
"""
SEND = """
  $("form").requestSubmit();
  while (!$("result").children.length) await new Promise(done => setTimeout(done, 50));
"""
FILL = """
  for (const area of document.querySelectorAll("textarea")) area.value = "x";
"""
SAY = """
  $("form").append(`focus: ${document.activeElement.id}, hidden: ${$("example").hidden}`);
"""
EXAMPLE = f'$("example").click();{SAY}{SEND}'
TYPED = f"""
  $("question").value = "Mine";
  $("question").dispatchEvent(new Event("input", {{bubbles: true}}));
  document.querySelector(".candidate button").focus();
  document.querySelector(".candidate button").click();
  {SAY}
"""


@pytest.fixture(scope="module")
def port(tiny_prm_dir: Path, tiny_data_dir: Path) -> Iterator[int]:
    """The service, and its page filled in and sent, at /used with a good and /failed a bad text."""
    app = create_app(PRM.from_pretrained(tiny_prm_dir, precision="fp32", device="cpu"), "tiny")
    (playground,) = (route.endpoint for route in app.routes if route.path == "/")
    question = json.loads((tiny_data_dir / "test.json").read_text())[0]
    image = base64.b64encode((tiny_data_dir / question["image_path"]).read_bytes()).decode()

    def used(asked: str, answer: str = "even"):
        async def page() -> HTMLResponse:
            text = (await playground()).body.decode()
            return HTMLResponse(
                probed(text, USE % (asked, answer, f"data:image/png;base64,{image}"))
            )

        return page

    def acted(script: str):
        async def page() -> HTMLResponse:
            return HTMLResponse(probed((await playground()).body.decode(), script))

        return page

    async def docs() -> HTMLResponse:
        page = docs_page(app.openapi(), "http://127.0.0.1/")
        return HTMLResponse(probed(page))

    async def frame(path: str, width: int) -> HTMLResponse:
        return HTMLResponse(framed(path, width))

    app.get("/used")(used("Is the digit even or odd?"))
    app.get("/failed")(used("<image> <image>"))
    app.get("/numbers")(acted(f"$('result').textContent = `[${{{SCORES}.map(shown).join(' ')}}]`"))
    app.get("/example")(acted(EXAMPLE))
    app.get("/typed")(acted(TYPED))
    answered = 'window.fetch = async () => new Response("bad gateway", {status: 502});'
    app.get("/proxy")(acted(FILL + answered + SEND))
    app.get("/probed-docs")(docs)
    app.get("/frame")(frame)
    with served(app) as port:
        yield port


@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)])
@pytest.mark.parametrize("width", [1280, 390])
def test_scores_are_shown_accessibly(
    port: int, tmp_path: Path, width: int, flags: tuple[str, ...]
) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/used&width={width}", tmp_path, *flags)
    assert "★ chosen" in found["text"] and "Candidate 2: 0." in found["text"]
    assert found["violations"] == [] and found["checks"] > 15
    assert found["console"] == []
    assert found["overflow"] == 0
    assert found["dark"] == bool(flags)


# Small scores, and those close to 1, keep what tells them apart.
SCORES = [0, 1e-15, 1.23e-7, 1.23e-5, 0.00123, 0.0123, 0.05, 0.5, 0.8765, 0.9996, 0.99999, 1 - 1e-9]
SCORES += [1, 0.09999999, 0.1, 0.00999, 9.99e-4, 0.3333333333]


def test_scores_read_as_in_the_report(port: int, tmp_path: Path) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/numbers&width=1280", tmp_path)
    assert f"[{' '.join(map(significant, SCORES))}]" in found["text"]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_example_is_filled_in_and_scored(port: int, tmp_path: Path, width: int) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/example&width={width}", tmp_path)
    text = found["text"]
    assert "Remove image 1" in text and "★ chosen" in text and "The digit is 0." in text
    assert "focus: send, hidden: false" in text
    assert found["violations"] == [] and found["console"] == [] and found["overflow"] == 0


def test_the_example_does_not_overwrite_what_was_typed(port: int, tmp_path: Path) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/typed&width=1280", tmp_path)
    assert "Fill in an example" not in found["text"]
    assert "focus: add" in found["text"]  # of who removed a candidate by keyboard


@pytest.mark.parametrize("width", [1280, 390])
def test_docs_are_accessible(port: int, tmp_path: Path, width: int) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/probed-docs&width={width}", tmp_path)
    assert "POST /v1/score" in found["text"]
    assert found["violations"] == [] and found["console"] == [] and found["overflow"] == 0


def test_an_answer_that_is_no_json_is_said(port: int, tmp_path: Path) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/proxy&width=1280", tmp_path)
    assert "Not scored: status 502" in found["text"]


def test_what_is_wrong_is_said(port: int, tmp_path: Path) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/failed&width=1280", tmp_path)
    assert "2 <image> for 1 image" in found["text"] and "★ chosen" not in found["text"]
    assert found["violations"] == []
