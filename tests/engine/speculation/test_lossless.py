"""Output does not depend on speculation: token for token for a given seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.speculation.oracles import OracleDrafter, TreeOracleDrafter
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels.native.library import isa

Engine = Callable[..., LocalEngine]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.2},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {1: 2.0, 5: -3.0}},
    "allowed": {"allowed_token_ids": (0, 2, 3, 7)},
    "bad_words": {"bad_words": ((1, 2), (4,))},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": (3, 6)},
    "stop": {"stop_token_ids": (6,)},
}


def drafters() -> list[Drafter]:
    return [NGramDrafter(), SuffixDrafter(10_000)]


PROMPTS = [[1, 2, 3, 1, 2], [5, 6, 7, 0], [4, 4, 4], [0, 1, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize("kind", list(PARAMS))
def test_tokens_logprobs_and_ends_are_those_without_speculation(engine: Engine, kind: str) -> None:
    check_without_speculation(engine, kind)


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize(("arithmetic", "kind"), [("exact", "temperature"), ("int8", "greedy"), ("int8", "penalties")])
def test_so_they_are_with_packed_weights(engine: Engine, packed: Path, arithmetic: str, kind: str) -> None:
    form = {"model": str(packed), "weights": "packed", "packed_arithmetic": arithmetic}
    check_without_speculation(partial(engine, **form), kind)


def check_without_speculation(engine: Engine, kind: str) -> None:
    jobs = [
        (prompt, SamplingParams(**({"max_tokens": 40, "logprobs": 2, "seed": 7} | PARAMS[kind]))) for prompt in PROMPTS
    ]

    def run(local: LocalEngine) -> list[Any]:
        completions = [local.submit(prompt, params) for prompt, params in jobs for _ in range(4)]
        local.finish()
        return completions

    plain = run(engine())
    answers = {tuple(prompt): done.tokens for (prompt, _), done in zip(jobs, plain[::4], strict=True)}
    oracle, trees = OracleDrafter(answers, 0.8), TreeOracleDrafter(answers, 0.9, 8)
    for chosen, fields in (
        ([oracle], {}),
        ([oracle, *drafters(), HeadDrafter(random_head)], {}),
        ([trees], {"draft_width": 2, "max_draft_tokens": 7}),
        ([trees, *drafters(), HeadDrafter(random_head, width=3)], {"draft_width": 3, "max_running": 3}),
    ):
        for cache in ("16MiB", "64KiB"):  # the second is too small for all of them at once
            local = engine(chosen, kv_cache_memory=cache, prefix_caching=cache == "16MiB", **fields)
            moved = watch_moves(local)
            for once, again in zip(plain, run(local), strict=True):
                assert again.tokens == once.tokens
                assert again.finish_reason == once.finish_reason
                # The compiled kernels give a row the same bits in any batch; torch's do not.
                exact = local.engine.ready().kernels.startswith("native")
                assert logprobs(again) == (logprobs(once) if exact else pytest.approx(logprobs(once), abs=1e-4))
            accepted = sum(delta.num_accepted for done in local.completions.values() for delta in done.deltas)
            assert accepted > 20, "draft tokens have to be right for this test to say anything"
            assert moved or chosen != [trees], "branches have to be right for this test to say anything"
            if cache == "64KiB" and "stop_token_ids" not in PARAMS[kind] and "max_running" not in fields:
                assert local.stats.preemptions, "the cache has to be too small for this test to say anything"


def test_more_branches_than_there_are_blocks_for(engine: Engine) -> None:
    """Every request gets some of them, and the others are not offered."""
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3)
    prompts = [[a, b] for a in range(8) for b in range(5)]
    plain = engine().generate(prompts, params)
    answers = {tuple(prompt): done.tokens for prompt, done in zip(prompts, plain, strict=True)}
    local = engine([TreeOracleDrafter(answers, 0.9, 8)], draft_width=2, max_draft_tokens=7)
    moved = watch_moves(local)
    for once, again in zip(plain, local.generate(prompts, params), strict=True):
        assert again.tokens == once.tokens
    assert len(moved) > 100


def watch_moves(local: LocalEngine) -> list[tuple[int, int]]:
    """Cells of accepted draft tokens on branches, which are copied."""
    cache, moved = local.engine.runner.cache, list[tuple[int, int]]()
    copy = cache.copy_cells

    def watch(pairs: Sequence[tuple[int, int]]) -> None:
        moved.extend(pairs)
        copy(pairs)

    cache.copy_cells = watch  # type: ignore[method-assign]
    return moved


def logprobs(completion: Any) -> list[float]:
    entries = [entry for delta in completion.deltas for entry in delta.logprobs]
    return [value for entry in entries for value in (entry.token, entry.rank, entry.logprob, *sum(entry.top, ()))]


def test_a_request_chooses_its_drafters(engine: Engine) -> None:
    local = engine(drafters())
    prompt = [1, 2, 3] * 10

    def drafted(speculation: SpeculationParams) -> list[int]:
        params = SamplingParams(max_tokens=30, temperature=0.0)
        done = local.submit(prompt, params, speculation=speculation)
        local.finish()
        return [delta.num_drafted for delta in done.deltas]

    assert max(drafted(SpeculationParams())) == 4
    assert max(drafted(SpeculationParams(max_draft_tokens=1))) == 1
    assert max(drafted(SpeculationParams("off"))) == 0
    before = {stats.name: stats.drafts for stats in local.stats.drafters}
    drafted(SpeculationParams("ngram"))
    after = {stats.name: stats.drafts for stats in local.stats.drafters}
    assert after["ngram"] > before["ngram"] and after["suffix"] == before["suffix"]


def random_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 8)
    return FirstHead(config, layout.random_tensors(config, 0))
