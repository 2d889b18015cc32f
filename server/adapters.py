"""LoRAs by name: those beside the model, which requests choose by ``model``, and those merged into its weights.

The one that was merged last serves under every name of the model; a name that it has brought is one more of these.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.engine.errors import ConfigError, EngineDiedError, SlipstreamError
from slipstream.engine.handle import EngineHandle
from slipstream.engine.messages import NewRequest
from slipstream.engine.operations import LoadAdapter, LoadSharedAdapter, UnloadAdapter
from slipstream.server.errors import ApiError, ConflictError, InvalidRequestError, ModelNotFoundError
from slipstream.server.preparing.prepared import require_model
from slipstream.server.rollout.control import Control

logger = logging.getLogger(__name__)
CONFIG_FILE = "adapter_config.json"
SHARED = "__tensor__"
"""Stands for the folder of a LoRA that lies in none, as in SGLang."""
OPTION = "--lora-modules"


class Named(Protocol):
    """A sequence, as far as its LoRA is concerned."""

    @property
    def request(self) -> NewRequest: ...

    @property
    def has_begun(self) -> bool: ...


class Adapters(Collector):
    """What the model of a server answers to. The engine has the LoRAs; this knows them for the engine after it, too."""

    def __init__(
        self, control: Control, model_names: Sequence[str], folders: Mapping[str, str], most: int, prefix: str
    ) -> None:
        """``folders`` of LoRAs to begin with, ``most`` that there may be; ``prefix`` of metrics.

        Raises ConfigError for what cannot be a LoRA.
        """
        self._control = control
        self._most = most
        self._prefix = prefix
        self._model_names = tuple(model_names)
        self._merged: list[str] = []
        self._folders: dict[str, str] = {}
        """Where the LoRAs lie that the engine has beside the model, by name."""
        self._named: dict[str, int] = {}
        """When each of them was named last, or loaded: the larger, the later."""
        self._turns = count()
        self._pinned = set(folders)
        """Those that make room for no other one."""
        self._first = {name: checked(name, folder, self._model_names) for name, folder in folders.items()}
        self._changing = asyncio.Lock()
        """One is loaded or unloaded at a time, so that what is known here is what the engine has."""
        self._open: list[Named] = []
        """Sequences that run or wait."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that ``model`` may be."""
        return (*self._model_names, *self._merged, *self._folders)

    @property
    def folders(self) -> dict[str, str]:
        """Where those lie that are beside the model, by name."""
        return dict(self._folders)

    def require(self, name: str | None) -> str:
        """The name to answer with; requests may leave it out. Raises ModelNotFoundError."""
        return require_model(self.names, name)

    def of(self, name: str | None) -> str:
        """What a request for this model names in ``NewRequest.adapter``."""
        return name if name in self._folders else ""

    # Beside the model ------------------------------------------------------------------------------------------------

    async def begin(self, engine: EngineHandle) -> None:
        """Loads those of the options. Raises ConfigError for what cannot be loaded."""
        for name, folder in self._first.items():
            try:
                await engine.call(LoadAdapter(name, folder))
            except EngineDiedError:
                raise
            except SlipstreamError as error:
                raise ConfigError(f"{OPTION} {name}={folder}: {error}; mend it or leave it out") from None
            self._folders[name] = folder

    async def load_again(self, engine: EngineHandle) -> None:
        """An engine that takes over gets them before any request. One that cannot be loaded any more is gone: its name
        is unknown from then on, for nothing else may answer in its place. So are those that were merged into weights
        which ended with the engine before.
        """
        if self._merged:
            logger.error("the new engine has no LoRA merged into its weights: %s are unknown", ", ".join(self._merged))
            self._merged.clear()
        for name, folder in list(self._folders.items()):
            try:
                if folder == SHARED:
                    raise SlipstreamError("whoever shared it has to send it again")
                await engine.call(LoadAdapter(name, folder))
            except EngineDiedError:
                raise
            except SlipstreamError as error:
                del self._folders[name]
                self._named.pop(name, None)
                self._pinned.discard(name)
                logger.error("the LoRA %r could not be loaded again, and is gone: %s", name, error)

    async def load(self, name: str, folder: str, replace: bool, pinned: bool = False) -> None:
        """Has the LoRA in a folder at hand for requests that name it; see ``_load``."""
        path = str(Path(folder).absolute())
        await self._load(LoadAdapter(name, path), path, replace, pinned)

    async def load_shared(self, name: str, config: Mapping[str, Any], pickled: bytes, pinned: bool = False) -> None:
        """The same of one that a process of the engine's machine shares, in the place of any with its name."""
        operation = LoadSharedAdapter(name, msgspec.json.encode(config), pickled)
        await self._load(operation, SHARED, True, pinned)

    async def _load(self, operation: LoadAdapter | LoadSharedAdapter, where: str, replace: bool, pinned: bool) -> None:
        """One that nobody uses makes room for it, if there is none.

        Args:
            replace: whether it may take the place of one with the same name.
            pinned: whether it never makes room for others.
        Raises:
            InvalidRequestError: it cannot be had.
            ConflictError: there is no room for it.
        """
        async with self._changing:
            name = operation.name
            self._require_free(name, replace)
            leaving = self._leaving(name)
            await self._control.operate(operation)
            self._folders[name], self._named[name] = where, next(self._turns)
            (self._pinned.add if pinned else self._pinned.discard)(name)
            if leaving is not None:
                logger.info("the LoRA %r makes room for %r, and is unknown from now on (--max-loras)", leaving, name)
                await self._forget(leaving)

    def _leaving(self, name: str) -> str | None:
        """Which one is to make room for this one, if there is none. Raises ConflictError where none can."""
        if len(self._folders) + (name not in self._folders) <= self._most:
            return None
        used = {each.request.adapter for each in self._open} | self._pinned
        if not (free := self._folders.keys() - used):
            raise ConflictError(
                f"lora_name: there are {self._most} LoRAs beside the model (--max-loras), each of them in use or there "
                "to stay; unload one of them first, or try again later"
            )
        return min(free, key=lambda each: self._named.get(each, 0))

    async def unload(self, name: str) -> None:
        """Answers to this name no longer; weights that a LoRA was merged into stay. Raises ModelNotFoundError."""
        async with self._changing:
            if name in self._merged:
                self._merged.remove(name)
                return
            if name not in self._folders:
                raise ModelNotFoundError(f"there is no LoRA {name[:200]!r} here", param="lora_name")
            await self._forget(name)

    async def _forget(self, name: str) -> None:
        folder = self._folders.pop(name)  # at once: requests that come while the engine is told are too late
        try:
            await self._control.operate(UnloadAdapter(name))
        except ApiError:
            self._folders[name] = folder
            raise
        self._named.pop(name, None)
        self._pinned.discard(name)

    def _require_free(self, name: str, replace: bool) -> None:
        if name in self._model_names:
            raise InvalidRequestError(
                f"lora_name: {name[:200]!r} is the model itself; give the LoRA a name of its own", param="lora_name"
            )
        if name in self._merged:
            raise InvalidRequestError(
                f"lora_name: a LoRA {name[:200]!r} is merged into the weights; unload this name first, or take another",
                param="lora_name",
            )
        if name in self._folders and not replace:
            raise InvalidRequestError(
                f"lora_name: there is a LoRA {name[:200]!r} already; set load_inplace to true to replace it",
                param="load_inplace",
            )

    @contextmanager
    def holding(self, sequences: Sequence[Named]) -> Iterator[None]:
        """Around the answers of sequences."""
        named = [sequence for sequence in sequences if sequence.request.adapter]
        self._open += named
        self._named |= {name: next(self._turns) for name in {sequence.request.adapter for sequence in named}}
        try:
            yield
        finally:
            for sequence in named:
                self._open.remove(sequence)

    def collect(self) -> Iterable[Metric]:
        """What routers choose a server by that has the LoRA at hand: labels as vLLM's, and its value, the time."""
        found = GaugeMetricFamily(
            self._prefix + "lora_requests_info",
            "LoRAs of sequences that run and that wait, and how many there may be; the time.",
            labels=("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        )
        if self._folders:
            running, waiting = (
                ",".join(sorted({each.request.adapter for each in self._open if each.has_begun is begun}))
                for begun in (True, False)
            )
            found.add_metric((running, waiting, str(self._most)), time.time())
        return [found]

    # Merged into the weights -----------------------------------------------------------------------------------------

    def require_mergeable(self, name: str) -> None:
        """Raises ConflictError for the name of one beside the model, which goes on answering to it."""
        if name in self._folders:
            raise ConflictError(
                f"there is a LoRA {name[:200]!r} beside the model: unload it first, or give this one another name"
            )

    def merged(self, name: str) -> None:
        """The model answers to this name, too: the LoRA is in the weights that serve."""
        if name not in self.names:
            self._merged.append(name)


def checked(name: str, folder: str, model_names: Sequence[str]) -> str:
    """The folder of an option as the engine is told. Raises ConfigError, before a model is loaded for minutes."""
    if name in model_names:
        raise ConfigError(f"{OPTION} {name}={folder}: {name!r} is the model itself; give the LoRA a name of its own")
    path = Path(folder).expanduser().absolute()
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{OPTION} {name}={folder}: there is no {CONFIG_FILE} in it; name the folder of a LoRA as PEFT writes it, "
            f"with {CONFIG_FILE} and adapter_model.safetensors"
        )
    return str(path)
