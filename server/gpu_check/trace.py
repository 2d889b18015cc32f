"""What happened on the device during some steps, from the trace that torch's profiler writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events that the device is busy with."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls in which the host waits for the device; a copy of this name is one that waits."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")


@dataclass(frozen=True, slots=True)
class Activity:
    """Sums over a time."""

    seconds: float
    """From the first thing on the device to the end of the last one."""
    busy: float
    """Seconds in which the device did something."""
    late: float
    """Seconds in which it did nothing as what came next was not launched yet."""
    kernels: int
    to_device: int
    """Copies from the host."""
    to_host: int
    bytes_to_device: int
    bytes_to_host: int
    waits: int
    launches: int
    operations: int
    """Operations of torch on the host."""

    @property
    def idle_share(self) -> float:
        return 1 - self.busy / self.seconds if self.seconds else 0.0

    @property
    def late_share(self) -> float:
        return self.late / self.seconds if self.seconds else 0.0


def watch(run: Callable[[], None], file: Path) -> Activity:
    """What ``run`` did; the trace itself goes into a file.

    On a GPU without torch's operations, whose recording would slow the host down.
    """
    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        run()
    found.export_chrome_trace(str(file))
    return activity(json.loads(file.read_text())["traceEvents"])


def activity(events: Iterable[Mapping[str, Any]]) -> Activity:
    """From the events of a trace, whose times are in microseconds."""
    complete = [event for event in events if event.get("ph") == "X"]
    calls = [event for event in complete if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {number: _end(call) for call in calls if (number := _correlation(call)) is not None}
    spans = sorted(
        (float(event["ts"]), _end(event), launched.get(_correlation(event), float(event["ts"])))
        for event in complete
        if event.get("cat") in ON_DEVICE
    )
    busy, late, until = 0.0, 0.0, 0.0
    for begin, end, known in spans:
        busy += max(end - max(begin, until), 0.0)
        if until:
            late += max(min(begin, known) - until, 0.0)
        until = max(until, end)
    copies = [(str(event["name"]), _bytes(event)) for event in complete if event.get("cat") == "gpu_memcpy"]
    to_device = [size for name, size in copies if "HtoD" in name]
    to_host = [size for name, size in copies if "DtoH" in name]
    names = [str(call["name"]) for call in calls]
    return Activity(
        seconds=(until - spans[0][0]) / 1e6 if spans else 0.0,
        busy=busy / 1e6,
        late=late / 1e6,
        kernels=sum(event.get("cat") == "kernel" for event in complete),
        to_device=len(to_device),
        to_host=len(to_host),
        bytes_to_device=sum(to_device),
        bytes_to_host=sum(to_host),
        waits=sum(name in WAITS for name in names),
        launches=sum(name in LAUNCHES for name in names),
        operations=sum(event.get("cat") == "cpu_op" for event in complete),
    )


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _correlation(event: Mapping[str, Any]) -> Any:
    """What a launch and what it launched have in common; all of a graph, with the one launch of it."""
    return event.get("args", {}).get("correlation")


def _bytes(event: Mapping[str, Any]) -> int:
    return int(event.get("args", {}).get("bytes", 0))
