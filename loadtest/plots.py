"""Lines over time with marks, drawn by matplotlib: an SVG or a PNG file, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
WIDTH_INCHES, PANEL_INCHES = 8.6, 2.6
MARK = "#c60"


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    """In the order of time."""
    steps: bool = False
    """A value lasts until the next point, instead of changing evenly up to it."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    value: str
    """What the values are, with their unit."""
    lines: Sequence[Line]
    least: float = 0.0
    """The axis begins here."""
    marks: Sequence[tuple[float, str]] = ()
    """(time, label) of dashed vertical lines."""


def require_plot(path: Path) -> None:
    """Raises ValueError for a name that no plot can have, so that it is told before anything is measured."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: a plot is an SVG or a PNG file; let its name end with one of {SUFFIXES}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no such folder")


def write_plot(path: Path, title: str, time: str, panels: Sequence[Panel]) -> None:
    """``time`` is what the common horizontal axis says, with its unit."""
    from matplotlib import rc_context

    # Text stays text in SVG files, which so can be searched and read aloud, and needs no fonts in the file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "slipstream"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw(title, time, panels).savefig(path, dpi=120, metadata=metadata)


def draw(title: str, time: str, panels: Sequence[Panel]) -> Figure:
    """The figure, a panel below the other on one axis of time. No part of pyplot, which would open a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES * len(panels) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set_ylabel(panel.value)
        for line in panel.lines:
            moments, values = [moment for moment, _ in line.points], [value for _, value in line.points]
            style = {"drawstyle": "steps-post"} if line.steps else {"marker": "o", "markersize": 4}
            axis.plot(moments, values, label=line.name, **style)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=panel.least)
        for moment, label in panel.marks:
            axis.axvline(moment, color=MARK, linestyle="--", linewidth=1)
            # Just above the panel, where no line is.
            axis.annotate(
                label, (moment, 1), (0, 2), ("data", "axes fraction"), "offset points", color=MARK, ha="center"
            )
        axis.grid(alpha=0.3)
        if len(panel.lines) > 1:
            axis.legend(fontsize=8)
    axes[-1].set_xlabel(time)
    return figure
