"""Metrics under the names that other engines have for them, for what reads those: pickers of endpoints, dashboards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

Alias = Literal["none", "vllm"]
OWN = "slipstream:"
SAME = frozenset(
    {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
        *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_max_num_generation_tokens", "request_params_n"),
        *("request_params_max_tokens", "request_prefill_kv_computed_tokens", "iteration_tokens_total"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("spec_decode_num_accepted_tokens_per_pos", "cache_config_info", "lora_requests_info"),
    }
)
"""What means the same there."""
OTHERS = {"kv_cache_usage_perc": ("gpu_cache_usage_perc",)}
"""Further names that it had there."""
LABELS = {"num_blocks": "num_gpu_blocks"}


class Aliased:
    """A registry whose metrics are there twice: under their own names, and under those of another engine."""

    def __init__(self, registry: CollectorRegistry, alias: Alias) -> None:
        self._registry = registry
        self._prefix = f"{alias}:"

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            yield metric
            name = metric.name.removeprefix(OWN)
            if name in SAME and metric.name != name:
                for other in (name, *OTHERS.get(name, ())):
                    yield self._renamed(metric, self._prefix + other)

    def _renamed(self, metric: Metric, name: str) -> Metric:
        found = Metric(name, metric.documentation, metric.type, metric.unit)
        found.samples = list(self._samples(metric, name))
        return found

    def _samples(self, metric: Metric, name: str) -> Iterable[Sample]:
        for sample in metric.samples:
            labels = {LABELS.get(label, label): value for label, value in sample.labels.items()}
            yield sample._replace(name=name + sample.name.removeprefix(metric.name), labels=labels)
