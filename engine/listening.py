"""Listeners, which hear what becomes of requests that may be kept (``NewRequest.traffic``), and by which weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from slipstream.engine.faults import Faults
from slipstream.engine.messages import FinishReason, NewRequest, TrafficStats
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.speculation.protocol import Computed, DraftRow


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that has ended, as listeners see it."""

    request: NewRequest
    tokens: list[int]
    """The prompt and the answer."""
    reason: FinishReason
    """"stop" also where a stop string ended the text; "abort" and "error" are no whole answers."""
    target_version: int
    drafter_version: int


class Listener(ABC):
    """Hears what becomes of the requests that may be kept (``NewRequest.traffic``), and must not hold a step up.

    ``begin`` and ``finish`` are called by the thread that plans steps, ``observe`` by the one that runs them; with a
    pipeline these are two, and a step may still compute a row whose request has ended.
    """

    top_k: int = 0
    """How many of the most likely tokens it wants to see at sampled positions."""

    def taps(self, model: CausalModel, tapped: tuple[int, ...]) -> tuple[int, ...]:
        """Layers whose inputs it wants to see, none or, if drafters see some already, those: ``tapped``.

        Called once, before anything that follows; raises ConfigError if the model does not show them.
        """
        return ()

    @abstractmethod
    def begin(self, request: NewRequest) -> None:
        """A request has arrived."""

    def target_changed(self, version: int, model: CausalModel) -> None:
        """The model's weights are those of this version from here on; called between two steps.

        Those that it refers to now (``model.decoder.embedding``, say) stay as they are for who keeps a reference.
        """
        return

    def observe(self, computed: Sequence[Computed]) -> None:
        """What a step computed of the requests whose features may be kept; only called with taps."""
        return

    @abstractmethod
    def finish(self, ended: EndedRequest) -> None:
        """A request that began has ended."""

    @property
    @abstractmethod
    def stats(self) -> TrafficStats:
        """The counts so far."""

    def close(self) -> None:
        """The engine ends."""
        return


class Listeners:
    """All listeners of an engine, which tells them everything through this.

    Keeping what requests say is optional: a listener that fails costs what it would have kept, and no request. After a
    failure, the request in question ends for it with an error.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._all = [_Guarded(listener) for listener in listeners]
        self._watching: list[_Guarded] = []
        """Listeners that see features."""

    def taps(self, model: CausalModel, tapped: tuple[int, ...]) -> tuple[int, ...]:
        """Layers whose inputs are wanted: those that drafters see (``tapped``), or others if they see none."""
        for guarded in self._all:
            if taps := guarded.listener.taps(model, tapped):
                assert tapped in ((), taps), "all who watch see the same layers"
                tapped = taps
                self._watching.append(guarded)
        return tapped

    def begin(self, request: NewRequest) -> None:
        """A request has arrived."""
        if request.traffic != "off":
            for guarded in self._all:
                guarded.begin(request)

    def target_changed(self, version: int, model: CausalModel) -> None:
        """New weights serve, after the step before this call and before the next one."""
        for guarded in self._all:
            guarded.target_changed(version, model)

    def top_k(self, rows: Iterable[DraftRow]) -> int:
        """How many of the most likely tokens they want to see of one of these rows."""
        most = max((guarded.listener.top_k for guarded in self._watching), default=0)
        return most if most and any(row.traffic == "features" for row in rows) else 0

    def observe(self, computed: Sequence[Computed]) -> None:
        """What a step computed, as far as it is right."""
        if self._watching and (kept := [entry for entry in computed if entry.row.traffic == "features"]):
            for guarded in self._watching:
                guarded.observe(kept)

    def finish(self, ended: EndedRequest) -> None:
        """A request that began has ended."""
        if ended.request.traffic != "off":
            for guarded in self._all:
                guarded.finish(ended)

    def stats(self) -> TrafficStats:
        """The counts of the first one, which keeps the traffic."""
        return self._all[0].listener.stats if self._all else TrafficStats()

    def close(self) -> None:
        for guarded in self._all:
            guarded.listener.close()


class _Guarded:
    """A listener that may fail."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._faults = Faults()
        self._spoiled: set[int] = set()
        """Requests that run and are not to be kept any more."""

    def begin(self, request: NewRequest) -> None:
        try:
            self.listener.begin(request)
        except Exception:
            self._spoil([request.request_id])

    def target_changed(self, version: int, model: CausalModel) -> None:
        try:
            self.listener.target_changed(version, model)
        except Exception:
            self._faults.tell("hearing of the model's new weights", "whoever listens goes on with the old ones")

    def observe(self, computed: Sequence[Computed]) -> None:
        kept = [entry for entry in computed if entry.row.request_id not in self._spoiled]
        try:
            self.listener.observe(kept)
        except Exception:
            self._spoil([entry.row.request_id for entry in kept])

    def finish(self, ended: EndedRequest) -> None:
        if ended.request.request_id in self._spoiled:
            self._spoiled.discard(ended.request.request_id)
            ended = replace(ended, reason="error")
        try:
            self.listener.finish(ended)
        except Exception:
            self._faults.tell("keeping a request", "it is not kept")

    def _spoil(self, request_ids: Sequence[int]) -> None:
        self._spoiled.update(request_ids)
        self._faults.tell("listening to requests", "those of this step are not kept")
