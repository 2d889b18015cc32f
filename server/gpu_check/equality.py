"""The whole engine: the same tokens however requests are computed.

In float32, where roundings leave the most likely token alone, so that a difference is a fault. In bfloat16 two tokens
may be so close that the order of additions decides; how often they do is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FinishTargetUpdate,
    MemoryTag,
    Operation,
    ReadTarget,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, NotThere, Part
from slipstream.server.gpu_check.engines import config, engine, load_loras, prompts

SMALL = models.SHAPES["1B"] | {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 2816}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8192}
HEAD = {"speculation": "head", "drafter": "cold", "speculation_policy": "fixed"}
PREEMPTING = "no room for all"
VARIANTS: dict[str, dict[str, Any]] = {
    "in a batch": {},
    "in chunks": {"max_step_tokens": 16},
    "planned ahead": {"pipeline": "on"},
    "without graphs": {"graph_memory": "0"},
    "with cached beginnings": {"prefix_caching": True},
    "preempted": {"kv_cache_memory": PREEMPTING},
    "by the reference on the CPU": {"device": "cpu", "kernels": "torch"},
    "with lookups": {"speculation": "ngram,suffix", "speculation_policy": "fixed"},
    "with a head": HEAD,
    "with a head's trees": HEAD | {"draft_width": 2},
    "with a head, in chunks, planned ahead": HEAD | {"max_step_tokens": 16, "pipeline": "on"},
}
"""What is changed of an engine that computes all requests together, by what that is to prove."""
EXACT = {"packed_arithmetic": "exact"}
KEPT: dict[str, dict[str, Any]] = {
    "a cache in int8": {"kv_cache_dtype": "int8"},
    "a cache in fp8": {"kv_cache_dtype": "fp8"},
    "weights in 8 bits": EXACT | {"quantize": "q8"},
    "weights in 4 bits, a cache in int8": EXACT | {"quantize": "q4", "kv_cache_dtype": "int8"},
}
"""How keys, values and weights are kept in few bits; answers are compared with those of engines that keep them so."""
KEPT_VARIANTS = ("with a head's trees", "with a head, in chunks, planned ahead")
ROUNDED = ("in a batch", "in chunks")
"""Variants that are also tried in bfloat16, and in it where results must not depend on the batch."""
REQUESTS, PROMPT = 8, 45
LORAS = ("a", "", "b")
"""What requests have in turn: a LoRA, or none."""


def parts(context: Context) -> Iterator[Part]:
    compare = Comparison(context)
    for name, options in VARIANTS.items():
        yield Part(name, partial(compare.judge, name, options, "float32"))
    for name, operations in compare.changes.items():
        for head in ({}, HEAD):
            what = f"{name}, with a head" if head else name
            yield Part(what, partial(compare.judge, what, head, "float32", operations=operations))
    for name in ROUNDED:
        yield Part(f"{name}, bfloat16", partial(compare.judge, name, VARIANTS[name], "bfloat16"))
        yield Part(f"{name}, with LoRAs", partial(compare.judge, name, VARIANTS[name], "float32", LORAS))
        exact = VARIANTS[name] | {"deterministic": True}
        yield Part(f"{name}, deterministic", partial(compare.judge, f"{name}, deterministic", exact, "bfloat16"))
    for kept in KEPT:
        for name in KEPT_VARIANTS:
            yield Part(f"{name}, {kept}", partial(compare.judge, name, VARIANTS[name], "float32", kept=kept))
        if "4 bits" not in kept:  # whose scales may be others, as sums over a block are in another order
            cpu = {"device": "cpu", "kernels": "native" if "quantize" in KEPT[kept] else "torch"}
            yield Part(f"on the CPU, {kept}", partial(compare.judge, "on the CPU", cpu, "float32", kept=kept))
        else:  # blocks are made again, and then lie in the host's memory
            both = (*compare.changes["after an update"], *compare.changes["after sleep"])
            name = "after an update and sleep"
            yield Part(f"{name}, {kept}", partial(compare.judge, name, HEAD, "float32", operations=both, kept=kept))


class Comparison:
    """One model, the same requests each time: greedy ones and sampled ones, of which some begin alike."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config = models.TINY if context.dry_run else SMALL
        self._model = models.lively(context, "lively", self._config)
        self._tokens = 24 if context.dry_run else 64
        texts = prompts(REQUESTS, PROMPT, self._config["vocab_size"])
        begun = [texts[0][:32] + text[:5] for text in texts[:2]]
        repeated = [text[:15] * 3 for text in texts[2:4]]
        self._texts = [*begun, *repeated, *texts[4:]]
        self._alone = cache(self._compute_alone)

    @property
    def changes(self) -> dict[str, tuple[Operation[Any], ...]]:
        """What leaves an engine with the weights that it had, somewhere else: whatever was recorded of them is old."""
        both: tuple[MemoryTag, ...] = ("kv_cache", "weights")
        return {
            "after an update": (BeginTargetUpdate(1), ReadTarget(1, str(self._model)), FinishTargetUpdate(1)),
            "after sleep": (ReleaseMemory(both), ResumeMemory(both)),
            "after sleep without weights": (ReleaseMemory(both, keep_weights=False), ResumeMemory(both)),
        }

    def judge(
        self,
        name: str,
        options: dict[str, Any],
        dtype: str,
        loras: tuple[str, ...] = ("",),
        operations: tuple[Operation[Any], ...] = (),
        kept: str = "",
    ) -> None:
        """``kept``: a name of ``KEPT``, if anything is kept in few bits."""
        alone, invariant = self._alone(dtype, bool(options.get("deterministic")), loras, kept)
        with self._engine(KEPT.get(kept, {}) | options, dtype, loras) as local:
            if operations:
                for i in range(len(self._texts)):
                    self._submit(local, i, loras)
                local.finish()
                local.operate(*operations)
            together = [self._submit(local, i, loras) for i in range(len(self._texts))]
            local.finish()
        if kept:
            name += f", {kept}"
        if any(loras):
            name += ", with LoRAs"
            plain = self._alone(dtype, False, ("",), "")[0]
            changed = sum(one != other for one, other in zip(alone, plain, strict=True))
            self._context.check(f"other tokens {name}", changed > 0, f"{changed} answers", "some")
        equal = [self._same(one, other) for one, other in zip(alone, together, strict=True)]
        right = sum(length == len(one) for length, one in zip(equal, alone, strict=True))
        drafted, accepted = (sum(getattr(delta, each) for c in together for delta in c.deltas) for each in COUNTED)
        preempted = sum(completion.num_preemptions for completion in together)
        self._context.row(
            "answers as when computed alone",
            computed=name,
            dtype=dtype,
            equal=f"{right} of {len(alone)}",
            tokens_until_one_differs=None if right == len(alone) else min(equal),
            verified=drafted or None,
            accepted=accepted or None,
        )
        if dtype == "float32" or invariant:
            self._context.check(
                f"the same tokens {name}, {dtype}", right == len(alone), f"{right} of {len(alone)} answers", "all"
            )
        if options.get("kv_cache_memory"):
            self._context.check("a request was preempted", preempted > 0, f"{preempted} times", "once at least")
        if "speculation" in options:
            self._context.check(f"draft tokens were accepted {name}", accepted > 0, f"{accepted} of {drafted}", "some")

    def _compute_alone(
        self, dtype: str, deterministic: bool, loras: tuple[str, ...], kept: str
    ) -> tuple[list[list[int]], bool]:
        """Answers, and whether this engine promises the same bits in any batch."""
        with ExitStack() as stack:
            try:
                options = KEPT.get(kept, {}) | {"deterministic": deterministic}
                local = stack.enter_context(self._engine(options, dtype, loras))
            except ConfigError as error:
                raise NotThere(str(error)) from None
            found = []
            for i in range(len(self._texts)):
                found.append(self._submit(local, i, loras))
                local.finish()
            decoder = local.engine.loaded.model.decoder
            return [each.tokens for each in found], decoder is not None and decoder.compute.is_batch_invariant

    @contextmanager
    def _engine(self, options: dict[str, Any], dtype: str, loras: tuple[str, ...]) -> Iterator[LocalEngine]:
        with engine(self._engine_config(options, dtype)) as local:
            load_loras(self._context, local, [name for name in loras if name], size=0.2)
            yield local

    def _submit(self, local: LocalEngine, number: int, loras: tuple[str, ...]) -> Completion:
        adapter = loras[number % len(loras)]
        return local.submit(self._texts[number], self._params(number), adapter=adapter)

    def _params(self, number: int) -> SamplingParams:
        return SamplingParams(max_tokens=self._tokens, temperature=0.0 if number % 2 == 0 else 0.8, seed=number)

    def _engine_config(self, options: dict[str, Any], dtype: str) -> Any:
        room = "16MiB" if self._context.dry_run else "1GiB"
        changed = {"max_step_tokens": 4096, "pipeline": "off", "max_model_len": 128, "kv_cache_memory": room} | options
        if changed["kv_cache_memory"] == PREEMPTING:  # two sequences of the longest kind, and a half
            changed["kv_cache_memory"] = str(320 * models.kv_bytes(self._config, 4))
        return config(
            self._context, self._model, dtype=dtype, **{"threads": 1 if self._context.dry_run else 0} | changed
        )

    @staticmethod
    def _same(expected: Sequence[int], found: Completion) -> int:
        """Tokens before the first that differs."""
        pairs = zip(expected, found.tokens, strict=False)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), len(found.tokens))


COUNTED = ("num_drafted", "num_accepted")
