"""Server configuration: frozen, resolved once; the command line is generated from these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slipstream.engine.config import option
from slipstream.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP side needs to know. Times are in seconds, sizes in what their names say."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface (in a container, say).")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = option(
        (), "Name of the model in the API; repeat for aliases. Default: from the file."
    )
    api_key: tuple[str, ...] = option((), "Key clients must send as 'Authorization: Bearer KEY'; repeat for several.")
    admin_key: tuple[str, ...] = option(
        (),
        "Key for the admin API and the dashboard's data; repeat for several. Without one they answer only to clients "
        "on this machine.",
    )
    unknown_fields: Literal["error", "warn"] = option(
        "error", "A request field this server does not know: refuse the request, or log the name and go on."
    )
    generation_config: Literal["none", "auto"] = option(
        "none",
        "Where sampling defaults come from: the OpenAI API (temperature 1), or the model's generation_config.json.",
    )
    chat_template: str | None = option(None, "File with a Jinja chat template to use instead of the model's own.")
    trust_request_chat_template: bool = option(
        False, "Accept the request field chat_template; a hostile template can keep a core busy."
    )
    logprobs_mode: Literal["raw", "processed"] = option(
        "raw", "Log-probabilities of the model's own distribution, or of the one the token was drawn from."
    )
    max_logprobs: int = option(20, "Most log-probabilities per token a request may ask for; -1 for no limit.")
    max_n: int = option(128, "Most choices (n) per prompt.")
    max_prompts: int = option(1024, "Most prompts in one completions request.")
    max_body_bytes: int = option(16 * 2**20, "Largest request body; larger ones get 413.")
    max_queued_requests: int = option(
        1024, "Sequences that may wait beyond those that run; a request that finds no room gets 429."
    )
    request_timeout_s: float = option(0.0, "Time a request may take, answer included; then 504. 0 for no limit.")
    health_stall_s: float = option(30.0, "/health is 503 when there is work and no step has ended for this long.")
    drain_timeout_s: float = option(30.0, "Time running requests get to finish on shutdown.")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "What goes to the log on stderr.")
    access_log: bool = option(False, "Log a line for every HTTP request.")

    def __post_init__(self) -> None:
        at_least = {
            "port": 0,
            "max_logprobs": -1,
            "max_n": 1,
            "max_prompts": 1,
            "max_body_bytes": 1,
            "max_queued_requests": 0,
            "request_timeout_s": 0,
            "drain_timeout_s": 0,
        }
        for name, minimum in at_least.items():
            if not getattr(self, name) >= minimum:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, not {getattr(self, name)}")
        if not self.health_stall_s > 0:
            raise ConfigError(f"--health-stall-s must be more than 0, not {self.health_stall_s}")
        for name in ("api_key", "admin_key", "served_model_name"):
            if not all(value.strip() for value in getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} must not be empty")
        if set(self.api_key) & set(self.admin_key):
            raise ConfigError("--admin-key must not be one of the keys of --api-key: those are given to users")
