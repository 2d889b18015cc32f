"""The engine process: loads the model, then steps while there is work and listens while there is none.

Run as ``python -m slipstream.engine.process DESCRIPTOR CONFIG``: an inherited socket, and EngineConfig as JSON.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from slipstream.engine.adapters import Adapters
from slipstream.engine.background import Background, done
from slipstream.engine.child import keep_for_good
from slipstream.engine.config import EngineConfig
from slipstream.engine.core import EngineCore
from slipstream.engine.errors import ConfigError, ModelError, SlipstreamError, kind_of
from slipstream.engine.grammars.constrained import ConstrainedRequests
from slipstream.engine.grammars.grammar import Grammars
from slipstream.engine.listening import Listener, Listeners
from slipstream.engine.memory import is_out_of_memory
from slipstream.engine.messages import (
    AbortRequests,
    Call,
    CallReply,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    NewRequest,
    StepOutputs,
    TokenDelta,
)
from slipstream.engine.models.loader import file_tensors, load_model
from slipstream.engine.models.weights import Weights
from slipstream.engine.operations import (
    AdapterOperation,
    CheckIntegrity,
    DropDrafter,
    MemoryOperation,
    Operation,
    Pause,
    Profile,
    ResetPrefixCache,
    Resume,
    SwapDrafter,
    SwapReport,
    TargetOperation,
    TellDraftCosts,
    TellStepCosts,
    UpdateMode,
    UseVocabulary,
)
from slipstream.engine.profiling import StepProfiler
from slipstream.engine.runner.runner import ModelRunner
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.runner.warming import warm_up
from slipstream.engine.scheduling.calibration import calibrate
from slipstream.engine.scheduling.scheduler import Scheduler
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.sleeping import Sleeper
from slipstream.engine.speculation.protocol import Drafter, DraftNeeds
from slipstream.engine.target.update import TargetUpdates
from slipstream.engine.validation import problem
from slipstream.engine.wire import EngineChannel, Undecodable

MakeDrafters = Callable[[EngineConfig], Sequence[Drafter]]
MakeListeners = Callable[[EngineConfig], Sequence[Listener]]
HEARTBEAT_MS = 1000
USER_ERROR = 2  # the exit status where the user can mend it
BACKGROUND_MS = 5
"""How long an idle engine waits for messages while something is prepared beside it."""


class Engine:
    """Everything of one engine process but its sockets; also runs inside tests."""

    def __init__(
        self,
        config: EngineConfig,
        deliver: Callable[[list[TokenDelta], EngineStats], None],
        drafters: Sequence[Drafter] = (),
        listeners: Sequence[Listener] = (),
    ) -> None:
        drafting = DraftNeeds.of(drafters, config.max_draft_tokens)
        loaded = load_model(config, drafting.branches)
        self.listeners = Listeners(listeners)
        self.loaded, self.config = loaded, config
        grammars = Grammars()
        self.runner = ModelRunner(
            loaded.model,
            loaded.num_blocks,
            config.block_size,
            config.max_running,
            loaded.max_model_len,
            Speculator(drafters, config.max_draft_tokens),
            self.listeners,
            loaded.scratch_blocks,
            grammars,
        )
        device, cost = self.runner.cache.device, StepCost()
        calibrate(cost, self.runner.profile, loaded.max_model_len, config.max_step_tokens)
        if device.type == "cpu":  # there, blocks that were written take memory
            self.runner.cache.release()
            self.runner.cache.restore()
        else:
            warm_up(self.runner, loaded.max_model_len, config.max_step_tokens)
        self.scheduler = Scheduler(
            config,
            loaded.num_blocks,
            loaded.max_model_len,
            cost,
            switch_length=loaded.model.switch_length,
            drafting=drafting,
            listeners=self.listeners,
        )
        self.constrained = ConstrainedRequests(grammars, self.scheduler)
        on_gpu = device.type == "cuda"
        pipeline = config.pipeline == "on" or (config.pipeline == "auto" and on_gpu and not drafters)
        drafter_stats = self.runner.speculator.stats
        self.core = EngineCore(self.scheduler, self.runner, deliver, pipeline, drafter_stats, self.listeners.stats)
        self.background = Background(self.core.drain)
        self._profiler = StepProfiler(self.core, on_gpu)
        self.adapters = Adapters(loaded.model, device, self.background)
        self._target = TargetUpdates(loaded.model, device, loaded.update_bytes, self.background, self._prepare_target)
        self._sleeper = Sleeper(
            *(self.runner, self.scheduler, self._target, self.background, self._prepare_target),
            lambda: file_tensors(config, loaded.model, device),
        )

    def ready(self) -> EngineReady:
        model, loaded = self.loaded.model, self.loaded
        return EngineReady(
            model_type=model.shape.model_type,
            vocab_size=model.shape.vocab_size,
            max_model_len=loaded.max_model_len,
            dtype=model.formats.numbers,
            kv_cache_dtype=model.formats.cache,
            weights=loaded.weights,
            weights_because=loaded.weights_because,
            device=self.runner.cache.device.type,
            kernels=model.kernels,
            block_size=self.config.block_size,
            num_blocks=loaded.num_blocks,
            weights_bytes=loaded.weights_bytes,
            kv_cache_bytes=(loaded.num_blocks + loaded.scratch_blocks) * loaded.block_bytes,
            load_seconds=loaded.seconds,
            drafters=tuple(self.runner.speculator.names),
        )

    def submit(self, request: NewRequest) -> None:
        """Takes a request, or ends it with an error if it asks for what the model cannot do."""
        wrong = problem(request, self.loaded.model.shape.vocab_size, self.loaded.max_model_len)
        if wrong is None and (lora := self.adapters.find(request.adapter)) is not None:
            self.constrained.add(request, self.runner.speculator.own_drafter(request.route), lora)
        else:
            self.scheduler.refuse(request, wrong or f"there is no LoRA {request.adapter!r} here any more")

    def operate(self, operation: Operation[Any]) -> Future[Any]:
        """Carries out a control operation, between two steps; raises SlipstreamError for what cannot be done.

        What takes longer than steps may wait goes on in the background: its future is done in ``poll``.
        """
        self.core.drain()
        if isinstance(operation, TargetOperation):
            return self._target.operate(operation)
        if isinstance(operation, AdapterOperation):
            return self.adapters.operate(operation)
        if isinstance(operation, MemoryOperation):
            return self._sleeper.operate(operation)
        match operation:
            case SwapDrafter():
                return self._swap_drafter(operation)
            case DropDrafter():
                self._drop_drafter(operation.route)
            case Pause():
                self.scheduler.pause(operation.mode)
            case Resume():
                self.scheduler.resume()
            case UseVocabulary():
                self.constrained.grammars.use(operation.tokens, operation.special, self.loaded.model.shape.vocab_size)
            case ResetPrefixCache():
                self.scheduler.kv.reset()
                return done(self.scheduler.kv.pool.num_used == 0)
            case CheckIntegrity():
                self.scheduler.check_integrity()
            case TellStepCosts():
                return done(self.scheduler.cost.table())
            case TellDraftCosts():
                return done(self.scheduler.draft_planner.costs())
            case Profile():
                return self._profiler.start(operation)
            case _:
                raise SlipstreamError(f"the engine has no operation {type(operation).__name__}")
        return done(None)

    def poll(self) -> None:
        """Carries out what the background has prepared; called between two steps."""
        self._target.poll()
        self.constrained.poll(self.core.has_work)
        self.background.poll(self.core.has_work)
        self._profiler.poll()

    @property
    def has_background_work(self) -> bool:
        """Whether ``poll`` may find something to carry out at any moment."""
        workers = (self.background, self.constrained, self._profiler)
        return self._target.is_waiting or any(worker.has_work for worker in workers)

    def close(self) -> None:
        self._profiler.close()
        self._target.close()
        self.constrained.close()
        self.background.close()
        self.core.close()
        self.listeners.close()

    def _swap_drafter(self, asked: SwapDrafter) -> Future[SwapReport]:
        speculator, background = self.runner.speculator, self.background
        route, version, path = asked.route, asked.version, asked.path
        if not self._target.has_weights:
            raise SlipstreamError("the model's weights were discarded: drafters are swapped once there are some again")
        began = time.perf_counter()

        def report(swap: Callable[[], object], prepare_seconds: float) -> SwapReport:
            swap_began = time.perf_counter()
            swap()
            return SwapReport(version, route, prepare_seconds, time.perf_counter() - swap_began)

        def prepare() -> Callable[[], SwapReport]:
            swap = speculator.prepare_swap(route, version, path)
            return lambda: report(swap, time.perf_counter() - began)

        if speculator.swap_loaded(route, version, path):
            background.supersede(route)
            return done(report(lambda: None, time.perf_counter() - began))
        return background.start(prepare, route)

    def _prepare_target(self, weights: Weights) -> Callable[[int, UpdateMode], None]:
        follow = self.runner.speculator.prepare_target(weights)

        def use(version: int, mode: UpdateMode) -> None:
            self.loaded.model.use(weights)
            follow()
            self.scheduler.use_target(version, mode)
            self.listeners.target_changed(version, self.loaded.model)

        return use

    def _drop_drafter(self, route: str) -> None:
        was_coming = self.background.supersede(route)
        if not was_coming or route in self.runner.speculator.learned_routes:
            self.runner.speculator.drop(route)


class EngineLoop:
    """An engine at the end of a channel: takes messages between two steps and sends what each step brought.

    ``run`` blocks the thread that calls it; any other, or a signal, may ``stop`` it.
    """

    def __init__(
        self,
        channel: EngineChannel,
        make_drafters: MakeDrafters = lambda _: (),
        make_listeners: MakeListeners = lambda _: (),
    ) -> None:
        self._channel = channel
        self._make_drafters = make_drafters
        self._make_listeners = make_listeners
        self._stop = threading.Event()

    def stop(self) -> None:
        """Has the engine end after the step under way, or at once if there is none."""
        self._stop.set()
        self._channel.wake()

    def run(self, config: EngineConfig, on_loaded: Callable[[], None] = lambda: None) -> int:
        """Returns an exit status; raises ConnectionError when nobody is left to tell anything."""
        try:
            drafters, listeners = self._make_drafters(config), self._make_listeners(config)
            engine = Engine(config, lambda deltas, stats: self._send(StepOutputs(deltas, stats)), drafters, listeners)
        except (ModelError, ConfigError) as error:
            return self._failed(USER_ERROR, str(error))
        except Exception as error:
            if is_out_of_memory(error):
                said = str(error).partition("\n")[0] or "none is left"
                return self._failed(USER_ERROR, f"the model does not fit into memory: {said}")
            if isinstance(error, OSError) and error.filename is not None:  # of a path among the options
                return self._failed(USER_ERROR, f"{os.fsdecode(error.filename)}: {error.strerror}")
            traceback.print_exc()
            return self._failed(1, f"the engine could not start: {type(error).__name__}: {error}")
        on_loaded()
        try:
            self._send(StepOutputs([], engine.core.stats()))
            self._send(engine.ready())
            self._serve(engine)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            return self._failed(1, f"the engine failed: {type(error).__name__}: {error}")
        finally:
            engine.close()
        return 0

    def _failed(self, status: int, why: str) -> int:
        self._send(EngineFailed(why, user_error=status == USER_ERROR))
        return status

    def _serve(self, engine: Engine) -> None:
        while not self._stop.is_set():
            busy = engine.core.has_work
            idle_ms = BACKGROUND_MS if engine.has_background_work else HEARTBEAT_MS
            messages = self._channel.receive(0 if busy else idle_ms)
            for message in messages:
                self._take(engine, message)
            engine.poll()
            if engine.core.has_work:
                engine.core.step()
            elif not messages:
                self._send(StepOutputs([], engine.core.stats()))

    def _take(self, engine: Engine, message: NewRequest | AbortRequests | Call | Undecodable) -> None:
        match message:
            case NewRequest():
                engine.submit(message)
            case AbortRequests():
                engine.scheduler.abort(message.request_ids, message.stopped)
            case Call():
                self._answer(engine, message)
            case Undecodable():
                self._refuse(engine, message)

    def _refuse(self, engine: Engine, message: Undecodable) -> None:
        """Whoever waits for an answer gets one."""
        error = f"the engine does not understand the message: {message.error}"
        print(error, file=sys.stderr, flush=True)
        if message.tag == "new":
            failed = TokenDelta(request_id=message.message_id, tokens=[], finish_reason="error", error=error)
            self._send(StepOutputs([failed], engine.core.stats()))
        elif message.tag == "call":
            self._send(CallReply(message.message_id, error=error))

    def _answer(self, engine: Engine, call: Call) -> None:
        engine.core.drain()  # if that fails, it is not the operation's fault
        try:
            done = engine.operate(call.operation)
        except Exception as error:
            self._send(_failure(call, error))
        else:
            done.add_done_callback(lambda done: self._tell_done(engine, call, done))

    def _tell_done(self, engine: Engine, call: Call, done: Future[Any]) -> None:
        """Statistics go first: whoever gets the reply finds there what has changed."""
        self._send(StepOutputs([], engine.core.stats()))
        self._send(_reply(call, done))

    def _send(self, message: FromEngine) -> None:
        self._channel.send(message)


def _reply(call: Call, done: Future[Any]) -> CallReply:
    error = done.exception()
    return CallReply(call.call_id, done.result()) if error is None else _failure(call, error)


def _failure(call: Call, error: BaseException) -> CallReply:
    """Whatever goes wrong with an operation, serving goes on."""
    if isinstance(error, SlipstreamError):
        return CallReply(call.call_id, error=str(error), kind=kind_of(error))
    traceback.print_exception(error)
    return CallReply(call.call_id, error=f"{type(call.operation).__name__} failed: {type(error).__name__}: {error}")


def main(
    descriptor: str,
    config: str,
    make_drafters: MakeDrafters = lambda _: (),
    make_listeners: MakeListeners = lambda _: (),
) -> int:
    loop = EngineLoop(EngineChannel(int(descriptor)), make_drafters, make_listeners)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return loop.run(msgspec.json.decode(config, type=EngineConfig), keep_for_good)
    except ConnectionError:
        return 1  # nobody is left to tell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
