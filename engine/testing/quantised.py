"""Small folders with quantised weights, as the tools write them, for tests of every room."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.kernels.stored import Stored

Parts = dict[str, Tensor]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs of a word, from its lowest half byte on."""


@dataclass(frozen=True)
class Whole:
    """A matrix [n, k] as whole numbers: scale * (q - zero) with those of the group of the input."""

    bits: int
    q: Tensor  # [n, k] int32, 0 … 2^bits - 1
    scale: Tensor  # [n, groups] of the format it is stored in
    zero: Tensor  # [n, groups] int32
    group: Tensor  # [k] int32

    @property
    def numbers(self) -> Tensor:
        group = self.group.long()
        return self.scale.float()[:, group] * (self.q - self.zero[:, group]).float()


def quantise(
    weight: Tensor, bits: int, size: int, symmetric: bool, scales: torch.dtype = torch.float16, ordered: bool = True
) -> Whole:
    """By groups of ``size`` inputs, -1 for one; not ``ordered``: which are anywhere in a row."""
    n, k = weight.shape
    size = k if size < 0 else size
    order = torch.arange(k) if ordered else torch.randperm(k, generator=torch.Generator().manual_seed(k))
    group = torch.empty(k, dtype=torch.int32)
    group[order] = (torch.arange(k) // size).int()
    groups, most = -(-k // size), (1 << bits) - 1
    scale, zero = torch.empty(n, groups), torch.full((n, groups), 1 << (bits - 1), dtype=torch.int32)
    for g in range(groups):
        of_group = weight[:, group == g]
        low, high = of_group.amin(1).clamp(max=0), of_group.amax(1).clamp(min=0)
        if symmetric:
            scale[:, g] = 2 * torch.maximum(-low, high).clamp(min=1e-5) / most
        else:
            scale[:, g] = (high - low).clamp(min=1e-5) / most
            zero[:, g] = (-low / scale[:, g]).round().clamp(0, most).int()
    scale = scale.to(scales)
    wide = scale.float()[:, group.long()]
    q = (weight / wide + zero[:, group.long()]).round().clamp(0, most).int()
    return Whole(bits, q, scale, zero, group)


def words(numbers: Tensor, bits: int) -> Tensor:
    """[rows, count] of so many bits -> [rows, words] int32, the lowest bits first; the last word is filled with 0."""
    count = 32 // bits
    filled = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % count)).view(len(numbers), -1, count)
    return (filled << bits * torch.arange(count)).sum(-1).to(torch.int32)


def gptq(whole: Whole, less_one: bool = True, with_order: bool = True) -> Parts:
    ones = sum(1 << at for at in range(0, 32, whole.bits))
    parts = {
        "qweight": words(whole.q, whole.bits).t().contiguous(),
        "qzeros": words(whole.zero.t(), whole.bits) - (ones if less_one else 0),
        "scales": whole.scale.t().contiguous(),
    }
    return parts | ({"g_idx": whole.group} if with_order else {})


def awq(whole: Whole) -> Parts:
    def packed(numbers: Tensor) -> Tensor:  # [rows, n]
        return words(numbers.view(len(numbers), -1, 8)[:, :, AWQ_ORDER].reshape(len(numbers), -1), 4)

    return {
        "qweight": packed(whole.q.t().contiguous()),
        "qzeros": packed(whole.zero.t().contiguous()),
        "scales": whole.scale.t().contiguous(),
    }


def compressed(whole: Whole, symmetric: bool) -> Parts:
    """``pack-quantized`` of compressed-tensors."""
    parts = {
        "weight_packed": words(whole.q, whole.bits),
        "weight_scale": whole.scale,
        "weight_shape": torch.tensor(whole.q.shape),
    }
    return parts if symmetric else parts | {"weight_zero_point": words(whole.zero.t(), whole.bits).t().contiguous()}


def bytes_of(whole: Whole, symmetric: bool) -> Parts:
    """``int-quantized`` of compressed-tensors."""
    parts = {"weight": (whole.q - 128).to(torch.int8), "weight_scale": whole.scale}
    return parts if symmetric else parts | {"weight_zero_point": (whole.zero - 128).to(torch.int8)}


