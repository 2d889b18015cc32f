"""How full disks are, also where a folder is not there yet."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from slipstream.server.telemetry.disks import Disks, look


def test_a_folder_lies_on_the_disk_of_those_above_it(tmp_path: Path) -> None:
    found = look({"there": tmp_path, "to come": tmp_path / "not" / "yet"})
    assert found["there"][0] == found["to come"][0] > found["to come"][1] > 0


async def test_metrics_say_what_was_seen(tmp_path: Path) -> None:
    disks = Disks("slipstream:", "m")
    registry = CollectorRegistry()
    registry.register(disks)
    before = generate_latest(registry).decode()
    assert "# TYPE slipstream:disk_free_bytes gauge" in before and 'store="' not in before
    watching = asyncio.create_task(disks.watch({"traffic": tmp_path}))
    try:
        while not next(iter(disks.collect())).samples:
            await asyncio.sleep(0.001)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    size, free = ([sample.value for sample in family.samples] for family in disks.collect())
    assert size > free > [0]
    assert 'slipstream:disk_free_bytes{model_name="m",store="traffic"}' in generate_latest(registry).decode()
