"""What a step costs besides computing: time in which the device waits, synchronisations, copies, launches, memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from slipstream.engine.testing.local import LocalEngine
from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, NotThere, Part, streams_of
from slipstream.server.gpu_check.engines import (
    WARM_UP,
    config,
    decoding,
    engine,
    load_loras,
    measure,
    prompts,
    synchronize,
)
from slipstream.server.gpu_check.throughput import dummy_engine
from slipstream.server.gpu_check.trace import watch

STEPS = 20
LORAS = ("", "a", "b", "c", "d")
"""What streams have in turn, the first of them none."""
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LONGEST = 32768
WANTED = 0.05
WANTED_GRAPH_BYTES = 2e9
SYNCHRONIZES = "called a synchronizing"
"""In the warning that torch gives of every synchronisation, if it is asked to."""


def parts(context: Context) -> Iterator[Part]:
    counts = (1, 3) if context.dry_run else (1, 32, 256)
    prompt = 20 if context.dry_run else 128
    longest = prompt + 3 * STEPS + 2 * WARM_UP + 16
    with dummy_engine(context, "8B", counts[-1] * longest, max_model_len=longest) as local:
        for count in counts:
            yield Part(f"{streams_of(count)}", partial(_watch, context, local, "8B shape", count, prompt))
        load_loras(context, local, LORAS[1:], size=0.001)
        count = counts[1]
        yield Part(f"{streams_of(count)} with LoRAs", partial(_watch, context, local, "8B shape", count, prompt, LORAS))
    yield Part("4 streams with a head", partial(_with_head, context, _head(context, longest), "a head", prompt))
    in_bits = _head(context, longest, quantize="q8", kv_cache_dtype="int8")
    what = "a head, weights and cache in 8 bits"
    yield Part(f"4 streams with {what}", partial(_with_head, context, in_bits, what, prompt))


def _head(context: Context, longest: int, **more: Any) -> Any:
    name = "1B"
    path = models.folder(context, name, models.shape(context, name))
    options = {"speculation": "head", "drafter": "random", "speculation_policy": "fixed", "max_draft_tokens": 4}
    return config(context, path, load_format="dummy", max_model_len=2 * longest, **options, **more)


def _with_head(context: Context, options: Any, what: str, prompt: int) -> None:
    with engine(options) as local:
        _watch(context, local, f"1B shape with {what}", 2 if context.dry_run else 4, prompt)


def _watch(
    context: Context, local: LocalEngine, model: str, count: int, prompt: int, adapters: Sequence[str] = ("",)
) -> None:
    steps = 4 if context.dry_run else STEPS
    vocab = local.engine.loaded.model.shape.vocab_size
    longest = local.engine.loaded.max_model_len - prompt - 1
    with decoding(local, prompts(count, prompt, vocab, count), longest, context.streams_s, adapters) as running:
        plain = measure(local, running, steps, context.streams_s / 2)
        found = watch(lambda: _run(local, steps), context.scratch / f"{model}-{count}.json")
        waits = _synchronisations(context, local, steps)
    if not context.on_gpu and not found.operations:
        raise RuntimeError("the profiler has seen nothing of the steps")
    model += " with LoRAs" if any(adapters) else ""
    context.row(
        "steps",
        model=model,
        streams=count,
        ms_per_step=plain.step_ms,
        device_waits_for_the_host=found.late_share if context.on_gpu else None,
        device_idle=found.idle_share if context.on_gpu else None,
        ms_the_device_is_busy=1e3 * found.busy / steps if context.on_gpu else None,
        synchronisations=waits / steps,
        waits_of_the_host=found.waits / steps,
        copies_to_the_device=found.to_device / steps,
        copies_to_the_host=found.to_host / steps,
        KB_copied=(found.bytes_to_device + found.bytes_to_host) / steps / 1e3,
        kernels=found.kernels / steps,
        launches=found.launches / steps,
        operations_of_torch=None if context.on_gpu else found.operations / steps,
    )
    what = f"{model}, {streams_of(count)}: "
    if context.on_gpu and not found.kernels:
        raise RuntimeError("the profiler has seen no kernel: does this container allow it to look at the device?")
    context.target(what + "share of the time in which the device waits for the host", found.late_share, at_most=WANTED)
    context.target(what + "synchronisations per step", waits / steps, at_most=0)
    context.target(what + "copies to the device per step", found.to_device / steps, at_most=1)
    context.target(what + "copies to the host per step", found.to_host / steps, at_most=1)


def _run(local: LocalEngine, steps: int) -> None:
    for _ in range(steps):
        local.step()
    synchronize(local)


def _synchronisations(context: Context, local: LocalEngine, steps: int) -> int:
    """As torch counts them, where it can; they are in its operations, not in waiting for an event."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if context.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                local.step()
        finally:
            if context.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONIZES in str(warning.message) for warning in told)


def memory(context: Context) -> Iterator[Part]:
    """What an engine of the 8B shape takes, and what of that its graphs take."""
    yield Part("8B shape", partial(_memory, context))


def _memory(context: Context) -> None:
    prompt, counts, longest = (16, (2,), 64) if context.dry_run else (16, BUCKETS, LONGEST)
    with dummy_engine(context, "8B", max(256 * 64, longest), max_model_len=longest) as local:
        loaded = local.engine.loaded
        made, beside = _reserved(context), _outside(context)
        for count in counts:  # whatever is recorded for sizes of steps is recorded now
            with decoding(
                local, prompts(count, prompt, loaded.model.shape.vocab_size), 40, context.streams_s
            ) as running:
                measure(local, running, 2, context.streams_s)
            synchronize(local)
            local.engine.runner.profile(count, 1, longest)  # and for sequences of any length
        outside = _outside(context) - beside
        cache = (loaded.num_blocks + loaded.scratch_blocks) * loaded.block_bytes
        context.row(
            "memory",
            model="8B shape",
            weights_GB=loaded.weights_bytes / 1e9,
            cache_GB=cache / 1e9,
            other_GB_after_loading=(made - loaded.weights_bytes - cache) / 1e9 if context.on_gpu else None,
            other_GB_after_steps=(_reserved(context) - loaded.weights_bytes - cache) / 1e9 if context.on_gpu else None,
        )
        decoder = loaded.model.decoder
        graphs = getattr(decoder.compute, "graphs", None) if decoder else None
        if graphs is not None and graphs.refused:
            context.check("steps are recorded as graphs", False, graphs.refused, "no error")
        if not graphs:
            raise NotThere("graphs: this engine has recorded none")
        context.row(
            "graphs",
            model="8B shape",
            recorded=len(graphs),
            GB=graphs.num_bytes / 1e9,
            GB_of_the_driver=outside / 1e9 if context.on_gpu else None,
        )
        context.target("8B shape: bytes of graphs", graphs.num_bytes + outside, at_most=WANTED_GRAPH_BYTES)


def _reserved(context: Context) -> int:
    return torch.cuda.memory_reserved() if context.on_gpu else 0


def _outside(context: Context) -> int:
    """What is taken of the device besides what torch's allocator has: graphs themselves, and kernels."""
    if not context.on_gpu:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
