"""How full the disks are that the server writes to while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LOOK_SECONDS = 10.0


class Disks(Collector):
    """Metrics of the disks under folders; a folder that cannot be asked about has no series.

    The system is asked in a thread: a file system whose other end is gone answers late or never, and neither requests
    nor scrapes may wait for it.
    """

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._model_name = model_name
        self._found: Mapping[str, tuple[int, int]] = {}
        """Bytes in all and free, by what is kept there."""

    async def watch(self, folders: Mapping[str, Path]) -> None:
        """Looks at them until cancelled; the keys are values of the label ``store``."""
        while True:
            self._found = await asyncio.to_thread(look, folders)
            await asyncio.sleep(LOOK_SECONDS)

    def collect(self) -> Iterable[Metric]:
        labels = ("model_name", "store")
        sizes = GaugeMetricFamily(self._prefix + "disk_size_bytes", "Size of the disk under a folder.", labels=labels)
        free = GaugeMetricFamily(
            self._prefix + "disk_free_bytes", "Room on it for what this user writes.", labels=labels
        )
        for store, (size, left) in self._found.items():
            sizes.add_metric((self._model_name, store), size)
            free.add_metric((self._model_name, store), left)
        yield from (sizes, free)


def look(folders: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Bytes in all and free of the disks under folders, whether or not these exist yet."""
    found = {}
    for store, folder in folders.items():
        absolute = folder.absolute()
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists()))
            found[store] = usage.total, usage.free
    return found
