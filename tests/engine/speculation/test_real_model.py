"""Deterministic mode on the default model: greedy output is the same with every drafter, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from slipstream.drafter import warm
from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import ResetPrefixCache, SwapDrafter
from slipstream.engine.speculation.oracles import OracleDrafter, TreeOracleDrafter
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import LocalEngine
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
    drafter: str = "random",
) -> tuple[list[list[int]], int]:
    """Tokens of each answer, and how many draft tokens were right."""
    config = EngineConfig(
        dtype=dtype,  # type: ignore[arg-type]
        deterministic=True,
        speculation=speculation,
        speculation_policy="fixed",
        max_draft_tokens=5,
        draft_width=width,
        max_running=at_once,
        drafter=drafter,
        draft_model="default" if speculation == "draft" else None,
        kv_cache_memory="1GiB",
    )
    drafters = [oracle] if oracle else make_drafters(config)
    local = LocalEngine(config, drafters)
    done = local.generate(prompts, SamplingParams(max_tokens=length, temperature=0.0))
    right = sum(delta.num_accepted for completion in done for delta in completion.deltas)
    return [completion.tokens for completion in done], right


@pytest.mark.usefixtures("quick_engines")
@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
def test_greedy_output_does_not_depend_on_trees(real_prompts: Callable[..., list[list[int]]]) -> None:
    """A short form of what follows."""
    prompts = real_prompts(4, longest=100)
    expected, _ = run(prompts, "bfloat16", "off", 4, length=40)
    answers = {tuple(prompt): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
    tokens, right = run(prompts, "bfloat16", "auto", 4, TreeOracleDrafter(answers, 0.9, VOCAB), 3, 40)
    assert tokens == expected
    assert right > 50
    assert run(prompts, "bfloat16", "head", 4, width=3, length=40)[0] == expected


PROMPTS = {16: 48, 1: 12}
"""How many prompts, by how many are answered at once: one after another takes five times as long for a token.

Any wrong token fails the test, so an error in one step of 200 is found in each form; that rows have the same bits in
any batch, which few tokens would show, is asked of logits by other tests (test_every_form.py).
"""


@pytest.fixture(scope="module")
def plain(real_prompts: Callable[..., list[list[int]]]) -> Callable[[str], tuple[list[list[int]], list[list[int]]]]:
    """Prompts and their answers without speculation, 16 at once, by data type."""

    @cache
    def plain(dtype: str) -> tuple[list[list[int]], list[list[int]]]:
        prompts = real_prompts(max(PROMPTS.values()))
        return prompts, run(prompts, dtype, "off", 16)[0]

    return plain


@pytest.mark.slow
@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize(
    ("speculation", "drafter", "width"),
    [
        ("off", "random", 1),
        ("ngram", "random", 1),
        ("suffix", "random", 1),
        ("head", "random", 1),
        ("head", "warm", 1),
        ("head", "warm", 3),
        ("draft", "random", 1),
        ("auto", "warm", 3),
        ("oracle", "random", 1),
        ("oracle", "random", 3),
    ],
)
@pytest.mark.parametrize("at_once", [16, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_greedy_output_does_not_depend_on_speculation(
    plain: Any, dtype: str, at_once: int, speculation: str, drafter: str, width: int
) -> None:
    prompts, expected = (known[: PROMPTS[at_once]] for known in plain(dtype))
    oracle: Drafter | None = None
    if speculation == "oracle":
        answers = {tuple(prompt): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
        oracle = OracleDrafter(answers, 0.7) if width == 1 else TreeOracleDrafter(answers, 0.9, VOCAB)
    policy = "auto" if oracle else speculation
    tokens, right = run(prompts, dtype, policy, at_once, oracle, width, drafter=drafter)
    assert tokens == expected
    least = {"off": 0, "suffix": 0, "ngram": 0.04, "auto": 0.04, "head": 0.23 if drafter == "warm" else 0}
    assert right >= least.get(speculation, 0.39) * len(prompts) * LENGTH


@pytest.mark.slow
@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize(
    ("speculation", "drafter", "width"),
    [
        ("ngram,suffix", "random", 1),
        ("head", "warm", 1),
        ("head", "warm", 3),
        ("draft", "random", 1),
        ("auto", "warm", 3),
        ("oracle", "random", 1),
        ("oracle", "random", 3),
    ],
)
def test_the_pipelined_loop_says_the_same_whatever_comes_and_goes(
    plain: Any, tmp_path: Path, speculation: str, drafter: str, width: int
) -> None:
    """Arrivals, aborts, preemptions for lack of blocks, swaps, a prefix cache that is emptied."""
    known = list(zip(*plain("bfloat16"), strict=True))
    answers = {tuple(prompt): tokens for prompt, tokens in known}
    oracle = OracleDrafter(answers, 0.7) if width == 1 else TreeOracleDrafter(answers, 0.9, VOCAB)
    config = EngineConfig(
        dtype="bfloat16",
        deterministic=True,
        pipeline="on",
        speculation="auto" if speculation == "oracle" else speculation,
        speculation_policy="fixed",
        max_draft_tokens=4,
        draft_width=width,
        max_running=6,
        max_model_len=640,
        drafter=drafter,
        draft_model="default" if speculation == "draft" else None,
        kv_cache_memory="24MiB",
    )
    head, tensors = warm.read(EngineConfig())
    folders = [tmp_path / str(version) for version in (2, 3)]
    for folder in folders:
        layout.write(folder, head, tensors)
    local = LocalEngine(config, [oracle] if speculation == "oracle" else make_drafters(config))
    rng, open_requests, swaps = Random(0), {}, list[Future[Any]]()
    for prompt, expected in known[:40]:
        most = rng.randrange(20, LENGTH)
        done = local.submit(prompt, SamplingParams(max_tokens=most, temperature=0.0), priority=rng.choice([0, 0, -1]))
        open_requests[done.request_id] = (done, expected[:most])
        for _ in range(rng.randrange(12)):
            local.step()
        match rng.randrange(8):
            case 0:
                local.engine.scheduler.abort([rng.choice(list(open_requests))])
            case 1:
                local.engine.operate(ResetPrefixCache())
            case 2 if drafter == "warm":
                version = rng.randrange(2)
                swaps.append(local.engine.operate(SwapDrafter(version + 2, "", str(folders[version]))))
    while not all(swap.done() for swap in swaps):
        local.step() if local.engine.core.has_work else local.engine.poll()
    local.finish()
    aborted = 0
    for done, expected in open_requests.values():
        aborted += done.finish_reason == "abort"
        assert done.tokens == (expected[: len(done.tokens)] if done.finish_reason == "abort" else expected)
    right = sum(delta.num_accepted for done, _ in open_requests.values() for delta in done.deltas)
    print(f"{right} accepted, {aborted} aborted, {local.stats.preemptions} preemptions, {len(swaps)} swaps")
    assert aborted and local.stats.preemptions and (right > 100 or speculation == "draft")
    local.close()
