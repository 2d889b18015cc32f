"""Listens to the engine and keeps what consenting requests said: tokens and, where asked for, features."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.head.layout import default_taps
from slipstream.drafter.registry.fingerprint import files_fingerprint, served_fingerprint, traffic_target
from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.config import TrafficConfig, parse_duration
from slipstream.drafter.traffic.pages import FeaturePages, Track
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.target_file import EMBEDDING, OUTPUT, UpdatedWeights
from slipstream.drafter.traffic.writer import TrafficWriter, load_hook
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.listening import EndedRequest, Listener
from slipstream.engine.messages import NewRequest, TrafficStats
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.speculation.protocol import Computed
from slipstream.engine.units import parse_size

LEAST_S = 0.001
MOST_POSITIONS = 4096
"""Positions of a request, from its end, whose features are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    """Weights of the model that serve, or did; the number of a version may come again, for others."""

    since: float = 0.0
    """When they began to, in seconds since 1970; 0 for those that served first."""


class _Recording:
    """What is kept of a running request."""

    __slots__ = ("after_purge", "dropped", "serving", "time", "top", "track")

    def __init__(self, serving: _Serving, after_purge: int) -> None:
        self.time = time.time()
        self.serving = serving
        self.after_purge = after_purge
        self.track = Track()
        self.top: list[tuple[Tensor, Tensor]] = []
        self.dropped = False