def fp8(weight: Tensor, block: tuple[int, int], name: str = "weight_scale") -> tuple[Parts, Tensor]:
    """A scale for each block of outputs and inputs; with the numbers that this stands for."""
    n, k = weight.shape
    rows, columns = block if block != (0, 0) else (n, k)
    scale = torch.empty(-(-n // rows), -(-k // columns))
    stored, numbers = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[at].abs().amax() / 448
            stored[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            numbers[at] = stored[at].float() * scale[i, j]
    return {"weight": stored, name: scale if block != (0, 0) else scale.reshape(())}, numbers


def _of(make: Callable[[Whole], Parts], bits: int, size: int, symmetric: bool, **how: Any) -> Quantiser:
    def quantiser(weight: Tensor) -> tuple[Parts, Tensor]:
        whole = quantise(weight, bits, size, symmetric, **how)
        return make(whole), whole.numbers

    return quantiser


Quantiser = Callable[[Tensor], tuple[Parts, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A way to quantise, and how a configuration names it."""

    config: dict[str, Any]
    quantise: Quantiser
    format: str
    """What its matrices are kept as."""


def _gptq_kind(bits: int, size: int, symmetric: bool, ordered: bool = True, v2: bool = False) -> Kind:
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": not ordered}
    make = lambda whole: gptq(whole, not v2)  # noqa: E731
    form = f"INT{bits}" + ("" if symmetric else "_ZERO") if ordered else "F32"
    config |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return Kind(config, _of(make, bits, size, symmetric, ordered=ordered), form)


def _compressed_kind(bits: int, size: int, symmetric: bool, layout: str = "pack-quantized") -> Kind:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if size > 0 else "channel"}
    if size > 0:
        weights["group_size"] = size
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        **{"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"},
        **{"config_groups": {"group_0": group}, "ignore": ["lm_head"]},
    }
    make = compressed if layout == "pack-quantized" else bytes_of
    form = f"INT{bits}" + ("" if symmetric else "_ZERO")
    return Kind(config, _of(lambda whole: make(whole, symmetric), bits, size, symmetric, scales=torch.bfloat16), form)


def _fp8_kind(config: dict[str, Any], block: tuple[int, int], name: str = "weight_scale") -> Kind:
    return Kind({"quant_method": "fp8"} | config, lambda weight: fp8(weight, block, name), "F32")


def block_numbers(blocks: Stored) -> Tensor:
    """What blocks of INT4, INT4_ZERO, INT8 and INT8_ZERO stand for."""
    n, k = blocks.shape
    data = torch.from_numpy(blocks.data.copy()).view(n, k // 32, -1)
    sides = data[..., : -16 if "INT4" in blocks.format else -32].contiguous().view(torch.float16).float()
    q = torch.cat((data[..., -16:] & 15, data[..., -16:] >> 4), -1)
    zero = torch.tensor(8.0)
    if "INT8" in blocks.format:
        q, zero = data[..., -32:].view(torch.int8), torch.tensor(0.0)
    if blocks.format.endswith("ZERO"):
        zero = sides[..., 1:]
    return (sides[..., :1] * (q.float() - zero)).view(n, k)


KINDS: dict[str, Kind] = {
    "gptq-4": _gptq_kind(4, 32, True),
    "gptq-4-asymmetric": _gptq_kind(4, 32, False),
    "gptq-4-v2": _gptq_kind(4, -1, False, v2=True),
    "gptq-4-act-order": _gptq_kind(4, 32, True, ordered=False),
    "gptq-8": _gptq_kind(8, -1, True),
    "gptq-8-asymmetric": _gptq_kind(8, 32, False),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        _of(awq, 4, 32, False),
        "INT4_ZERO",
    ),
    "w4a16": _compressed_kind(4, 32, True),
    "w4a16-asymmetric": _compressed_kind(4, 32, False),
    "w8a16": _compressed_kind(8, -1, True),
    "w8a8": _compressed_kind(8, -1, True, "int-quantized"),
    "w8a8-asymmetric": _compressed_kind(8, -1, False, "int-quantized"),
    "fp8": _fp8_kind({"activation_scheme": "dynamic"}, (0, 0)),
    "fp8-blocks": _fp8_kind({"weight_block_size": [16, 32]}, (16, 32), "weight_scale_inv"),
}


def write_quantised(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], kind: Kind, extra: dict[str, Tensor] | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """A folder with these weights, the linear layers of which are quantised; and the numbers that they stand for."""
    stored, numbers = dict(extra or {}), dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] not in MODULES or tensor.ndim != 2:
            stored[name] = tensor
            continue
        parts, numbers[name] = kind.quantise(tensor.float())
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": kind.config}))
    save_file(stored, folder / "model.safetensors")
    return folder, numbers


def four_bit_floats(weight: Tensor, nested: bool, block: int = 64) -> tuple[Parts, Tensor]:
    """``load_in_4bit`` of bitsandbytes: places in a table, times the largest of a block; that of 8 bits, if nested."""
    table = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16) ** 2
    blocks = weight.reshape(-1, block)
    largest = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {"weight.quant_map": table}
    if nested:
        offset, places = float(largest.mean()), torch.linspace(-1, 1, 256)
        rest = largest - offset
        parts_of_16 = torch.nn.functional.pad(rest, (0, -len(rest) % 16)).view(-1, 16)
        scales = parts_of_16.abs().amax(1).clamp(min=1e-6)
        wide = scales.repeat_interleave(16)[: len(rest)]
        index = ((rest / wide)[:, None] - places).abs().argmin(1)
        largest = places[index] * wide + offset
        state |= {"nested_blocksize": 16, "nested_offset": offset, "nested_dtype": "float32"}
        parts |= {"weight.absmax": index.to(torch.uint8)}
        parts |= {"weight.nested_absmax": scales, "weight.nested_quant_map": places}
    else:
        parts["weight.absmax"] = largest
    index = ((blocks / largest[:, None])[..., None] - table).abs().argmin(-1)
    pairs = index.to(torch.uint8).reshape(-1, 2)
    parts["weight"] = (pairs[:, :1] << 4) | pairs[:, 1:]
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = told
    return parts, (table[index] * largest[:, None]).reshape(weight.shape)


def rows_of_bytes(weight: Tensor) -> tuple[Parts, Tensor]:
    """``load_in_8bit`` of bitsandbytes."""
    largest = weight.abs().amax(1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    numbers = stored.float() * largest[:, None] * 7.874015718698502e-3
    return {"weight": stored, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}, numbers
