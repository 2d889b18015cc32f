"""Who comes back to a kept response brings its text along, and with it what was said about keeping that text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.drafter.traffic.store import TrafficStore
from slipstream.server.access.consent import LEVEL_KEY

OFF = {"X-Slipstream-Traffic": "off"}


class Keeping:
    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.folder = server, folder

    def ask(self, text: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body = {"input": text, "temperature": 0, "max_output_tokens": 8, "user": text, **fields}
        status, _, reply = self.server.request(
            "POST", "/v1/responses", json.dumps(body).encode(), {"content-type": "application/json"} | (headers or {})
        )
        assert status == 200, reply
        return json.loads(reply)

    def kept(self, count: int) -> dict[str, bool]:
        """The tenants of whom something is kept, once it is of so many; and whether with features."""
        self.server.wait_until(lambda: self.server.metric("traffic_samples_total", outcome="kept") >= count)
        store = TrafficStore(self.folder, create=False)
        found = {sample.tenant: sample.features is not None for sample in store.samples()}
        store.close()
        return found


def start(start_local: Callable[..., Any], folder: Path, **options: Any) -> Keeping:
    server = start_local(traffic_log="features", traffic_folder=str(folder), **options)
    return Keeping(server.wait_until_ready(), folder)


def test_a_refusal_holds_for_what_follows(start_local: Callable[..., Any], tmp_path: Path) -> None:
    keeping = start(start_local, tmp_path / "t")
    refused = keeping.ask("refused", OFF)
    second = keeping.ask("second", previous_response_id=refused["id"])
    keeping.ask("third", previous_response_id=second["id"], metadata={LEVEL_KEY: "features"})
    reference = {"type": "item_reference", "id": refused["output"][0]["id"]}
    keeping.ask("referring", input=[reference, {"role": "user", "content": "And?"}])
    lowered = keeping.ask("lowered", metadata={LEVEL_KEY: "tokens"})
    keeping.ask("after lowered", previous_response_id=lowered["id"])
    asked = keeping.ask("asked")
    assert "metadata" in keeping.ask("after asked", previous_response_id=asked["id"])
    expected = {"lowered": False, "after lowered": False, "asked": True, "after asked": True}
    assert keeping.kept(4) == expected


def test_where_silence_is_no_consent(start_local: Callable[..., Any], tmp_path: Path) -> None:
    keeping = start(start_local, tmp_path / "t", traffic_consent="opt-in")
    silent, willing = keeping.ask("silent"), keeping.ask("willing", {"X-Slipstream-Traffic": "tokens"})
    keeping.ask("too late", {"X-Slipstream-Traffic": "tokens"}, previous_response_id=silent["id"])
    keeping.ask("still silent", previous_response_id=willing["id"])
    keeping.ask("again", {"X-Slipstream-Traffic": "features"}, previous_response_id=willing["id"])
    assert keeping.kept(2) == {"willing": False, "again": False}


def test_what_odd_tenants_sent_can_be_purged(start_local: Callable[..., Any], tmp_path: Path) -> None:
    keeping = start(start_local, tmp_path / "t")
    names = ["a\0b", "a", "", "  ", "ü/ß:x", "\u202e"]
    for name in names:
        keeping.ask("Hello", user=name)
    assert set(keeping.kept(len(names))) == set(names)
    for name in names:
        status, said = keeping.server.post("/admin/v1/traffic/purge", {"tenant": name})
        assert (status, said) == (200, {"purged_samples": 1}), name
