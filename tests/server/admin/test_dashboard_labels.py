"""What the dashboard says where things are wrong, or are not there yet: nothing that is not so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

LONG = "a-name-without-any-space-" * 20
FITS = "document.documentElement.scrollWidth <= innerWidth"


def version(number: int, state: str, **fields: Any) -> dict[str, Any]:
    training = {"tokens": 100, "samples": 3}
    made = {"origin": "trained", "parent": None, "note": "", "gate": {}, "training": training}
    known = {"route": "", "pinned": False, "metrics": {}, "damage": ""}
    manifest = {"created_at": "2026-01-01T00:00:00Z", **made}
    return {"version": number, "state": state, "manifest": manifest, **known, **fields}


def evolving(*versions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    progress = {"tokens": 0, "rounds": {"published": 0, "refused": 0}, "training": {}, "verdict": {}, "losses": []}
    return {
        "mode": "idle",
        "registry": {"folder": "/registry", "error": None, "in_control": True},
        "options": {"first_tokens": 100, "round_tokens": 100, "canary_share": 0.2, "canary_requests": 20},
        "worker": {"report": {"state": "waiting"}, "paused": False, "restarts": 0, **progress},
        "routes": {"": 1},
        "trial": None,
        "live": {"accept_length": 0.0, "predicted": 0.0, "drift": 1.0, "drifts": 0},
        "decisions": {"promote": 0, "roll_back": 0},
        "versions": list(versions),
        "events": [],
        **fields,
    }


def drafting(number: int) -> list[dict[str, Any]]:
    """A head that drafts, and has this number."""
    counts = {"drafts": 8, "draft_tokens": 8, "accepted_tokens": 0}
    own = {"versions": [{"version": number, **counts}], "routes": {"": number}, "accepted_per_position": [0]}
    return [{"name": "head", **counts, **own}]


class Drawn:
    def __init__(self, page: Any, status: dict[str, Any]) -> None:
        self._page, self._status = page, status

    async def text(self, card: str, **changes: Any) -> str:
        """The text of a card, drawn of what the server says with these changes."""
        found = json.dumps(self._status | changes)
        return str(await self._page.ask(f"(draw({found}), document.querySelector('#{card}').innerText)"))

    async def fits(self, **changes: Any) -> bool:
        return bool(await self._page.ask(f"(draw({json.dumps(self._status | changes)}), {FITS})"))


async def test_labels_are_true(server: Any, open_page: Callable[[], Any]) -> None:
    page = await open_page()
    await page.open(f"{server.url}/dashboard")
    await page.wait("document.body && document.body.dataset.updated")
    status = server.get("/admin/v1/status")[1]
    drawn = Drawn(page, status)

    # While the model loads, nobody knows of the registry.
    loading = {"requests": None, "drafters": [], "evolution": None}
    for card in ("learning", "trial", "versions", "history", "drafters", "tile-version-note"):
        assert "loading" in await drawn.text(card, server=status["server"] | {"phase": "loading"}, **loading), card

    # A head with the number of a version that has never served is not that version.
    fresh = {"drafters": drafting(1), "evolution": evolving(version(1, "candidate"))}
    assert await drawn.text("tile-version-note", **fresh) == "from --drafter"
    assert "draft tokens accepted" not in await drawn.text("versions", **fresh)
    live = {"drafters": drafting(1), "evolution": evolving(version(1, "live"))}
    assert (await drawn.text("tile-version-note", **live)).startswith("trained, made")
    assert "0 % of 8 draft tokens accepted" in await drawn.text("versions", **live)

    # Damage and errors.
    damaged = version(2, "live", damage="drafter version 2 is no drafter manifest")
    shown = await drawn.text("versions", evolution=evolving(damaged))
    assert "damaged" in shown and "is no drafter manifest" in shown and "Jan" not in shown and "trained" not in shown
    unusable = evolving(version(1, "live"), registry={"folder": "/r", "error": "it is locked", "in_control": True})
    assert "cannot be used at the moment. it is locked" in await drawn.text("versions", evolution=unusable)
    kept = {"log": "tokens", "folder": "/t", "kept": 1, "dropped": 2, "redacted": 0}
    full = await drawn.text("traffic", traffic=kept | {"failure": "OSError: No space left on device"})
    assert "Nothing can be kept at the moment. OSError: No space left on device" in full
    assert "at the moment" not in await drawn.text("traffic", traffic=kept | {"failure": ""})
    asleep = {"status": "asleep", "reason": "it has given back the memory of weights"}
    assert await drawn.text("reason", server=status["server"] | {"health": asleep}) == asleep["reason"]
    assert await drawn.text("reason") == ""

    paused: Any = {"server": status["server"] | {"health": {"status": "paused"}, "paused": True}}
    assert "/continue_generation" in await drawn.text("reason", **paused)
    replaced = await drawn.text("machine", server=status["server"] | {"engine_restarts": 2})
    assert "engine replaced 2 times" in replaced and "replaced" not in await drawn.text("machine")

    # The tile says what the chart ends with: all drafters together. What the gate knows of is the head.
    alone = evolving(version(1, "live"), live={"accept_length": 1.2, "predicted": 2.0, "drift": 0.6, "drifts": 0})
    seen: Any = {"points": [[10.0, 50.0, 3.5, 1, 1]], "accept_length": 1.2, "evolution": alone}
    assert await drawn.text("tile-accept", **seen) == "3.50 tokens/step"
    assert (
        await drawn.text("tile-accept-note", **seen)
        == "1.20 without lookups, 60 % of what the gate expected of first draft tokens"
    )

    # A curve ends where nothing ran, goes on where requests ran without one that ended, and both charts have one time.
    rows = [[0, 9, 1.5], [2, 9, 0], [4, 9, 2.0], [6, 0, 0], [8, 0, 0], [10, 9, 1.8], [12, 0, 0], [14, 0, 0]]
    points: Any = {"points": [[time, speed, accept, 1, 1] for time, speed, accept in rows]}
    await drawn.text("chart-accept", **points)
    assert await page.ask("document.querySelectorAll('#chart-accept path.area').length") == 2
    assert await page.ask("document.querySelectorAll('#chart-speed path.area').length") == 1
    assert await page.ask("charts.accept.x(14) === charts.speed.x(14)")

    # Another server decides.
    elsewhere = {"folder": "/r", "error": None, "in_control": False}
    followed = evolving(version(1, "live"), version(2, "canary"), registry=elsewhere)
    assert "Version 2 is on trial there" in await drawn.text("trial", evolution=followed, drafters=drafting(1))
    assert "no learned drafter" in await drawn.text("trial", evolution=followed, drafters=[])

    # Names of any length.
    names: Any = {"server": status["server"] | {"models": [LONG], "health": {"status": "stalled", "reason": LONG}}}
    names["traffic"] = kept | {"folder": LONG, "failure": LONG}
    event = {"id": 1, "time": 0.0, "version": 1, "route": LONG, "action": "added", "after": "live", "reason": LONG}
    worker = evolving()["worker"] | {"report": {"state": "failed", "message": LONG}}
    names["evolution"] = evolving(
        version(1, "live", route=LONG, damage=LONG),
        worker=worker,
        events=[event | {"before": ""}],
        registry={"folder": "/r", "error": LONG, "in_control": True},
    )
    assert await drawn.fits(**names)
    for width in (390, 700, 1600):
        narrow = await open_page()
        await narrow.open(f"{server.url}/dashboard", width, "light")
        await narrow.wait("document.body && document.body.dataset.updated")
        assert await Drawn(narrow, status).fits(**names), width
    assert page.errors == []
