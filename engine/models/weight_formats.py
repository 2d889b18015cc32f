"""In which numbers a model's weights are kept, why, and what memory that takes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.checkpoint.shapes import parameter_shapes
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.config import decoder_config, is_own
from slipstream.kernels.compute import PACKED, Arithmetic, Compute, Formats
from slipstream.kernels.native.piecewise import PiecewiseCompute
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.torch_stack import TorchCompute

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COMPILED: tuple[type[Compute], ...] = (NativeCompute, PiecewiseCompute)
"""Those whose matrices are the compiled kernels'."""
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""What --kv-cache-dtype asks for, beside the format of --dtype."""
ARITHMETIC: Arithmetic = "int16"
"""What --packed-arithmetic auto is: tokens are those of exact arithmetic more often than with weights in bfloat16."""


def choose_formats(
    checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute], dtype: torch.dtype
) -> tuple[Formats, str]:
    """``dtype`` of activations, and of the cache unless there is another for it. Also says why, for people.

    Raises ConfigError for what this model or these kernels do not have.
    """
    formats = replace(Formats.of(dtype), kv=CACHE_DTYPES.get(config.kv_cache_dtype, dtype))
    if config.weights in DTYPES and config.weights != formats.weights:
        raise ConfigError(f"--weights {config.weights}: does not go with --dtype {config.dtype}; leave one of them out")
    if config.weights in DTYPES:
        return formats, f"--weights {config.weights}"
    if config.weights == "auto" and config.packed_arithmetic == "auto":
        if not packed_formats(checkpoint, config, kind):
            return formats, "the number format of --dtype"
        if dtype == torch.bfloat16 and kind.rounds_fast():
            packed = replace(formats, weights=PACKED, arithmetic="bfloat16")
            return packed, "the numbers of --dtype, made in registers of the blocks in the file, which are read faster"
        return formats, "the number format of --dtype; --weights packed reads less per step"
    asked = f"--weights {PACKED}" if config.weights == PACKED else f"--packed-arithmetic {config.packed_arithmetic}"
    if kind is TorchCompute:
        raise ConfigError(f"{asked}: torch does not compute with quantised weights; use --kernels auto")
    default: Arithmetic = ARITHMETIC if kind in COMPILED else "exact"
    arithmetic = default if config.packed_arithmetic == "auto" else config.packed_arithmetic
    if arithmetic != "exact" and kind not in COMPILED:
        raise ConfigError(f"--packed-arithmetic {arithmetic}: a GPU computes exactly with quantised weights")
    if arithmetic == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            f"--packed-arithmetic bfloat16: does not go with --dtype {config.dtype}; leave one of them out"
        )
    if not packed_formats(checkpoint, config, kind):
        raise ConfigError(
            f"{asked}: {checkpoint.path} has no quantised weights that can be kept so; GGUF files of the "
            "types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K have, and folders with whole numbers of 4 or 8 "
            "bits (GPTQ, AWQ, compressed-tensors), but for mixtures of experts on a GPU"
        )
    return replace(formats, weights=PACKED, arithmetic=arithmetic), asked


def packed_formats(checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute]) -> list[str]:
    """The types of matrices that can be kept packed, those of most weights first."""
    if config.load_format == "dummy" or not is_own(checkpoint.config):
        return []
    count: Counter[str] = Counter()
    layer, shapes = decoder_config(checkpoint.config).layer, checkpoint.tensor_shapes()
    for name, stored in checkpoint.formats().items():
        shape = shapes[name]
        if len(shape) == 2 and kind.packed_bytes(layer, stored, *shape):
            count[stored] += math.prod(shape)
    return [stored for stored, _ in count.most_common()]


def describe(checkpoint: Checkpoint, config: EngineConfig, formats: Formats, kind: type[Compute]) -> str:
    """For people and metrics, for example ``packed (Q4_1, Q8_0), exact`` or ``bfloat16``."""
    if formats.weights != PACKED:
        return formats.weights
    return f"{PACKED} ({', '.join(packed_formats(checkpoint, config, kind))}), {formats.arithmetic}"


def weights_bytes(checkpoint: Checkpoint, config: EngineConfig, formats: Formats, kind: type[Compute]) -> int:
    """The memory that all tensors take; 0 for those that are known only once a model is built."""
    if config.load_format == "dummy":
        if not is_own(checkpoint.config):
            return 0
        shapes = parameter_shapes(checkpoint.config)
        return sum(math.prod(size) for _, size in shapes) * formats.compute.itemsize
    if formats.weights != PACKED:
        return checkpoint.weights_bytes(formats.compute)
    kinds, total = checkpoint.formats(), 0
    layer = decoder_config(checkpoint.config).layer
    for name, shape in checkpoint.tensor_shapes().items():
        packed = kind.packed_bytes(layer, kinds[name], *shape) if len(shape) == 2 else 0
        total += packed or math.prod(shape) * formats.compute.itemsize
    return total
