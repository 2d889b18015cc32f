"""What is read from a profiler's trace."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.server.gpu_check.trace import activity


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_times_in_which_the_device_waits_are_those_of_no_stream() -> None:
    events = [
        event("kernel", "gemm", 100, 50),
        event("kernel", "beside it", 120, 60),  # until 180
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 190, 10, bytes=4096),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 280, 20, bytes=128),
        event("gpu_memset", "Memset (Device)", 195, 1),
        event("cuda_runtime", "cudaLaunchKernel", 90, 5),
        event("cuda_runtime", "cudaGraphLaunch", 96, 5),
        event("cuda_driver", "cuLaunchKernelEx", 97, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 260, 40),
        event("cuda_runtime", "cudaMemcpyAsync", 250, 4),
        event("cpu_op", "aten::mm", 80, 30),
        {"ph": "M", "name": "process_name"},
        event("python_function", "step", 0, 1000),
    ]
    found = activity(events)
    assert found.seconds == pytest.approx(200e-6) and found.busy == pytest.approx(110e-6)
    assert found.idle_share == pytest.approx(0.45)
    assert (found.kernels, found.launches, found.waits, found.operations) == (2, 3, 1, 1)
    assert (found.to_device, found.bytes_to_device, found.to_host, found.bytes_to_host) == (1, 4096, 1, 128)


def test_without_a_device_there_is_nothing_on_it() -> None:
    found = activity([event("cpu_op", "aten::mm", 80, 30)])
    assert (found.seconds, found.busy, found.idle_share, found.kernels, found.operations) == (0, 0, 0, 0, 1)


def test_the_device_waits_for_the_host_until_what_comes_next_is_launched() -> None:
    """Not within a graph, and not for what was launched ahead; for what nobody knows the launch of, all the time."""
    events = [
        event("cuda_runtime", "cudaGraphLaunch", 0, 10, correlation=1),
        event("kernel", "first of the graph", 20, 10, correlation=1),
        event("kernel", "second of the graph", 35, 10, correlation=1),  # until 45
        event("cuda_driver", "cuLaunchKernelEx", 40, 3, correlation=2),
        event("kernel", "launched ahead", 50, 10, correlation=2),  # until 60
        event("cuda_runtime", "cudaLaunchKernel", 70, 10, correlation=3),
        event("kernel", "launched late", 85, 5, correlation=3),  # until 90
        event("cuda_runtime", "cudaMemcpyAsync", 95, 100, correlation=4),
        event(
            "gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 96, 4, correlation=4, bytes=1
        ),  # begins before its call ends
        event("kernel", "from somewhere", 110, 10),
    ]
    found = activity(events)
    assert found.late * 1e6 == pytest.approx((80 - 60) + (96 - 90) + (110 - 100))
    assert found.late_share == pytest.approx(36 / 100) and found.seconds == pytest.approx(100e-6)
