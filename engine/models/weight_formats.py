"""In which numbers a model's weights are kept, why, and what memory that takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.checkpoint.shapes import parameter_shapes
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.config import decoder_config, is_own
from slipstream.kernels.compute import EIGHT_BITS, FOUR_BITS, PACKED, Arithmetic, Compute, Formats
from slipstream.kernels.native.piecewise import PiecewiseCompute
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.torch_stack import TorchCompute

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COMPILED: tuple[type[Compute], ...] = (NativeCompute, PiecewiseCompute)
"""Those whose matrices are the compiled kernels'."""
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""What --kv-cache-dtype asks for, beside the format of --dtype."""
BITS = {EIGHT_BITS: "q8", FOUR_BITS: "q4"}
"""What people call blocks that numbers become."""
ARITHMETIC: Arithmetic = "int16"
"""What --packed-arithmetic auto is: tokens are those of exact arithmetic more often than with weights in bfloat16."""


def choose_formats(
    checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute], dtype: torch.dtype
) -> tuple[Formats, str]:
    """``dtype`` of activations, and of the cache unless there is another for it. Also says why, for people.

    Raises ConfigError for what this model or these kernels do not have.
    """
    formats = replace(Formats.of(dtype), kv=CACHE_DTYPES.get(config.kv_cache_dtype, dtype))
    if config.weights in DTYPES:
        if config.weights != formats.weights:
            raise ConfigError(
                f"--weights {config.weights}: does not go with --dtype {config.dtype}; leave one of them out"
            )
        if config.quantize != "none":
            raise ConfigError(
                f"--quantize {config.quantize}: does not go with --weights {config.weights}, which keeps all weights "
                "as numbers; leave one of them out"
            )
        return formats, f"--weights {config.weights}"
    is_free = config.weights == "auto" and config.packed_arithmetic == "auto"
    rounds = is_free and dtype == torch.bfloat16 and kind.rounds_fast()
    if is_free and config.quantize == "none":
        if not packed_formats(checkpoint, config, kind):
            return formats, "the number format of --dtype"
        if rounds:
            packed = replace(formats, weights=PACKED, arithmetic="bfloat16")
            return packed, "the numbers of --dtype, made in registers of the blocks in the file, which are read faster"
        return formats, "the number format of --dtype; --weights packed reads less per step"
    asked = f"--weights {PACKED}" if config.weights == PACKED else f"--packed-arithmetic {config.packed_arithmetic}"
    if config.quantize != "none":
        asked = f"--quantize {config.quantize}"
    if kind is TorchCompute:
        instead = "use --kernels auto" if config.kernels == "torch" else "no other kernels compute this model here"
        raise ConfigError(f"{asked}: torch does not compute with quantised weights; {instead}")
    default: Arithmetic = "exact" if kind not in COMPILED else "bfloat16" if rounds else ARITHMETIC
    arithmetic = default if config.packed_arithmetic == "auto" else config.packed_arithmetic
    if arithmetic != "exact" and kind not in COMPILED:
        raise ConfigError(f"--packed-arithmetic {arithmetic}: a GPU computes exactly with quantised weights")
    if arithmetic == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            f"--packed-arithmetic bfloat16: does not go with --dtype {config.dtype}; leave one of them out"
        )
    packed = replace(formats, weights=PACKED, arithmetic=arithmetic, quantize=config.quantize)
    if config.quantize != "none":
        return packed, f"--quantize {config.quantize}" + _left_as_numbers(checkpoint, config, kind, formats.weights)
    if not packed_formats(checkpoint, config, kind):
        raise ConfigError(
            f"{asked}: {checkpoint.path} has no quantised weights that can be kept so; GGUF files of the "
            "types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K have, and folders with whole numbers of 4 or 8 "
            "bits (GPTQ, AWQ, compressed-tensors), but for mixtures of experts on a GPU"
        )
    return packed, asked


def _left_as_numbers(checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute], dtype: str) -> str:
    """What --quantize leaves, if anything, for people. Raises ConfigError where it has nothing to do."""
    matrices = [matrix for matrix in _tensors(checkpoint, config, kind) if matrix.is_matrix]
    packed = list(dict.fromkeys(matrix.packed_as for matrix in matrices if matrix.packed_bytes))
    if not any(name in packed for name in BITS.values()):
        why = "none of its matrices can be: their rows are no multiples of 32 numbers, or it is a mixture of experts"
        if packed:
            why = f"its weights are quantised already ({', '.join(packed)}), which --weights packed leaves so"
        raise ConfigError(f"--quantize {config.quantize}: {checkpoint.path} cannot be quantised, since {why}")
    left = sum(not matrix.packed_bytes for matrix in matrices)
    several = "matrices whose rows are" if left > 1 else "matrix whose rows are"
    return f"; {left} {several} no multiples of 32 numbers: {dtype}" if left else ""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a checkpoint as it is to be kept."""

    size: int
    is_matrix: bool
    packed_as: str = ""
    """A type of GGUF files, or what numbers are quantised to."""
    packed_bytes: int = 0
    """0: it stays numbers."""


def _tensors(checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute]) -> Iterator[_Tensor]:
    if not is_own(checkpoint.config):
        yield from (_Tensor(math.prod(shape), len(shape) == 2) for shape in checkpoint.tensor_shapes().values())
        return
    is_dummy = config.load_format == "dummy"
    shapes = dict(parameter_shapes(checkpoint.config)) if is_dummy else checkpoint.tensor_shapes()
    layer, stored = decoder_config(checkpoint.config).layer, {} if is_dummy else checkpoint.formats()
    of_numbers = replace(Formats.of(torch.bfloat16), weights=PACKED, quantize=config.quantize)
    for name, shape in shapes.items():
        size, is_matrix = math.prod(shape), len(shape) == 2
        became = of_numbers.blocks_of_numbers(name.split(".")[-2] if name.startswith("model.layers.") else "")
        for blocks, called in ((stored.get(name, ""), stored.get(name, "")), (became, BITS.get(became, ""))):
            if is_matrix and blocks and (taken := kind.packed_bytes(layer, blocks, *shape)):
                yield _Tensor(size, is_matrix, called, taken)
                break
        else:
            yield _Tensor(size, is_matrix)


def packed_formats(checkpoint: Checkpoint, config: EngineConfig, kind: type[Compute]) -> list[str]:
    """As what matrices can be kept packed, that of most weights first."""
    if not is_own(checkpoint.config):
        return []
    count: Counter[str] = Counter()
    for tensor in _tensors(checkpoint, config, kind):
        if tensor.packed_bytes:
            count[tensor.packed_as] += tensor.size
    return [stored for stored, _ in count.most_common()]


def describe(checkpoint: Checkpoint, config: EngineConfig, formats: Formats, kind: type[Compute]) -> str:
    """For people and metrics, for example ``packed (Q4_1, Q8_0), exact`` or ``bfloat16``."""
    if formats.weights != PACKED:
        return formats.weights
    return f"{PACKED} ({', '.join(packed_formats(checkpoint, config, kind))}), {formats.arithmetic}"


def weights_bytes(checkpoint: Checkpoint, config: EngineConfig, formats: Formats, kind: type[Compute]) -> int:
    """The memory that all tensors take; 0 for those that are known only once a model is built."""
    if config.load_format == "dummy" and not is_own(checkpoint.config):
        return 0
    is_packed, itemsize = formats.weights == PACKED, formats.compute.itemsize
    tensors = _tensors(checkpoint, config, kind)
    return sum((tensor.packed_bytes if is_packed else 0) or tensor.size * itemsize for tensor in tensors)
