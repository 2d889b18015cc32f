"""Server configuration: frozen, resolved once; the command line is generated from these fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from slipstream.engine.config import option
from slipstream.engine.errors import ConfigError
from slipstream.server.access.keys import Keys

MAX_PRIORITY = 1000
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/]+/?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP side needs to know. Times are in seconds, sizes in what their names say."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 for every interface (for example in a container), :: for IPv6 as well.",
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = option(
        (), "Name of the model in the API; repeat for aliases. Default: from the file."
    )
    lora_modules: tuple[str, ...] = option(
        (),
        "NAME=FOLDER: a LoRA in PEFT's format beside the model, for requests whose field model is NAME; repeat for "
        "several. POST /v1/load_lora_adapter loads more later.",
    )
    max_loras: int = option(
        32,
        "Most LoRAs beside the model. Loading one more evicts, of those loaded while the server runs and in no "
        "request, the one that was named longest ago.",
    )
    api_key: tuple[str, ...] = option(
        (),
        "Key clients must send as 'Authorization: Bearer KEY'; repeat for several. NAME=KEY gives a key a name; with "
        "keys of several names, tenants are called NAME/user. sha256:DIGEST stands for a key.",
    )
    admin_key: tuple[str, ...] = option(
        (),
        "Key for the admin API and the dashboard's data; repeat for several. Without one they answer only clients on "
        "this machine, and only with a loopback --host, without --api-key and without --behind-proxy.",
    )
    keys_file: str | None = option(
        None,
        "TOML file with further keys, as digests, and the limits of each; see 'slipstream keys'. It is read again when "
        "it changes, and on SIGHUP.",
    )
    behind_proxy: bool = option(
        False,
        "A proxy or router on this machine forwards requests of others: clients on loopback addresses are not trusted, "
        "so the admin API needs --admin-key.",
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "A name by which clients call this server, beside loopback names and --host; repeat for several, * for any. "
        "Others are refused if this is given, or on a loopback --host without --api-key.",
    )
    allowed_origin: tuple[str, ...] = option(
        (),
        "Origin of web pages that may use this server from a browser (https://chat.example); repeat for several, * for "
        "any. Others are refused.",
    )
    most_urgent_priority: int = option(
        0, "Lowest value of the field priority that requests may have; at 0 they can only make themselves less urgent."
    )
    unknown_fields: Literal["error", "warn"] = option(
        "error", "What to do with unknown request fields: refuse the request, or log the name and continue."
    )
    generation_config: Literal["none", "auto"] = option(
        "none",
        "Where sampling defaults come from: the OpenAI API (temperature 1), or the model's generation_config.json.",
    )
    stream_interval: int = option(
        1,
        "Least number of tokens per stream event, except the first and last of an answer: fewer events take less "
        "processor time. Requests in vLLM's and SGLang's dialects may set another number.",
    )
    chat_template: str | None = option(None, "File with a Jinja chat template to use instead of the model's own.")
    tool_call_parser: Literal[
        "auto",
        "none",
        "apertus",
        "command_a",
        "command_r",
        "deepseek_v3",
        "deepseek_v31",
        "deepseek_v32",
        "functiongemma",
        "gemma4",
        "glm4",
        "glm45",
        "granite",
        "hermes",
        "internlm",
        "jamba",
        "json",
        "kimi_k2",
        "lfm2",
        "llama3_json",
        "llama4_json",
        "longcat",
        "minimax_m2",
        "mistral",
        "mistral_args",
        "nemotron",
        "olmo3",
        "phi4_mini",
        "pythonic",
        "qwen3_coder",
        "seed_oss",
    ] = option("auto", "How the model calls tools; auto takes it from the chat template, none refuses tools.")
    reasoning_parser: Literal[
        "auto",
        "none",
        "think",
        "magistral",
        "seed",
        "harmony",
        "command",
        "gemma4",
        "granite",
        "apertus",
        "longcat",
    ] = option(
        "auto",
        "Tags around the model's reasoning, which becomes reasoning_content; auto takes them from the chat template.",
    )
    trust_request_chat_template: bool = option(
        False, "Accept the request field chat_template; a hostile template can keep a core busy."
    )
    logprobs_mode: Literal["raw", "processed"] = option(
        "raw", "Log-probabilities of the model's own distribution, or of the one the token was sampled from."
    )
    max_logprobs: int = option(20, "Most log-probabilities per token a request may ask for; -1 for no limit.")
    max_n: int = option(128, "Most choices (n) per prompt.")
    max_prompts: int = option(1024, "Most prompts in one completions request.")
    max_body_bytes: int = option(16 * 2**20, "Largest request body; larger ones get 413.")
    max_queued_requests: int = option(
        1024,
        "Sequences that may wait besides the running ones; a request that finds no room gets 429. Holders of different "
        "keys share the room fairly.",
    )
    max_queued_tokens: int = option(
        0, "Prompt tokens that may wait; a request that finds no room gets 429. 0 for no limit."
    )
    request_timeout_s: float = option(
        0.0, "Time a request may take, from reading it to the end of its answer; then 504. 0 for no limit."
    )
    batch_folder: str | None = option(
        None,
        "Folder for files and batches (/v1/files, /v1/batches, /v1/messages/batches), which continue when the server "
        "is restarted; without it there are none. "
        "Servers may share it: one of them runs the batches.",
    )
    max_file_bytes: int = option(200 * 2**20, "Largest file of /v1/files.")
    max_stored_bytes: int = option(2 * 2**30, "Bytes of all files of one key beyond which it may not upload more.")
    write_timeout_s: float = option(
        30.0, "How long a client may go without reading what waits for it before it is disconnected."
    )
    max_connections: int = option(
        0, "Most connections at a time; further ones get 503. 0 for as many as the system's limit on open files allows."
    )
    health_stall_s: float = option(30.0, "/health is 503 when there is work and no step has ended for this long.")
    engine_restarts: int = option(
        30,
        "How often a dead engine process is replaced within --engine-restart-window-s; beyond that the server exits "
        "with status 3. 0 to exit at once.",
    )
    engine_restart_window_s: float = option(
        600.0, "Seconds of serving within which --engine-restarts are counted, not including start-up time."
    )
    engine_hang_s: float = option(
        120.0, "An engine process that has given no sign of life for this long is killed and replaced; 0 for never."
    )
    drain_timeout_s: float = option(30.0, "Time running requests get to finish on shutdown.")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "What goes to the log on stderr.")
    log_format: Literal["text", "json"] = option(
        "text", "Format of log lines: for people, or JSON objects that name the request they are about."
    )
    access_log: bool = option(False, "Log a line for every HTTP request.")
    traces: str | None = option(
        None,
        "Where traces of requests go: the address of an OpenTelemetry collector (http://127.0.0.1:4318, OTLP over "
        "HTTP), or a file. They hold no text. Needs slipstream[otel].",
    )
    metrics_alias: Literal["none", "vllm"] = option(
        "none", "Also show metrics under the names of another engine (vllm), for tools that expect those."
    )

    def __post_init__(self) -> None:
        at_least = {
            "port": 0,
            "max_loras": 1,
            "stream_interval": 1,
            "max_logprobs": -1,
            "max_n": 1,
            "max_prompts": 1,
            "max_body_bytes": 1,
            "max_file_bytes": 1,
            "max_stored_bytes": 1,
            "max_queued_requests": 0,
            "max_queued_tokens": 0,
            "request_timeout_s": 0,
            "engine_restarts": 0,
            "engine_hang_s": 0,
            "max_connections": 0,
            "drain_timeout_s": 0,
        }
        for name, minimum in at_least.items():
            if not getattr(self, name) >= minimum:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, not {getattr(self, name)}")
        for name in ("health_stall_s", "write_timeout_s", "engine_restart_window_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(self, name)}")
        if not -MAX_PRIORITY <= self.most_urgent_priority <= 0:
            raise ConfigError(f"--most-urgent-priority must be -{MAX_PRIORITY} to 0, not {self.most_urgent_priority}")
        for name in ("served_model_name", "allowed_host", "allowed_origin"):
            if not all(value.strip() for value in getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} must not be empty")
        if len(self.lora_folders) < len(self.lora_modules):
            raise ConfigError("--lora-modules: two LoRAs have the same name; give each a name of its own")
        if len(self.lora_modules) > self.max_loras:
            raise ConfigError(
                f"--lora-modules: {len(self.lora_modules)} LoRAs are more than --max-loras {self.max_loras}; raise it"
            )
        for origin in self.allowed_origin:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origin {origin}: write it like https://chat.example or http://10.0.0.1:80"
                )
        if Keys(self.api_key, "--api-key").digests & Keys(self.admin_key, "--admin-key").digests:
            raise ConfigError("--admin-key must not be one of the keys of --api-key: those are given to users")

    @property
    def lora_folders(self) -> dict[str, str]:
        """Those of --lora-modules by name. Raises ConfigError for what is no name and folder."""
        found: dict[str, str] = {}
        for module in self.lora_modules:
            name, _, folder = module.partition("=")
            if not name.strip() or not folder.strip():
                raise ConfigError(f"--lora-modules {module}: write NAME=FOLDER, as in sql=/models/sql-lora")
            found[name] = folder
        return found
