"""Backends of attention beside each other: are they right, and how fast are they for what steps are made of?

What comes out is what the order in ``kernels/attention/choice.py`` is to be written from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from slipstream.kernels.attention.choice import TABLE, against, backend, missing, wanted
from slipstream.kernels.cases import (
    ATTENDED,
    LLAMA_8B,
    MIDDLE,
    SHARED,
    TINY,
    TOLERANCE,
    Attended,
    Case,
    Source,
    attention_case,
    difference,
)
from slipstream.kernels.kv_cache import LARGEST, CacheShape, PagedKVCache
from slipstream.kernels.triton import launch
from slipstream.server.gpu_check.context import Context, NotThere, Part
from slipstream.server.gpu_check.kernels import copied_per_s, mend_interpreter
from slipstream.server.gpu_check.timing import seconds

COMPARED = (*(attended for attended in ATTENDED if not attended.window and not attended.softcap), SHARED)
"""What all of them do."""


def parts(context: Context) -> Iterator[Part]:
    """First all of them against the reference, then against the clock."""
    if not launch.runs_on(context.device.type):
        raise NotThere("Triton, whose kernels store keys and values for all backends")
    mend_interpreter()
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    names = []
    shape = CacheShape(1, LLAMA_8B.block_size, LLAMA_8B.kv_heads, LLAMA_8B.head_dim, dtype)
    for entry in TABLE:
        reasons = against(entry.name, wanted(shape, dtype, context.device))
        if why := "; ".join(reasons) or missing(entry.name):
            context.note(f"{entry.name}: {why}")
        else:
            names.append(entry.name)
    # The interpreter takes a second for each, and nothing is compared with it.
    compared = [each for each in COMPARED if not context.dry_run or each.name == "decode" or each.is_shared]
    for name in names:
        for attended in compared:
            yield Part(f"{name}, {attended.name}", partial(_compare, context, name, attended, dtype))
    for attended in compared:
        for name in names:
            yield Part(f"{name}, {attended.name}, speed", partial(_time, context, name, attended, dtype))
    for kept in LARGEST:
        if why := "; ".join(against("triton", wanted(replace(shape, dtype=kept), dtype, context.device))):
            context.note(f"a cache in {kept}: {why}")
        elif "triton" in names:
            yield Part(f"triton, decode, cache in {kept}", partial(_eight_bits, context, kept, dtype))


def _case(name: str, attended: Attended) -> Case:
    from slipstream.kernels.triton.kv_cache import TritonKVCache  # where Triton runs

    def make(shape: CacheShape, blocks: int, device: torch.device) -> PagedKVCache:
        return TritonKVCache(shape, blocks, device, backend(name), prompt=True)

    return attention_case(name, make, attended)


def _eight_bits(context: Context, kept: torch.dtype, dtype: torch.dtype) -> None:
    """Decode over a cache of 8 bits, which Triton's attention alone reads: what that gives, and what time it takes
    beside one in the format of queries."""
    decode, name = replace(COMPARED[0], kept=kept), str(kept).removeprefix("torch.")
    prepared = _case("triton", decode).prepare(Source(context.device, dtype), TINY if context.dry_run else MIDDLE)
    found, most = difference(prepared.found(), prepared.expected()), TOLERANCE[dtype]
    context.check(
        f"triton, {decode.name}, cache in {name}", found <= most, f"differs by {found:.2g}", f"at most {most:.2g}"
    )
    sizes, most_s = (LLAMA_8B, 0.3) if context.on_gpu else (TINY, 0.0)
    whole, ours = (
        _case("triton", each).prepare(Source(context.device, dtype), sizes) for each in (COMPARED[0], decode)
    )
    plain, took = (seconds(each.run, context.device, most_s) for each in (whole, ours))
    context.row("cache in 8 bits", what=decode.name, cache=name, µs=took * 1e6, of_the_plain=took / plain)


def _compare(context: Context, name: str, attended: Attended, dtype: torch.dtype) -> None:
    prepared = _case(name, attended).prepare(Source(context.device, dtype), TINY if context.dry_run else MIDDLE)
    found, most = difference(prepared.found(), prepared.expected()), TOLERANCE[dtype]
    context.check(f"{name}, {attended.name}", found <= most, f"differs by {found:.2g}", f"at most {most:.2g}")


def _time(context: Context, name: str, attended: Attended, dtype: torch.dtype) -> None:
    sizes, most_s = (LLAMA_8B, 0.3) if context.on_gpu else (TINY, 0.0)
    prepared = _case(name, attended).prepare(Source(context.device, dtype), sizes)
    took = seconds(prepared.run, context.device, most_s)
    context.row(
        "attention backends",
        what=attended.name,
        backend=name,
        µs=took * 1e6,
        GB_per_s=prepared.moved / took / 1e9,
        of_the_copy=prepared.moved / took / copied_per_s(context),
        TFLOP_per_s=prepared.flops / took / 1e12,
    )
