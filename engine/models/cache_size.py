"""How many blocks the cache has: what weights, drafters and everything else leave of the memory."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.limits import control_groups
from slipstream.engine.models.config import ModelShape
from slipstream.engine.units import human_size, parse_size

DEFAULT_CACHE_SHARE = 4
DEFAULT_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Drafts:
    """Bytes that drafters take of a GPU: once, and for each block of the cache."""

    fixed: int = 0
    per_block: int = 0
    waiting: int = 0
    """What waits for a head of so many requests as may run, and for each block that is full of such positions."""
    waiting_per_block: int = 0


NO_DRAFTS = Drafts()


def fit_cache(
    config: EngineConfig,
    shape: ModelShape,
    weights_bytes: int,
    block_bytes: int,
    drafts: Drafts,
    besides: int,
    available: int,
    on_gpu: bool,
) -> tuple[int, int]:
    """Number of cache blocks, and the longest sequence they and the model allow.

    ``available`` bytes hold weights, cache and, ``besides``, everything else. Memory of a GPU is all for this. Drafters
    take so much of it for each block.

    Raises:
        ConfigError: --block-size, --max-model-len or --kv-cache-memory is not possible with this model.
        ModelError: the model, or the cache that is asked for, does not fit.
    """
    if config.block_size % 16:
        raise ConfigError(f"--block-size {config.block_size} must be a multiple of 16")
    left, of_a_block = available - weights_bytes - besides, block_bytes + drafts.per_block
    left = max(
        (left - drafts.waiting) * block_bytes // of_a_block,
        left * block_bytes // (of_a_block + drafts.waiting_per_block),  # no more waits than there is in the cache
    )
    wanted = config.max_model_len or shape.max_positions
    if wanted > shape.max_positions:
        raise ConfigError(f"--max-model-len {wanted}: the model was made for {shape.max_positions} positions at most")
    least = -(-wanted // config.block_size) * block_bytes if config.max_model_len else 16 * block_bytes
    if left < least:
        shorter = ", or lower --max-model-len" if config.max_model_len else ""
        raise ModelError(
            f"the model does not fit: it needs {human_size(weights_bytes + least + besides)} of memory (weights "
            f"{human_size(weights_bytes)}, the smallest useful KV cache {human_size(least)}, everything else "
            f"{human_size(besides)}), and {human_size(available)} are free{_limit(config, on_gpu)}; "
            f"free some, try a smaller model or --quantize q8 or q4{shorter}"
        )
    if config.kv_cache_memory is None:
        size = left if on_gpu else max(min(left // DEFAULT_CACHE_SHARE, DEFAULT_CACHE_BYTES), least)
    else:
        size = parse_size(config.kv_cache_memory, "kv-cache-memory")
        if size > left:
            raise ModelError(
                f"--kv-cache-memory {config.kv_cache_memory} does not fit: beside the weights "
                f"({human_size(weights_bytes)}) and everything else ({human_size(besides)}) "
                f"{human_size(max(left, 0))} of memory are left{_limit(config, on_gpu)}"
            )
        if size < least:
            raise ConfigError(
                f"--kv-cache-memory {config.kv_cache_memory} is too small; at least "
                f"{human_size(least, least=True)} are needed"
            )
    num_blocks = size // block_bytes
    return num_blocks, min(wanted, num_blocks * config.block_size)


def _limit(config: EngineConfig, on_gpu: bool) -> str:
    """What keeps the process from the memory of the machine, if anything does."""
    if on_gpu:
        return f" within --gpu-memory-utilization {config.gpu_memory_utilization:g}"
    limits = control_groups()
    return "" if limits.memory is None else f" (its control group is limited to {human_size(limits.memory)})"
