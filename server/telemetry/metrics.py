"""Prometheus metrics under the prefix ``slipstream:``; what each one means is listed in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from slipstream.engine.handle import EngineHandle
from slipstream.engine.messages import EngineStats, FinishReason, StepOutputs
from slipstream.server.telemetry.metric_alias import Alias, Aliased

PREFIX = "slipstream:"
OPENMETRICS = "application/openmetrics-text"
disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter and histogram that only says when it was first used
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES_BUCKETS = (1, 2, 5, 10, 20, 50, 100)
PREEMPTIONS_BUCKETS = (0, 1, 2, 5, 10, 20)
FAILURES = (429, 500, 503, 504)
REJECTIONS = ("queue_full", "requests_per_minute", "tokens_per_minute", "max_concurrent")

FROM_STATS: tuple[
    tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[EngineStats], float]], ...
] = (
    (GaugeMetricFamily, "num_requests_running", "Sequences in the running batch.", lambda s: s.num_running),
    (GaugeMetricFamily, "num_requests_waiting", "Sequences that wait for room.", lambda s: s.num_waiting),
    (
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Share of the KV-cache blocks that running sequences hold, 0 to 1.",
        lambda s: s.blocks_used / s.blocks_total if s.blocks_total else 0.0,
    ),
    (GaugeMetricFamily, "kv_blocks_total", "KV-cache blocks there are.", lambda s: s.blocks_total),
    (GaugeMetricFamily, "kv_blocks_used", "KV-cache blocks that running sequences hold.", lambda s: s.blocks_used),
    (
        GaugeMetricFamily,
        "kv_blocks_cached",
        "KV-cache blocks kept for reuse and free to be evicted.",
        lambda s: s.blocks_cached,
    ),
    (GaugeMetricFamily, "target_version", "Version of the target's weights.", lambda s: s.target_version),
    (GaugeMetricFamily, "engine_paused", "1 while somebody has paused the engine.", lambda s: float(s.is_paused)),
    (CounterMetricFamily, "prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    (CounterMetricFamily, "generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    (
        CounterMetricFamily,
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache_queries,
    ),
    (
        CounterMetricFamily,
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_cache_hits,
    ),
    (
        CounterMetricFamily,
        "num_preemptions",
        "Sequences sent back to the queue for lack of blocks.",
        lambda s: s.preemptions,
    ),
    (
        GaugeMetricFamily,
        "traffic_store_up",
        "1 while the traffic that may be kept can be written, 0 while it cannot; also 1 where none is kept.",
        lambda s: float(not s.traffic.failure),
    ),
    (
        GaugeMetricFamily,
        "traffic_store_bytes",
        "Bytes of the traffic that is kept.",
        lambda s: s.traffic.store_bytes,
    ),
    (
        GaugeMetricFamily,
        "traffic_store_tokens",
        "Tokens of the traffic that is kept.",
        lambda s: s.traffic.store_tokens,
    ),
    (CounterMetricFamily, "engine_steps", "Steps of the engine.", lambda s: s.steps),
    (
        CounterMetricFamily,
        "step_seconds",
        "Wall time in the model and in sampling.",
        lambda s: s.model_seconds,
    ),
    (
        CounterMetricFamily,
        "spec_decode_verify_seconds",
        "Wall time in the model and in sampling, of steps that verified draft tokens.",
        lambda s: s.verify_seconds,
    ),
    (
        CounterMetricFamily,
        "spec_decode_draft_seconds",
        "Wall time of proposing draft tokens.",
        lambda s: s.draft_seconds,
    ),
    (
        CounterMetricFamily,
        "scheduler_cpu_seconds",
        "CPU time of the engine on everything else: planning, batches, results, messages.",
        lambda s: s.overhead_cpu_seconds,
    ),
)


class EngineCollector(Collector):
    """Reads the engine's last snapshot when somebody looks."""

    def __init__(self, model_name: str) -> None:
        self.engine: EngineHandle | None = None
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        if self.engine is None:
            return
        stats = self.engine.stats
        for family_type, name, help_text, read in FROM_STATS:
            family = family_type(PREFIX + name, help_text, labels=("model_name",))
            family.add_metric((self._model_name,), read(stats))
            yield family
        yield from self._speculation(stats)
        samples = CounterMetricFamily(
            PREFIX + "traffic_samples",
            "Requests that may be kept, by what became of them.",
            labels=("model_name", "outcome"),
        )
        for outcome in ("kept", "dropped", "redacted"):
            samples.add_metric((self._model_name, outcome), getattr(stats.traffic, outcome))
        yield samples
        ready = self.engine.ready
        info = {
            "model_name": self._model_name,
            "block_size": str(ready.block_size),
            "num_blocks": str(ready.num_blocks),
            "kv_cache_bytes": str(ready.kv_cache_bytes),
            "dtype": ready.dtype,
            "cache_dtype": ready.kv_cache_dtype,
            "weights": ready.weights,
            "weights_because": ready.weights_because,
            "device": ready.device,
            "kernels": ready.kernels,
        }
        family = GaugeMetricFamily(PREFIX + "cache_config_info", "How the engine is set up.", labels=tuple(info))
        family.add_metric(tuple(info.values()), 1)
        yield family

    def _speculation(self, stats: EngineStats) -> Iterable[Metric]:
        def counter(name: str, help_text: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(PREFIX + name, help_text, labels=("model_name", *labels))

        drafts = counter("spec_decode_num_drafts", "Proposals of which draft tokens were verified.", "drafter")
        drafted = counter("spec_decode_num_draft_tokens", "Draft tokens verified.", "drafter")
        accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.", "drafter")
        places = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were accepted, by place.",
            "drafter",
            "position",
        )
        for drafter in stats.drafters:
            labels = (self._model_name, drafter.name)
            drafts.add_metric(labels, drafter.drafts)
            drafted.add_metric(labels, drafter.draft_tokens)
            accepted.add_metric(labels, drafter.accepted_tokens)
            for position, count in enumerate(drafter.accepted_per_position):
                places.add_metric((*labels, str(position)), count)
        yield from (drafts, drafted, accepted, places)
        yield from self._versions(stats)
        steps = counter("speculation_steps", "Steps by why so many draft tokens were verified in them.", "reason")
        for reason, count in stats.speculation_steps.items():
            steps.add_metric((self._model_name, reason), count)
        yield steps

    def _versions(self, stats: EngineStats) -> Iterable[Metric]:
        """Metrics of learned drafters: only what is loaded now, so that the number of series stays small."""
        labels = ("model_name", "drafter", "version")
        versions = GaugeMetricFamily(
            PREFIX + "drafter_version", "Version of the drafter that a route uses.", labels=(*labels[:2], "route")
        )
        memory = GaugeMetricFamily(PREFIX + "drafter_memory_bytes", "Memory of all loaded versions.", labels=labels[:2])
        swaps = CounterMetricFamily(PREFIX + "drafter_swaps", "Versions loaded while serving.", labels=labels[:2])
        drafts, drafted, accepted = (
            CounterMetricFamily(PREFIX + f"drafter_version_num_{name}", help_text, labels=labels)
            for name, help_text in (
                ("drafts", "Proposals of a loaded version of which draft tokens were verified."),
                ("draft_tokens", "Draft tokens of a loaded version that were verified."),
                ("accepted_tokens", "Draft tokens of a loaded version that were accepted."),
            )
        )
        for drafter in stats.drafters:
            if not drafter.routes:
                continue
            named = (self._model_name, drafter.name)
            for route, version in drafter.routes.items():
                versions.add_metric((*named, route), version)
            memory.add_metric(named, drafter.memory_bytes)
            swaps.add_metric(named, drafter.swaps)
            for entry in drafter.versions:
                drafts.add_metric((*named, str(entry.version)), entry.drafts)
                drafted.add_metric((*named, str(entry.version)), entry.draft_tokens)
                accepted.add_metric((*named, str(entry.version)), entry.accepted_tokens)
        yield from (versions, memory, swaps, drafts, drafted, accepted)


