"""What steps cost before the first request: measured when the engine starts."""

from __future__ import annotations

from collections.abc import Callable

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.step_cost import StepCost

Profile = Callable[[int, int, int], float]
"""Seconds of a step over so many segments, of so many positions each, that end at a position."""
PROFILE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PROBE_TOKENS = 16
PROBE_CONTEXT = 1024
PROFILE_RUNS = 3
PROFILE_SECONDS = 0.05
"""A size that has taken so long is known well enough: the longer a step, the less its time varies."""
LONG_STEP_S = 0.08
"""Sizes beyond a step that takes so long are not measured: arithmetic bounds them, so they go on in proportion."""


def calibrate(cost: StepCost, profile_step: Profile, longest: int, max_step_tokens: int) -> None:
    """Measures steps of several sizes, best of a few runs each, so that the first requests are planned well.

    The server is not ready before, so this takes about half a second also where a step takes long.
    """
    most = min(longest, max_step_tokens)
    sizes = [count for count in PROFILE_TOKENS if count <= most] or [most]

    def measure(segments: int, tokens: int, context: int) -> tuple[StepWork, float]:
        work = StepWork()
        for _ in range(segments):
            work = work.add(context - tokens, tokens)
        runs: list[float] = []
        while len(runs) < PROFILE_RUNS and sum(runs) < PROFILE_SECONDS:
            runs.append(profile_step(segments, tokens, context))
        return work, min(runs)

    probe = min(PROBE_TOKENS, sizes[-1])
    profile: list[tuple[StepWork, float]] = []
    for tokens in sizes:
        profile.append(measure(1, tokens, tokens))
        if tokens >= probe and profile[-1][1] > LONG_STEP_S:
            break
    context = min(PROBE_CONTEXT, longest)
    cost.calibrate(profile, [measure(1, probe, context), measure(probe, 1, context)])
