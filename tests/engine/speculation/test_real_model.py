"""Deterministic mode on the default model: greedy output is the same with every drafter, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing import LocalEngine, OracleDrafter
from slipstream.kernels.native.library import isa

LENGTH = 128


def run(
    prompts: list[list[int]], dtype: str, speculation: str, at_once: int, oracle: OracleDrafter | None = None
) -> tuple[list[list[int]], int]:
    """Tokens of each answer, and how many guesses were right."""
    config = EngineConfig(
        dtype=dtype,  # type: ignore[arg-type]
        deterministic=True,
        speculation=speculation,
        speculation_policy="fixed",
        max_draft_tokens=5,
        max_running=at_once,
        drafter="random",
        kv_cache_memory="1GiB",
    )
    drafters = [oracle] if oracle else make_drafters(config)
    local = LocalEngine(config, drafters)
    done = local.generate(prompts, SamplingParams(max_tokens=LENGTH, temperature=0.0))
    right = sum(delta.num_accepted for completion in done for delta in completion.deltas)
    return [completion.tokens for completion in done], right


@pytest.mark.slow
@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_greedy_output_does_not_depend_on_speculation(
    dtype: str, real_prompts: Callable[[int], list[list[int]]]
) -> None:
    prompts = real_prompts(100)
    expected, _ = run(prompts, dtype, "off", 16)
    answers = {tuple(prompt): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
    for at_once in (16, 1):
        assert run(prompts, dtype, "off", at_once)[0] == expected
        for speculation in ("ngram", "suffix", "head", "auto"):
            tokens, right = run(prompts, dtype, speculation, at_once)
            assert tokens == expected
            assert right > (500 if speculation in ("ngram", "auto") else -1)
        tokens, right = run(prompts, dtype, "auto", at_once, OracleDrafter(answers, 0.7))
        assert tokens == expected
        assert right > 5000