class TrafficTap(Listener):
    """Copies rows into pages in a step, and does nothing else; a sample for which there is no room is dropped."""

    def __init__(
        self,
        writer: TrafficWriter,
        features: bool,
        buffer_bytes: int = 256 << 20,
        top_k: int = 0,
        most_positions: int = MOST_POSITIONS,
        target: Callable[[], str] = lambda: "",
    ) -> None:
        """``target`` returns the fingerprint of the served model; the writer asks for it when weights are updated."""
        self.top_k = top_k
        self._target = target
        self._serving = _Serving()
        self._writer = writer
        self._features = features
        self._buffer_bytes = buffer_bytes
        self._most_positions = most_positions
        self._taps: tuple[int, ...] = ()
        self._pages: FeaturePages
        self._recordings: dict[int, _Recording] = {}
        self._lock = threading.Lock()
        """Between the thread that runs steps and the one that plans them; the writer never holds it."""

    def taps(self, model: CausalModel, tapped: tuple[int, ...]) -> tuple[int, ...]:
        if not self._features:
            return ()
        if (decoder := model.decoder) is None:
            raise ConfigError(
                f"{model.shape.model_type} models, run through transformers, do not show hidden states; "
                "use --traffic-log tokens"
            )
        self._taps = tapped or default_taps(model.shape.num_layers)
        self._pages = FeaturePages(self._buffer_bytes, len(self._taps), decoder.config.hidden)
        return self._taps

    @property
    def stats(self) -> TrafficStats:
        return self._writer.stats

    def begin(self, request: NewRequest) -> None:
        with self._lock:
            self._recordings[request.request_id] = _Recording(self._serving, self._writer.last_purge)

    def target_changed(self, version: int, model: CausalModel) -> None:
        self._serving = _Serving(time.time())
        since = self._serving.since
        decoder = model.decoder
        if decoder is None:
            return  # nor is anything trained for such a model
        matrices = {EMBEDDING: decoder.embedding}
        if decoder.output is not decoder.embedding:
            matrices[OUTPUT] = decoder.output
        device = decoder.compute.device
        self._writer.target_changed(
            lambda folder: target_file.write(folder, UpdatedWeights(version, since, self._target()), matrices, device)
        )

    def observe(self, computed: Sequence[Computed]) -> None:
        places: list[int] = []
        features: list[Tensor] = []
        with self._lock:
            for entry in computed:
                recording = self._recordings.get(entry.row.request_id)
                if recording is None or recording.dropped:
                    continue  # it has ended while the step ran, or there was no room
                if entry.top is not None and self.top_k:
                    recording.top.append((entry.top[0].cpu(), entry.top[1].cpu()))
                new = self._new(recording, entry)
                if not len(new):
                    continue
                found = self._pages.extend(recording.track, len(new), self._most_positions)
                if found is None:
                    self._drop(recording)
                else:
                    places += found
                    features.append(new)
            if places:
                self._pages.write(places, features)

    def _new(self, recording: _Recording, entry: Computed) -> Tensor:
        """The rows that follow those there are.

        After a preemption some come again, with the same content. Where a gap would come about, because the prefix
        cache knew more this time, or where earlier positions come, because it knew less, recording starts over: what
        is computed from here on goes up to the last token.
        """
        track = recording.track
        if not track.pages or not track.begin <= entry.start <= track.end:
            self._pages.release(track)
            track.begin = track.end = entry.start
        beyond = entry.start + len(entry.rows) - self._most_positions
        if beyond > track.end:
            self._pages.release(track)
            track.begin = track.end = beyond
        return entry.features[track.end - entry.start :]

    def _drop(self, recording: _Recording) -> None:
        recording.dropped = True
        recording.top = []
        self._pages.release(recording.track)

    def finish(self, ended: EndedRequest) -> None:
        with self._lock:
            recording = self._recordings.pop(ended.request.request_id, None)
        if recording is None:
            return
        since = self._serving.since
        by_one = recording.serving is self._serving
        # Others go by times to tell whose answer it is, and clocks are put back.
        recording.time = max(recording.time, since) if by_one else min(recording.time, since - LEAST_S)
        if recording.dropped:
            self._writer.drop()
        elif (
            ended.reason in ("abort", "error")
            or len(ended.tokens) == len(ended.request.prompt)  # nothing was to be said
            or not self._writer.offer(lambda: self._sample(ended, recording, by_one))
        ):
            self._release(recording)

    def close(self) -> None:
        self._writer.close()

    def _sample(self, ended: EndedRequest, recording: _Recording, by_one: bool) -> Sample:
        """Puts a sample together and lets the pages go; called by the writer.

        ``by_one``: whether the same weights answered from the first token to the last; else only tokens mean anything.
        """
        tokens = np.array(ended.tokens, np.int32)
        num_prompt = len(ended.request.prompt)
        track = recording.track
        features: Tensor | None = None
        topk: tuple[Tensor, Tensor] | None = None
        start = len(tokens)
        if by_one:
            end = min(track.end, len(tokens) - 1)
            begin = max(track.begin, end - self._most_positions)
            if track.pages and begin < end:
                start = begin
                features = self._pages.read(track, end)[begin - track.begin :].clone()
            if recording.top:
                ids, logprobs = (
                    torch.cat(parts)[: len(tokens) - num_prompt] for parts in zip(*recording.top, strict=True)
                )
                topk = ids, logprobs
        self._release(recording)
        return Sample(
            tenant=ended.request.tenant,
            domain=ended.request.domain,
            target_version=ended.target_version,
            drafter_version=ended.drafter_version,
            time=max(recording.time, self._writer.files_since) if by_one else recording.time,
            tokens=tokens,
            num_prompt=num_prompt,
            start=start,
            features=features,
            topk=topk,
            greedy=ended.request.params.temperature == 0,
            taps=self._taps if features is not None else (),
            after_purge=recording.after_purge,
        )

    def _release(self, recording: _Recording) -> None:
        if recording.track.pages:
            self._pages.release(recording.track)


def make_listeners(traffic: TrafficConfig, engine: EngineConfig) -> list[Listener]:
    """What the options ask for; raises ConfigError."""
    if traffic.traffic_log == "off":
        return []
    assert traffic.traffic_folder is not None
    max_bytes = parse_size(traffic.traffic_max_bytes, "traffic-max-bytes")
    buffer_bytes = parse_size(traffic.traffic_buffer, "traffic-buffer")
    redact = load_hook(traffic.traffic_redact) if traffic.traffic_redact else None
    max_age = parse_duration(traffic.traffic_max_age, "traffic-max-age")
    folder, target, files = traffic.traffic_folder, traffic_target(engine), files_fingerprint(engine)

    def open_store() -> TrafficStore:
        store = TrafficStore(folder, max_bytes, max_age)
        try:
            store.lock()
            store.index.claim(target, files)
        except BaseException:
            store.close()
            raise
        return store

    writer, features = TrafficWriter(open_store, redact), traffic.traffic_log == "features"
    fingerprint = cache(lambda: served_fingerprint(engine))
    return [TrafficTap(writer, features, buffer_bytes, traffic.traffic_topk, target=fingerprint)]
