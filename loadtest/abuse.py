"""What hostile clients do to the others: bodies that take long to read, answers that nobody reads, idle connections.

While a body is being dealt with, ``/health`` is asked again and again and one stream runs; the longest wait of each
is what counts. The memory is that of the server's own process, without the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import Target

MIB = 1024 * 1024
PROBE_S = 0.005
CALM_S = 3.0
"""How long is measured without any body, to compare with."""
SMALL_BUFFER = 4096
"""Receive buffer of clients that do not read."""
ANSWERS, READERS, CONNECTIONS = 30, 200, 2000
READER_TOKENS = 2000
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
IMPORT = "/admin/v1/drafters/import"
# A place for items, and the route that it is sent to.
LISTS = [
    *(
        (COMPLETIONS, '{"prompt":[%s]}'),
        (COMPLETIONS, '{"prompt":[[0],%s]}'),
        (COMPLETIONS, '{"prompt":"x","stop":[%s]}'),
    ),
    *((COMPLETIONS, '{"prompt":"x","bad_words":[%s]}'), (COMPLETIONS, '{"prompt":"x","suffix":[%s]}')),
    *((CHAT, '{"messages":[%s]}'), (CHAT, '{"messages":[{"role":"user","content":[%s]}]}'), (COMPLETIONS, "[%s]")),
    *((TOKENIZE, '{"messages":[%s]}'), (DETOKENIZE, '{"tokens":[%s]}'), (IMPORT, '{"folder":[%s]}')),
]
OBJECTS = [
    *((COMPLETIONS, '{"prompt":"x","max_tokens":1,%s}'), (COMPLETIONS, '{"prompt":"x","logit_bias":{%s}}')),
    *((CHAT, '{"messages":[{"role":"user","content":"x",%s}],"max_tokens":1}'), (TOKENIZE, '{"prompt":"x",%s}')),
    *(
        (CHAT, '{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{%s}}'),
        (IMPORT, '{"folder":"x",%s}'),
    ),
]
TEXTS = [
    *((TOKENIZE, '{"prompt":"%s"}'), (COMPLETIONS, '{"prompt":"%s","max_tokens":1}'), (COMPLETIONS, '{"%s":1}')),
    *(
        (CHAT, '{"messages":[{"role":"user","content":"%s"}],"max_tokens":1}'),
        (COMPLETIONS, '{"prompt":"x","model":"%s"}'),
    ),
]
ITEMS = ["0", '"a"', "[]", "{}", "null", "[0]", '{"role":"user","content":"a"}', '{"type":"text","text":"a"}', "1e300"]
NAMES = ['"f{}"', '"{}"', '"same"']
PIECES = ["a", " ", "a b ", "\\u00e9", "\\n", "日本", "\\ud83d\\ude00", "0"]
FIXED = [
    ("unknown null fields", COMPLETIONS, '{"prompt":"x","max_tokens":1,%s}', '"f{}"', "null"),
    ("unknown fields", COMPLETIONS, '{"prompt":"x","max_tokens":1,%s}', '"f{}"', "0"),
    ("ids", COMPLETIONS, '{"prompt":[%s],"max_tokens":1}', "", "0"),
    ("prompts", COMPLETIONS, '{"prompt":[%s],"max_tokens":1}', "", '"a"'),
    ("empty lists as ids", COMPLETIONS, '{"prompt":[%s]}', "", "[]"),
    ("wrong biases", COMPLETIONS, '{"prompt":"x","logit_bias":{%s}}', '"a{}"', "0"),
    ("messages", CHAT, '{"messages":[%s],"max_tokens":1}', "", '{"role":"user","content":"a"}'),
    ("parts", CHAT, '{"messages":[{"role":"user","content":[%s]}]}', "", '{"type":"text","text":"a"}'),
    ("ids to detokenize", DETOKENIZE, '{"tokens":[%s]}', "", "0"),
]
"""Kind, route, frame, names of the items if they are fields, values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AbuseOptions:
    megabytes: float = 16.0
    """Size of the largest bodies."""
    bodies: int = 20
    """Random ones, besides the fixed kinds."""
    seed: int = 0
    bound_ms: float = 100.0
    memory: bool = True
    growth_mib: float = 50.0
    settle: float = 45.0
    """Seconds after which memory must be back: more than the server's --write-timeout-s."""
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class AbuseBody:
    kind: str
    path: str
    data: bytes


