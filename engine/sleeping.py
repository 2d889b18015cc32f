"""An engine that sleeps: memory that it gives back to the system for a while, and takes again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch

from slipstream.engine.background import Background
from slipstream.engine.memory import trim
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import HostCopy, Rows, fill_sent
from slipstream.engine.operations import MemoryOperation, MemoryTag, ReleaseMemory, ResumeMemory
from slipstream.engine.runner.runner import ModelRunner
from slipstream.engine.scheduling.scheduler import Scheduler
from slipstream.engine.target.update import PrepareUse, TargetUpdates

Tensors = Iterable[tuple[str, Rows]]


class Sleeper:
    """Gives memory of the cache and of the weights back, and takes it again, in the order in which it is told to.

    Drafters keep their weights and their versions; their keys and values go with those of the model.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        targets: TargetUpdates,
        background: Background,
        prepare_use: PrepareUse,
        files: Callable[[], Tensors],
    ) -> None:
        """``files`` reads the weights that the engine began with."""
        self._runner, self._scheduler, self._targets = runner, scheduler, targets
        self._background, self._prepare_use, self._files = background, prepare_use, files
        self._model: CausalModel = runner.model
        self._kept: HostCopy | None = None
        """Weights of a GPU, in the memory of the host."""

    def operate(self, asked: MemoryOperation) -> Future[Any]:
        if isinstance(asked, ResumeMemory):
            return self._background.start(lambda: self._prepare(asked))
        # After what is being prepared for the weights that there are now.
        return self._background.start(lambda: lambda: self._release(asked))

    def _release(self, asked: ReleaseMemory) -> None:
        standstill = self._scheduler.standstill
        tags = [tag for tag in asked.tags if tag not in standstill.released]
        self._scheduler.interrupt("abort" if asked.abort else "recompute" if "kv_cache" in tags else "keep")
        standstill.released = tuple(sorted({*standstill.released, *tags}))
        if "kv_cache" in tags:
            self._scheduler.kv.reset()
            for cache in self._runner.caches:
                cache.release()
        # Those that were kept when it fell asleep may be discarded later.
        if "weights" in tags or ("weights" in asked.tags and not asked.keep_weights):
            self._release_weights(asked.keep_weights)
        give_back()

    def _release_weights(self, keep: bool) -> None:
        on_host = self._runner.cache.device.type == "cpu"
        if keep and on_host:
            return  # they lie where they would be kept
        self._kept = HostCopy(self._model.weights) if keep else None
        had_weights = self._targets.has_weights
        self._targets.discard(keep)
        if had_weights:
            for drafter in self._runner.speculator.drafters:
                drafter.forget_target()

    def _prepare(self, asked: ResumeMemory) -> Callable[[], None]:
        if "weights" not in asked.tags or self._targets.has_weights:
            return lambda: self._resume(asked.tags)
        weights, kept = self._model.new_weights(), self._kept
        for name, tensor in self._files() if kept is None else kept.tensors.items():
            if kept is None:
                fill_sent(weights, name, tensor)
            else:
                weights.fill(name, tensor, exact=True)
        weights.check_complete()
        follow = self._prepare_use(weights)
        version = 0 if kept is None else self._scheduler.target_version

        def land() -> None:
            if not self._targets.has_weights:  # else an update was finished meanwhile
                self._targets.use(weights, version, "recompute", follow)
            self._resume(asked.tags)

        return land

    def _resume(self, tags: tuple[MemoryTag, ...]) -> None:
        standstill = self._scheduler.standstill
        if "kv_cache" in tags and "kv_cache" in standstill.released:
            for cache in self._runner.caches:
                cache.restore()
        if "weights" in tags:
            self._kept = None
        standstill.released = tuple(tag for tag in standstill.released if tag not in tags)
        give_back()  # what reading the weights took besides


def give_back() -> None:
    """Has the allocators give memory that is free to the system."""
    if torch.cuda.is_available():
        gc.collect()  # what is still referred to is not free
        torch.cuda.empty_cache()
    trim()
