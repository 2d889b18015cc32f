"""Pages for browsers, the dashboard and the chat: one file with everything in it, which asks the API for the rest."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.responses import Response

HERE = Path(__file__).parent
DASHBOARD, CHAT = HERE.parent / "admin" / "dashboard.html", HERE / "chat.html"


@cache
def _read(page: Path) -> tuple[bytes, dict[str, str]]:
    text = page.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    # Names of tenants, notes and answers come from users and models. They are only ever set as text; should that
    # fail, no script of theirs runs, and nothing is loaded from or sent to elsewhere.
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _digest(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()


def page_response(page: Path) -> Response:
    """``page`` has one script and one style, and its answer lets no others run."""
    text, headers = _read(page)
    return Response(text, headers=headers, media_type="text/html; charset=utf-8")
