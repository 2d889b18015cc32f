"""Pictures of the pages, of a server of the default model that has something to show; PICTURES names a folder that
keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
KEY = "an-admin-key"
QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")
SUBJECTS = ("the sea", "a long winter", "bread", "the Moon", "old maps", "a train at night", "rain", "bees")


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
    await page.wait("document.querySelector('#model').innerText")
    for number, question in enumerate(QUESTIONS, 1):
        await page.ask(
            f"document.querySelector('#question').value = {question!r}; document.querySelector('#send').click()"
        )
        await page.wait(f"document.querySelectorAll('.turn').length === {2 * number} && stop === null")
    speeds = await page.ask("[...document.querySelectorAll('.speed')].map(note => note.innerText)")
    assert len(speeds) == 2 and all("per step" in speed for speed in speeds)
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
        shown.chat(f"Tell me a short story of {subject}.", max_tokens=120)
    await page.wait("document.querySelector('#chart-speed path.curve')")
    # Without a key the page was turned away once, and asked for one.
    assert all("401 (Unauthorized)" in error for error in page.errors)
    await page.picture(folder / "dashboard.png")
