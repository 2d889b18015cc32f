"""Checks of docker/prometheus and docker/grafana, for tests with and without a Prometheus that runs.

A function returns what is wrong, a sentence each; nothing if all is well.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "slipstream.json"
DATA_SOURCES = GRAFANA / "provisioning" / "datasources" / "prometheus.yaml"
METRICS_PAGE = ROOT / "docs" / "metrics.md"

PREFIX = "slipstream:"
GRID_WIDTH = 24
SEVERITIES = {"critical", "warning", "info"}
OF_GRAFANA = {"__rate_interval": "1m", "__interval": "15s", "__range": "1h"}
"""Variables that Grafana fills in, and what stands for them here."""
OF_PROMETHEUS = {"up", "ALERTS"}
"""Series that Prometheus makes itself; the second has none while nothing fires."""
ANY = ".+"
"""What stands for a variable of the dashboard; it matches no series without the label."""

VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")
TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)|(?P<name>[A-Za-z_:][\w:]*)|(?P<number>\d[\w.]*)|"""
    r"""(?P<space>\s+)|(?P<sign>.)""",
    re.DOTALL,
)
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
AGGREGATIONS = {
    "sum",
    "min",
    "max",
    "avg",
    "group",
    "stddev",
    "stdvar",
    "count",
    "count_values",
    "bottomk",
    "topk",
    "quantile",
}
WORDS = {"and", "or", "unless", "offset", "bool", "atan2", "inf", "nan"}


@dataclass(frozen=True, slots=True)
class Query:
    """Something that Prometheus is asked, its variables filled in."""

    where: str
    expression: str
    by_parts: bool = False
    """Rightly without an answer while all is well, as an alert is: only its selectors have to find series."""
    labels: tuple[str, ...] = ()
    """What the answer has to be labelled with."""


# What is asked ----------------------------------------------------------------------------------------------------


def queries(dashboard: Path = DASHBOARD, rules: Path = PROMETHEUS / "rules.yml") -> list[Query]:
    """Everything that the dashboard (panels, annotations, variables) and the rules ask."""
    board = read_json(dashboard)
    names = {variable["name"] for variable in board["templating"]["list"]}
    found = [
        Query(
            f"panel {panel['title']!r}", filled(target["expr"], names), labels=tuple(legend(target) & grouped(target))
        )
        for panel in panels(board)
        for target in panel.get("targets", [])
    ]
    found += [
        Query(f"annotation {annotation['name']!r}", filled(annotation["expr"], names), by_parts=True)
        for annotation in board["annotations"]["list"]
    ]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            values = re.fullmatch(r"label_values\((.+), *(\w+)\)", variable["query"]["query"])
            assert values is not None, f"variable {variable['name']}: its query is no label_values(series, label)"
            series = filled(values[1], names)
            expression = f"count by ({values[2]}) ({series})"
            found.append(Query(f"variable {variable['name']!r}", expression, labels=(values[2],)))
    found += [Query(f"alert {rule['alert']}", rule["expr"], by_parts=True) for rule in alerts(rules)]
    return found


def tested_series(tests: Path = PROMETHEUS / "rules_test.yml") -> list[Query]:
    """The series that the tests of the rules make up."""
    found = read_yaml(tests)["tests"]
    return [Query(f"test {test['name']!r}", series["series"]) for test in found for series in test["input_series"]]


def legend(target: dict[str, Any]) -> set[str]:
    """Labels in the legend of a query of a panel."""
    return set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))


