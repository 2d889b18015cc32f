"""Which attention a model gets on a GPU, by what its configuration says of its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.config import cache_shape, decoder_config, is_own, model_shape
from slipstream.engine.models.transformers_files import settings_of, transformers_shape
from slipstream.kernels.attention.choice import (
    FROM_FP8,
    Choice,
    NoAttentionError,
    Wanted,
    against,
    backend,
    choose,
    wanted,
)
from slipstream.kernels.compute import Formats
from slipstream.kernels.kv_cache import CacheShape, PagedKVCache, TorchKVCache
from slipstream.kernels.triton import launch

log = logging.getLogger(__name__)
CacheMaker = Callable[[CacheShape, int, torch.device], PagedKVCache]


def attention_wanted(config: dict[str, Any], options: EngineConfig, formats: Formats, device: torch.device) -> Wanted:
    """What the model with this configuration asks of attention."""
    if is_own(config):
        shape, more = model_shape(config), {"window": any(decoder_config(config).windows)}
    else:
        shape, settings = transformers_shape(config), settings_of(config)
        more = {
            "window": bool(getattr(settings, "sliding_window", None)),
            "softcap": bool(getattr(settings, "attn_logit_softcapping", None)),
            "sinks": settings.model_type == "gpt_oss",
        }
    kept = cache_shape(shape, options.block_size, formats)
    return wanted(kept, formats.compute, device, deterministic=options.deterministic, **more)


def attention_choice(config: dict[str, Any], options: EngineConfig, formats: Formats, device: torch.device) -> Choice:
    """Raises ConfigError where --attention-backend or --kv-cache-dtype cannot be used."""
    asked = attention_wanted(config, options, formats, device)
    if asked.kv_dtype is torch.float8_e4m3fn and 0 < asked.capability < FROM_FP8:
        raise ConfigError(
            f"--kv-cache-dtype {options.kv_cache_dtype}: a GPU of compute capability {asked.capability / 10} does not "
            f"compute with such numbers, which came with {FROM_FP8 / 10}; use --kv-cache-dtype int8"
        )
    try:
        choice = choose(asked, options.attention_backend)
    except NoAttentionError as error:
        raise ConfigError(str(error)) from error
    log.info("attention by %s: %s", choice.name, choice.because)
    return choice


def cache_maker(config: dict[str, Any], options: EngineConfig, formats: Formats, device: torch.device) -> CacheMaker:
    """What makes the cache of a model that runs through transformers: with attention in kernels where these run.

    Raises ConfigError where --attention-backend cannot be used.
    """
    forced = options.attention_backend
    # On the CPU there may be an interpreter, which nobody gets without asking for it.
    is_wanted = options.kernels == "triton" or (device.type != "cpu" and options.kernels != "torch")
    if not is_wanted or not launch.runs_on(device.type):
        if forced not in ("auto", "torch"):
            raise ConfigError(
                f"--attention-backend {forced}: kernels of GPUs do not run here; use --attention-backend auto"
            )
        return TorchKVCache
    choice = attention_choice(config, options, formats, device)
    if against("triton", attention_wanted(config, options, formats, device)):
        return TorchKVCache  # Triton's kernels store for all others
    from slipstream.kernels.triton.kv_cache import TritonKVCache

    computed = backend(choice.name)
    return lambda shape, blocks, where: TritonKVCache(shape, blocks, where, computed, prompt=True)
