"""What a check has found, as JSON and as Markdown. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from slipstream.engine.errors import ConfigError

Cell = str | int | float | bool | None
Outcome = Literal["ok", "failed", "not there", "left out"]
JSON_FILE = "gpu-check.json"


class Finding(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Something that has to hold: a result that must be right, or a figure that is to be reached."""

    name: str
    passed: bool | None
    """None where it cannot be judged here."""
    found: str
    wanted: str = ""


class StageReport(msgspec.Struct, kw_only=True):
    name: str
    title: str
    outcome: Outcome = "left out"
    seconds: float = 0.0
    errors: dict[str, str] = {}
    """By part of the stage."""
    reason: str = ""
    """Why it is not there, or was left out."""
    left_out: list[str] = []
    """Parts for which there was no time."""
    checks: list[Finding] = []
    """Results that must be right."""
    targets: list[Finding] = []
    """Figures that are to be reached."""
    notes: list[str] = []
    done: list[str] = []
    """Parts that have begun, whatever became of them: those that a later run leaves out."""
    tables: dict[str, list[dict[str, Cell]]] = {}


class Report(msgspec.Struct, kw_only=True):
    """Everything of one run."""

    date: str
    version: str
    commit: str
    options: dict[str, Cell]
    dry_run: bool
    machine: dict[str, Cell] = {}
    kept: dict[str, float] = {}
    """Figures that stages have kept for those after them."""
    stages: list[StageReport] = []

    @property
    def failed(self) -> list[str]:
        return [stage.name for stage in self.stages if stage.outcome == "failed"]


def read(folder: Path) -> Report | None:
    """The report in a folder; None if there is none. Raises ConfigError for what is none."""
    file = folder / JSON_FILE
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--resume: {file} is no report of this version: {error}") from None


def write(report: Report, folder: Path) -> None:
    """Both files, each whole or as it was before."""
    found = msgspec.json.format(msgspec.json.encode(report), indent=1)
    for name, content in ((JSON_FILE, found), ("gpu-check.md", markdown(report).encode())):
        part = folder / f".{name}.part"
        part.write_bytes(content)
        part.replace(folder / name)


def markdown(report: Report) -> str:
    lines = [f"# gpu-check: {report.machine.get('device', 'no device')}", ""]
    if report.dry_run:
        lines += ["A dry run: every stage with tiny shapes on the CPU. No figure here says anything of a GPU.", ""]
    facts: dict[str, Cell] = {"date": report.date, "slipstream": f"{report.version}, commit {report.commit}"}
    facts |= report.machine | {"options": ", ".join(f"{name} {value}" for name, value in report.options.items())}
    lines += table(["", ""], [[name, cell(value)] for name, value in facts.items()])
    lines += table(
        ["stage", "", "outcome", "s", "checks passed"],
        [[each.name, each.title, _outcome(each), f"{each.seconds:.1f}", _passed(each)] for each in report.stages],
    )
    targets = [
        [each.name, each.wanted, each.found, _verdict(each)] for stage in report.stages for each in stage.targets
    ]
    if targets:
        lines += ["## Targets", "", *table(["", "wanted", "found", "reached"], targets)]
    for stage in report.stages:
        lines += _details(stage)
    return "\n".join(lines).rstrip() + "\n"


def _details(stage: StageReport) -> list[str]:
    wrong = [check for check in stage.checks if not check.passed]
    if not (stage.tables or stage.errors or stage.notes or wrong or stage.left_out):
        return []
    lines = [f"## {stage.title[0].upper()}{stage.title[1:]}", ""]
    lines += [f"- **{check.name}**: {check.found} (wanted: {check.wanted})" for check in wrong]
    lines += [f"- **{part}** failed: {_last_line(error)}" for part, error in stage.errors.items()]
    if stage.left_out:
        lines.append(f"- No time was left for: {', '.join(stage.left_out)}.")
    lines += [f"- {note}" for note in stage.notes]
    if lines[-1]:
        lines.append("")
    for name, rows in stage.tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f"### {name[0].upper()}{name[1:]}", ""]
        lines += table(columns, [[cell(row.get(column)) for column in columns] for row in rows])
    return lines


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown, with an empty line after it."""
    texts = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in [columns, *rows]]
    drawn = [f"| {' | '.join(row)} |" for row in texts]
    return [drawn[0], "|---" * len(columns) + "|", *drawn[1:], ""]


def cell(value: Cell) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int():
            return f"{value:,}"
        case _:
            return value


def _outcome(stage: StageReport) -> str:
    return f"{stage.outcome}: {stage.reason}" if stage.reason else stage.outcome


def targets(stage: StageReport) -> list[str]:
    """A line for each."""
    return [f"  {each.name}: {each.found} ({each.wanted}): {_reached(each)}" for each in stage.targets]


def _passed(stage: StageReport) -> str:
    return f"{sum(bool(check.passed) for check in stage.checks)} of {len(stage.checks)}" if stage.checks else ""


def _reached(target: Finding) -> str:
    return "not judged" if target.passed is None else "reached" if target.passed else "MISSED"


def _verdict(target: Finding) -> str:
    return "not judged" if target.passed is None else cell(target.passed)


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or ["no message"])[-1]
