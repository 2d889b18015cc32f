"""Keeping what requests say is optional: a listener that fails costs what it would have kept, and no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slipstream.engine.faults import Faults
from slipstream.engine.messages import NewRequest, TrafficStats
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.speculation.protocol import Computed, EndedRequest, Listener


class GuardedListener(Listener):
    """Passes on what it hears; after a failure the request in question ends for the listener with an error."""

    def __init__(self, listener: Listener) -> None:
        self.top_k = listener.top_k
        self._listener = listener
        self._faults = Faults()
        self._spoiled: set[int] = set()
        """Requests that run and are not to be kept any more."""

    def taps(self, model: CausalModel, tapped: tuple[int, ...]) -> tuple[int, ...]:
        return self._listener.taps(model, tapped)

    def begin(self, request: NewRequest, target_version: int) -> None:
        try:
            self._listener.begin(request, target_version)
        except Exception:
            self._spoil([request.request_id])

    def observe(self, computed: Sequence[Computed]) -> None:
        kept = [entry for entry in computed if entry.row.request_id not in self._spoiled]
        try:
            self._listener.observe(kept)
        except Exception:
            self._spoil([entry.row.request_id for entry in kept])

    def finish(self, ended: EndedRequest) -> None:
        if ended.request.request_id in self._spoiled:
            self._spoiled.discard(ended.request.request_id)
            ended = replace(ended, reason="error")
        try:
            self._listener.finish(ended)
        except Exception:
            self._faults.tell("keeping a request", "it is not kept")

    @property
    def stats(self) -> TrafficStats:
        return self._listener.stats

    def close(self) -> None:
        self._listener.close()

    def _spoil(self, request_ids: Sequence[int]) -> None:
        self._spoiled.update(request_ids)
        self._faults.tell("listening to requests", "those of this step are not kept")