class Metrics:
    """Everything /metrics shows. Values of one label are resolved once, because these run for every token."""

    def __init__(self, model_name: str, alias: Alias = "none") -> None:
        self.registry = CollectorRegistry()
        self._shown: Any = self.registry if alias == "none" else Aliased(self.registry, alias)
        self._model_name = model_name
        self._engine = EngineCollector(model_name)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)

        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of a sequence.", BETWEEN_TOKENS_BUCKETS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, per sequence.",
            BETWEEN_TOKENS_BUCKETS,
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to its last token.", LATENCY_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step a sequence took part in.", LATENCY_BUCKETS
        )
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", LATENCY_BUCKETS
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", LATENCY_BUCKETS
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", LATENCY_BUCKETS
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per sequence.", COUNT_BUCKETS)
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per sequence.", COUNT_BUCKETS
        )
        self.computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens per sequence that were computed, not taken from the prefix cache.",
            COUNT_BUCKETS,
        )
        self.max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of the requests, as resolved.", COUNT_BUCKETS
        )
        self.max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest choice per request.", COUNT_BUCKETS
        )
        self.choices = self._histogram("request_params_n", "n of the requests.", CHOICES_BUCKETS)
        self.preemptions = self._histogram("request_num_preemptions", "Preemptions per sequence.", PREEMPTIONS_BUCKETS)
        self.step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed per engine step.", STEP_TOKENS_BUCKETS
        )
        self._finished = self._counter("request_success", "Sequences ended, by reason.", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Requests refused before any work, by reason.", "reason")
        self._responses = Counter(
            PREFIX + "http_responses", "HTTP responses.", ("route", "status"), registry=self.registry
        )
        self._cut = Counter(
            PREFIX + "connections_cut",
            "Connections closed because the client did not read its answer in time.",
            registry=self.registry,
        )
        # Series that begin with the first failure would hide it: a rate needs a value before it.
        for finish_reason in get_args(FinishReason):
            self._finished.labels(model_name, finish_reason)
        for rejection in REJECTIONS:
            self._rejected.labels(model_name, rejection)
        self._phase = Gauge(PREFIX + "ready", "1 when the server takes requests.", registry=self.registry)
        self._stalled = Gauge(
            PREFIX + "engine_stalled_seconds",
            "Time since the last step while sequences are open, 0 while none are.",
            ("model_name",),
            registry=self.registry,
        ).labels(model_name)
        self._restarts = Counter(
            PREFIX + "engine_restarts",
            "Engine processes that replaced a dead one.",
            registry=self.registry,
        )

    def attach(self, engine: EngineHandle, is_ready: Callable[[], bool], stalled_s: Callable[[], float]) -> None:
        """Called with every engine process that serves, one after the other."""
        if self._engine.engine is None:
            self._phase.set_function(lambda: float(is_ready()))
            self._stalled.set_function(stalled_s)
            ProcessCollector(namespace="slipstream_engine", pid=self._engine_pid, registry=self.registry)
        else:
            self._restarts.inc()
        self._engine.engine = engine
        engine.on_step.append(self._on_step)

    def _engine_pid(self) -> int:
        assert self._engine.engine is not None
        return self._engine.engine.pid

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """For whoever sends this Accept header: all there is, and its media type."""
        _, content_type = choose_encoder(accept)
        if not content_type.startswith(OPENMETRICS):
            return generate_latest(self._shown), CONTENT_TYPE_PLAIN_0_0_4
        # The encoder chosen would put underscores for the colons of names, which need no escaping.
        body: bytes = openmetrics.generate_latest(self._shown, escaping=ALLOWUTF8)  # type: ignore[no-untyped-call]
        return body, openmetrics.CONTENT_TYPE_LATEST

    def finished(self, reason: FinishReason) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model_name, reason).inc()

    def connection_cut(self) -> None:
        self._cut.inc()

    def expect_failures(self, route: str) -> None:
        """Counts of a route's answers by which a server that is in trouble is known begin at 0."""
        for status in FAILURES:
            self._responses.labels(route, status)

    def responded(self, route: str, status: int) -> None:
        self._responses.labels(route, status).inc()

    def _on_step(self, step: StepOutputs) -> None:
        if step.stats.step_tokens:
            self.step_tokens.observe(step.stats.step_tokens)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        parent = Histogram(PREFIX + name, help_text, ("model_name",), buckets=buckets, registry=self.registry)
        return parent.labels(self._model_name)

    def _counter(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(PREFIX + name, help_text, ("model_name", label), registry=self.registry)
