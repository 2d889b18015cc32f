"""How soon decisions about the drafter take effect on a busy server, and what streams feel of it: a table in Markdown.

    python scripts/bench_control.py --streams 32 --cycles 10

A server with a registry serves real prompts to so many streams while its worker trains. Windows in which nothing is
decided take turns with windows of the same length in which versions are promoted and rolled back, two and two (so every
second rollback goes to a version that is not the one before), and imports are asked for that cannot be. Promoted
versions are new to the engine each time. A decision counts from when it is sent until the server says that the version
drafts. Gaps are between two parts of one answer; a step is their median where nothing is decided.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from time import perf_counter

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import APIError
from slipstream.drafter.choice import DRAFT_VOCAB_SIZE
from slipstream.drafter.head import layout
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.models.config import decoder_config
from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.harness import Target, connect
from slipstream.loadtest.workloads import Workload, WorkloadOptions

POLL_S = 0.25
"""Asking takes some 10 ms of the server's each time."""
GIVE_UP_S = 300.0
FIRST_TOKENS = 2000
LENGTHS = 64, 448


class Streams:
    """Answers, one after the other in each stream; what arrived when."""

    def __init__(self, target: Target, workload: Workload, count: int) -> None:
        self._target, self._workload, self._count = target, workload, count
        self.gaps: list[tuple[float, float]] = []
        """When a gap ended, and how long it was."""
        self.tokens: list[tuple[float, int]] = []
        self._turn = asyncio.Lock()
        self._lengths = Random(0)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._stream()) for _ in range(self._count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self) -> None:
        while True:
            async with self._turn:
                [request] = await self._workload.round(1)
                # Streams of one length stay in step with each other, and prompts come in waves.
                length = {"max_tokens": self._lengths.randint(*LENGTHS)}
            before, counted = 0.0, 0
            async with self._target.client.stream(request.path, self._target.body(request) | length) as stream:
                async for chunk in stream:
                    usage = chunk.data.get("usage") or {}
                    now = int(usage.get("completion_tokens", counted))
                    if now > counted:
                        self.tokens.append((chunk.received, now - counted))
                        if before:
                            self.gaps.append((chunk.received, chunk.received - before))
                        before, counted = chunk.received, now

    def between(self, began: float, ended: float) -> tuple[float, list[float]]:
        """Tokens per second and the gaps."""
        tokens = sum(count for when, count in self.tokens if began <= when < ended)
        return tokens / (ended - began), [gap for when, gap in self.gaps if began + gap <= when < ended]


class Control:
    def __init__(
        self, admin: AdminClient, target: Target, base: int, versions: list[int], wrong: list[Path], between: float
    ) -> None:
        """``between`` two decisions, in seconds."""
        self._admin, self._target, self._between = admin, target, between
        self._base, self._versions, self._wrong = base, versions, wrong
        self.seconds: dict[str, list[float]] = {"promotion": [], "rollback": [], "import": []}

    async def cycle(self) -> None:
        first, second = self._versions.pop(0), self._versions.pop(0)
        await self._decide("promotion", first, first)
        await self._decide("promotion", second, second)
        await self._refuse(self._wrong[len(self.seconds["import"]) % len(self._wrong)])
        await self._decide("rollback", second, first)
        await self._decide("rollback", first, self._base)

    async def _decide(self, what: str, version: int, live: int) -> None:
        began = perf_counter()
        await self._admin.change("promote" if what == "promotion" else "rollback", version)
        while await self._live() != live:
            if perf_counter() - began > GIVE_UP_S:
                raise SystemExit(f"{what} of version {version}: {live} was not live after {GIVE_UP_S:g} s")
            await asyncio.sleep(POLL_S)
        self.seconds[what].append(perf_counter() - began)
        print(f"{what} of {version}: {self.seconds[what][-1]:.2f} s", file=sys.stderr, flush=True)
        await asyncio.sleep(self._between)

    async def _live(self) -> int:
        for line in (await self._target.client.metrics()).splitlines():
            if line.startswith("slipstream:drafter_version{") and 'route=""' in line:
                return int(float(line.split()[-1]))
        return -1

    async def _refuse(self, folder: Path) -> None:
        began = perf_counter()
        try:
            await self._admin.import_drafter(str(folder))
        except APIError as error:
            if error.status != 400:
                raise
        else:
            raise SystemExit(f"{folder} was imported")
        self.seconds["import"].append(perf_counter() - began)
        print(f"import of {folder.name}: {self.seconds['import'][-1]:.2f} s", file=sys.stderr, flush=True)
        await asyncio.sleep(self._between)


