"""Locust users that stream chat answers over real prompts:   locust -f locustfile.py --host URL

Besides the request itself (``POST``, response time = the whole stream) each one reports two more entries of type
``SSE``: ``time to first token`` and, for every later chunk with tokens, ``inter-token latency``. The lengths of
response of the two count the tokens of usage and of the chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from threading import Lock
from time import perf_counter
from typing import Any

import msgspec
from locust import HttpUser, constant, events, task
from requests import RequestException

from slipstream.clients.errors import api_error
from slipstream.clients.sse import Chunk, SSEDecoder
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.workloads import Request, Workload, WorkloadOptions

PROMPTS_PER_DRAW = 64


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    group = parser.add_argument_group("slipstream", "Requests; see docs/benchmarks.md.")
    group.add_argument(
        "--workload", default="sharegpt", choices=("sharegpt", "shared-prefix", "long", "rewrite", "extract", "code")
    )
    group.add_argument("--model", default="", help="Model name to ask for; default the first that the server lists.")
    group.add_argument("--api-key", default="", help="Sent as bearer token.")
    group.add_argument("--output-tokens", type=int, default=128, help="max_tokens of each request.")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=0)


class Prompts:
    """The workload shared by all users of this process; lengths of long texts are estimated."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._workload: Workload | None = None
        self._ready: list[Request] = []
        self._lock = Lock()  # a greenlet's, for Locust patches threading: one event loop at a time

    def next(self) -> Request:
        with self._lock:
            if not self._ready:
                self._workload = self._workload or self._start()
                self._ready = asyncio.run(self._workload.round(PROMPTS_PER_DRAW))
            return self._ready.pop()

    def _start(self) -> Workload:
        options = self._environment.parsed_options
        # Workers of a distributed run, numbered when they have found their master, draw different prompts.
        seed = options.seed + 1000 * getattr(self._environment.runner, "worker_index", 0)
        return Workload(
            WorkloadOptions(
                name=options.workload, output_tokens=options.output_tokens, temperature=options.temperature, seed=seed
            )
        )


@events.init.add_listener  # type: ignore[untyped-decorator]
def make_prompts(environment: Any, **_: Any) -> None:
    environment.prompts = Prompts(environment)


class ChatUser(HttpUser):  # type: ignore[misc]
    """Sends its next request when the last answer has ended."""

    wait_time = constant(0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self.model = options.model
        if not self.model:
            with self.client.get("/v1/models", headers=self.headers, catch_response=True) as response:
                self.model = response.json()["data"][0]["id"]

    @task  # type: ignore[untyped-decorator]
    def chat(self) -> None:
        request = self.environment.prompts.next()
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **request.body,
        }
        start = perf_counter()
        record = RequestRecord(due=start, start=start)
        with self.client.post(
            request.path, json=body, headers=self.headers, stream=True, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(str(api_error(response.status_code, response.content or b"")))
                return
            read_stream(response.iter_content(chunk_size=None), record)
            # With stream=True Locust stops its clock at the headers.
            response.request_meta["response_time"] = (perf_counter() - start) * 1e3
            if record.error:
                response.failure(record.error)
        if record.ok:
            self.report(record)

    def report(self, record: RequestRecord) -> None:
        ttft = record.ttft()
        if ttft is not None:
            self._fire("time to first token", ttft, record.output_tokens)
        for gap, tokens in zip(record.itl(), record.chunk_tokens[1:], strict=True):
            self._fire("inter-token latency", gap, tokens or 1)

    def _fire(self, name: str, seconds: float, tokens: int) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=seconds * 1e3,
            response_length=tokens,
            exception=None,
            context={},
        )


def read_stream(blocks: Iterator[bytes], record: RequestRecord) -> None:
    """Add the chunks to the record, up to [DONE] or to an error, which ends up in ``record.error``."""
    decoder = SSEDecoder()
    try:
        for block in blocks:
            received = perf_counter()
            for event in decoder.feed(block):
                if event == b"[DONE]":
                    if len(record.finish_reasons) != 1:
                        record.error = f"the stream had {len(record.finish_reasons)} finish reasons instead of one"
                    return
                data = msgspec.json.decode(event)
                if "error" in data and "choices" not in data:
                    record.error = str(api_error(200, event))
                    return
                record.add(Chunk(received, data))
    except (RequestException, msgspec.DecodeError) as error:
        record.error = f"broken stream: {error}"
    else:
        record.error = "the stream ended without [DONE]"
