"""What drafts, and which version requests count for, while versions are read or cannot be had."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slipstream.drafter.routes import CANARY_ROUTE, SHARED_ROUTE
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.operations import SwapDrafter, SwapReport
from slipstream.server.evolution.follower import Follower
from slipstream.server.evolution.wish import Outcome, Trial, Wish


class Engine:
    """Asleep without weights: has what it has."""

    def __init__(self) -> None:
        self.is_asleep = False

    async def call(self, operation: Any) -> Any:
        if self.is_asleep:
            raise SlipstreamError("the model's weights were discarded")
        return SwapReport(operation.version, operation.route, 0.0, 0.0) if isinstance(operation, SwapDrafter) else None


def test_requests_count_for_what_drafted() -> None:
    asyncio.run(play())


async def play() -> None:
    engine, loaded = Engine(), asyncio.Event()
    served: Any = SimpleNamespace(engine=engine, engine_config=SimpleNamespace(drafter="elsewhere"))
    follower = Follower(served, Path("registry"), lambda version: Path(f"{version}"), refuse, loaded.set)

    async def wish(trial: Trial, **routes: int) -> None:
        loaded.clear()
        await follower.follow(Wish(1, {SHARED_ROUTE: routes["shared"], CANARY_ROUTE: trial.beside}, trial))
        await loaded.wait()

    first = Trial(new=2, old=1, is_live=False, share=0.5)
    await wish(first, shared=1)
    while follower.outcome(CANARY_ROUTE, 4, 3) is None:
        await asyncio.sleep(0)
    assert {follower.route(number) for number in range(50)} == {SHARED_ROUTE, CANARY_ROUTE}
    assert follower.outcome(SHARED_ROUTE, 4, 1) == Outcome(1, 4, 1)
    engine.is_asleep = True
    await wish(Trial(new=2, old=3, is_live=False, share=0.5), shared=3)
    assert {follower.route(number) for number in range(50)} == {SHARED_ROUTE}, "3 is not there, so nothing is compared"
    assert follower.outcome(SHARED_ROUTE, 4, 1) is None, "it was 1 that drafted"
    assert follower.outcome("tenant:acme", 4, 1) is None
    await follower.close()


async def refuse(refusal: object) -> None:
    raise AssertionError(refusal)