def make_registry(folder: Path, count: int) -> list[int]:
    """A registry with so many copies of the cold head, the first of them live."""
    registry = Registry(folder)
    checkpoint = open_checkpoint("default")
    target = decoder_config(checkpoint.config)
    config = layout.config_for(target, DRAFT_VOCAB_SIZE)
    last = layout.last_layer(checkpoint.tensors(), target.shape.num_layers)
    tensors = layout.from_target(config, last, range(config.draft_vocab_size))
    fingerprint = served_fingerprint(EngineConfig())
    versions = [registry.add(config, tensors, target=fingerprint, origin="trained").version for _ in range(count)]
    for version in versions:
        registry.pin(version)  # else they are superseded by what the worker publishes, and pruned
    registry.promote(versions[0], "to begin with")
    registry.record_metrics(versions[0], {"trial": 1})
    return versions


def make_wrong(folder: Path, registry: Path) -> list[Path]:
    """Folders that cannot be imported, for one reason each."""
    target = decoder_config(open_checkpoint("default").config)
    config = layout.config_for(target, DRAFT_VOCAB_SIZE)
    tensors = layout.random_tensors(config, 0)
    made = {name: folder / name for name in ("missing", "not-finite", "truncated", "another-size", "damaged-version")}
    layout.write(made["truncated"], config, tensors)
    file = made["truncated"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    tensors["fc.weight"][3, 3] = float("inf")
    layout.write(made["not-finite"], config, tensors)
    made["another-size"].mkdir()
    (made["another-size"] / "config.json").write_text(
        (made["truncated"] / "config.json").read_text().replace('"hidden_size": 576', '"hidden_size": 512')
    )
    (made["another-size"] / "model.safetensors").symlink_to(made["not-finite"] / "model.safetensors")
    made["damaged-version"].mkdir()
    version = sorted((registry / "versions").iterdir())[0]
    (made["damaged-version"] / "manifest.json").write_bytes((version / "manifest.json").read_bytes())
    weights = bytearray((version / "weights.safetensors").read_bytes())
    weights[-7] ^= 1
    (made["damaged-version"] / "weights.safetensors").write_bytes(weights)
    return list(made.values())


async def window(seconds: float, work: Callable[[], Awaitable[None]] | None = None) -> tuple[float, float]:
    """Does the work, for at least so many seconds; when it began and ended."""
    began = perf_counter()
    if work is not None:
        await work()
    if (left := seconds - (perf_counter() - began)) > 0:
        await asyncio.sleep(left)
    return began, perf_counter()


async def run(options: argparse.Namespace, folder: Path) -> None:
    base, *versions = make_registry(folder / "registry", 1 + 2 * options.cycles)
    wrong = make_wrong(folder / "wrong", folder / "registry")
    port = free_port()
    flags = {
        "--port": port,
        "--registry": folder / "registry",
        "--traffic-log": "features",
        "--traffic-folder": folder / "traffic",
        "--evolve": options.evolve,
        "--evolve-first-tokens": FIRST_TOKENS,
        "--evolve-round-tokens": 1_000_000_000,  # no version comes of it: the only decisions are ours
        "--kv-cache-memory": "1GiB",
        "--max-running": options.streams,
        "--speculation": options.speculation,
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "slipstream.server",
        "serve",
        *(str(p) for pair in flags.items() for p in pair),
    ]
    url = f"http://127.0.0.1:{port}"
    quiet: list[tuple[float, float]] = []
    busy: list[tuple[float, float]] = []
    async with (
        running("server", command, port, log=folder / "server.log"),
        connect(url, timeout=600) as target,
        AdminClient(url) as admin,
    ):
        workload = Workload(
            WorkloadOptions(name=options.workload, output_tokens=LENGTHS[1], ignore_eos=True, temperature=0.8)
        )
        streams = Streams(target, workload, options.streams)
        control = Control(admin, target, base, versions, wrong, options.between)
        if options.evolve != "off":
            await let_train(admin, streams)
        async with streams.flowing():
            await asyncio.sleep(options.settle)
            began = perf_counter()
            for number in range(options.cycles):
                if perf_counter() - began > 60 * options.minutes:
                    break
                length = busy[-1][1] - busy[-1][0] if busy else options.window
                if number % 2:
                    busy.append(await window(options.window, control.cycle))
                    quiet.append(await window(length))
                else:
                    quiet.append(await window(length))
                    busy.append(await window(options.window, control.cycle))
        worker = (await admin.status())["evolution"]["worker"]
    report_all(streams, quiet, busy, control.seconds)
    if worker is not None:
        print(f"\nThe worker learned {worker.get('tokens', 0)} positions meanwhile.")


async def let_train(admin: AdminClient, streams: Streams) -> None:
    """Until the worker trains: on a busy machine it would get nothing to begin with."""
    async with streams.flowing():
        while (await admin.status())["traffic"]["store_tokens"] < 2 * FIRST_TOKENS:
            await asyncio.sleep(1)
    while (report := (await admin.status())["evolution"]["worker"]["report"])["state"] != "training":
        await asyncio.sleep(0.5)
    print(f"the worker is {report['state']}", file=sys.stderr, flush=True)


def report_all(
    streams: Streams,
    quiet: list[tuple[float, float]],
    busy: list[tuple[float, float]],
    seconds: dict[str, list[float]],
) -> None:
    print("| seconds | number | median | p95 | longest |\n|---|---|---|---|---|")
    names = {
        "promotion": "promotion to live",
        "rollback": "decision to rolled back",
        "import": "wrong import to refused",
    }
    for what, name in names.items():
        found = sorted(seconds[what])
        if found:
            ninth = found[min(int(len(found) * 0.95), len(found) - 1)]
            print(f"| {name} | {len(found)} | {statistics.median(found):.2f} | {ninth:.2f} | {found[-1]:.2f} |")
    without, during = ([streams.between(*each) for each in windows] for windows in (quiet, busy))
    step = statistics.median(gap for _, gaps in without for gap in gaps)
    ratios = [b[0] / a[0] for a, b in zip(without, during, strict=True)]
    print("\n| windows | tokens/s, median | p99 gap, steps | longest gap, steps, by window |\n|---|---|---|---|")
    for name, windows in (("without control", without), ("with control", during)):
        gaps = sorted(gap / step for _, some in windows for gap in some)
        longest = sorted(max(some) / step for _, some in windows)
        print(
            f"| {name} | {statistics.median(rate for rate, _ in windows):.1f} | {gaps[int(len(gaps) * 0.99)]:.2f} | "
            f"median {statistics.median(longest):.1f}, longest {longest[-1]:.1f} |"
        )
    whole = sum(rate for rate, _ in during) / sum(rate for rate, _ in without)
    print(
        f"\nThroughput with control over without, {len(ratios)} pairs of windows: "
        f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"all together {whole:.3f}. A step takes {step * 1e3:.1f} ms."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--cycles", type=int, default=10, help="of two promotions, two rollbacks and a wrong import")
    parser.add_argument("--window", type=float, default=12.0, help="seconds, at least")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no other cycle is begun")
    parser.add_argument("--settle", type=float, default=10.0)
    parser.add_argument("--between", type=float, default=1.0, help="seconds from one decision to the next")
    parser.add_argument("--evolve", default="always")
    parser.add_argument("--speculation", default="auto")
    parser.add_argument(
        "--workload",
        default="sharegpt",
        help="with 'fixed', prompts of one length, windows differ less by what is asked",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(options, Path(folder)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