def grouped(target: dict[str, Any]) -> set[str]:
    """Labels by which a query of a panel aggregates."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))


def selectors(expression: str) -> list[str]:
    """The vector selectors of a PromQL expression, without ranges and offsets, each once."""
    return list(
        dict.fromkeys(f"{name}{{{matchers}}}" if matchers else name for name, matchers in _selectors(expression))
    )


def metrics(expression: str) -> list[str]:
    """The names of series in a PromQL expression, each once."""
    return list(dict.fromkeys(name for name, _ in _selectors(expression)))


def _selectors(expression: str) -> Iterator[tuple[str, str]]:
    """(name, matchers) of each."""
    tokens = [(found.lastgroup, found[0]) for found in TOKEN.finditer(expression) if found.lastgroup != "space"]
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        after = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        if text in GROUPING and after == "(":
            at = _closing(tokens, at + 1)
        elif text == "[":
            at = _closing(tokens, at)
        elif text == "{":
            raise ValueError(f"a selector without the name of a metric: {expression}")
        elif kind == "name" and after != "(" and text.lower() not in WORDS | AGGREGATIONS | GROUPING:
            matchers = ""
            if after == "{":
                end = _closing(tokens, at + 1)
                matchers = "".join(text for _, text in tokens[at + 2 : end])
                at = end
            yield text, matchers
        at += 1


def _closing(tokens: list[tuple[str | None, str]], at: int) -> int:
    """Where the bracket is closed that is opened there; there are none in those that are asked about."""
    closing = {"(": ")", "[": "]", "{": "}"}[tokens[at][1]]
    return next(end for end in range(at, len(tokens)) if tokens[end][1] == closing)


def filled(expression: str, names: Iterable[str]) -> str:
    """With values for the variables of Grafana and for those that the dashboard has; others stay."""
    values = dict.fromkeys(names, ANY) | OF_GRAFANA
    return VARIABLE.sub(lambda found: values.get(found[1] or found[2], found[0]), expression)


# What there is ----------------------------------------------------------------------------------------------------


def exposed(text: str) -> dict[str, str]:
    """Kinds by name of the metrics in what /metrics says."""
    return dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))


def documented(page: Path = METRICS_PAGE) -> dict[str, str]:
    """Kinds by name of the metrics that docs/metrics.md lists."""
    rows = re.findall(r"^\| ([^|]+) \| (gauge|counter|histogram) \|", page.read_text(), re.MULTILINE)
    return {PREFIX + name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}


def unknown_metrics(asked: Iterable[Query], known: Mapping[str, str]) -> list[str]:
    """``known``: kinds by name, as ``exposed`` or ``documented`` return them."""
    series = set(OF_PROMETHEUS)
    for name, kind in known.items():
        series |= {f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return [
        f"{query.where}: there is no metric {name}"
        for query in asked
        for name in metrics(query.expression)
        if name not in series
    ]


def without_data(url: str, asked: Iterable[Query], timeout_s: float = 10.0) -> list[str]:
    """Asks the Prometheus at ``url`` for each; those that find no series, or cannot be asked, are wrong.

    Rates need two scrapes, and a server that has served: ask again for a while before that means anything.
    """
    wrong = []
    for query in asked:
        parts = [query.expression]
        if query.by_parts:
            parts = [part for part in selectors(query.expression) if not part.startswith("ALERTS{")]
        for part in parts:
            try:
                series = ask(url, part, timeout_s)
            except (OSError, ValueError) as error:
                wrong.append(f"{query.where}: {error}: {part}")
                continue
            if not series:
                wrong.append(f"{query.where}: finds no series: {part}")
            missing = {label for label in query.labels for each in series if label not in each["metric"]}
            wrong += [f"{query.where}: no label {label} in what is found: {part}" for label in sorted(missing)]
    return wrong


def ask(url: str, expression: str, timeout_s: float = 10.0) -> list[Any]:
    """The series that Prometheus answers with.

    Raises:
        ValueError: it does not take the expression.
        OSError: it is not there.
    """
    question = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/query?{question}", timeout=timeout_s) as answer:
            series: list[Any] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(error.read().decode(errors="replace")[:500]) from None
    return series


# Files -------------------------------------------------------------------------------------------------------------


def dashboard_problems(dashboard: Path = DASHBOARD, data_sources: Path = DATA_SOURCES) -> list[str]:
    """What Grafana would not show, or not as meant."""
    board = read_json(dashboard)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    provisioned = {source["uid"] for source in read_yaml(data_sources)["datasources"]}
    sources = {f"${{{name}}}": each for name, each in variables.items() if each["type"] == "datasource"}
    wrong = [
        f"data source {name}: {each['current']['value']!r} is not provisioned"
        for name, each in sources.items()
        if each["current"]["value"] not in provisioned
    ]
    found = list(panels(board))
    wrong += [f"panel id {each} is used twice" for each, count in Counter(p["id"] for p in found).items() if count > 1]
    shown = [panel for panel in found if panel["type"] != "row"]
    titles = Counter((panel["type"], panel["title"]) for panel in shown)
    wrong += [f"two panels are called {title!r}" for (_, title), count in titles.items() if count > 1]
    wrong += _overlaps(found)
    asking = [(f"annotation {each['name']!r}", [each], each) for each in board["annotations"]["list"]]
    asking += [(f"panel {panel['title']!r}", panel["targets"], panel) for panel in shown]
    for where, targets, holder in asking:
        for target in targets:
            uid = (target.get("datasource") or holder.get("datasource") or {}).get("uid")
            if uid not in sources and uid not in provisioned:
                wrong.append(f"{where}: data source {uid!r} is not provisioned")
            used = {first or second for first, second in VARIABLE.findall(target["expr"])}
            wrong += [f"{where}: unknown variable ${name}" for name in used - variables.keys() - OF_GRAFANA.keys()]
            if re.search(rf"\b({'|'.join(AGGREGATIONS)})\b *(by|\()", target["expr"]):
                gone = legend(target) - grouped(target)
                wrong += [f"{where}: {label} of the legend is aggregated away" for label in sorted(gone)]
    for panel in shown:
        where = f"panel {panel['title']!r}"
        if not re.fullmatch(r"[A-Z].*\.", panel.get("description", ""), re.DOTALL):
            wrong.append(f"{where}: no sentence says how to read it")
        if not panel["fieldConfig"]["defaults"].get("unit"):
            wrong.append(f"{where}: no unit")
        names = [target["refId"] for target in panel["targets"]]
        if not names or len(set(names)) < len(names):
            wrong.append(f"{where}: no queries, or two of the same refId")
    return wrong


def _overlaps(found: list[dict[str, Any]]) -> Iterator[str]:
    taken: dict[tuple[int, int], int] = {}
    for panel in found:
        at = panel["gridPos"]
        if at["x"] < 0 or at["x"] + at["w"] > GRID_WIDTH:
            yield f"panel {panel['title']!r}: beyond the width of the grid"
        cells = [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
        if any(taken.setdefault(cell, panel["id"]) != panel["id"] for cell in cells):
            yield f"panel {panel['title']!r}: lies on another one"


def rule_problems(rules: Path = PROMETHEUS / "rules.yml", tests: Path = PROMETHEUS / "rules_test.yml") -> list[str]:
    """Alerts that do not say what they should, or of which no test shows that they fire, and not always."""
    wrong = []
    fires: set[str] = set()
    for test in read_yaml(tests)["tests"]:
        looks = [
            {name for sample in look["exp_samples"] for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
            for look in test["promql_expr_test"]
        ]
        fires |= set().union(*looks) - set.intersection(*looks)
    names = Counter(rule["alert"] for rule in alerts(rules))
    for rule in alerts(rules):
        where = f"alert {rule['alert']}"
        if names[rule["alert"]] > 1:
            wrong.append(f"{where}: there are two of this name")
        if not rule.get("for"):
            wrong.append(f"{where}: no time that it has to last")
        if rule.get("labels", {}).get("severity") not in SEVERITIES:
            wrong.append(f"{where}: its severity is none of {', '.join(sorted(SEVERITIES))}")
        if not all(rule.get("annotations", {}).get(part) for part in ("summary", "description")):
            wrong.append(f"{where}: no summary, or no description of what to do")
        if rule["alert"] not in fires:
            wrong.append(f"{where}: no test in {tests.name} in which it fires at one time and not at another")
    return wrong + [f"{tests.name}: there is no alert {name}" for name in sorted(fires - names.keys())]


def promtool_problems(promtool: Path | str, asked: Iterable[Query] = (), folder: Path = PROMETHEUS) -> list[str]:
    """What promtool says of the configuration, of the rules and their tests, and of the syntax of queries."""
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "queries.yml")
        records = [{"record": f"query_{number}", "expr": query.expression} for number, query in enumerate(asked)]
        written.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
        for arguments in (
            ("check", "config", folder / "prometheus.yml"),
            ("check", "rules", folder / "rules.yml"),
            ("test", "rules", folder / "rules_test.yml"),
            ("check", "rules", written),
        ):
            done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                wrong.append(f"promtool {arguments[0]} {arguments[1]}: {(done.stdout + done.stderr).strip()[-3000:]}")
    return wrong


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows too, and what is in rows that are folded."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def alerts(rules: Path) -> Iterator[dict[str, Any]]:
    for group in read_yaml(rules)["groups"]:
        yield from group["rules"]


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found
