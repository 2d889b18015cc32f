"""Statistics that go on when an engine process is replaced: counters continue, the rest is what it is now."""

from __future__ import annotations

from itertools import zip_longest

from msgspec.structs import replace

from slipstream.engine.messages import DrafterStats, EngineStats, TrafficStats, VersionStats

COUNTERS = (
    *("step", "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "preemptions"),
    *("steps", "model_seconds", "verify_seconds", "draft_seconds", "overhead_cpu_seconds"),
)


def at_rest(stats: EngineStats) -> EngineStats:
    """What is left of an engine that has ended: its counters."""
    return replace(
        stats,
        **{"num_running": 0, "num_waiting": 0, "blocks_used": 0, "blocks_cached": 0, "step_tokens": 0},
        step_seconds=0.0,
        drafters=[replace(entry, routes={}, memory_bytes=0) for entry in stats.drafters],
    )


def added(before: EngineStats, now: EngineStats) -> EngineStats:
    """``now``, its counters raised by those of the engines ``before``."""
    counters = {name: getattr(before, name) + getattr(now, name) for name in COUNTERS}
    return replace(
        now,
        **counters,
        drafters=_drafters(before.drafters, now.drafters),
        speculation_steps=_sums(before.speculation_steps, now.speculation_steps),
        traffic=_traffic(before.traffic, now.traffic),
    )


def _sums(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: before.get(name, 0) + now.get(name, 0) for name in before | now}


def _traffic(before: TrafficStats, now: TrafficStats) -> TrafficStats:
    sums = {name: getattr(before, name) + getattr(now, name) for name in ("kept", "dropped", "redacted")}
    return replace(now, **sums)


def _drafters(before: list[DrafterStats], now: list[DrafterStats]) -> list[DrafterStats]:
    old = {entry.name: entry for entry in before}
    return [_drafter(old.get(entry.name, DrafterStats(entry.name)), entry) for entry in now]


def _drafter(before: DrafterStats, now: DrafterStats) -> DrafterStats:
    places = zip_longest(before.accepted_per_position, now.accepted_per_position, fillvalue=0)
    old = {entry.version: entry for entry in before.versions}
    return replace(
        now,
        drafts=before.drafts + now.drafts,
        draft_tokens=before.draft_tokens + now.draft_tokens,
        accepted_tokens=before.accepted_tokens + now.accepted_tokens,
        accepted_per_position=[first + second for first, second in places],
        swaps=before.swaps + now.swaps,
        versions=[_version(old.get(entry.version, VersionStats(entry.version)), entry) for entry in now.versions],
    )


def _version(before: VersionStats, now: VersionStats) -> VersionStats:
    return VersionStats(
        now.version,
        before.drafts + now.drafts,
        before.draft_tokens + now.draft_tokens,
        before.accepted_tokens + now.accepted_tokens,
    )
