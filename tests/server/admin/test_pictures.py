"""Pictures of the pages, of a server of the default model that has something to show. The docs have them:

PICTURES=docs/pictures pytest -m slow tests/server/admin/test_pictures.py

but for dashboard.png, which shows a server after some minutes of traffic, training, trials and a rollback.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
KEY = "an-admin-key"
QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")
SUBJECTS = ("the sea", "a long winter", "bread", "the Moon", "old maps", "a train at night", "rain", "bees")
BOUND = """
window.really = window.fetch;
window.fetch = (path, options) => {
  if (options && options.body)
    options.body = JSON.stringify({...JSON.parse(options.body), temperature: 0, max_tokens: 100});
  return really(path, options);
};
"""
"""The page asks for sampled answers of any length: here they are the same each time, and end."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = Path(os.environ.get("PICTURES", tmp_path)).absolute()
    found.mkdir(parents=True, exist_ok=True)
    return found


@pytest.fixture(scope="module")
def shown(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of the default model that learns."""
    folder = tmp_path_factory.mktemp("shown")
    learning = ("--evolve", "idle", "--evolve-first-tokens", "2000", "--traffic-log", "tokens")
    kept = ("--registry", str(folder / "registry"), "--traffic-folder", str(folder / "traffic"))
    server = start_server(*kept, *learning, "--drafter", "warm", "--admin-key", KEY)
    return server.wait_until_ready()


async def test_of_the_chat_page(shown: Any, open_page: Callable[[], Any], folder: Path) -> None:
    page = await open_page()
    await page.open(f"{shown.url}/", 900)
    await page.wait("document.querySelector('#model') && document.querySelector('#model').innerText")
    await page.ask(BOUND)
    for number, question in enumerate(QUESTIONS, 1):
        await page.ask(
            f"document.querySelector('#question').value = {question!r}; document.querySelector('#send').click()"
        )
        await page.wait(
            f"document.querySelectorAll('.turn:not([hidden])').length === {2 * number} && "
            "document.querySelector('#send').innerText === 'Send'"
        )
    speeds = await page.ask("[...document.querySelectorAll('.speed')].map(note => note.innerText)")
    assert len(speeds) == 2 and all("per step" in speed for speed in speeds), speeds
    assert "Paris" in await page.text("body")
    assert page.errors == []
    await page.picture(folder / "chat.png")


async def test_of_the_dashboard(shown: Any, open_page: Callable[[], Any], folder: Path) -> None:
    page = await open_page()
    await page.open(f"{shown.url}/dashboard")
    await page.wait("document.querySelector('#problem input')")
    await page.ask(
        f"document.querySelector('#problem input').value = {KEY!r}; document.querySelector('#problem button').click()"
    )
    await page.wait("document.body && document.body.dataset.updated")
    for subject in SUBJECTS:
        await asyncio.to_thread(shown.chat, f"Tell me a short story of {subject}.", max_tokens=120, temperature=0)
    await page.wait("document.querySelector('#chart-speed path.curve')")
    # Without a key the page was turned away once, and asked for one.
    assert all("401 (Unauthorized)" in error for error in page.errors), page.errors
    await page.picture(folder / "dashboard.png")
