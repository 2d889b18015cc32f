"""What of the traffic is kept to learn from, and how long: the options, without torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from slipstream.engine.config import option
from slipstream.engine.errors import ConfigError
from slipstream.engine.units import parse_size

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class TrafficConfig:
    """Nothing is kept unless the server says so, and a request may lower what is kept of it."""

    traffic_log: Literal["off", "tokens", "features"] = option(
        "off",
        "What is kept of requests for the drafter to learn from: nothing, their tokens, or also hidden states of the "
        "model. A request may ask for less with the header X-Slipstream-Traffic.",
    )
    traffic_consent: Literal["opt-out", "opt-in"] = option(
        "opt-out", "Requests that say nothing about being kept are kept (opt-out), or not (opt-in)."
    )
    traffic_folder: str | None = option(None, "Where traffic is kept; readable by the owner only.")
    traffic_max_bytes: str = option("2GiB", "The oldest traffic is deleted when there is more than this.")
    traffic_max_age: str = option("7d", "Traffic older than this is deleted: 30min, 12h, 7d.")
    traffic_topk: int = option(
        0, "Also keep the model's k most likely tokens wherever one is sampled; costs a pass over the logits. 0: none."
    )
    traffic_buffer: str = option(
        "256MiB", "Memory for hidden states until a request has ended and is written; what finds no room is dropped."
    )
    traffic_redact: str | None = option(
        None, "module:function that sees every sample before it is written, and returns it, changed or not, or None."
    )

    def __post_init__(self) -> None:
        if self.traffic_log != "off" and not self.traffic_folder:
            raise ConfigError(f"--traffic-log {self.traffic_log} needs --traffic-folder")
        if self.traffic_topk < 0:
            raise ConfigError(f"--traffic-topk must be at least 0, not {self.traffic_topk}")
        if self.traffic_topk and self.traffic_log != "features":
            raise ConfigError("--traffic-topk needs --traffic-log features")
        parse_duration(self.traffic_max_age, "traffic-max-age")
        parse_size(self.traffic_max_bytes, "traffic-max-bytes")
        parse_size(self.traffic_buffer, "traffic-buffer")


def parse_duration(text: str, name: str) -> float:
    """Seconds of "30min", "12h", "7d"; raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", text)
    seconds = float(match[1]) * UNITS[match[2]] if match else math.nan
    if not seconds > 0:
        raise ConfigError(f"--{name} {text!r} is not a time; write it like 30min, 12h or 7d")
    return seconds
