"""The phases of the demo: measure, let it learn, measure again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import msgspec
from rich.console import Console
from rich.status import Status

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import ClientError
from slipstream.loadtest.children import running
from slipstream.loadtest.demo.heldout import Answers, HeldOut
from slipstream.loadtest.demo.machine import hope
from slipstream.loadtest.demo.plan import GRACE, LONGEST_BURST, SETTLE, DemoOptions
from slipstream.loadtest.demo.replay import Replay
from slipstream.loadtest.demo.result import Glance, Measured, Result
from slipstream.loadtest.demo.watch import Watch
from slipstream.loadtest.harness import Target, connect
from slipstream.loadtest.workloads import Workload, WorkloadOptions

READY_SECONDS = 300.0
STARVED_SECONDS = 6.0
"""Time the worker has to wait for traffic before it gets some."""
LEAST_BURST_SECONDS = 3.0
TRIAL_STREAMS = 4
"""Few enough that draft tokens are verified; a version is not judged where none are."""
NOT_KEPT = {"X-Slipstream-Traffic": "off"}


class Demo:
    def __init__(self, options: DemoOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._began = monotonic()
        self._url = f"http://127.0.0.1:{options.port}"
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        self._phase = ""
        self._status: Status | None = None
        self._glances: list[Glance] = []
        self._heldout = HeldOut(())
        self._watch: Watch | None = None
        self._hoped = False
        """Whether it was said what can be hoped for."""

    async def run(self) -> Result:
        """Raises ClientError if the server cannot be started or is lost."""
        with self._console.status("starting") as self._status:
            return await self._run()

    async def _run(self) -> Result:
        options = self._options
        before_depth, _ = await self._probe(options.drafter, "before")
        self._say(f"before: accept length {before_depth.accept_length:.2f} with {options.heldout} held-out prompts")
        async with (
            self._server(options.serve(), "server"),
            connect(self._url, timeout=600) as target,
            connect(self._url, timeout=600, headers=NOT_KEPT) as unseen,
            AdminClient(self._url, timeout=30) as admin,
        ):
            self._enter(f"measuring the {self._first_head}")
            before = await self._measure(unseen, before_depth)
            self._glances.append(self._glance_of(before.head))
            # Afterwards it will take as long again.
            until = self._began + 60 * options.minutes * (1 - SETTLE) - 1.1 * (monotonic() - self._began)
            replay = Replay(self._workload, target)
            watch = self._watch = Watch(admin, self._minute, self._show)
            watching = asyncio.create_task(watch.run())
            try:
                await self._learn(watch, replay, unseen, until)
                await self._settle(watch, replay, admin)
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
            await watch.look()
            self._enter(f"measuring version {watch.live}")
            after = await self._measure(unseen, before_depth)
            self._glances.append(self._glance_of(after.head))
            await watch.look()
        offline = None
        if watch.live:
            after_depth, traffic = await self._probe(str(options.version_folder(watch.live).absolute()), "after")
            after = Measured(after.off, after.head, after_depth)
            self._enter("scoring the same answers offline")
            try:
                offline = await self._evaluate(watch.live, traffic)
            except ClientError as error:
                # What was measured is told all the same.
                self._say(str(error))
        return Result(
            options=options,
            minutes=self._minute(),
            before=before,
            after=after,
            offline_accept_length=offline,
            watch=watch,
            glances=self._glances,
            sent=replay.sent + self._heldout.sent,
            failed=replay.failed + self._heldout.failed,
            replayed_tokens=replay.tokens,
        )

    # Measuring ------------------------------------------------------------------------------------------------------

    async def _measure(self, target: Target, depth: Answers) -> Measured:
        off, head = await self._heldout.compare(target)
        return Measured(off, head, depth)

    @property
    def _first_head(self) -> str:
        return f"{self._options.drafter} head" if self._options.drafter in ("cold", "warm") else "head that was given"

    async def _probe(self, drafter: str, when: str) -> tuple[Answers, Path]:
        """The accept length of a head that always drafts, and where its answers are kept."""
        traffic = self._options.folder / f"heldout-{when}"
        self._enter(f"measuring the accept length of the {self._first_head if when == 'before' else 'evolved head'}")
        async with self._server(self._options.probe(drafter, traffic), "probe"), self._connect() as target:
            if not self._heldout.requests:
                await self._draw()
            return await self._heldout.measure(target, "head"), traffic

    async def _draw(self) -> None:
        """The first prompts of the workload are held out; none comes twice."""
        options = self._options
        described = WorkloadOptions(
            name=options.workload, output_tokens=options.output_tokens, seed=options.seed, dataset=options.dataset
        )
        # Without a tokenizer: that of the probe will be gone.
        self._workload = Workload(described, None)
        self._heldout = HeldOut(await self._workload.round(options.heldout))

    async def _evaluate(self, version: int, traffic: Path) -> float:
        command = self._options.evaluate(version, traffic)
        process = await asyncio.create_subprocess_exec(
            *command, env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, said = await process.communicate()
        if process.returncode:
            raise ClientError(f"version {version} could not be scored: {said.decode(errors='replace').strip()}")
        length: float = msgspec.json.decode(out)["verdict"]["accept_length"]
        return length

    def _glance_of(self, answers: Answers) -> Glance:
        seen = answers.first(self._options.glance)
        return Glance(self._minute(), seen.accept_length, seen.tokens_per_second)

    # Learning -------------------------------------------------------------------------------------------------------

    async def _learn(self, watch: Watch, replay: Replay, unseen: Target, until: float) -> None:
        """Traffic, then time to train, in turn: in idle mode the worker stands still while requests run."""
        options = self._options
        self._enter("replaying traffic")
        await replay.run(
            options.streams, lambda: monotonic() > until or replay.tokens > options.wanted_tokens(watch.learned)
        )
        latest = until + GRACE * 60 * options.minutes

        def over() -> bool:
            return monotonic() > (until if watch.rounds else latest)

        while not over():
            began, rounds, swaps = monotonic(), watch.rounds, len(watch.swaps)
            self._enter("training")
            while not over() and watch.rounds == rounds and not self._starved(watch, began):
                await asyncio.sleep(0.5)
            if watch.rounds > rounds:
                self._say(watch.verdict)
            # What was published is put on trial within the next second.
            await asyncio.sleep(2)
            await self._trial(watch, replay, until)
            if len(watch.swaps) > swaps:
                self._say(f"version {watch.swaps[-1].version} is live")
                self._enter("looking at held-out prompts")
                self._glances.append(self._glance_of(await self._heldout.measure(unseen, "head", options.glance)))
            if over():  # what the round under way has learned is still to be judged: no traffic that it would wait for
                break
            self._enter("replaying traffic")
            await self._burst(watch, replay, until)

    async def _burst(self, watch: Watch, replay: Replay, until: float) -> None:
        """Traffic for the next round, as far as there is time; some in any case, or a worker without any would wait."""
        now = monotonic()
        least, latest = now + LEAST_BURST_SECONDS, min(now + LONGEST_BURST * (until - now), until)
        wanted = self._options.wanted_tokens(watch.learned)
        await replay.run(
            self._options.streams,
            lambda: monotonic() > (least if replay.tokens > wanted else max(latest, least)),
        )

    def _starved(self, watch: Watch, since: float) -> bool:
        """Whether the worker has found nothing to do for a while; it looks for new traffic every two seconds."""
        return watch.worker_state == "waiting" and monotonic() - max(watch.idle_since, since) > STARVED_SECONDS

    async def _trial(self, watch: Watch, replay: Replay, until: float) -> None:
        """A version on trial needs requests on which it drafts."""
        if watch.on_trial:
            self._enter("a new version on trial")
            speculation = {"mode": "head"}
            await replay.run(
                TRIAL_STREAMS, lambda: not watch.on_trial or monotonic() > until, speculation=speculation, max_tokens=64
            )
            # A promoted version is loaded, and seen here, within so long.
            await asyncio.sleep(3)

    async def _settle(self, watch: Watch, replay: Replay, admin: AdminClient) -> None:
        """What is being judged may still go live; then training stops."""
        until = monotonic() + 60 * self._options.minutes * SETTLE
        self._enter("waiting for the last verdict")
        if watch.worker_state == "training":  # what it has learned until now is not to be lost
            rounds = watch.rounds
            await admin.evolve("judge")
            while watch.rounds == rounds and monotonic() < until:
                await asyncio.sleep(0.5)
        while watch.worker_state == "gating" and monotonic() < until:
            await asyncio.sleep(0.5)
        await admin.evolve("pause")
        await asyncio.sleep(2)
        await self._trial(watch, replay, until)

    # The server and the screen --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _server(self, command: list[str], name: str) -> AsyncIterator[None]:
        options = self._options
        try:
            async with running(
                name, command, options.port, self._environment, ready_timeout=READY_SECONDS, log=options.log
            ):
                yield
        except ClientError as error:
            lines = options.log.read_text(errors="replace").splitlines()[-5:] if options.log.exists() else []
            raise ClientError("\n  ".join([f"{error}; the end of its log:", *lines])) from None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Target]:
        async with connect(self._url, timeout=600) as target:
            yield target

    def _minute(self) -> float:
        return (monotonic() - self._began) / 60

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            if not self._console.is_terminal:
                self._say(phase)
        self._show()

    def _say(self, text: str) -> None:
        self._console.print(f"{self._minute():5.1f} min  {text}", highlight=False, markup=False)

    def _show(self) -> None:
        if self._status is None:
            return
        parts = [f"{self._minute():.1f} of {self._options.minutes:g} min", self._phase]
        if self._watch is not None:
            watch = self._watch
            worker = watch.worker_state + (f" {watch.progress:.0%}" if watch.progress else "")
            if not self._hoped and watch.machine and watch.arithmetic:
                self._hoped = True
                self._say(hope(watch.machine, watch.arithmetic))
            parts += [
                f"worker {worker}",
                f"version {watch.live or self._options.drafter}",
                f"{watch.kept:,} tokens kept",
            ]
        if self._glances:
            parts.append(f"accept length {self._glances[-1].accept_length:.2f}")
        self._status.update(" · ".join(parts))
