"""docker/prometheus and docker/grafana go with what the server exposes; faults are found, too."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monitoring
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig

RULES = monitoring.PROMETHEUS / "rules.yml"


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """What docs/metrics.md lists, which tests/server/test_docs.py holds against a server, and what it only mentions."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    ProcessCollector(namespace="slipstream_engine", registry=registry)
    return monitoring.documented() | monitoring.exposed(generate_latest(registry).decode())


def test_the_dashboard_is_what_its_generator_makes() -> None:
    made = runpy.run_path(str(monitoring.GRAFANA / "make_dashboard.py"))["text"]()
    assert monitoring.DASHBOARD.read_text() == made, "run docker/grafana/make_dashboard.py"


def test_grafana_can_show_it() -> None:
    assert monitoring.dashboard_problems() == []


def test_alerts_say_what_to_do_and_are_tested() -> None:
    assert monitoring.rule_problems() == []


def test_every_metric_exists(known: dict[str, str]) -> None:
    asked = [*monitoring.queries(), *monitoring.tested_series()]
    assert len(asked) > 200
    assert monitoring.unknown_metrics(asked, known) == []


def test_options_and_panels_that_are_named_exist() -> None:
    configs: tuple[Any, ...] = (ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig)
    options = {f"--{field.name.replace('_', '-')}" for config in configs for field in dataclasses.fields(config)}
    texts = RULES.read_text() + monitoring.DASHBOARD.read_text()
    named = set(re.findall(r"--[a-z][a-z-]+[a-z]", texts))
    assert len(named) > 8 and named <= options
    titles = {panel["title"] for panel in monitoring.panels(monitoring.read_json(monitoring.DASHBOARD))}
    panels = {title for rule in monitoring.alerts(RULES) for title in re.findall('panel "([^"]+)"', str(rule))}
    assert panels and panels <= titles


@pytest.mark.parametrize("name", ["time_to_first_token_seconds", "drafter_versions", "disk_free_bytes"])
def test_a_metric_that_is_called_otherwise_is_found(name: str, known: dict[str, str], tmp_path: Path) -> None:
    copies = [tmp_path / original.name for original in (monitoring.DASHBOARD, RULES)]
    for original, copy in zip((monitoring.DASHBOARD, RULES), copies, strict=True):
        copy.write_text(re.sub(rf"slipstream:{name}(?=_bucket|\b)", "slipstream:old_name", original.read_text()))
    found = monitoring.unknown_metrics(monitoring.queries(*copies), known)
    assert found and all("there is no metric slipstream:old_name" in each for each in found)


def test_the_name_of_a_histogram_alone_is_no_series(known: dict[str, str]) -> None:
    asked = [monitoring.Query("here", "sum(slipstream:time_to_first_token_seconds)")]
    assert monitoring.unknown_metrics(asked, known) != []


def panel(board: Any, title: str) -> Any:
    return next(each for each in board["panels"] if each["title"] == title)


def other_query(title: str, old: str, new: str) -> Callable[[Any], object]:
    def change(board: Any) -> None:
        target = panel(board, title)["targets"][0]
        assert old in target["expr"]
        target["expr"] = target["expr"].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda board: panel(board, "Drift").update(id=1), "panel id 1 is used twice"),
        (lambda board: panel(board, "Drift")["gridPos"].update(x=1), "lies on another one"),
        (lambda board: panel(board, "Drift")["gridPos"].update(x=20), "beyond the width"),
        (lambda board: panel(board, "Drift").update(title="Draft tokens"), "two panels are called"),
        (lambda board: panel(board, "Drift").update(description=""), "no sentence"),
        (lambda board: panel(board, "Drift")["targets"][0]["datasource"].update(uid="other"), "is not provisioned"),
        (lambda board: board["templating"]["list"][0]["current"].update(value="other"), "'other' is not provisioned"),
        (lambda board: panel(board, "Trial")["targets"][0].update(legendFormat="{{route}}"), "route of the legend"),
        (other_query("Drift", "$job", "$jobs"), "unknown variable $jobs"),
    ],
)
def test_faults_of_a_dashboard_are_found(fault: Callable[[Any], object], found: str, tmp_path: Path) -> None:
    board = monitoring.read_json(monitoring.DASHBOARD)
    fault(board)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(board))
    assert found in "; ".join(monitoring.dashboard_problems(changed))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda rule: rule.pop("for"), "no time"),
        (lambda rule: rule["labels"].update(severity="loud"), "severity"),
        (lambda rule: rule["annotations"].pop("description"), "no description"),
        (lambda rule: rule.update(alert="SlipstreamUntested"), "no test in rules_test.yml"),
        (lambda rule: rule.update(alert="SlipstreamUntested"), "there is no alert SlipstreamDown"),
    ],
)
def test_faults_of_alerts_are_found(fault: Callable[[Any], object], found: str, tmp_path: Path) -> None:
    rules = monitoring.read_yaml(RULES)
    fault(rules["groups"][0]["rules"][0])
    changed = tmp_path / "rules.yml"
    changed.write_text(yaml.safe_dump(rules))
    assert found in "; ".join(monitoring.rule_problems(changed))


SELECTORS = st.sampled_from(
    [
        "up",
        "slipstream:ready",
        'slipstream:x_bucket{le="+Inf"}',
        'a:b{state=~"a{2}|by (c)",d!="\\"}"}',
        "offset_seconds",
        "sum_total",
        "by_name{sum='count'}",
    ]
)


def wrapped(inner: st.SearchStrategy[tuple[str, list[str]]]) -> st.SearchStrategy[tuple[str, list[str]]]:
    """Expressions of expressions, each with the selectors in it."""
    single = st.sampled_from(
        [
            "sum(%s)",
            "sum by (job, le) (rate(%s[5m]))",
            "max without (instance) (%s)",
            "sum (%s) by (state)",
            "histogram_quantile(0.95, %s)",
            "increase(%s[1h] offset 2d) > 2.5e9",
            "avg_over_time((%s)[1h:5m])",
            "count_values('version', %s)",
            "-(1 + %s) ^ 2",
            "quantile(0.5, %s) or vector(0)",
            "%s == bool 1",
        ]
    )
    double = st.sampled_from(
        [
            "%s / %s",
            "%s / on (drafter) group_left %s",
            "%s * on (job) group_left (version) %s",
            "%s unless ignoring (decision) %s",
            "(%s and %s)",
        ]
    )
    one = st.tuples(single, inner).map(lambda each: (each[0].replace("%s", each[1][0]), each[1][1]))
    two = st.tuples(double, inner, inner).map(
        lambda each: (each[0] % (each[1][0], each[2][0]), each[1][1] + each[2][1])
    )
    return one | two


@given(st.recursive(SELECTORS.map(lambda each: (each, [each])), wrapped, max_leaves=6))
def test_selectors_of_any_expression_are_found(expression: tuple[str, list[str]]) -> None:
    text, put_in = expression
    assert monitoring.selectors(text) == list(dict.fromkeys(put_in))
