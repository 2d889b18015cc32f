"""The dashboard: one file with everything in it, which asks the admin API every two seconds."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).with_name("dashboard.html")


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    # Names of tenants and notes come from users. They are only ever set as text; should that fail, no script of theirs
    # runs, and nothing is loaded from or sent to elsewhere.
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


def dashboard_page() -> Response:
    text, headers = _page()
    return Response(text, headers=headers, media_type="text/html; charset=utf-8")
