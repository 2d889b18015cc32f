"""Deterministic mode on the default model: greedy output is the same with every drafter, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing import LocalEngine, OracleDrafter, TreeOracleDrafter
from slipstream.kernels.native.library import isa

LENGTH = 128
VOCAB = 49152


def run(
    prompts: list[list[int]],
    dtype: str,
    speculation: str,
    at_once: int,
    oracle: Drafter | None = None,
    width: int = 1,
    length: int = LENGTH,
) -> tuple[list[list[int]], int]:
    """Tokens of each answer, and how many guesses were right."""
    config = EngineConfig(
        dtype=dtype,  # type: ignore[arg-type]
        deterministic=True,
        speculation=speculation,
        speculation_policy="fixed",
        max_draft_tokens=5,
        draft_width=width,
        max_running=at_once,
        drafter="random",
        kv_cache_memory="1GiB",
    )
    drafters = [oracle] if oracle else make_drafters(config)
    local = LocalEngine(config, drafters)
    done = local.generate(prompts, SamplingParams(max_tokens=length, temperature=0.0))
    right = sum(delta.num_accepted for completion in done for delta in completion.deltas)
    return [completion.tokens for completion in done], right


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
def test_greedy_output_does_not_depend_on_trees(real_prompts: Callable[[int], list[list[int]]]) -> None:
    """A short form of what follows."""
    prompts = real_prompts(4)
    expected, _ = run(prompts, "bfloat16", "off", 4, length=40)
    answers = {tuple(prompt): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
    tokens, right = run(prompts, "bfloat16", "auto", 4, TreeOracleDrafter(answers, 0.9, VOCAB), 3, 40)
    assert tokens == expected
    assert right > 50
    assert run(prompts, "bfloat16", "head", 4, width=3, length=40)[0] == expected


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
        for speculation, width in (("ngram", 1), ("suffix", 1), ("head", 1), ("head", 3), ("auto", 1), ("auto", 3)):
            tokens, right = run(prompts, dtype, speculation, at_once, width=width)
            assert tokens == expected
            assert right > (500 if speculation in ("ngram", "auto") else -1)
        for oracle, width in ((OracleDrafter(answers, 0.7), 1), (TreeOracleDrafter(answers, 0.9, VOCAB), 3)):
            tokens, right = run(prompts, dtype, "auto", at_once, oracle, width)
            assert tokens == expected
            assert right > 5000
