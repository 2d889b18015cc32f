"""Tokens per second of the engine with the sizes of known models, whose weights say nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.loader import available_memory
from slipstream.engine.testing.local import LocalEngine
from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, NotThere, Part, streams_of
from slipstream.server.gpu_check.engines import WARM_UP, config, decoding, engine, measure, prompts
from slipstream.server.gpu_check.kernels import copied_per_s

STREAMS = (1, 8, 32, 64, 128, 256)
PROMPT, STEPS = 128, 64
LONG_PROMPT, LONG_ANSWER = 1024, 1024
SPARE_BYTES = 4 << 30
"""Memory of the device that is left for activations and graphs."""
WANTED_SHARE = 0.8
FEW_BITS: dict[str, dict[str, Any]] = {
    "numbers": {},
    "a cache in int8": {"kv_cache_dtype": "int8"},
    "a cache in fp8": {"kv_cache_dtype": "fp8"},
    "weights in 8 bits": {"quantize": "q8"},
    "weights in 4 bits": {"quantize": "q4"},
}


def streams(context: Context) -> tuple[int, ...]:
    return (1, 3) if context.dry_run else STREAMS


def sizes(context: Context) -> tuple[int, int]:
    """Tokens of a prompt, and steps that are measured."""
    return (20, 8) if context.dry_run else (PROMPT, STEPS)


@contextmanager
def dummy_engine(context: Context, name: str, tokens: int, **options: Any) -> Iterator[LocalEngine]:
    """An engine with the weights of a dummy, and a cache for so many tokens or as many as there is room for.

    Raises NotThere where there is not even room for the weights.
    """
    shape = models.shape(context, name)
    path = models.folder(context, name, shape)
    if context.on_gpu:
        wanted = tokens * models.kv_bytes(shape, 2)
        room = available_memory(context.device) - models.weights_bytes(shape, 2) - SPARE_BYTES
        options |= {"dtype": "bfloat16", "kv_cache_memory": str(max(min(wanted, room), 0))}
    with ExitStack() as stack:
        asked = {"load_format": "dummy", "max_running": max(STREAMS)} | options
        try:
            local = stack.enter_context(engine(config(context, path, **asked)))
        except ModelError as error:
            raise NotThere(f"room for the {name} shape: {error}") from None
        yield local


def of_shape(name: str, context: Context) -> Iterator[Part]:
    prompt, steps = sizes(context)
    counts = streams(context)
    long = (30, 12) if context.dry_run else (LONG_PROMPT, LONG_ANSWER)
    longest = max(prompt + steps + 2 * WARM_UP, sum(long)) + 2
    most = max(counts[-1] * sum(long), 1)
    copied_per_s(context)  # while there is memory for it
    with dummy_engine(context, name, most, max_model_len=longest) as local:
        for count in counts:
            yield Part(f"{streams_of(count)}", partial(_measure, context, name, local, count, prompt, steps))
        yield Part(f"{streams_of(counts[-1])}, whole answers", partial(_whole, context, name, local, counts[-1], *long))


def _measure(context: Context, name: str, local: LocalEngine, count: int, prompt: int, steps: int) -> None:
    shape = models.shape(context, name)
    texts = prompts(count, prompt, shape["vocab_size"], count)
    with decoding(local, texts, steps + 2 * WARM_UP, context.streams_s) as running:
        speed = measure(local, running, steps, context.streams_s)
    itemsize = 2 if context.on_gpu else 4
    read = models.weights_bytes(shape, itemsize) + count * prompt * models.kv_bytes(shape, itemsize)
    share = read / copied_per_s(context) / (speed.seconds / speed.steps)
    context.keep(f"{name}, {streams_of(count)}", speed.tokens_per_s)
    context.row(
        "decoding",
        program="slipstream",
        model=f"{name} shape",
        streams=count,
        prompt=prompt,
        tokens_per_s=speed.tokens_per_s,
        ms_per_step=speed.step_ms,
        of_the_copy=share,
    )
    if name == "8B" and count == 1:
        what = "8B shape, 1 stream: share of the bandwidth of a copy at which weights are read"
        context.target(what, share, at_least=WANTED_SHARE)


def few_bits(context: Context) -> Iterator[Part]:
    """What weights and caches of few bits bring."""
    for name in FEW_BITS:
        yield Part(f"8B shape, {name}", partial(_few_bits, context, name))


def _few_bits(context: Context, kept: str) -> None:
    vocab = models.shape(context, "8B")["vocab_size"]
    prompt, steps = (20, 8) if context.dry_run else (LONG_PROMPT, STEPS)
    counts = (1, 3) if context.dry_run else (1, 32)
    longest = prompt + steps + 2 * WARM_UP + 2
    with ExitStack() as stack:
        try:
            made = dummy_engine(context, "8B", counts[-1] * longest, max_model_len=longest, **FEW_BITS[kept])
            local = stack.enter_context(made)
        except ConfigError as error:
            raise NotThere(str(error)) from None
        for count in counts:
            with decoding(local, prompts(count, prompt, vocab), longest, context.streams_s) as running:
                speed = measure(local, running, steps, context.streams_s)
            context.row(
                "few bits",
                model="8B shape",
                kept=kept,
                weights_GB=local.engine.loaded.weights_bytes / 1e9,
                streams=count,
                prompt=prompt,
                tokens_per_s=speed.tokens_per_s,
                ms_per_step=speed.step_ms,
            )


def deterministic(context: Context) -> Iterator[Part]:
    """What the same bits in any batch cost."""
    yield Part("8B shape", partial(_deterministic, context))


def _deterministic(context: Context) -> None:
    name, count = "8B", 3 if context.dry_run else 32
    prompt, steps = sizes(context)
    longest = prompt + steps + 2 * WARM_UP + 2
    shape = models.shape(context, name)
    found: dict[bool, float] = {}
    for demanded in (True, False):
        try:
            made = dummy_engine(context, name, count * longest, max_model_len=longest, deterministic=demanded)
            with (
                made as local,
                decoding(local, prompts(count, prompt, shape["vocab_size"]), longest, context.streams_s) as running,
            ):
                found[demanded] = measure(local, running, steps, context.streams_s).tokens_per_s
        except ConfigError as error:
            raise NotThere(str(error)) from None
    context.row(
        "deterministic",
        model=f"{name} shape",
        streams=count,
        prompt=prompt,
        tokens_per_s=found[True],
        otherwise=found[False],
        costs=f"{1 - found[True] / found[False]:.0%}",
    )


def _whole(context: Context, name: str, local: LocalEngine, count: int, prompt: int, answer: int) -> None:
    """From the first prompt to the last token."""
    texts = prompts(count, prompt, models.shape(context, name)["vocab_size"], count)
    began = time.perf_counter()
    asked = [local.submit(text, SamplingParams(max_tokens=answer, temperature=0.0)) for text in texts]
    while local.engine.core.has_work:
        if context.left() < 0:
            done = sum(len(each.tokens) for each in asked)
            local.engine.scheduler.abort([each.request_id for each in asked])
            local.finish()
            raise TimeoutError(f"{done} of {count * answer} tokens were there when the stage's time was over")
        local.step()
    seconds = time.perf_counter() - began
    if wrong := [each.finish_reason for each in asked if len(each.tokens) != answer]:
        raise RuntimeError(f"{len(wrong)} answers are not {answer} tokens long, the first ended with {wrong[0]}")
    context.row(
        "whole requests",
        program="slipstream",
        model=f"{name} shape",
        streams=count,
        prompt=prompt,
        answer=answer,
        tokens_per_s=count * answer / seconds,
        seconds=seconds,
        preemptions=sum(each.num_preemptions for each in asked),
    )
    context.keep(f"{name}, whole", count * answer / seconds)
