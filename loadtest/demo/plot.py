"""Lines over time with marks, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

WIDTH, PANEL_HEIGHT = 860, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 42, 34
INK, GRID, MARK = "#334", "#dde", "#c60"
COLOURS = ("#06c", "#888")


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    """(minute, value), in the order of time."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    lines: Sequence[Line]
    least: float
    """The axis begins here."""


def write_plot(path: Path, title: str, panels: Sequence[Panel], marks: Sequence[tuple[float, str]]) -> None:
    """``marks``: (minute, label) of vertical lines through all panels."""
    path.write_text(plot(title, panels, marks), encoding="utf-8")


def plot(title: str, panels: Sequence[Panel], marks: Sequence[tuple[float, str]]) -> str:
    minutes = [minute for panel in panels for line in panel.lines for minute, _ in line.points]
    longest = max([*minutes, *(minute for minute, _ in marks), 0.1])
    height = len(panels) * PANEL_HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(WIDTH / 2, 20, title, "middle", size=15),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, 30 + number * PANEL_HEIGHT, longest, marks)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: float, longest: float, marks: Sequence[tuple[float, str]]) -> list[str]:
    upper, lower = top + TOP, top + PANEL_HEIGHT - BOTTOM
    values = [value for line in panel.lines for _, value in line.points]
    steps = ticks(panel.least, max([*values, panel.least + 0.1]))
    most = steps[-1]

    def x(minute: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * minute / longest

    def y(value: float) -> float:
        return lower - (lower - upper) * (value - panel.least) / (most - panel.least)

    parts = [_text(LEFT, top + 18, panel.title, "start", size=13)]
    for value in steps:
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    shown = [minute for minute in ticks(0, longest) if minute <= longest]
    parts += [_text(x(minute), lower + 16, f"{minute:g}", "middle") for minute in shown]
    parts.append(_text(WIDTH - RIGHT, lower + 30, "minutes", "end"))
    for minute, label in marks:
        parts.append(
            f'<path class="mark" d="M{x(minute):.1f} {upper}V{lower}" stroke="{MARK}" stroke-dasharray="4 3"/>'
        )
        parts.append(_text(x(minute), upper - 4, label, "middle", fill=MARK))
    for number, (curve, colour) in enumerate(zip(panel.lines, COLOURS, strict=False)):
        places = [(x(minute), y(value)) for minute, value in curve.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        parts.append(_text(WIDTH - RIGHT - 150 * number, top + 18, curve.name, "end", fill=colour))
    return parts


def ticks(least: float, most: float) -> list[float]:
    """Round numbers from ``least`` on, the last one not below ``most``; about five."""
    raw = (most - least) / 5
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [round(least + i * step, 10) for i in range(ceil((most - least) / step - 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, fill: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
    )
