"""Pages that run their own script and style and load nothing."""

import base64
import hashlib
import re

from fastapi.responses import HTMLResponse


def page_response(page: str) -> HTMLResponse:
    """A page with a policy that lets its own script and style run and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
    policy += "img-src data:; connect-src 'self'; base-uri 'none'"
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})
