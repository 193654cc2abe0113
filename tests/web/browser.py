"""Pages in headless Chromium: what axe-core and the console say of them.

`make test-web` installs axe-core from npm beside this file.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """
<script>{axe}</script>
<script>
async function probe() {{
  {first}
  const found = await axe.run();
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify({{
    violations: found.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))]),
    checks: found.passes.length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    text: document.body.innerText,
    scrolled: [...document.querySelectorAll(".scroll")].filter(
      box => box.scrollWidth > box.clientWidth).map(
      box => [box.ariaLabel, getComputedStyle(box).backgroundAttachment]),
  }});
  document.body.append(probe);
}}
probe();
</script>
"""

NEEDS_BROWSER = [
    pytest.mark.web,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed (make test-web)"),
]


def probed(page: str, first: str = "") -> str:
    """A page that leaves what axe-core finds in it in an element `probe`.

    Args:
        first: JavaScript to run before.
    """
    probe = PROBE.format(axe=AXE.read_text(encoding="utf-8"), first=first)
    return page.replace("</body>", probe + "</body>")


def framed(address: str, width: int) -> str:
    """A page that shows another in a frame of this width in pixels, for no window is so narrow."""
    return (
        f'<!doctype html><title>f</title><iframe src="{address}" '
        f'style="width:{width}px;height:2000px;border:0"></iframe><script>'
        "const wait = setInterval(() => {"
        'const p = document.querySelector("iframe").contentDocument.getElementById("probe");'
        "if (p) { clearInterval(wait); document.title = p.textContent; }}, 50)</script>"
    )


def visit(address: str, home: Path, *flags: str) -> dict:
    """Findings of the probe of a framed page, and the lines of the console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={home / 'profile'}", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=30000", "--window-size=1400,2000", "--dump-dom", *flags]
    env = os.environ | {"HOME": str(home)}
    done = subprocess.run(
        [*command, address], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    title = re.search(r"<title>(\{.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(title[1])) | {"console": console}
