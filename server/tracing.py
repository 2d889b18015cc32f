"""A trace of every generating request, by OpenTelemetry and its conventions for generative AI; no text of clients.

A span is made when its request is over, of what is known by then, so that nothing is done for it per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import FinishReason, NewRequest
from slipstream.server.access.principal import principal_of
from slipstream.server.errors import ApiError
from slipstream.server.http.headers import header
from slipstream.server.telemetry.sequence_metrics import SequenceMetrics, sequences_metrics

if TYPE_CHECKING:
    from starlette.types import Scope

EXPORT_TIMEOUT_S = 5.0
TRACES_PATH = "/v1/traces"
CONVERSATIONS = ("chat", "responses", "messages")
"""What paths of conversations contain; what else generates continues texts."""
NANOSECONDS = 1_000_000_000


class TracedSequence(Protocol):
    @property
    def request(self) -> NewRequest: ...

    @property
    def metrics(self) -> SequenceMetrics: ...

    @property
    def finish_reason(self) -> FinishReason | None: ...


class Traced(Protocol):
    """What there is to say of a request."""

    @property
    def name(self) -> str: ...

    @property
    def arrival(self) -> float:
        """time.monotonic()"""
        ...

    @property
    def sequences(self) -> Sequence[TracedSequence]: ...

    def count_tokens(self) -> tuple[int, int, int]:
        """Prompt tokens, those of them that were cached, and generated ones."""
        ...


class Tracing:
    """Sends traces to a collector, or appends them to a file."""

    def __init__(self, where: str, model: str) -> None:
        """``where``: the address of a collector (OTLP over HTTP), or a path. Raises ConfigError if something lacks."""
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = _exporter(where)
        except ImportError as error:
            raise ConfigError(
                f"--traces needs {error.name}, which is not installed: pip install 'slipstream[otel]'"
            ) from None
        resource = Resource.create({"service.name": "slipstream", "service.version": version("slipstream")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("slipstream", version("slipstream"))
        self._context = TraceContextTextMapPropagator()
        self._trace = trace
        self._model = model

    def record(self, scope: Scope, generation: Traced, error: ApiError | None) -> None:
        """The request is over; ``error`` is what it ended with, if with one."""
        offset = time.time() - time.monotonic()

        def at(moment: float) -> int:
            return int((moment + offset) * NANOSECONDS)

        carrier = {name: value for name in ("traceparent", "tracestate") if (value := header(scope, name))}
        operation = "chat" if any(name in scope["path"] for name in CONVERSATIONS) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._context.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=self._attributes(scope, generation, operation),
            start_time=at(generation.arrival),
        )
        span.set_attribute("http.response.status_code", 200 if error is None else error.status)
        if error is not None:
            span.set_attribute("error.type", error.code or str(error.status))
            span.set_status(self._trace.StatusCode.ERROR)
        parent = self._trace.set_span_in_context(span)
        for name, begin, end in _phases(generation):
            self._tracer.start_span(name, context=parent, start_time=at(begin)).end(at(end))
        span.end(at(time.monotonic()))

    def _attributes(self, scope: Scope, generation: Traced, operation: str) -> dict[str, Any]:
        first = generation.sequences[0].request
        params = first.params
        prompt_tokens, cached_tokens, tokens = generation.count_tokens()
        reasons = [each.finish_reason or "error" for each in generation.sequences]
        speculated = sequences_metrics([each.metrics for each in generation.sequences])["speculative_decoding"]
        route = scope.get("route")
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "slipstream",
            "gen_ai.request.model": self._model,
            "gen_ai.request.choice.count": len(generation.sequences),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.response.id": generation.name,
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": tokens,
            "gen_ai.usage.cache_read.input_tokens": cached_tokens,
            "http.request.method": scope["method"],
            "http.route": getattr(route, "path", scope["path"]),
            "slipstream.request_id": scope["state"]["request_id"],
            "slipstream.tenant": first.tenant,
            "slipstream.key": principal_of(scope).key,
            "slipstream.priority": first.priority,
            "slipstream.speculation.draft_tokens": speculated["num_draft_tokens"],
            "slipstream.speculation.accepted_tokens": speculated["num_accepted_draft_tokens"],
            "slipstream.speculation.steps": speculated["num_spec_steps"],
            "slipstream.drafter.versions": speculated["drafter_versions"],
            "slipstream.preemptions": sum(each.metrics.preemptions for each in generation.sequences),
        }
        if params.seed is not None:
            found["gen_ai.request.seed"] = params.seed
        for name, begin, end in _phases(generation):
            found[f"gen_ai.latency.{LATENCIES[name]}"] = end - begin
        if firsts := [each.metrics.first for each in generation.sequences if each.metrics.first]:
            found["gen_ai.latency.time_to_first_token"] = min(firsts) - generation.arrival
        found["gen_ai.latency.e2e"] = time.monotonic() - generation.arrival
        return found

    def close(self) -> None:
        """Sends what is left, which may take a while."""
        self._provider.force_flush(int(EXPORT_TIMEOUT_S * 1000))
        self._provider.shutdown()


LATENCIES = {"queue": "time_in_queue", "prefill": "time_in_model_prefill", "decode": "time_in_model_decode"}
"""Names under which the parts of a request's time stand among its attributes, as vLLM has them."""


def _phases(generation: Traced) -> list[tuple[str, float, float]]:
    """Parts of the time of a request, as far as it came, by the first and the last of its sequences."""
    clocks = [sequence.metrics for sequence in generation.sequences]
    scheduled = min((clock.scheduled for clock in clocks if clock.scheduled), default=0.0)
    first = min((clock.first for clock in clocks if clock.first), default=0.0)
    last = max(clock.last for clock in clocks)
    marks = [("queue", generation.arrival, scheduled), ("prefill", scheduled, first), ("decode", first, last)]
    return [(name, begin, end) for name, begin, end in marks if begin and end]


def _exporter(where: str) -> Any:
    if where.startswith(("http://", "https://")):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        address = where if where.rstrip("/").count("/") > 2 else where.rstrip("/") + TRACES_PATH
        return OTLPSpanExporter(endpoint=address, timeout=EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter

    return FileSpanExporter(where)
