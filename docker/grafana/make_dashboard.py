"""Makes dashboards/slipstream.json: python docker/grafana/make_dashboard.py writes it anew.

Below, a panel is its title, how to read it, and its queries. Of queries, ``m`` names a metric of the chosen servers and
models, and ``s`` one that has no label ``model_name``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "slipstream.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PROVISIONED = "slipstream-prometheus"
"""The uid in provisioning/datasources/prometheus.yaml."""
WIDTH = 24
RATE = "[$__rate_interval]"
GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "#808080"
TOKENS_S, STEPS_S, REQUESTS_S = "suffix: tok/s", "suffix: steps/s", "reqps"

Query = tuple[str, str]
"""Legend and expression."""
Steps = Sequence[tuple[float | None, str]]
"""From which value on which colour; the first begins at None."""


def s(name: str, **labels: str) -> str:
    """The value of a label may be a regular expression: "~429|5.."."""
    prefix = "" if name.startswith(("process_", "slipstream_engine_process_")) else "slipstream:"
    chosen = {"job": "~$job", "instance": "~$instance", **labels}
    found = [f'{key}="{value}"'.replace('="~', '=~"') for key, value in chosen.items()]
    return prefix + name + "{" + ",".join(found) + "}"


def m(name: str, **labels: str) -> str:
    return s(name, model_name="~$model_name", **labels)


def rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{RATE}))"


def quantiles(histogram: str, legend: str = "", *shares: float) -> list[Query]:
    buckets = rate(m(histogram + "_bucket"), "le")
    return [
        (f"{legend}p{share * 100:g}", f"histogram_quantile({share}, {buckets})")
        for share in shares or (0.5, 0.95, 0.99)
    ]


def mean(histogram: str) -> str:
    return f"{rate(m(histogram + '_sum'))} / {rate(m(histogram + '_count'))}"


LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
LINES = {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}}
STAT = {"reduceOptions": LAST, "colorMode": "value", "textMode": "auto"}
BARS = {"reduceOptions": LAST, "displayMode": "gradient", "orientation": "horizontal", "showUnfilled": True}
STATES = {"showValue": "never", "mergeValues": True, "rowHeight": 0.8, "legend": LEGEND, "tooltip": {"mode": "single"}}


class Page:
    """Panels one after the other, from left to right, in lines."""

    def __init__(self) -> None:
        self.panels: list[dict[str, Any]] = []
        self._x = self._y = self._height = 0

    def row(self, title: str) -> None:
        self._place({"type": "row", "title": title, "collapsed": False, "panels": []}, WIDTH, 1)

    def lines(
        self, title: str, unit: str, queries: list[Query], description: str, *, stack: str = "none", **more: Any
    ) -> None:
        """A time series; ``steps`` are lines in it."""
        custom = {
            "lineWidth": 1,
            "fillOpacity": 10 if stack == "none" else 40,
            "lineInterpolation": more.pop("interpolation", "linear"),
            "showPoints": "never",
            "stacking": {"mode": stack, "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if "steps" in more else "off"},
        }
        colors = {"mode": "palette-classic"}
        self._add("timeseries", title, unit, queries, description, LINES, min=0, color=colors, custom=custom, **more)

    def stat(
        self, title: str, unit: str, queries: list[Query], description: str, *, graph: str = "area", **more: Any
    ) -> None:
        """The last value, and what it was before; a share of nothing is no number."""
        more |= {"mappings": [{"type": "special", "options": {"match": "nan", "result": {"text": "idle"}}}]}
        self._add("stat", title, unit, queries, description, STAT | {"graphMode": graph}, **{"size": (3, 4)} | more)

    def bars(self, title: str, unit: str, queries: list[Query], description: str, **more: Any) -> None:
        """The last value of each series beside those of the others."""
        self._add("bargauge", title, unit, queries, description, BARS, min=0, **more)

    def states(self, title: str, queries: list[Query], description: str, no: str = RED, **more: Any) -> None:
        """When something was so (1), or not (0), for which ``no`` is the colour."""
        names = {"1": {"text": "yes", "color": GREEN}, "0": {"text": "no", "color": no}}
        mappings = [{"type": "value", "options": names}]
        self._add("state-timeline", title, "short", queries, description, STATES, mappings=mappings, **more)

    def _add(
        self,
        kind: str,
        title: str,
        unit: str,
        queries: list[Query],
        description: str,
        options: dict[str, Any],
        *,
        size: tuple[int, int] = (8, 7),
        steps: Steps = ((None, GREEN),),
        instant: bool = False,
        **defaults: Any,
    ) -> None:
        """``instant``: queries are asked once, for the end of the time shown."""
        kinds = {"instant": True, "range": False} if instant else {}
        targets = [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend, **kinds}
            for i, (legend, expression) in enumerate(queries)
        ]
        thresholds = {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}
        field = {"unit": unit, "color": {"mode": "thresholds"}, "thresholds": thresholds, **defaults}
        about = {"type": kind, "title": title, "description": description, "datasource": SOURCE, "targets": targets}
        self._place(about | {"fieldConfig": {"defaults": field, "overrides": []}, "options": options}, *size)

    def _place(self, panel: dict[str, Any], width: int, height: int) -> None:
        if self._x + width > WIDTH:
            self._x, self._y, self._height = 0, self._y + self._height, 0
        position = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, **panel, "gridPos": position})
        self._x, self._height = self._x + width, max(self._height, height)


ACCEPTED, GENERATED = rate(m("spec_decode_num_accepted_tokens_total")), rate(m("generation_tokens_total"))
TOKENS_PER_STEP = f"{GENERATED} / ({GENERATED} - {ACCEPTED})"
"""Of a sequence: a step brings one token of its own, and the draft tokens that were accepted."""
FAILING = f"{rate(m('request_success_total', finished_reason='error'))} / {rate(m('request_success_total'))}"
BUSY = f"{rate(m('step_seconds_total'), 'instance')} + {rate(m('scheduler_cpu_seconds_total'), 'instance')}"
FIRING = 'ALERTS{alertstate="firing",alertname=~"Slipstream.*"}'


def now(page: Page) -> None:
    page.stat(
        *("Alerts", "short", [("", f"count({FIRING}) or vector(0)")]),
        "Alerts that fire now; their names stand in the annotations and in Prometheus.",
        steps=[(None, GREEN), (1, RED)],
    )
    page.stat(
        *("Ready", "short", [("ready", f"sum({s('ready')})"), ("of", f"count({s('ready')})")]),
        "Servers that take requests, of those that Prometheus reaches.",
        steps=[(None, RED), (1, GREEN)],
        graph="none",
    )
    page.stat(
        *("Tokens per second", TOKENS_S, [("", GENERATED)]),
        "Tokens generated, by all servers together.",
    )
    page.stat(
        *("First token, p95", "s", quantiles("time_to_first_token_seconds", "", 0.95)),
        "Nineteen of twenty sequences had their first token within this time.",
        steps=[(None, GREEN), (2, YELLOW), (10, RED)],
    )
    page.stat(
        *("Waiting", "short", [("", f"sum({m('num_requests_waiting')})")]),
        "Sequences that have arrived and found no room to run yet; what stays above 0 is overload.",
        steps=[(None, GREEN), (10, YELLOW), (100, RED)],
    )
    page.stat(
        *("Failing", "percentunit", [("", FAILING)]),
        "Share of sequences that end with an error.",
        steps=[(None, GREEN), (0.001, YELLOW), (0.01, RED)],
        decimals=2,
    )
    page.stat(
        *("Tokens per step", "short", [("", TOKENS_PER_STEP)]),
        "Of a sequence, with speculation: 2 means that it needs half as many steps as without.",
        steps=[(None, GREY), (1.2, GREEN)],
        decimals=2,
    )
    page.stat(
        *("Live version", "short", [("{{drafter}}", f"max by (drafter) ({m('drafter_version', route='')})")]),
        "Version of the learned drafter that most requests use; it should rise as traffic is learned.",
        steps=[(None, BLUE)],
        graph="none",
    )


def serving(page: Page) -> None:
    page.row("Serving")
    page.lines(
        *("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        "From arrival to the first token, queue included; if only p99 is high, look for long prompts.",
    )
    page.lines(
        *("Time per output token", "s"),
        quantiles("request_time_per_output_token_seconds") + quantiles("inter_token_latency_seconds", "gap ", 0.99),
        "Mean per sequence after the first token, and the longest gaps that a reader sees (p99 of single gaps).",
    )
    page.lines(
        *("Waiting in the queue", "s", quantiles("request_queue_time_seconds")),
        "From arrival to the first step: this part of the time to first token goes away with more servers.",
    )
    page.lines(
        *("Running and waiting", "short"),
        [
            ("running, {{instance}}", f"sum by (instance) ({m('num_requests_running')})"),
            ("waiting, {{instance}}", f"sum by (instance) ({m('num_requests_waiting')})"),
            ("preempted per second", rate(m("num_preemptions_total"))),
        ],
        "A queue that grows while as many run as may is overload; with few running, or any preempted, the KV cache is "
        "too small.",
    )
    page.lines(
        *("Throughput", TOKENS_S, [("generated", GENERATED), ("prompts", rate(m("prompt_tokens_total")))]),
        "Tokens generated, and tokens of prompts (those found in the prefix cache too).",
    )
    page.lines(
        *("KV cache", "percentunit"),
        [
            ("held, {{instance}}", f"max by (instance) ({m('kv_cache_usage_perc')})"),
            ("kept, {{instance}}", f"max by (instance) ({m('kv_blocks_cached')} / {m('kv_blocks_total')})"),
        ],
        "Share of blocks that running sequences hold, and that are kept for reuse; above the line, sequences are "
        "soon sent back to the queue.",
        steps=[(None, GREEN), (0.9, RED)],
        max=1,
    )
    page.lines(
        *("How sequences end", REQUESTS_S),
        [("{{finished_reason}}", rate(m("request_success_total"), "finished_reason"))],
        "Stop and length are answers; abort is a client that left or a time limit; error is ours.",
        stack="normal",
    )
    page.lines(
        *("Refused and failed requests", REQUESTS_S),
        [
            ("{{status}}", rate(s("http_responses_total", status="~429|5.."), "status")),
            ("rejected: {{reason}}", rate(m("admission_rejections_total"), "reason")),
            ("clients cut", rate(s("connections_cut_total"))),
        ],
        "By HTTP status: 429 is overload, 503 not ready, 504 a time limit, 500 a fault; beside them rejections by "
        "the queue and clients that do not read.",
    )
    page.lines(
        *("Prefix cache", "percentunit"),
        [("found", f"{rate(m('prefix_cache_hits_total'))} / {rate(m('prefix_cache_queries_total'))}")],
        "Share of prompt tokens that need not be computed; 0 where no two prompts begin alike.",
        max=1,
    )
    page.lines(
        *("Where the time of a sequence goes", "s"),
        [
            ("queue", mean("request_queue_time_seconds")),
            ("prefill", mean("request_prefill_time_seconds")),
            ("decode", mean("request_decode_time_seconds")),
        ],
        "Means; a long prefill asks for shorter prompts or more prefix hits, a long decode for speculation.",
        stack="normal",
    )
    page.lines(
        *("Length of prompts and answers", "short"),
        quantiles("request_prompt_tokens", "prompt ", 0.5, 0.95)
        + quantiles("request_generation_tokens", "answer ", 0.5, 0.95),
        "Tokens; what changes here explains most changes of the latencies.",
    )
    page.lines(
        *("Steps of the engine", "s"),
        [("length", f"{rate(m('step_seconds_total'))} / {rate(m('engine_steps_total'))}")],
        "Mean length of a step; longer ones compute more at once, as long as the tokens per step grow with it.",
        size=(6, 7),
    )
    page.lines(
        *("Tokens computed per step", "short", quantiles("iteration_tokens_total", "", 0.5, 0.95)),
        "Prompts, tokens of streams and draft tokens together; this is how well steps are used.",
        size=(6, 7),
    )
    page.lines(
        *("Memory", "bytes"),
        [
            ("API, {{instance}}", s("process_resident_memory_bytes")),
            ("engine, {{instance}}", s("slipstream_engine_process_resident_memory_bytes")),
        ],
        "Resident memory of the API process and of the engine process; what grows without end is a leak.",
        size=(6, 7),
    )
    page.lines(
        *("Processor", "short"),
        [
            ("API, {{instance}}", f"rate({s('process_cpu_seconds_total')}{RATE})"),
            ("engine, {{instance}}", f"rate({s('slipstream_engine_process_cpu_seconds_total')}{RATE})"),
        ],
        "Cores in use; an API process near 1 is at the end of what it can do.",
        size=(6, 7),
    )
    page.states(
        *("Ready", [("{{instance}}", s("ready"))]),
        "Red where a server took no requests: loading, draining, stalled, or replacing its engine.",
        size=(12, 5),
    )
    page.lines(
        *("Stalls, pauses and restarts", "short"),
        [
            ("stalled, {{instance}}", m("engine_stalled_seconds")),
            ("restarts, {{instance}}", s("engine_restarts_total")),
            ("paused, {{instance}}", m("engine_paused")),
        ],
        "Seconds without a step while sequences are open (above the line an alert), engines replaced since the "
        "start, and 1 while somebody has paused the engine.",
        size=(12, 5),
        steps=[(None, GREEN), (30, RED)],
    )


def speculation(page: Page) -> None:
    accepted = rate(m("spec_decode_num_accepted_tokens_total"), "drafter")
    drafts = rate(m("spec_decode_num_drafts_total"), "drafter")
    drafted = rate(m("spec_decode_num_draft_tokens_total"), "drafter")
    places = f"sum by (drafter, position) (increase({m('spec_decode_num_accepted_tokens_per_pos_total')}[$__range]))"
    proposals = f"sum by (drafter) (increase({m('spec_decode_num_drafts_total')}[$__range]))"
    page.row("Speculation")
    page.lines(
        *("Accept length", "short"),
        [("{{drafter}}", f"1 + {accepted} / {drafts}"), ("all steps", TOKENS_PER_STEP)],
        "Tokens per step: of a proposal that was verified, by drafter, and of all steps of a sequence, which is "
        "what counts.",
        steps=[(None, RED), (1, GREEN)],
    )
    page.lines(
        *("Accept rate", "percentunit", [("{{drafter}}", f"{accepted} / {drafted}")]),
        "Share of verified draft tokens that were accepted, by drafter; low with a high accept length means that "
        "many are tried, which is cheap when little runs.",
        max=1,
    )
    page.bars(
        *("Accepted by position", "percentunit"),
        [("{{drafter}} {{position}}", f"{places} / on (drafter) group_left {proposals}")],
        "Of the proposals in the time shown, the share whose draft token at this place was accepted (0 is the first).",
        instant=True,
        max=1,
    )
    page.lines(
        *("Time for speculation", "percentunit"),
        [
            ("verifying", f"{rate(m('spec_decode_verify_seconds_total'))} / {rate(m('step_seconds_total'))}"),
            (
                "drafting",
                f"{rate(m('spec_decode_draft_seconds_total'))} / "
                f"({rate(m('spec_decode_draft_seconds_total'))} + {rate(m('step_seconds_total'))})",
            ),
        ],
        "Shares of the engine's working time: in steps that verify draft tokens, and in proposing them; the "
        "second is its price.",
        max=1,
    )
    page.lines(
        *("Why so many draft tokens", STEPS_S, [("{{reason}}", rate(m("speculation_steps_total"), "reason"))]),
        "Steps by reason: with many streams, not worth it is right; does not pay for long means that the drafter "
        "does not fit the traffic.",
        stack="percent",
    )
    page.lines(
        *("Draft tokens", TOKENS_S),
        [("accepted", ACCEPTED), ("rejected", f"{rate(m('spec_decode_num_draft_tokens_total'))} - {ACCEPTED}")],
        "Accepted ones are tokens that needed no step of their own; the others were computed in vain.",
        stack="normal",
    )


def evolution(page: Page) -> None:
    page.row("Evolution")
    page.lines(
        *("Accept length: live against the gate", "short"),
        [
            ("live, {{instance}}", m("drafter_accept_length")),
            ("gate, {{instance}}", m("drafter_accept_length_predicted")),
        ],
        "What the live version brings on real requests, and what the gate predicted for it; 0 where too little is "
        "known.",
    )
    page.lines(
        *("Drift", "percentunit", [("{{instance}}", m("drafter_drift_ratio"))]),
        "The first over the second: below the line the traffic is another one than was learned, and a round begins.",
        steps=[(None, RED), (0.85, GREEN)],
    )
    page.lines(
        *("Versions that draft", "short", [("{{drafter}} {{route}} {{instance}}", m("drafter_version"))]),
        "By route; each step up is a swap, each step down a rollback.",
        interpolation="stepAfter",
    )
    page.lines(
        *("Accept length by version", "short"),
        [
            (
                "{{drafter}} {{version}}",
                f"1 + {rate(m('drafter_version_num_accepted_tokens_total'), 'drafter, version')} / "
                + rate(m("drafter_version_num_drafts_total"), "drafter, version"),
            )
        ],
        "Of the versions that are loaded: during a trial, the new one beside the one that is live.",
    )
    page.lines(
        *("Versions by state", "short", [("{{state}}", f"max by (state) ({m('drafter_versions')})")]),
        "In the registry; many rolled back among few live ones means that the gate sees other traffic than the "
        "requests.",
        stack="normal",
        interpolation="stepAfter",
    )
    page.lines(
        *("Trial", "short"),
        [
            ("{{side}}", f"sum by (side) ({m('drafter_trial_requests')})"),
            ("version on trial", f"max({m('drafter_trial_version')})"),
        ],
        "Requests counted so far on the version before and on the one on trial, whose number is shown; 0 without "
        "a trial.",
        interpolation="stepAfter",
    )
    page.stat(
        *("In the time shown", "short"),
        [
            (
                f"{label}{{{{{by}}}}}" if by else label,
                f"sum{f' by ({by}) ' if by else ''}(increase({m(name)}[$__range]))",
            )
            for label, by, name in (
                ("round ", "outcome", "evolution_rounds_total"),
                ("trial ", "decision", "drafter_trials_total"),
                ("swaps", "", "drafter_swaps_total"),
                ("refused by the engine", "", "drafter_failed_swaps_total"),
                ("drifts", "", "drafter_drifts_total"),
                ("worker deaths", "", "evolution_worker_restarts_total"),
            )
        ],
        "Rounds of training by the gate's verdict, trials by their end, swaps, versions that would not load, "
        "drifts, and deaths of the worker.",
        steps=[(None, BLUE)],
        instant=True,
        decimals=0,
        graph="none",
        size=(8, 7),
    )
    page.states(
        *("Training worker",),
        [
            ("{{state}}", f"max by (state) ({m('evolution_worker_state')})"),
            ("runs", f"max({m('evolution_worker_up')})"),
        ],
        "What it does: paused while requests run (--evolve idle), waiting while there is nothing new to learn.",
        no="transparent",
    )
    page.states(
        *("Registry and traffic store",),
        [
            ("registry, {{instance}}", m("drafter_registry_up")),
            ("in control, {{instance}}", m("drafter_registry_in_control")),
            ("traffic, {{instance}}", m("traffic_store_up")),
        ],
        "Whether they can be used, and which server decides and trains.",
    )
    page.lines(
        *("Learned tokens per second", TOKENS_S),
        [
            ("while training, {{instance}}", m("evolution_training_tokens_per_second")),
            ("over all", rate(m("evolution_training_tokens_total"))),
        ],
        "While it trains, and over all time: the second falls where requests leave no room.",
    )
    page.lines(
        *("Loss of training", "short", [("{{instance}}", m("evolution_training_loss"))]),
        "Falls within a round; a jump at its beginning is new traffic.",
    )
    page.lines(
        *("Idle share", "percentunit"),
        [
            ("engine idle, {{instance}}", f"clamp_min(1 - ({BUSY}), 0)"),
            ("training", f"max(avg_over_time({m('evolution_worker_state', state='training')}{RATE}))"),
        ],
        "Share of the time in which the engine has nothing to do, and in which the worker trains; idle time that "
        "is not used waits for traffic.",
        max=1,
    )
    page.lines(
        *("Traffic kept", REQUESTS_S, [("{{outcome}}", rate(m("traffic_samples_total"), "outcome"))]),
        "Answers by what became of them: dropped ones found no room, redacted ones the hook refused.",
        stack="normal",
        size=(6, 7),
    )
    page.lines(
        *("Traffic store", "bytes", [("{{instance}}", m("traffic_store_bytes"))]),
        "Bytes on the disk; it stands where --traffic-max-bytes or --traffic-max-age let go as much as comes.",
        size=(6, 7),
    )
    page.lines(
        *("Tokens in the traffic store", "short", [("{{instance}}", m("traffic_store_tokens"))]),
        "What the worker can learn from.",
        size=(6, 7),
    )
    page.lines(
        *("Room on disks", "percentunit"),
        [("{{store}}, {{instance}}", f"{m('disk_free_bytes')} / {m('disk_size_bytes')}")],
        "Share that is free under the traffic store and the registry; below the line an alert.",
        steps=[(None, RED), (0.1, GREEN)],
        size=(6, 7),
        max=1,
    )


def annotation(name: str, color: str, expression: str, title: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "enable": True,
        "iconColor": color,
        "datasource": SOURCE,
        "expr": expression,
        "step": "15s",
        "titleFormat": title,
        "textFormat": text,
    }


def variable(name: str, label: str, series: str, of: str) -> dict[str, Any]:
    query = f"label_values({series}, {of})"
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    page = Page()
    for part in (now, serving, speculation, evolution):
        part(page)
    changed = f"changes({m('drafter_version', route='')}{RATE}) > 0"
    version = f"count_values by (instance, drafter) ('version', {m('drafter_version', route='')} and {changed})"
    taken_back = f"increase({m('drafter_trials_total', decision='roll_back')}{RATE}) > 0"
    replaced = f"increase({s('engine_restarts_total')}{RATE}) > 0"
    return {
        "uid": "slipstream",
        "title": "Slipstream",
        "description": "A Slipstream server, or several: serving, speculation, and how the drafter evolves.",
        "tags": ["slipstream", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {
                    "type": "datasource",
                    "name": "datasource",
                    "label": "Data source",
                    "query": "prometheus",
                    "current": {"text": "Prometheus", "value": PROVISIONED},
                },
                variable("job", "Job", "slipstream:ready", "job"),
                variable("instance", "Server", 'slipstream:ready{job=~"$job"}', "instance"),
                variable("model_name", "Model", s("num_requests_running"), "model_name"),
            ]
        },
        "annotations": {
            "list": [
                annotation("Swaps", BLUE, version, "Version {{version}} drafts", "{{drafter}} on {{instance}}"),
                annotation("Rollbacks", RED, taken_back, "A version was taken back", "on {{instance}}"),
                annotation("Engine restarts", "orange", replaced, "The engine was replaced", "on {{instance}}"),
                annotation("Alerts", RED, FIRING, "{{alertname}}", "{{severity}}, {{instance}}"),
            ]
        },
        "panels": page.panels,
    }


def text() -> str:
    """What stands in the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
