"""Output does not depend on speculation: token for token for a given seed, and in law over seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from scipy.stats import chi2_contingency
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.speculation.tree import Tree, branches
from slipstream.engine.testing import LocalEngine, OracleDrafter, TreeOracleDrafter

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    # Large weights, so that the next token depends on those before it.
    tensors = {name: tensor * (20 if tensor.ndim == 2 else 1) for name, tensor in dummy_tensors(CONFIG, 0)}
    save_file(tensors, path / "model.safetensors")
    return path


def engine(folder: Path, drafters: Sequence[Drafter] = (), **fields: Any) -> LocalEngine:
    options = {"max_running": 128, "kv_cache_memory": "16MiB", "speculation_policy": "fixed", "max_draft_tokens": 4}
    options |= {"max_step_tokens": 16384, "step_latency_ms": 1000.0}
    return LocalEngine(EngineConfig(model=str(folder), dtype="float32", **(options | fields)), drafters)


def drafters() -> list[Drafter]:
    return [NGramDrafter(), SuffixDrafter(10_000)]


# Every pair of neighbours occurs, so that the n-gram drafter always has a guess.
PAIRS = [token for a in range(8) for b in range(a, 8) for token in (a, b)]
PROMPTS = [[1, 2, 3, 1, 2], [5, 6, 7, 0], [4, 4, 4], [0, 1, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize("kind", list(PARAMS))
def test_tokens_logprobs_and_ends_are_those_without_speculation(folder: Path, kind: str) -> None:
    jobs = [
        (prompt, SamplingParams(**({"max_tokens": 40, "logprobs": 2, "seed": 7} | PARAMS[kind]))) for prompt in PROMPTS
    ]

    def run(local: LocalEngine) -> list[Any]:
        completions = [local.submit(prompt, params) for prompt, params in jobs for _ in range(2)]
        local.finish()
        return completions

    plain = run(engine(folder))
    answers = {tuple(prompt): done.tokens for (prompt, _), done in zip(jobs, plain[::2], strict=True)}
    oracle, trees = OracleDrafter(answers, 0.8), TreeOracleDrafter(answers, 0.9, 8)
    for chosen, fields in (
        ([oracle], {}),
        ([oracle, *drafters(), HeadDrafter(random_head)], {}),
        ([trees], {"draft_width": 2, "max_draft_tokens": 7}),
        ([trees, *drafters(), HeadDrafter(random_head, width=3)], {"draft_width": 3, "max_running": 3}),
    ):
        for cache in ("16MiB", "64KiB"):  # the second is too small for all of them at once
            local = engine(folder, chosen, kv_cache_memory=cache, prefix_caching=cache == "16MiB", **fields)
            moved = watch_moves(local)
            for once, again in zip(plain, run(local), strict=True):
                assert again.tokens == once.tokens
                assert again.finish_reason == once.finish_reason
                # The compiled kernels give a row the same bits in any batch; torch's do not.
                exact = local.engine.ready().kernels.startswith("native")
                assert logprobs(again) == (logprobs(once) if exact else pytest.approx(logprobs(once), abs=1e-4))
            accepted = sum(delta.num_accepted for done in local.completions.values() for delta in done.deltas)
            assert accepted > 20, "guesses have to be right for this test to say anything"
            assert moved or chosen != [trees], "branches have to be right for this test to say anything"
            if cache == "64KiB" and "stop_token_ids" not in PARAMS[kind] and "max_running" not in fields:
                assert local.stats.preemptions, "the cache has to be too small for this test to say anything"


def watch_moves(local: LocalEngine) -> list[tuple[int, int]]:
    """Slots of right guesses on branches, which are copied."""
    cache, moved = local.engine.runner.cache, list[tuple[int, int]]()
    copy = cache.copy_slots

    def watch(pairs: Sequence[tuple[int, int]]) -> None:
        moved.extend(pairs)
        copy(pairs)

    cache.copy_slots = watch  # type: ignore[method-assign]
    return moved


def logprobs(completion: Any) -> list[float]:
    entries = [entry for delta in completion.deltas for entry in delta.logprobs]
    return [value for entry in entries for value in (entry.token, entry.rank, entry.logprob, *sum(entry.top, ()))]


def test_a_request_chooses_its_drafters(folder: Path) -> None:
    local = engine(folder, drafters())
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


def joint(local: LocalEngine, draws: int, first_seed: int, params: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """How often each run of the next three tokens came, over so many seeds."""
    counts: Counter[tuple[int, ...]] = Counter()
    for begin in range(0, draws, 128):
        completions = [
            local.submit(PAIRS, SamplingParams(**({"max_tokens": 3, "seed": first_seed + begin + i} | params)))
            for i in range(min(128, draws - begin))
        ]
        local.finish()
        counts.update(tuple(completion.tokens) for completion in completions)
    return counts


def p_value(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """Of the chi-square test that both come from one distribution; rare outcomes are taken together."""
    common = [key for key in a | b if a[key] + b[key] >= 20]
    table = np.array([[counts[key] for key in common] for counts in (a, b)])
    rest = np.array([[a.total()], [b.total()]]) - table.sum(1, keepdims=True)
    table = np.hstack([table, rest]) if rest.sum() >= 20 else table
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


KINDS = {
    "ngram": lambda: [NGramDrafter()],
    "suffix": lambda: [SuffixDrafter(10_000)],
    "head": lambda: [HeadDrafter(random_head, stop_below=0.0)],
    "oracle": lambda: [OracleDrafter({tuple(PAIRS): [1, 0, 1]}, 0.8)],
}


def random_head(target: DecoderConfig) -> tuple[layout.HeadConfig, dict[str, Tensor]]:
    config = layout.config_for(target, 8)
    return config, layout.random_tensors(config, 0)


right_nodes = Tree.right
LAWS = ("temperature", "top_p", "top_k", "min_p", "penalties", "logit_bias", "allowed")


def law(folder: Path, kind: str, name: str, draws: int) -> float:
    plain = joint(engine(folder, prefix_caching=True), draws, 1, PARAMS[name])
    guessing = engine(folder, KINDS[kind](), prefix_caching=True)
    speculated = joint(guessing, draws, 10_000_000, PARAMS[name])
    drafted = sum(stats.draft_tokens for stats in guessing.stats.drafters)
    assert drafted > draws / 10, "too little was guessed for this test to say anything"
    return p_value(plain, speculated)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["temperature", "penalties"])
def test_the_law_of_three_tokens_is_the_same(folder: Path, kind: str, name: str) -> None:
    assert law(folder, kind, name, 3000) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", LAWS)
def test_the_law_of_three_tokens_is_the_same_over_many_draws(folder: Path, kind: str, name: str) -> None:
    assert law(folder, kind, name, 200_000) > 1e-4


def keep_the_first_path(self: Tree, drawn: list[int]) -> list[int]:
    """A planted error: guesses are kept if they can come at all, as if that were enough."""
    return branches(self.parents)[0]


def keep_one_more(self: Tree, drawn: list[int]) -> list[int]:
    """A planted error: off by one, what follows the first wrong guess is kept too."""
    right = right_nodes(self, drawn)
    return right + [node for node in branches(self.parents)[0] if node > max(right, default=-1)][:1]


@pytest.mark.parametrize("mistake", [keep_the_first_path, keep_one_more])
def test_a_planted_error_is_found(folder: Path, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "right", mistake)
    assert law(folder, "oracle", "temperature", 3000) < 1e-6
