"""The thread that writes samples: nothing of it happens in a step of the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.index import TrafficUnusableError
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.engine.errors import ConfigError
from slipstream.engine.faults import Faults
from slipstream.engine.messages import TrafficStats

log = logging.getLogger(__name__)
Redact = Callable[[Sample], Sample | None]
MOST_WAITING = 1024
"""Samples that may wait to be written."""
EVERY_S = 1.0
"""What ended within so many seconds is written together."""
EXPIRE_EVERY_S = 60.0
REOPEN_S = 5.0
"""How often what failed is tried again: opening a damaged store, or writing the target's new weights."""
CLOSE_S = 5.0
"""How long the end of the engine waits for what is not written yet."""
SWITCH_S = 0.0005
"""The step loop must not wait long for the interpreter while this thread has it."""


class TrafficWriter:
    def __init__(self, open_store: Callable[[], TrafficStore], redact: Redact | None = None) -> None:
        """Raises ConfigError if another process writes to the store, or it is another model's.

        A damaged store holds up nobody: what is to be kept is counted as dropped, and the store is opened again from
        time to time.
        """
        self._open_store = open_store
        self._store: TrafficStore | None = None
        self._failure = ""
        self._is_failing = False
        """Whether nothing could be written since the log was told why."""
        self._lost_before = 0
        """Samples that were lost when all went well."""
        self._redact = redact
        self._waiting: deque[Callable[[], Sample]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._kept = self._redacted = self._failed = 0
        self._refused = 0  # counted by the engine's threads, the others by the writer
        self._totals = (0, 0)
        self._told = TrafficStats()
        """What came of all that was begun: counters of samples on their way would not fit together."""
        self._put_target: Callable[[Path], None] | None = target_file.remove
        """Makes the file of the target's weights tell of those that serve; first, of those of the model's files.

        None once that is done: it holds weights, which may be wanted back."""
        self._target_lock = threading.Lock()
        self._target_due = 0.0
        """When it is tried again if it failed; as time.monotonic() has it."""
        self.last_purge = 0
        """The number of the last purge that is known of."""
        self.files_since = 0.0
        """See ``TrafficIndex.files_since``."""
        self._faults = Faults()
        self._expired_at = self._opened_at = time.monotonic()
        try:
            self._open()
        except TrafficUnusableError as error:
            self._fail(error)
        self._told = self._count()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> TrafficStats:
        told = self._told
        return msgspec.structs.replace(told, dropped=told.dropped + self._refused)

    def offer(self, make: Callable[[], Sample]) -> bool:
        """``make`` is called by the writer thread; False, and counted as dropped, if too much is waiting."""
        if len(self._waiting) >= MOST_WAITING:
            self.drop()
            return False
        self._waiting.append(make)
        return True

    def target_changed(self, put: Callable[[Path], None]) -> None:
        """New weights serve: the writer thread calls ``put``, which writes what is needed of them into the folder."""
        with self._target_lock:
            self._put_target = put

    def drop(self) -> None:
        """Counts a sample for which there was no room."""
        self._refused += 1

    def close(self) -> None:
        """Writes what is waiting, as far as it takes no more than CLOSE_S."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive() and self._store is not None:
            self._store.close()

    def _open(self) -> TrafficStore:
        """The store, opened again if that failed; raises ConfigError."""
        if self._store is None:
            self._opened_at = time.monotonic()
            store = self._open_store()
            store.lock()
            self._totals = store.index.totals()
            self.last_purge, self.files_since = store.index.last_purge(), store.index.files_since()
            self._store, self._failure = store, ""
        self._update_target(self._store.index.folder)
        return self._store

    def _update_target(self, folder: Path) -> None:
        """A failure costs no sample; it is tried again."""
        if time.monotonic() < self._target_due:
            return
        with self._target_lock:
            put, self._put_target = self._put_target, None
        try:
            if put is not None:
                put(folder)
        except Exception:
            with self._target_lock:
                self._put_target = self._put_target or put
            self._target_due = time.monotonic() + REOPEN_S
            self._faults.tell("writing the model's new weights for training", "it goes on with the old ones")

    def _fail(self, error: Exception) -> None:
        """Serving goes on: the disk is full, say."""
        message = f"{type(error).__name__}: {error}"
        if message != self._failure:
            where = f" in {self._store.index.folder}" if self._store is not None else ""
            log.error("traffic cannot be kept%s: %s; samples are dropped and counted until it can", where, message)
        self._failure, self._is_failing = message, True
        if isinstance(error, ConfigError) and self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()
            self._store = None

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(EVERY_S)
            closing = self._closing  # what came before is written now
            try:
                self._write()
            except Exception as error:
                self._fail(error)
            self._told = self._count()

    def _count(self) -> TrafficStats:
        """Without what was refused."""
        size, tokens = self._totals
        return TrafficStats(
            kept=self._kept,
            dropped=self._failed,
            redacted=self._redacted,
            store_bytes=size,
            store_tokens=tokens,
            failure=self._failure,
        )

    def _write(self) -> None:
        samples = []
        taken = len(self._waiting)
        for _ in range(taken):
            sample = self._prepare(self._waiting.popleft()())
            if sample is not None:
                samples.append(sample)
        self._failed += len(samples)
        if self._store is None and time.monotonic() - self._opened_at < REOPEN_S:
            return
        store = self._open()
        self.last_purge = store.index.last_purge()
        failure: Exception | None = None
        # What goes wrong with one tenant's samples does not lose the others'.
        for tenant in {sample.tenant: None for sample in samples}:
            try:
                kept = store.append([sample for sample in samples if sample.tenant == tenant])
            except Exception as error:
                failure = error
                continue
            self._failed -= kept
            self._kept += kept
        if failure is not None:
            raise failure
        if not samples and time.monotonic() - self._expired_at > EXPIRE_EVERY_S:
            store.expire()
            self._expired_at = time.monotonic()
        self._totals = store.index.totals()
        if samples:
            self._failure = ""
            if self._is_failing:
                lost = self._failed - self._lost_before
                log.warning("traffic is kept again in %s; samples lost meanwhile: %d", store.index.folder, lost)
            self._is_failing = False
        if not self._is_failing:
            self._lost_before = self._failed

    def _prepare(self, sample: Sample) -> Sample | None:
        """What the redaction hook makes of it; its errors say nothing of the content."""
        if self._redact is None:
            return sample
        try:
            changed = self._redact(sample)
            if changed is None:
                self._redacted += 1
                return None
            return _accept(sample, changed)
        except Exception as error:
            self._failed += 1
            log.warning("the redaction hook failed, and the sample is dropped: %s", type(error).__name__)
            return None


def _accept(sample: Sample, changed: Sample) -> Sample:
    """What to keep; features and log-probabilities tell of the tokens, so they go where tokens were changed.

    Raises ValueError for what cannot be kept.
    """
    tokens = np.ascontiguousarray(changed.tokens, np.int32)
    if tokens.ndim != 1 or not 0 <= changed.num_prompt <= len(tokens):
        raise ValueError("tokens and num_prompt do not go together")
    if np.array_equal(tokens, sample.tokens) and changed.num_prompt == sample.num_prompt:
        keeps_features, keeps_topk = changed.features is not None, changed.topk is not None
        return dataclasses.replace(
            sample,
            domain=changed.domain,
            features=sample.features if keeps_features else None,
            topk=sample.topk if keeps_topk else None,
            start=sample.start if keeps_features else len(tokens),
            taps=sample.taps if keeps_features else (),
        )
    return dataclasses.replace(
        sample,
        tokens=tokens,
        num_prompt=changed.num_prompt,
        domain=changed.domain,
        start=len(tokens),
        features=None,
        topk=None,
        taps=(),
    )


def load_hook(name: str) -> Redact:
    """ "module:function"; raises ConfigError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--traffic-redact {name}: {error}") from None
    if not callable(found):
        raise ConfigError(f"--traffic-redact {name}: it is no function")
    hook: Redact = found
    return hook
