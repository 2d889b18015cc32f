"""The answers of the admin API, as the OpenAPI document shows them. What they mean is in docs/api.md."""

from __future__ import annotations

from typing import Any

from slipstream.server.http.description import Answer

JsonObject = dict[str, Any]


class Drafter(Answer):
    """A version of a drafter."""

    version: int
    route: str
    state: str
    pinned: bool
    manifest: JsonObject
    metrics: dict[str, float]


class HistoryEvent(Answer):
    id: int
    time: float
    version: int
    route: str
    action: str
    before: str
    after: str
    reason: str


class Drafters(Answer):
    drafters: list[Drafter]


class DrafterAndHistory(Answer):
    drafter: Drafter
    history: list[HistoryEvent]


class DrafterAndLive(Answer):
    drafter: Drafter
    live: Drafter | None


class Difference(Answer):
    fields: dict[str, tuple[Any, Any]]
    gate: dict[str, tuple[float | None, float | None]]
    metrics: dict[str, tuple[float | None, float | None]]
    weights: dict[str, float | None]


class Pruned(Answer):
    pruned: list[int]


class Imported(Answer):
    drafter: Drafter


class Exported(Answer):
    version: int
    folder: str
    notes: list[str]


class Evolving(Answer):
    paused: bool
    report: JsonObject


class Paused(Answer):
    paused: bool


class Update(Answer):
    version: int


class Updated(Answer):
    version: int
    prepare_seconds: float
    pause_seconds: float


class Filled(Answer):
    version: int
    missing: int
    """Tensors that have not come completely."""


class WeightChecksums(Answer):
    version: str
    """What the weights that serve are called."""
    checksums: dict[str, str]


class TrainersGroup(Answer):
    name: str


class ReleasedMemory(Answer):
    released: list[str]
    """What the engine has given back of its memory."""


class Aborted(Answer):
    aborted: int
    """Sequences that were running or waiting."""


class TenantTraffic(Answer):
    samples: int
    tokens: int
    bytes: int
    oldest: float
    newest: float


class Traffic(Answer):
    tenants: dict[str, TenantTraffic]


class Purged(Answer):
    purged_samples: int


class Status(Answer):
    server: JsonObject
    requests: dict[str, int] | None
    points: list[list[float | None]]
    accept_length: float | None
    drafters: list[JsonObject]
    speculation_steps: dict[str, int]
    traffic: JsonObject
    evolution: JsonObject | None


ANSWERS: tuple[type[Answer], ...] = (
    *(Status, Drafters, DrafterAndHistory, DrafterAndLive, Difference, Pruned, Imported, Exported, Evolving),
    *(Traffic, Purged, Paused, Update, Updated, Filled, WeightChecksums, TrainersGroup, ReleasedMemory, Aborted),
)
