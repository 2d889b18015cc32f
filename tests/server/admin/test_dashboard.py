"""The dashboard in a real browser, against real servers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.clients.admin import AdminClient

KEY = "an-admin-key"
UPDATED = "document.body && document.body.dataset.updated"
FITS = "document.documentElement.scrollWidth <= innerWidth"


async def test_what_a_learning_server_shows(
    evolving: Any, heads: Path, open_page: Callable[[], Any], tmp_path: Path
) -> None:
    page = await open_page()
    await page.open(f"{evolving.url}/dashboard")
    await page.wait("document.querySelector('#problem input')")
    assert "--admin-key" in await page.text("#problem") and await page.text("#phase") == "locked"
    enter = "document.querySelector('#problem button').click()"
    await page.ask(f"document.querySelector('#problem input').value = 'wrong'; {enter}")
    await page.wait("document.querySelector('#problem').innerText.includes('not right')")
    page.errors.clear()
    await page.ask(f"document.querySelector('#problem input').value = {KEY!r}; {enter}")
    await page.wait(UPDATED)
    assert await page.text("#phase") == "ready"
    assert "1,000,000,000 tokens of answers" in await page.text("#traffic")

    # Two points and a swap between them.
    for _ in range(2):
        evolving.complete("The sea is", max_tokens=30, ignore_eos=True)
    await page.wait("document.querySelector('#chart-speed path.curve')")
    nasty = "<img src=x onerror=\"document.title='owned'\"><b id=nasty>bold</b>"
    async with AdminClient(evolving.url, KEY) as admin:
        number = (await admin.import_drafter(str(heads / "fits"), note=nasty))["version"]
        await admin.change("promote", number, f"because {nasty}")
        await page.wait(f"document.querySelector('#tile-version').innerText === 'v{number}'")
        evolving.complete("The sea is", max_tokens=30, ignore_eos=True)
        await page.wait("document.querySelector('#chart-speed line.swap')")
        versions = await page.text("#versions")
        assert "imported" in versions and nasty in versions and "not judged" in versions
        assert nasty in await page.text("#history")
        assert await page.ask("document.getElementById('nasty')") is None
        assert "owned" not in await page.ask("document.title")

        await admin.change("pin", number)
        await page.wait("document.querySelector('#versions').innerText.includes('pinned')")
        await page.wait("document.querySelector('#history').innerText.includes('pinned')")
        share = await page.ask(
            "(() => { const line = [...document.querySelectorAll('#chart-speed line.swap')].at(-1); "
            "const svg = line.ownerSVGElement; "
            "return line.x1.baseVal.value / svg.viewBox.baseVal.width; })()"
        )
        await page.hover("#chart-speed svg", share)
        tip = await page.wait("(t => !t.hidden && t.innerText)(document.querySelector('#chart-speed .tip'))")
        assert f"Version {number} took over" in tip and "because <img" in tip
        await page.hover("#chart-speed svg", 0.99)
        await page.wait("document.querySelector('#chart-speed .tip').innerText.includes('tokens per second')")
        await admin.evolve("pause")
        await page.wait("document.querySelector('#learning').innerText.includes('Paused by hand')")
        await admin.evolve("resume")
        await admin.change("rollback", number)
        await page.wait("document.querySelector('#versions').innerText.includes('rolled back')")
    assert page.errors == []
    assert all(address.startswith((evolving.url, "data:")) for address in page.requested)
    await page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


async def test_a_server_without_a_registry_says_what_to_do(
    server: Any, open_page: Callable[[], Any], tmp_path: Path
) -> None:
    page = await open_page()
    await page.open(f"{server.url}/dashboard")
    await page.wait(UPDATED)
    for card in ("learning", "trial", "versions", "history"):
        assert "--registry FOLDER" in await page.text(f"#{card}"), card
    assert "--traffic-log" in await page.text("#traffic")
    server.complete("one two one two one two one two", max_tokens=60, ignore_eos=True)
    await page.wait("document.querySelectorAll('#drafters .bars, #choices .bars').length >= 1")
    await page.wait("document.querySelector('#chart-speed path.curve')")
    assert re.fullmatch(r"[\d,]+ tokens/s", await page.text("#tile-speed"))
    # Hours later: the line is a mean, with the points faint behind it.
    many = "Array.from({length: 700}, (_, i) => [latest.server.time + 10 * i, 50 + i % 7, 1 + (i % 3) / 2, 1, 0])"
    await page.ask(f"draw({{...latest, points: {many}}})")
    assert await page.ask("document.querySelectorAll('path.curve.raw').length") == 2
    await page.picture(tmp_path / "later.png")
    assert page.errors == []


async def test_it_fits_a_phone_and_the_night(server: Any, open_page: Callable[[], Any]) -> None:
    colours = set()
    for width, scheme in ((390, "light"), (390, "dark"), (800, "dark"), (1600, "light")):
        page = await open_page()
        await page.open(f"{server.url}/dashboard", width, scheme)
        await page.wait(UPDATED)
        assert await page.ask(FITS), (width, scheme)
        colours.add((scheme, await page.ask("getComputedStyle(document.body).backgroundColor")))
    assert len(colours) == 2


async def test_it_says_when_the_server_is_gone(start_tiny: Callable[..., Any], open_page: Callable[[], Any]) -> None:
    server = start_tiny()
    page = await open_page()
    server.wait_until(lambda: "loading" in "".join(server.log))
    await page.open(f"{server.url}/dashboard")
    await page.wait(UPDATED)
    server.wait_until_ready()
    await page.wait("document.querySelector('#phase').innerText === 'ready'")
    server.stop()
    await page.wait("document.querySelector('#phase').innerText === 'no answer'")
    assert "does not answer" in await page.text("#problem")
