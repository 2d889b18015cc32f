"""Options of drafter evolution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import option
from slipstream.engine.errors import ConfigError

ROUTE_KINDS = ("tenant:", "domain:")


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Options of evolution. Without a registry nothing evolves, and the drafter is the one of --drafter for ever."""

    registry: str | None = option(
        None, "Folder of the drafter registry: the server drafts with its live version and follows its changes."
    )
    evolve: Literal["off", "idle", "always"] = option(
        "off",
        "Train the drafter on the traffic that --traffic-log keeps: while no request runs (idle), or with whatever the "
        "processor has left (always).",
    )
    evolve_route: tuple[str, ...] = option(
        (), "Also train a version of its own for tenant:NAME or domain:NAME; repeat for several."
    )
    evolve_loss: Literal["auto", "ce", "kl", "rkl", "jsd", "tv", "tvpp", "nla", "lk", "race"] = option(
        "auto", "What the drafter is trained for; auto: cross-entropy for greedy traffic, forward KL for sampled."
    )
    evolve_first_tokens: int = option(20_000, "Tokens of answers with which the first round of training begins.")
    evolve_round_tokens: int = option(100_000, "Positions learned between two candidates.")
    evolve_threads: int = option(0, "Threads of the training worker; 0 takes every core.")
    evolve_device: str = option(
        "auto",
        "Where training computes: cpu, cuda (a GPU with room for it), cuda:1 (that one), or auto. auto is the CPU, but "
        "where the model runs on a GPU another one, or with --evolve idle the same one, if it has room.",
    )
    canary_share: float = option(0.2, "Share of the requests on which a new version has to prove itself.")
    canary_requests: int = option(200, "Requests after which a trial ends at the latest.")

    def __post_init__(self) -> None:
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


def check_route(route: str, name: str) -> None:
    """Raises ConfigError naming the option if this is no name of a route."""
    if not route.startswith(ROUTE_KINDS) or route.endswith(":"):
        raise ConfigError(f"--{name} {route}: write tenant:NAME or domain:NAME")
