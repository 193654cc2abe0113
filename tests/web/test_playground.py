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
from dreamprm_dist.serving.app import create_app

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

    async def frame(path: str, width: int) -> HTMLResponse:
        return HTMLResponse(framed(path, width))

    app.get("/used")(used("Is the digit even or odd?"))
    app.get("/failed")(used("<image> <image>"))
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


def test_what_is_wrong_is_said(port: int, tmp_path: Path) -> None:
    found = visit(f"http://127.0.0.1:{port}/frame?path=/failed&width=1280", tmp_path)
    assert "2 <image> for 1 image" in found["text"] and "★ chosen" not in found["text"]
    assert found["violations"] == []
