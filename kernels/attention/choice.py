"""Which attention a device gets: what each backend does not do, and the order in which they are tried, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from slipstream.kernels.attention.backend import AttentionBackend, UnavailableError
from slipstream.kernels.kv_cache import CacheShape
from slipstream.kernels.triton import launch

Name = Literal["triton", "flashinfer", "xformers", "torch"]
HALVES = (torch.float16, torch.bfloat16)
FROM_FP8 = 89
"""Compute capability from which on Triton converts float8_e4m3fn."""
EXTRA = "pip install 'slipstream[gpu]'"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What attention is asked for by a device, a model and the options."""

    device: torch.device
    capability: int
    """CUDA's, for example 90 for 9.0; 0 elsewhere."""
    head_dim: int
    dtype: torch.dtype
    """Format of queries."""
    kv_dtype: torch.dtype
    block_size: int = 16
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    deterministic: bool = False


def wanted(shape: CacheShape, dtype: torch.dtype, device: torch.device, **more: bool) -> Wanted:
    """What a cache of this shape and queries of this format ask for; ``more`` are fields of ``Wanted``."""
    capability = launch.capability(device)
    return Wanted(device, capability, shape.head_dim, dtype, shape.dtype, shape.block_size, **more)


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that a backend does not do."""

    reason: str
    applies: Callable[[Wanted], bool]


@dataclass(frozen=True, slots=True)
class Entry:
    """A backend, by what it cannot do."""

    name: Name
    package: str
    """What has to be importable; empty for what comes with torch."""
    remedy: str
    """What to do where that is not installed."""
    limits: tuple[Limit, ...]
    module: str = ""
    """Where its class is, for those that are planned on the host: ``Backend`` of this module."""


_NO_WINDOW = Limit("its paged masks have no window", lambda wanted: wanted.window)
_NO_SOFTCAP = Limit("it has no soft cap", lambda wanted: wanted.softcap)
_NO_SINKS = Limit("it has no attention sinks", lambda wanted: wanted.sinks)
_NO_EIGHT_BITS = Limit("it does not apply the scales of an 8-bit cache", lambda wanted: wanted.kv_dtype.itemsize == 1)
_ONE_FORMAT = Limit(
    "queries and cache are to be in one format, float16 or bfloat16",
    lambda wanted: wanted.dtype not in HALVES or wanted.kv_dtype not in (wanted.dtype, torch.float8_e4m3fn),
)
_OF_LAYERS = (_NO_WINDOW, _NO_SOFTCAP, _NO_SINKS)
"""Limits that are a matter of single layers."""
_FROM_80 = Limit("it needs compute capability 8.0 or newer", lambda wanted: wanted.capability < 80)

TABLE: tuple[Entry, ...] = (
    Entry(
        "triton",
        "triton",
        "install a build of torch for CUDA, which brings Triton",
        (
            Limit("Triton runs no kernels on this device", lambda wanted: not launch.runs_on(wanted.device.type)),
            Limit(
                f"a cache in fp8 needs compute capability {FROM_FP8 / 10} or newer",
                lambda wanted: wanted.kv_dtype is torch.float8_e4m3fn and 0 < wanted.capability < FROM_FP8,
            ),
            Limit(
                "it has heads of an even size up to 256",
                lambda wanted: wanted.head_dim > 256 or wanted.head_dim % 2 > 0,
            ),
        ),
    ),
    Entry(
        "flashinfer",
        "flashinfer",
        EXTRA,
        (
            _FROM_80,
            _ONE_FORMAT,
            _NO_EIGHT_BITS,
            _NO_SINKS,
            Limit("its kernels have heads of 64, 128 and 256", lambda wanted: wanted.head_dim not in (64, 128, 256)),
            Limit("its bits depend on how a prompt is cut into steps", lambda wanted: wanted.deterministic),
        ),
        "slipstream.kernels.attention.flashinfer",
    ),
    Entry(
        "xformers",
        "xformers",
        EXTRA,
        (
            _FROM_80,
            _ONE_FORMAT,
            _NO_EIGHT_BITS,
            _NO_SINKS,
            _NO_WINDOW,
            _NO_SOFTCAP,
            Limit(
                "its paged kernel has heads of 16 to 128 in powers of two",
                lambda wanted: wanted.head_dim not in (16, 32, 64, 128),
            ),
            Limit(
                "it cuts keys by how many rows there are, so its bits depend on the batch",
                lambda wanted: wanted.deterministic,
            ),
        ),
        "slipstream.kernels.attention.xformers",
    ),
    Entry(
        "torch",
        "",
        "",
        (
            _NO_EIGHT_BITS,
            Limit("its bits depend on how a prompt is cut into steps", lambda wanted: wanted.deterministic),
        ),
        "slipstream.kernels.attention.sdpa",
    ),
)


@dataclass(frozen=True, slots=True)
class Preference:
    """Which backends are tried first on devices of these compute capabilities, and why."""

    least: int
    most: int
    order: tuple[Name, ...]
    because: str


PREFERENCES = (
    Preference(
        0,
        1 << 30,
        ("triton", "flashinfer", "xformers", "torch"),
        "steps with Triton's attention are recorded as graphs; no device was measured yet, so none has another order",
    ),
)
"""The first that covers the device counts. ``gpu-check --only attention`` measures what to write here."""


@dataclass(frozen=True, slots=True)
class Choice:
    name: Name
    because: str
    others: Mapping[str, str]
    """Why each of the others is not used."""


class NoAttentionError(Exception):
    """The backend that was asked for cannot be used; the message says why in one sentence."""


def entry(name: str) -> Entry:
    return next(each for each in TABLE if each.name == name)


def against(name: str, wanted: Wanted) -> list[str]:
    """Why a backend cannot be used for this, installed or not."""
    return [limit.reason for limit in entry(name).limits if limit.applies(wanted)]


@cache
def covers(name: str, window: bool, softcap: bool, sinks: bool) -> bool:
    """Whether a backend computes such a layer, in a model that it computes others of."""
    asked = Wanted(torch.device("cpu"), 0, 0, torch.float32, torch.float32, 0, window, softcap, sinks)
    return not any(limit in _OF_LAYERS and limit.applies(asked) for limit in entry(name).limits)


def absent(name: str) -> str:
    """That a backend is not installed and what to do, in one sentence; empty where it is. Imports nothing."""
    found = entry(name)
    if found.package and find_spec(found.package) is None:
        return f"{found.package} is not installed: {found.remedy}"
    return ""


def missing(name: str) -> str:
    """What keeps a backend from being used at all here, in one sentence; empty where nothing does.

    It is imported for that, which may take seconds.
    """
    if why := absent(name):
        return why
    try:
        backend(name)
    except UnavailableError as error:
        return str(error)
    return ""


@cache
def backend(name: str) -> AttentionBackend | None:
    """The backend of this name; None for Triton's, which is the cache's own. Raises UnavailableError."""
    if not (module := entry(name).module):
        return None
    made: AttentionBackend = import_module(module).Backend()
    return made


def choose(wanted: Wanted, asked: str = "auto") -> Choice:
    """What is asked for, or the first of the device's preference that is there and does all that is wanted.

    Raises:
        NoAttentionError: what is asked for cannot be used.
    """
    preference = next(each for each in PREFERENCES if each.least <= wanted.capability <= each.most)
    others: dict[str, str] = {}
    chosen: Name | None = None
    for name in preference.order:
        is_next = asked == name or (asked == "auto" and chosen is None)
        # Others than what is chosen are not imported.
        why_not = "; ".join(against(name, wanted)) or (missing(name) if is_next else absent(name))
        if asked == name and why_not:
            raise NoAttentionError(f"--attention-backend {name}: {why_not}")
        if why_not:
            others[name] = why_not
        elif is_next:
            chosen = name
        else:
            others[name] = f"{asked} was asked for" if asked != "auto" else "it comes later in the order of this device"
    if chosen is None:
        raise NoAttentionError(
            "nothing here computes such attention: " + "; ".join(f"{n}: {why}" for n, why in others.items())
        )
    because = "it was asked for" if asked != "auto" else preference.because
    return Choice(chosen, because, others)
