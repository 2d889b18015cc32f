"""Graphs of a GPU, on a model of what torch's allocator of CUDA memory does with streams, pools and graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from slipstream.kernels.triton.graphs import WARM_UPS, GraphPool

WORKSPACE = 32 << 20
"""What cuBLAS takes on every stream that it computes on."""
GRAPH = 10 << 20
"""What a graph of these tests takes."""
CUDA = torch.device("cuda")


class FakeCuda:
    """torch.cuda, as far as graphs use it.

    As torch has it (c10/cuda/CUDACachingAllocator.cpp): a pool counts the graphs that were recorded in it. One that
    has none any more is gone when all of its memory is; as long as something is left in it, recording in it is refused.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cached = 0
        """Reserved, and nobody's."""
        self.held = 0
        self.room = 1 << 40
        self.breaks = False
        """Whether the end of a recording fails, as after a call that is not allowed within one."""
        self.streams: list[Any] = []
        self.current: Any = self.new_stream()
        self.capturing: Any = None
        self.workspaces: dict[Any, Any] = {}
        """By stream: the pool that it was taken from, None for that of everything else."""
        self.pools: dict[int, int] = {}
        self.handles = 0
        for name in ("stream", "graph", "graph_pool_handle", "current_stream", "memory_reserved", "empty_cache"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        patch.setattr(torch.cuda, "Stream", lambda device: self.new_stream())
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def new_stream(self) -> Any:
        made = type("Stream", (), {"wait_stream": lambda self, other: None})()
        self.streams.append(made)
        return made

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert self.pools.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.empty_cache()
        self.pools[pool] = self.pools.get(pool, 0) + 1
        graph.pool, self.capturing = pool, pool
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.capturing = None
            if self.breaks:  # before torch.cuda.graph leaves the stream
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand more")
            self.current = before

    def current_stream(self, device: Any = None) -> Any:
        return self.current

    def graph_pool_handle(self) -> int:
        self.handles += 1
        return self.handles

    def memory_reserved(self, device: Any = None) -> int:
        return self.cached + self.held

    def empty_cache(self) -> None:
        self.cached = 0
        kept = {pool for pool in self.workspaces.values() if pool is not None}
        self.pools = {pool: count for pool, count in self.pools.items() if count or pool in kept}

    def compute(self) -> None:
        """A product, and other work."""
        if self.current not in self.workspaces:
            self.workspaces[self.current] = self.capturing
            self.held += WORKSPACE
        if self.capturing is None:
            self.cached = max(self.cached, 100 << 20)
        elif self.held + GRAPH > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        else:
            self.held += GRAPH


class FakeGraph:
    pool = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def replay(self) -> None: ...

    def __del__(self) -> None:
        if self.pool:
            self._cuda.pools[self.pool] -= 1
            self._cuda.held -= GRAPH


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_graphs_are_recorded_anew_after_all_of_them_were_given_up(cuda: FakeCuda) -> None:
    """As after new weights, while something that was taken during the first recording still lies in its pool."""
    pool, owner = GraphPool(CUDA, 1 << 30), object()
    for _ in range(3):
        for key in range(3):
            pool.run(owner, key, cuda.compute)
        cuda.workspaces |= {object(): cuda.handles}  # a library took memory while a graph was recorded
        assert len(pool) == 3 and max(cuda.pools.values()) == 3
        pool.forget(owner)


def test_what_graphs_take_is_neither_what_was_cached_before_nor_memory_of_libraries(cuda: FakeCuda) -> None:
    pool = GraphPool(CUDA, 1 << 30)
    cuda.cached = 500 << 20
    for key in range(40):
        pool.run(pool, key, cuda.compute)
    assert pool.num_bytes == 40 * GRAPH
    assert len(cuda.workspaces) == 1 and not any(cuda.workspaces.values()), (
        "one stream, met before anything is recorded"
    )
    assert len(cuda.streams) == 2


def test_where_there_is_no_memory_for_a_graph_work_is_done_without(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    pool, done = GraphPool(CUDA, 1 << 30), 0
    cuda.room = WORKSPACE + 2 * GRAPH

    def work() -> None:
        nonlocal done
        cuda.compute()
        done += 1

    for key in range(5):
        pool.run(pool, key, work)
    recorded = 2 * (WARM_UPS + 1)
    refused = WARM_UPS + 1  # as is the last one here, which was tried
    assert len(pool) == 2 and done == recorded + refused + 2
    assert [record.message for record in caplog.records] == [
        "no more graphs, other steps are launched piece by piece: CUDA out of memory."
    ]


def test_where_recording_fails_work_is_done_without_on_the_stream_that_was_left(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    pool, streams = GraphPool(CUDA, 1 << 30), []
    usual = cuda.current

    def work() -> int:
        cuda.compute()
        streams.append(cuda.current)
        return len(streams)

    pool.run(pool, 0, work)
    cuda.breaks = True
    assert [pool.run(pool, key, work) for key in (1, 1, 2)] == [2 * WARM_UPS + 3, 2 * WARM_UPS + 4, 2 * WARM_UPS + 5]
    assert streams[-3:] == [usual] * 3 and cuda.current is usual
    assert len(pool) == 1 and pool.run(pool, 0, work) == WARM_UPS + 1, "what was recorded before is still replayed"
    assert pool.refused == "CUDA error: operation failed due to a previous error during capture"
    [told] = caplog.records
    assert told.message.startswith("graphs cannot be recorded here") and told.exc_info


def test_work_that_fails_without_being_recorded_fails(cuda: FakeCuda) -> None:
    pool = GraphPool(CUDA, 1 << 30)

    def work() -> None:
        raise RuntimeError("a kernel does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        pool.run(pool, 0, work)
    assert not pool.refused and pool.run(pool, 1, cuda.compute) is None and len(pool) == 1
