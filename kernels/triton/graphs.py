"""Work on the device that is recorded once and repeated by one call: single launches keep the host busy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens that graphs are recorded for. A batch takes the smallest that it fits in; a larger one is launched piece by
piece, since then the device is busy for longer than the host."""
WARM_UPS = 2
"""Runs before recording: kernels are compiled and libraries take their memory in them."""


class Graph(Protocol):
    """Recorded work, which reads and writes the same memory each time."""

    def record(self, work: Callable[[], Any]) -> Any:
        """What the work returns; its tensors are those that ``replay`` fills."""

    def replay(self) -> None: ...


class RecordingError(RuntimeError):
    """Work could not be recorded, for another reason than memory; the cause says why."""


class CudaGraph:
    """One of CUDA's, in memory that it shares with others: their results are gone when one of them runs."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._pool, self._stream = pool, stream
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream()
        try:
            # Other threads may fill weights meanwhile, which is none of this graph.
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                return work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            torch.cuda.set_stream(current)  # torch has left this thread where it was recording
            raise RecordingError(str(error)) from error

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: Graph
    result: Any


class GraphPool:
    """Graphs of several owners by key, recorded when they are first asked for, as long as there is memory for them."""

    def __init__(self, device: torch.device, max_bytes: int, make: Callable[[], Graph] | None = None) -> None:
        """``make`` makes an empty graph; by default one of CUDA's, in a pool of memory that all of them share."""
        self._device, self._max_bytes = device, max_bytes
        self._stream: torch.cuda.Stream | None = None
        """Where graphs are tried and recorded: always the same, as cuBLAS takes memory on every stream it meets."""
        if make is None and device.type == "cuda" and max_bytes:
            self._stream, make = torch.cuda.Stream(device), self._of_cuda
        self._make = make
        self._pool: Any = None
        self._recorded: dict[tuple[object, Hashable], _Recorded] = {}
        self.num_bytes = 0
        """Memory that recording took so far."""
        self.refused = ""
        """Why nothing can be recorded here; empty as long as it can."""

    def __len__(self) -> int:
        return len(self._recorded)

    def bucket(self, tokens: int) -> int | None:
        """Room for tokens of the graph that such a batch takes; None if it is launched piece by piece."""
        if self._make is None:
            return None
        return next((room for room in BUCKETS if tokens <= room), None)

    def forget(self, owner: object) -> None:
        """Gives up all graphs of an owner: what they read or write is somewhere else now."""
        self._recorded = {key: graph for key, graph in self._recorded.items() if key[0] is not owner}
        if not self._recorded:
            self.num_bytes = 0

    def run(self, owner: object, key: Hashable, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, by the owner's graph of that key; valid until the next call.

        Work of the same key has to be the same: the operations, their shapes, and where what they read and write lies.
        """
        if (found := self._recorded.get((owner, key))) is None:
            if self._make is None or self.num_bytes >= self._max_bytes:
                return work()
            try:
                found = self._recorded[owner, key] = self._record(self._make(), work)
            except torch.OutOfMemoryError as error:
                log.warning("no more graphs, other steps are launched piece by piece: %s", str(error).split("\n")[0])
                self._max_bytes = 0
            except RecordingError as error:
                log.exception("graphs cannot be recorded here, all steps are launched piece by piece")
                self._max_bytes, self.refused = 0, str(error).split("\n")[0]
        if found is None:  # launched piece by piece it takes less, as nothing is kept
            return work()
        found.graph.replay()
        return found.result

    def _of_cuda(self) -> Graph:
        assert self._stream is not None
        if not self._recorded:  # torch refuses a pool all of whose graphs are gone, as long as anything is left in it
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(self._pool, self._stream)

    def _record(self, graph: Graph, work: Callable[[], Any]) -> _Recorded:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        before = self._memory()
        made = _Recorded(graph, graph.record(work))
        self.num_bytes += max(0, self._memory() - before)
        if self.num_bytes >= self._max_bytes:
            log.warning(
                "graphs took %d MiB, which is what --graph-memory allows: other steps are launched piece by piece",
                self.num_bytes >> 20,
            )
        return made

    def _memory(self) -> int:
        """What is reserved, without what nobody has any more: recording gives that back first, too."""
        if self._stream is None:
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)
