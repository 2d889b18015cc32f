"""The chat page in a real browser, against a real server; here because the browser is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY = "<img src=x onerror=\"document.title='owned'\"><b id=nasty>bold</b>"


def put(selector: str, value: str) -> str:
    return f"document.querySelector('{selector}').value = {value!r}"


async def test_a_conversation(evolving: Any, open_page: Callable[[], Any], tmp_path: Path) -> None:
    page = await open_page()
    await page.open(f"{evolving.url}/")
    await page.wait("document.querySelector('#key:not([hidden])')")
    page.errors.clear()  # the browser notes the 401
    send = "document.querySelector('#send').click()"
    await page.ask(f"{put('#key', 'a-user-key')}; {send}")
    await page.wait("document.querySelector('#model').innerText.includes('tiny')")

    # Text of users is text; answers come while they are written, and can be stopped.
    await page.ask(f"{put('#question', NASTY)}; {send}")
    await page.wait("document.querySelector('.speed') && document.querySelector('.speed').innerText.includes('tokens')")
    assert await page.text("#send") == "Stop"
    await page.ask(send)
    await page.wait("document.querySelector('#send').innerText === 'Send'")
    assert await page.text(".turn.user") == NASTY
    assert await page.ask("document.getElementById('nasty')") is None
    assert "stopped" in await page.text(".speed")

    # The next question has the first one and what came of its answer before it.
    await page.ask(
        "window.sent = []; window.really = window.fetch; "
        "window.fetch = (path, options) => { if (options.body) sent.push(options.body); return really(path, options); }"
    )
    await page.ask(f"{put('#question', 'and now?')}; {send}")
    await page.wait("sent.length === 1")
    roles = "JSON.parse(sent[0]).messages.map(message => message.role).join()"
    assert await page.ask(roles) == "user,assistant,user"
    await page.picture(tmp_path / "chat.png")
    await page.ask("document.querySelector('#anew').click()")
    await page.wait("document.querySelector('#send').innerText === 'Send'")
    assert await page.ask("document.querySelectorAll('.turn').length") == 0

    # What the server refuses is said, and the question is not lost.
    await page.ask(f"model = 'another'; {put('#question', 'who?')}; {send}")
    assert "another" in await page.wait("(e => e && e.innerText)(document.querySelector('.turn.bad'))")
    assert await page.ask("document.querySelector('#question').value") == "who?"
    assert all("404" in error for error in page.errors), page.errors
    assert {url.split("/")[2] for url in page.requested if url.startswith("http")} == {evolving.url.split("/")[2]}


THINKS = """
window.sent = [];
window.fetch = async (path, options) => {
  sent.push(JSON.parse(options.body).messages.length);
  const part = delta => new TextEncoder().encode(`data: ${JSON.stringify({choices: [{delta}]})}\\n\\n`);
  return new Response(new ReadableStream({start(answer) {
    for (const piece of ["hm, ", "<b>so</b>"]) answer.enqueue(part({reasoning_content: piece}));
    options.signal.addEventListener("abort", () => answer.error(new DOMException("", "AbortError")));
  }}));
};
"""


async def test_thoughts_are_shown_and_do_not_get_into_the_next_conversation(
    evolving: Any, open_page: Callable[[], Any]
) -> None:
    page = await open_page()
    await page.open(f"{evolving.url}/")
    await page.wait("document.querySelector('#key:not([hidden])')")
    await page.ask(THINKS)
    send = "document.querySelector('#send').click()"
    await page.ask(f"{put('#question', 'how?')}; {send}")
    await page.wait("(e => e && e.innerText === 'hm, <b>so</b>')(document.querySelector('.turn.thought'))")
    assert await page.ask("[...document.querySelectorAll('.turn')].filter(turn => !turn.hidden).length") == 2

    await page.ask("document.querySelector('#anew').click()")
    await page.wait("document.querySelector('#send').innerText === 'Send'")
    await page.ask(f"{put('#question', 'who?')}; {send}")
    await page.wait("sent.length === 2")
    assert await page.ask("sent.join()") == "1,1"


async def test_on_a_telephone(evolving: Any, open_page: Callable[[], Any]) -> None:
    page = await open_page()
    await page.open(f"{evolving.url}/", 360, "dark")
    await page.wait("document.querySelector('#question')")
    assert await page.ask("document.documentElement.scrollWidth <= innerWidth")
