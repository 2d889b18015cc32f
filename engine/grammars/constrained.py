"""Requests whose answers follow a grammar wait in the scheduler until it is compiled; others pass them."""

from __future__ import annotations

from collections.abc import Callable

from slipstream.engine.background import Background
from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.grammar import Grammars
from slipstream.engine.messages import NewRequest
from slipstream.engine.plan import PLAIN, LoadedAdapter
from slipstream.engine.scheduling.scheduler import Scheduler


class ConstrainedRequests:
    """The way of requests into the scheduler; for the thread of the steps."""

    def __init__(self, grammars: Grammars, scheduler: Scheduler) -> None:
        self.grammars = grammars
        self._scheduler = scheduler
        # Of its own, so that no grammar waits until the weights of a drafter are ready.
        self._background = Background()

    @property
    def has_work(self) -> bool:
        return self._background.has_work

    def add(self, request: NewRequest, drafter: str, lora: LoadedAdapter = PLAIN) -> None:
        """Adds a request, with a grammar or without; see Scheduler.add."""
        text = request.params.grammar
        if not text:
            self._scheduler.add(request, drafter, lora=lora)
        elif not self.grammars.has_vocabulary:
            self._scheduler.refuse(request, "grammar: the engine was not told what its tokens stand for")
        elif (grammar := self.grammars.find(text, request.scope)) is not None:
            self._scheduler.add(request, drafter, lora=lora)
            self._scheduler.release(request.request_id, grammar)
        else:
            self._scheduler.add(request, drafter, is_held=True, lora=lora)
            self._background.start(lambda: self._compile(request, text))

    def poll(self, is_busy: bool) -> None:
        """Lets requests begin whose grammar is ready; called between two steps, see Background.poll."""
        self._background.poll(is_busy)

    def close(self) -> None:
        self._background.close()

    def _compile(self, request: NewRequest, text: str) -> Callable[[], None]:
        """Runs beside the steps; what it returns is carried out between two of them."""
        try:
            grammar = self.grammars.compile(text, request.scope)
        except RequestError as error:
            reason = str(error)
            return lambda: self._scheduler.reject(request.request_id, reason)
        return lambda: self._scheduler.release(request.request_id, grammar)
