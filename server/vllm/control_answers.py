"""The answers of the control routes of this dialect, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal

from slipstream.server.http.description import Answer


class PauseStatus(Answer):
    status: Literal["paused", "resumed"]


class IsPaused(Answer):
    is_paused: bool


class SleepStatus(Answer):
    status: Literal["sleeping"]
    level: int


class WakeStatus(Answer):
    status: Literal["awake", "sleeping"]
    tags: list[str] | None


class IsSleeping(Answer):
    is_sleeping: bool


class CacheReleased(Answer):
    status: Literal["kv_cache_released"]


class CacheReset(Answer):
    success: bool


class WeightsReloaded(Answer):
    status: Literal["ok"]


class VllmAborted(Answer):
    status: Literal["aborted"]
    aborted: int


class WorldSize(Answer):
    world_size: int


class Done(Answer):
    message: str


class Succeeded(Answer):
    success: bool
    message: str


class VersionSet(Answer):
    success: Literal[True]
    message: str
    new_version: str


class WeightInfo(Answer):
    weight_version: str


class WeightCheck(Answer):
    """``checksums`` of action checksum, the others of action compare."""

    checksums: dict[str, str] | None = None
    match: bool | None = None
    mismatches: list[str] | None = None


class CallResults(Answer):
    results: list[Any]


ANSWERS: tuple[type[Answer], ...] = (
    *(PauseStatus, IsPaused, SleepStatus, WakeStatus, IsSleeping, CacheReleased, CacheReset, VllmAborted, WorldSize),
    *(WeightsReloaded, Done, Succeeded, VersionSet, WeightInfo, WeightCheck, CallResults),
)
