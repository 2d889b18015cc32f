"""Metrics of drafter evolution; what each one means is listed in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.drafter.registry.states import State

if TYPE_CHECKING:
    from slipstream.server.evolution.evolution import Evolution

WORKER_STATES = ("starting", "waiting", "training", "gating", "paused", "published", "refused", "failed")
VERSION_STATES: tuple[State, ...] = ("candidate", "canary", "live", "retired", "rolled-back", "pruned")

Values = float | Mapping[str, float] | None
"""The value of the one series, or values by that of the label; None where there is nothing to say."""


def trial_requests(evolution: Evolution) -> Values:
    judge = evolution.controller.judge
    counts = judge.counts if judge else (0, 0)
    return dict(zip(("baseline", "canary"), counts, strict=True))


def worker_states(evolution: Evolution) -> Values:
    if evolution.worker is None:
        return None
    now = evolution.worker.report["state"]
    return {state: float(state == now) for state in WORKER_STATES}


def of_training(read: Callable[[Evolution], Values]) -> Callable[[Evolution], Values]:
    """Only where versions are trained."""
    return lambda evolution: None if evolution.worker is None else read(evolution)


METRICS: tuple[
    tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, str, Callable[[Evolution], Values]], ...
] = (
    (
        GaugeMetricFamily,
        "drafter_versions",
        "Versions in the registry.",
        "state",
        lambda e: {state: e.states.get(state, 0) for state in VERSION_STATES},
    ),
    (
        GaugeMetricFamily,
        "drafter_registry_up",
        "1 while the registry can be used, 0 while it is damaged, locked or unreachable.",
        "",
        lambda e: float(e.error is None),
    ),
    (
        GaugeMetricFamily,
        "drafter_registry_in_control",
        "1 while this server decides which versions draft, 0 while another one does.",
        "",
        lambda e: float(e.controller.in_control),
    ),
    (
        CounterMetricFamily,
        "drafter_failed_swaps",
        "Versions that the engine would not load.",
        "",
        lambda e: e.follower.failures,
    ),
    (
        CounterMetricFamily,
        "drafter_trials",
        "Trials of new versions that have ended.",
        "decision",
        lambda e: e.controller.decisions,
    ),
    (
        GaugeMetricFamily,
        "drafter_trial_version",
        "Version on trial; 0 without one.",
        "",
        lambda e: e.controller.trial.new if e.controller.trial else 0,
    ),
    (
        GaugeMetricFamily,
        "drafter_trial_requests",
        "Requests that the trial under way has counted, by what they ran on.",
        "side",
        trial_requests,
    ),
    (
        GaugeMetricFamily,
        "drafter_accept_length",
        "Tokens per step of the latest requests on the live version; 0 where too little is known.",
        "",
        lambda e: e.observer.accept_length,
    ),
    (
        GaugeMetricFamily,
        "drafter_accept_length_predicted",
        "The same as the gate saw it on held-out traffic; 0 if the live version was never gated.",
        "",
        lambda e: e.predicted,
    ),
    (
        GaugeMetricFamily,
        "drafter_drift_ratio",
        "Tokens per step with one draft token, live over what the gate saw; 1 where too little is known.",
        "",
        lambda e: e.drift,
    ),
    (CounterMetricFamily, "drafter_drifts", "Times that drift asked for training.", "", lambda e: e.drifts),
    (
        GaugeMetricFamily,
        "evolution_worker_up",
        "1 while the process of the training worker runs.",
        "",
        of_training(lambda e: float(e.worker is not None and e.worker.pid is not None)),
    ),
    (GaugeMetricFamily, "evolution_worker_state", "1 for what the training worker does.", "state", worker_states),
    (
        CounterMetricFamily,
        "evolution_worker_restarts",
        "Times that the training worker died.",
        "",
        lambda e: None if e.worker is None else e.worker.restarts,
    ),
    (
        CounterMetricFamily,
        "evolution_training_tokens",
        "Positions learned.",
        "",
        of_training(lambda e: e.progress.tokens),
    ),
    (
        GaugeMetricFamily,
        "evolution_training_tokens_per_second",
        "Positions learned per second, pauses not counted.",
        "",
        of_training(lambda e: e.progress.training.get("tokens_per_second", 0.0)),
    ),
    (
        GaugeMetricFamily,
        "evolution_training_loss",
        "Loss of the last step that was told of.",
        "",
        of_training(lambda e: e.progress.training.get("loss", 0.0)),
    ),
    (
        CounterMetricFamily,
        "evolution_rounds",
        "Rounds of training, by what the gate said of their result.",
        "outcome",
        of_training(lambda e: e.progress.rounds),
    ),
)


class EvolutionCollector(Collector):
    """The metrics of evolution; without a registry the families have no series."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.evolution: Evolution | None = None
        self._prefix = prefix
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        for family_type, name, help_text, label, read in METRICS:
            family = family_type(self._prefix + name, help_text, labels=("model_name", *([label] if label else [])))
            values = None if self.evolution is None else read(self.evolution)
            if isinstance(values, Mapping):
                for key, value in values.items():
                    family.add_metric((self._model_name, key), value)
            elif values is not None:
                family.add_metric((self._model_name,), values)
            yield family