@dataclass(slots=True)
class Stops:
    """The longest waits of the others, in milliseconds, while something was done to the server."""

    kind: str
    size: int = 0
    status: str = ""
    seconds: float = 0.0
    health_ms: float = 0.0
    stream_ms: float = 0.0


@dataclass(slots=True)
class Growth:
    kind: str
    before: float
    during: float
    after: float
    """MiB of the server's process."""


@dataclass(slots=True)
class AbuseResult:
    stops: list[Stops] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    stream_errors: list[str] = field(default_factory=list)

    def failures(self, options: AbuseOptions) -> list[str]:
        found = [f"the stream: {error}" for error in self.stream_errors]
        for each in self.stops[1:]:
            longest = max(each.health_ms, each.stream_ms)
            if longest > options.bound_ms:
                found.append(f"{each.kind}: others waited {longest:.0f} ms")
        return found + [
            f"{growth.kind}: {growth.after - growth.before:.0f} MiB more than before"
            for growth in self.growth
            if growth.after - growth.before > options.growth_mib
        ]


def make_bodies(options: AbuseOptions) -> list[AbuseBody]:
    size = int(options.megabytes * MIB) - 1024
    bodies = [AbuseBody(kind, path, filled(frame, name, value, size)) for kind, path, frame, name, value in FIXED]
    bodies.append(AbuseBody("a long text", TOKENIZE, b'{"prompt":"%b"}' % (b"a b " * (size // 4))))
    bodies.append(AbuseBody("deep nesting", COMPLETIONS, b'{"prompt":' + b"[" * size))
    bodies.append(AbuseBody("a large number", COMPLETIONS, b'{"prompt":"x","seed":%b}' % (b"1" * size)))
    random = Random(f"abuse {options.seed}")
    return bodies + [random_body(random, size) for _ in range(options.bodies)]


def random_body(random: Random, largest: int) -> AbuseBody:
    size = min(largest, int(2 ** random.uniform(12, largest.bit_length())))
    kind = random.choice(("list", "object", "text"))
    path, frame = random.choice({"list": LISTS, "object": OBJECTS, "text": TEXTS}[kind])
    if kind == "text":
        piece = random.choice(PIECES)
        return AbuseBody(f"{frame} of {piece}", path, (frame % (piece * (size // len(piece.encode())))).encode())
    name = random.choice(NAMES) if kind == "object" else ""
    value = random.choice(ITEMS)
    return AbuseBody(f"{frame} of {name} {value}", path, filled(frame, name, value, size))


def filled(frame: str, name: str, value: str, size: int) -> bytes:
    """The frame with so many items, or fields if they have names, that the body has about ``size`` bytes."""
    longest = len(name) + len(value.encode()) + (8 if name else 1)
    count = max(1, (size - len(frame)) // longest)
    items = (f"{name.format(index)}:{value}" for index in range(count)) if name else [value] * count
    return (frame % ",".join(items)).encode()


class Watch:
    """Asks /health and runs a stream, all the time, and remembers the longest wait since it was last asked."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.health_s = 0.0
        self.stream_s = 0.0
        self.errors: list[str] = []

    def reset(self) -> None:
        self.health_s = self.stream_s = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._ask_health()), asyncio.create_task(self._keep_streaming())]
        await asyncio.sleep(1)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_health(self) -> None:
        while True:
            begin = perf_counter()
            await self._target.client.health()
            self.health_s = max(self.health_s, perf_counter() - begin)
            await asyncio.sleep(PROBE_S)

    async def _keep_streaming(self) -> None:
        body = {"model": self._target.model, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
        while True:
            try:
                async with self._target.client.completions_stream({**body, **self._target.extra}) as stream:
                    last = 0.0
                    async for chunk in stream:
                        if last:
                            self.stream_s = max(self.stream_s, chunk.received - last)
                        last = chunk.received
            except ClientError as error:
                self.errors.append(str(error))
                await asyncio.sleep(1)


async def abuse(
    target: Target, url: str, key: str | None, options: AbuseOptions, tell: Callable[[Stops], None]
) -> AbuseResult:
    """``tell`` hears each figure as soon as it is there: a server in trouble can take minutes for the next one."""
    result = AbuseResult()

    def note(stops: Stops) -> None:
        result.stops.append(stops)
        tell(stops)

    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    bodies = make_bodies(options)  # takes seconds, in which nobody here would listen to the stream
    watch = Watch(target)
    async with watch.running():
        calm = Stops("nothing")
        await _observe(watch, calm, asyncio.sleep(CALM_S))
        note(calm)
        for body in bodies:
            stops = Stops(body.kind, len(body.data))
            began = perf_counter()
            await _observe(watch, stops, asyncio.to_thread(_post, host, port, key, body))
            stops.seconds = perf_counter() - began
            note(stops)
        pid = options.pid or _listener(port)
        if options.memory and pid is not None:
            _allow_files()
            process = psutil.Process(pid)
            for kind, count, send in (
                (f"{ANSWERS} unread answers of /detokenize", ANSWERS, _ask_for_much),
                (f"{READERS} slow readers of {READER_TOKENS} tokens", READERS, _ask_for_stream),
                (f"{CONNECTIONS} idle connections", CONNECTIONS, lambda *_: None),
            ):
                stops = Stops(kind)
                grown = await _observe(watch, stops, _hold(process, host, port, key, kind, count, send, options))
                result.growth.append(grown)
                note(stops)
    result.stream_errors = watch.errors
    return result


async def _observe(watch: Watch, stops: Stops, doing: Any) -> Any:
    watch.reset()
    found = await doing
    await asyncio.sleep(0.2)  # what waited has been answered
    stops.health_ms, stops.stream_ms = watch.health_s * 1e3, watch.stream_s * 1e3
    if isinstance(found, str):
        stops.status = found
    return found


def _post(host: str, port: int, key: str | None, body: AbuseBody) -> str:
    """The status of the answer, or why there is none; blocking, in a thread."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request("POST", body.path, body.data, headers)
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


async def _hold(
    process: psutil.Process,
    host: str,
    port: int,
    key: str | None,
    kind: str,
    count: int,
    send: Callable[[socket.socket, str], None],
    options: AbuseOptions,
) -> Growth:
    """``count`` clients that ask and do not read, for so long that the server must have given them up."""
    before = process.memory_info().rss / MIB
    auth = f"Authorization: Bearer {key}\r\n" if key else ""
    clients = await asyncio.to_thread(_connect, host, port, count)
    try:
        for client in clients:
            await asyncio.to_thread(send, client, auth)
        during = before
        deadline = perf_counter() + options.settle
        while perf_counter() < deadline:
            during = max(during, process.memory_info().rss / MIB)
            if send is _ask_for_stream:
                await asyncio.to_thread(_read_a_little, clients)
            await asyncio.sleep(0.5)
        return Growth(kind, before, during, process.memory_info().rss / MIB)
    finally:
        for client in clients:
            client.close()


def _connect(host: str, port: int, count: int) -> list[socket.socket]:
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        client.settimeout(30)
        client.connect((host, port))
        clients.append(client)
    return clients


def _ask_for_much(client: socket.socket, auth: str) -> None:
    _send(client, auth, DETOKENIZE, {"tokens": [10 + index % 90 for index in range(300_000)]})


def _ask_for_stream(client: socket.socket, auth: str) -> None:
    body = {"prompt": "x", "max_tokens": READER_TOKENS, "ignore_eos": True, "stream": True}
    _send(client, auth, COMPLETIONS, body)


def _read_a_little(clients: list[socket.socket]) -> None:
    for client in clients:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.recv(256)


def _send(client: socket.socket, auth: str, path: str, body: dict[str, Any]) -> None:
    data = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{auth}Content-Type: application/json\r\n"
    with contextlib.suppress(OSError):
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def _listener(port: int) -> int | None:
    """The process that listens there, if it is one of this user's on this machine."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return int(connection.pid) if connection.pid else None
    return None


def _allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


KIND_WIDTH = 58


def print_head(console: Console) -> None:
    console.print("Longest waits of the others, in milliseconds:")
    console.print(f"{'sent':{KIND_WIDTH}} {'bytes':>10} {'answer':>8} {'seconds':>8} {'/health':>8} {'stream':>8}")


def print_stops(console: Console, stops: Stops) -> None:
    console.print(
        f"{stops.kind[:KIND_WIDTH]:{KIND_WIDTH}} {stops.size:>10} {stops.status[:8]:>8} {stops.seconds:>8.2f} "
        f"{stops.health_ms:>8.0f} {stops.stream_ms:>8.0f}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def print_abuse(console: Console, result: AbuseResult, options: AbuseOptions) -> None:
    if result.growth:
        table = Table("held", "before MiB", "most MiB", "after MiB", title="Memory of the server's process")
        for grown in result.growth:
            table.add_row(grown.kind, f"{grown.before:.0f}", f"{grown.during:.0f}", f"{grown.after:.0f}")
        console.print(table)
    for failure in result.failures(options):
        console.print(failure, style="red", markup=False)
