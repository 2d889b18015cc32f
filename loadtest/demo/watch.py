"""What the server says of its evolution, asked every second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import ClientError

POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Swap:
    """A version went live."""

    minute: float
    """Minutes since the demo's start."""
    version: int


class Watch:
    def __init__(self, admin: AdminClient, minute: Callable[[], float], on_look: Callable[[], None]) -> None:
        self._admin = admin
        self._minute = minute
        self._on_look = on_look
        self._status: dict[str, Any] = {}
        self.swaps: list[Swap] = []
        self.idle_since = monotonic()
        """Since when the worker has had nothing to do."""

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            # The next look may go well; a server that is gone is noticed by requests.
            with suppress(ClientError):
                await self.look()
            await asyncio.sleep(POLL_SECONDS)

    async def look(self) -> None:
        self._status = await self._admin.status()
        live = self.live
        if live and (not self.swaps or self.swaps[-1].version != live):
            self.swaps.append(Swap(self._minute(), live))
        if self.worker_state != "waiting":
            self.idle_since = monotonic()
        self._on_look()

    @property
    def evolution(self) -> dict[str, Any]:
        return self._status.get("evolution") or {}

    @property
    def worker_state(self) -> str:
        state: str = self.evolution.get("worker", {}).get("report", {}).get("state", "starting")
        return state

    @property
    def progress(self) -> float:
        """How much of the round of training is done, 0 to 1."""
        report = self.evolution.get("worker", {}).get("report", {})
        return float(report.get("progress", 0.0)) if report.get("state") == "training" else 0.0

    @property
    def learned(self) -> int:
        """Positions."""
        return int(self.evolution.get("worker", {}).get("tokens", 0))

    @property
    def training_rate(self) -> float:
        """Positions per second, pauses not counted."""
        return float(self.evolution.get("worker", {}).get("training", {}).get("tokens_per_second", 0.0))

    @property
    def machine(self) -> dict[str, Any] | None:
        """What steps cost there, once the server knows."""
        return self.evolution.get("machine")

    @property
    def arithmetic(self) -> str:
        """What training computes in, once the worker has said so."""
        worker = self.evolution.get("worker", {})
        return str(worker.get("report", {}).get("arithmetic", "") or worker.get("training", {}).get("arithmetic", ""))

    @property
    def kept(self) -> int:
        """Tokens of answers and prompts in the traffic store."""
        return int(self._status.get("traffic", {}).get("store_tokens", 0))

    @property
    def rounds(self) -> int:
        """Rounds of training that the gate has judged."""
        return sum(self.evolution.get("worker", {}).get("rounds", {}).values())

    @property
    def verdict(self) -> str:
        """What the gate said last, for people."""
        verdict = self.evolution.get("worker", {}).get("verdict", {})
        return f"{verdict['state']}: {verdict['message']}" if verdict else ""

    @property
    def versions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.evolution.get("versions", [])
        return found

    @property
    def live(self) -> int:
        """The live version of the registry, once it serves; 0 before."""
        live = next((each["version"] for each in self.versions if each["state"] == "live" and not each["route"]), 0)
        swapped = self.evolution.get("swaps", 0) and self.evolution.get("routes", {}).get("") == live
        return live if swapped else 0

    @property
    def on_trial(self) -> bool:
        """Whether a version is on trial, or about to be."""
        if self.evolution.get("trial"):
            return True
        newest = self.versions[-1] if self.versions else None
        return newest is not None and newest["state"] in ("candidate", "canary") and "trial" not in newest["metrics"]
