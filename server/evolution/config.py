"""Options of drafter evolution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slipstream.drafter.routes import ADAPTER_ROUTE, DOMAIN_NAME, DOMAIN_ROUTE, TENANT_ROUTE
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig, option
from slipstream.engine.errors import ConfigError

ROUTE_KINDS = (TENANT_ROUTE, DOMAIN_ROUTE)
OF_ALL = 2
"""Versions loaded beside those of tenants and domains: the shared one, and one on trial."""


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Options of evolution. Without a registry nothing evolves, and the drafter is the one of --drafter for ever."""

    registry: str | None = option(
        None, "Folder of the drafter registry: the server drafts with its live version and follows its changes."
    )
    evolve: Literal["off", "idle", "always"] = option(
        "off",
        "Train the drafter on the traffic that --traffic-log keeps: while no request runs (idle), or with the "
        "processor time that requests leave (always).",
    )
    evolve_route: tuple[str, ...] = option(
        (), "Also train a separate version for tenant:NAME or domain:NAME; repeat for several."
    )
    evolve_loss: Literal["auto", "ce", "kl", "rkl", "jsd", "tv", "tvpp", "nla", "lk", "race"] = option(
        "auto", "What the drafter is trained for; auto: cross-entropy for greedy traffic, forward KL for sampled."
    )
    evolve_first_tokens: int = option(20_000, "Tokens of answers with which the first round of training begins.")
    evolve_round_tokens: int = option(100_000, "Positions learned between two candidates.")
    evolve_threads: int = option(0, "Threads of the training worker; 0 takes every core.")
    evolve_device: str = option(
        "auto",
        "Where training computes: cpu, cuda (a GPU with room for it), cuda:1 (that one), or auto: the CPU; where the "
        "model runs on a GPU, another one with room, or with --evolve idle the same one.",
    )
    canary_share: float = option(0.2, "Share of the requests that try a new version.")
    canary_requests: int = option(200, "Requests after which a trial ends at the latest.")

    def __post_init__(self) -> None:
        if self.registry == "":
            raise ConfigError("--registry is empty: name a folder, or leave the option out")
        if self.evolve != "off" and self.registry is None:
            raise ConfigError(f"--evolve {self.evolve} needs --registry, where the versions are kept")
        if not 0 < self.canary_share < 1:
            raise ConfigError(f"--canary-share must be between 0 and 1, not {self.canary_share}")
        if self.canary_requests < 20:
            raise ConfigError(f"--canary-requests must be at least 20, not {self.canary_requests}")
        for name in ("evolve_first_tokens", "evolve_round_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.evolve_threads < 0:
            raise ConfigError(f"--evolve-threads must not be negative, not {self.evolve_threads}")
        check_device_name(self.evolve_device, "evolve-device")
        for route in self.evolve_route:
            check_route(route, "evolve-route")
        object.__setattr__(self, "evolve_route", tuple(dict.fromkeys(self.evolve_route)))  # each is trained once

    def check_drafters(self, engine: EngineConfig) -> None:
        """Raises ConfigError if the engine has no learned drafter, or no room for a version of every route."""
        speculation = engine.speculation
        if self.evolve != "off" and speculation != "auto" and "head" not in map(str.strip, speculation.split(",")):
            raise ConfigError(
                f"--evolve {self.evolve} trains the learned drafter, which --speculation {speculation} leaves out: "
                "add head, or leave one of the two options out"
            )
        needed = OF_ALL + len(self.evolve_route)
        if self.evolve != "off" and self.evolve_route and engine.max_drafters < needed:
            raise ConfigError(
                f"--max-drafters {engine.max_drafters} is not enough for {len(self.evolve_route)} of "
                f"--evolve-route: with the shared version and one on trial these are {needed}"
            )

    def check_traffic(self, traffic: TrafficConfig) -> None:
        """Raises ConfigError if there is nothing to learn from."""
        if self.evolve != "off" and traffic.traffic_log == "off":
            raise ConfigError(
                f"--evolve {self.evolve} needs --traffic-log tokens or features: there is nothing to learn from"
            )


def check_device_name(device: str, option: str) -> None:
    """Raises ConfigError naming the option if this is no name of a device to train on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise ConfigError(f"--{option} {device}: write auto, cpu, cuda, or cuda:NUMBER")


def check_route(route: str, name: str, kinds: Sequence[str] = ROUTE_KINDS) -> None:
    """Raises ConfigError naming the option if no request could be on this route."""
    kind = next((kind for kind in kinds if route.startswith(kind) and route != kind), None)
    if kind is None:
        raise ConfigError(f"--{name} {route}: write {' or '.join(f'{kind}NAME' for kind in kinds)}")
    if kind == DOMAIN_ROUTE and not DOMAIN_NAME.fullmatch(route.removeprefix(kind)):
        raise ConfigError(f"--{name} {route}: domains have at most 64 letters, digits and ._-:/")


def check_version_route(route: str, name: str) -> None:
    """The same for versions from elsewhere, which may also be for a LoRA or, with an empty name, for all requests."""
    if route:
        check_route(route, name, (*ROUTE_KINDS, ADAPTER_ROUTE))
