"""What a demo can hope for on this machine, and whether it paid: in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slipstream.loadtest.demo.plan import DEPTH

NOISE = 0.02
"""Ratios of two speeds that differ by less from 1 say nothing."""


def break_even(machine: Mapping[str, Any] | None) -> float | None:
    """Tokens per step from which chains of DEPTH draft tokens pay at one stream: how much longer the step becomes.

    ``machine``: of the admin API's status; None where it is not known yet.
    """
    if not machine or not machine["step_seconds"]:
        return None
    seconds = {int(size): float(each) for size, each in machine["step_seconds"].items()}
    sizes = sorted(seconds)
    plain, longer = (float(np.interp(size, sizes, [seconds[each] for each in sizes])) for size in (1, 1 + DEPTH))
    drafting = machine["draft_seconds"].get("1", [])
    return None if len(drafting) < DEPTH else (longer + float(drafting[DEPTH - 1])) / plain


def hope(machine: Mapping[str, Any] | None, arithmetic: str) -> str:
    """What to say at the start; empty where nothing is known."""
    found = []
    if (least := break_even(machine)) is not None:
        found.append(
            f"a step that proposes and verifies {DEPTH} draft tokens takes {least:.2f} times a plain one here: "
            f"with one stream a head pays from {least:.2f} tokens per step on"
        )
    if arithmetic:
        found.append(f"training computes in {arithmetic}")
    return "; ".join(found)


def verdict(machine: Mapping[str, Any] | None, accept_length: float, speedup: float) -> str:
    """What to say at the end. ``accept_length``: all draft tokens verified; ``speedup``: with the head over without."""
    least = break_even(machine)
    if speedup >= 1 + NOISE:
        said = f"It pays here: {speedup:.2f} times the speed without speculation"
    elif speedup > 1 - NOISE:
        said = "It does not pay here, and costs nothing: as fast as without speculation"
    else:
        said = f"It does not pay here: {speedup:.2f} times the speed without speculation"
    if least is None:
        return f"{said}."
    relation = "more" if accept_length > least else "less"
    return (
        f"{said}. The head has {accept_length:.2f} tokens per step with chains of {DEPTH}, {relation} than the "
        f"{least:.2f} plain steps that such a step costs; where a chain is too long, fewer "
        "draft tokens are verified, or none."
    )
