"""Engine configuration: frozen, resolved once; the command line is generated from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slipstream.engine.errors import ConfigError
from slipstream.engine.units import parse_size

MOST_TEXT_BYTES = 16 << 20
MOST_THREADS = 1024
"""More of them than a machine may have cores: the library of threads ends a process that gets none from the system."""


def option(default: Any, help: str) -> Any:  # noqa: A002
    """A configuration field with its command-line help."""
    return field(default=default, metadata={"help": help})


def read_option_file(path: Path) -> str:
    """The text of a file that an option names; OSError, or ValueError for what is not UTF-8 or has no end."""
    with path.open("rb") as file:
        content = file.read(MOST_TEXT_BYTES + 1)
    if len(content) > MOST_TEXT_BYTES:
        raise ValueError(f"it is larger than {MOST_TEXT_BYTES >> 20} MiB")
    return content.decode()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine needs to know. Sizes are in tokens or bytes as named; None means decided at load."""

    model: str = option(
        "default",
        "Hugging Face folder, GGUF file, a model of the Hub (OWNER/NAME, or OWNER/NAME/FILE.gguf), which is "
        "downloaded, or 'default' for the embedded model.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model of the Hub; default its main branch.")
    target_lineage: str = option(
        "",
        "Name that stands for the model's weights where these change, as in RL: drafters of this lineage fit them all. "
        "Without one, drafters are for the weights of the files.",
    )
    load_format: Literal["auto", "dummy"] = option("auto", "'dummy' fills the model with random weights.")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        "Format of the KV cache and of weights that are not packed; auto is bfloat16, or float32 where torch's kernels "
        "run on a CPU that is slow at bfloat16.",
    )
    weights: Literal["auto", "packed", "bfloat16", "float32"] = option(
        "auto",
        "How weights are kept: 'packed' keeps quantised weights in their own precision, which reads that much less per "
        "step (compiled kernels on a CPU, Triton's on a GPU); the others dequantise them at load. auto is the format "
        "of --dtype; where the processor rounds to bfloat16 fast, these numbers are made in registers from the "
        "quantised ones (--packed-arithmetic bfloat16).",
    )
    quantize: Literal["none", "q8", "q4"] = option(
        "none",
        "Quantise bfloat16, float16 and float32 weights when they are loaded or updated, and keep them packed: all "
        "matrices in 8 bits (q8), or most matrices of layers in 4 (q4); with the compiled kernels on a CPU and "
        "Triton's on a GPU.",
    )
    packed_arithmetic: Literal["auto", "exact", "bfloat16", "int16", "int8"] = option(
        "auto",
        "How packed weights are computed: 'exact' widens them in registers; 'bfloat16' rounds them there, which gives "
        "the tokens of --weights bfloat16; 'int16' and 'int8' also quantise activations in blocks of 32, which is "
        "faster, and less exact with 'int8'. auto is exact on a GPU; on a CPU int16 with --weights packed, otherwise "
        "bfloat16 where the processor rounds to it fast, else int16.",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where the model runs; auto takes a GPU if there is one.")
    kernels: Literal["auto", "native", "triton", "torch"] = option(
        "auto",
        "Kernels: compiled ones for the CPU, Triton's for a GPU, or the torch reference; auto takes those made for the "
        "device.",
    )
    isa: Literal[
        "auto", "avx512amx", "avx512bf16", "avx512vnni", "avx512", "avx2vnni", "avx2", "neonbf16", "neondot", "neon"
    ] = option(
        "auto",
        "Instruction set of the compiled kernels (model and sampling); auto takes the best that the processor has. "
        "'slipstream doctor' lists them.",
    )
    attention_backend: Literal["auto", "triton", "flashinfer", "xformers", "torch"] = option(
        "auto",
        "What computes attention on a GPU; auto takes the first in order of preference that is installed and covers "
        "the model. 'slipstream doctor' says which that is, and why.",
    )
    graph_memory: str = option(
        "2GiB", "GPU memory for recorded graphs of small steps, for example 512MiB; 0 launches kernels one by one."
    )
    threads: int = option(
        0,
        "Compute threads on the CPU; 0 takes every core this process may use, up to the CPU limit of its control "
        "group.",
    )
    max_model_len: int | None = option(None, "Longest prompt plus output in tokens; default from the model.")
    max_running: int = option(128, "Requests that may run at once.")
    max_step_tokens: int = option(512, "Most tokens computed in one step.")
    block_size: int = option(16, "Tokens per KV-cache block.")
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3"] = option(
        "auto",
        "Format of keys and values: auto is that of --dtype; 'int8' and 'fp8' (e4m3) take half the memory of bfloat16, "
        "with a scale per token and KV head, and cost a little precision.",
    )
    kv_cache_memory: str | None = option(
        None,
        "Size of the KV cache, for example 512MiB or 2GiB; by default a quarter of the free memory, at most 2GiB; on a "
        "GPU, all that is left.",
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory to use for weights, cache and everything else; the rest is for other programs."
    )
    prefix_caching: bool = option(True, "Reuse the KV cache of equal prompt prefixes.")
    prefix_cache_scope: Literal["tenant", "server"] = option(
        "tenant",
        "Who shares cached prefixes: requests of one tenant, or all. Where all do, timing and cached_tokens reveal "
        "whether somebody else has sent the same prefix.",
    )
    chunked_prefill: bool = option(True, "Split long prompts so that they do not stall running streams.")
    step_latency_ms: float = option(25.0, "Target step time while streams run; long prompts are split to fit.")
    priority_step_s: float = option(30.0, "Head start in seconds that one level of request priority is worth.")
    offline_share: float = option(
        0.1, "Share by which requests of batches may prolong the steps of others, on average."
    )
    offline_step_ms: float = option(
        100.0, "Approximate step time while only requests of batches run; a request that comes then waits for one step."
    )
    pipeline: Literal["auto", "on", "off"] = option(
        "auto",
        "Whether to plan the next step while the device runs this one; auto does so on a GPU where no drafter runs.",
    )
    deterministic: bool = option(
        False, "Start only if the bits of a request's result cannot depend on what else is in the batch."
    )
    speculation: str = option(
        "auto", "Drafters that may propose tokens, by name (ngram,suffix), 'auto' for all there are, or 'off'."
    )
    drafter: str | None = option(
        None,
        "Folder of a learned drafter (a registry, a version of one, or an EAGLE head), 'warm' for the one that comes "
        "with Slipstream for the default model, 'cold' for one made from the model's own last layer, or 'random' for "
        "an untrained one; none by default.",
    )
    max_drafters: int = option(
        4, "Versions of the learned drafter that may be loaded at once, one per route; each takes memory of its own."
    )
    draft_model: str | None = option(
        None, "A small model with the same tokenizer that drafts: a folder or a GGUF file; none by default."
    )
    max_draft_tokens: int = option(8, "Most draft tokens per request and step.")
    draft_width: int = option(
        1, "Draft tokens that a head or draft model may propose for the same position, as branches; 1 drafts chains."
    )
    speculation_policy: Literal["throughput", "bandit", "fixed"] = option(
        "throughput",
        "How many draft tokens are verified: what promises most tokens per second, what did best by trial, or always "
        "--max-draft-tokens.",
    )
    seed: int = option(0, "Seeds the random weights of --load-format dummy.")

    def __post_init__(self) -> None:
        positive = ("max_running", "max_step_tokens", "block_size", "max_draft_tokens", "max_drafters", "draft_width")
        for name in (*positive, "step_latency_ms", "offline_share", "offline_step_ms"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be more than 0")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"--threads {self.threads}: must be from 0 to {MOST_THREADS}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len {self.max_model_len}: must leave room for two tokens")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"--gpu-memory-utilization {self.gpu_memory_utilization}: must be above 0 and at most 1")
        parse_size(self.graph_memory, "graph-memory")
        if self.kv_cache_memory is not None:
            parse_size(self.kv_cache_memory, "kv-cache-memory")
