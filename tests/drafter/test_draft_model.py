"""A small model as drafter: it keeps up with the text whatever happened, and one that is the target is always right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.draft_model import MOST_AT_ONCE, MOST_PADDING
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.speculation.protocol import DraftRow, Proposal
from slipstream.engine.testing.gguf import write_gguf
from slipstream.engine.testing.local import LocalEngine, policy, write_policy
from slipstream.kernels.native.library import isa

TARGET = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    return write_policy(folder, policy(0, config, 8), config)


def engine(target: Path, draft: Path, **fields: Any) -> LocalEngine:
    options = {"dtype": "float32", "kv_cache_memory": "4MiB", "speculation_policy": "fixed", "max_draft_tokens": 4}
    config = EngineConfig(
        model=str(target), draft_model=str(draft), speculation="draft", max_running=4, **(options | fields)
    )
    return LocalEngine(config, make_drafters(config))


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
def test_a_drafter_that_torch_computes_beside_a_model_with_packed_weights(tmp_path: Path) -> None:
    target = write_gguf(tmp_path / "target.gguf", dict(dummy_tensors(TARGET, 0)), TARGET)
    draft = write(tmp_path / "draft", TARGET | {"hidden_size": 72})
    local = engine(target, draft, dtype="auto", weights="packed")
    [done] = local.generate([list(range(20))], SamplingParams(max_tokens=12, temperature=0.0))
    assert len(done.tokens) == 12 and sum(delta.num_drafted for delta in done.deltas)


def test_the_target_as_its_own_drafter_is_always_right(tmp_path: Path) -> None:
    """So its keys, values and positions are right too: in chunks, after pauses, across blocks and in a batch."""
    target = write(tmp_path / "target", TARGET)
    local = engine(target, target, max_step_tokens=64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, length).tolist() for length in (3, 30, 100)]
    params = SamplingParams(max_tokens=60, temperature=0.0)
    plain = [local.submit(prompt, params, speculation=SpeculationParams("off")) for prompt in prompts]
    local.finish()
    assert not any(delta.num_drafted for done in plain for delta in done.deltas)
    for done, before in zip(local.generate(prompts, params), plain, strict=True):
        assert done.tokens == before.tokens
        drafted = sum(delta.num_drafted for delta in done.deltas)
        accepted = sum(delta.num_accepted for delta in done.deltas)
        assert drafted > 35
        if isa() is not None:  # torch's kernels differ in their last bits between a batch and a single row
            assert accepted == drafted


@pytest.mark.parametrize("vocab_size", [80, 112])
@pytest.mark.parametrize("width", [1, 3])
def test_a_vocabulary_that_is_padded_to_another_size(tmp_path: Path, vocab_size: int, width: int) -> None:
    """As Qwen2.5's are. Tokens that the draft model lacks come in prompts and answers here, and harm nobody; what the
    target lacks is never proposed."""
    target = write(tmp_path / "target", TARGET)
    described, weights = TARGET | {"vocab_size": vocab_size}, policy(0, TARGET, 8)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        known = weights[name][:vocab_size]
        more = torch.randn(vocab_size - len(known), known.shape[1], generator=torch.Generator().manual_seed(1))
        weights[name] = torch.cat((known, 100 * more))  # what only it has would win nearly always
    draft = write_policy(tmp_path / "draft", weights, described)
    local = engine(target, draft, draft_width=width)
    prompts = [np.random.default_rng(length).integers(0, 96, length).tolist() for length in (3, 30, 100)]
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=3)
        plain = [local.submit(prompt, params, speculation=SpeculationParams("off")) for prompt in prompts]
        local.finish()
        drafted = local.generate(prompts, params)
        assert [done.tokens for done in drafted] == [done.tokens for done in plain]
        assert any(token >= 80 for done in plain for token in done.tokens)
        assert sum(delta.num_drafted for done in drafted for delta in done.deltas) > 40
        accepted = sum(delta.num_accepted for done in drafted for delta in done.deltas)
        assert accepted > (10 if vocab_size < 96 else 40), "where both know all tokens, it is the same model"
    local.close()


@pytest.mark.skipif(isa() is None, reason="torch's kernels differ in their last bits between batches")
def test_the_first_path_of_its_trees_is_always_right(tmp_path: Path) -> None:
    """With the target as its own drafter, so keys and values are right on branches that go on from others too."""
    target = write(tmp_path / "target", TARGET)
    local = engine(target, target, draft_width=3, max_draft_tokens=6)
    drafter = local.engine.runner.speculator._drafters["draft"]
    proposed: list[tuple[list[int], Proposal]] = []
    propose = drafter.propose

    def record(rows: Sequence[DraftRow]) -> list[Proposal | None]:
        proposals = propose(rows)
        for row, proposal in zip(rows, proposals, strict=True):
            assert proposal is not None
            proposed.append((row.known.tolist(), proposal))
        return proposals

    drafter.propose = record  # type: ignore[method-assign]
    prompts = [list(range(length)) for length in (3, 30)]
    done = local.generate(prompts, SamplingParams(max_tokens=60, temperature=0.0))
    texts = [prompt + completion.tokens for prompt, completion in zip(prompts, done, strict=True)]
    deepest = 0
    for known, proposal in proposed:
        text = next(text for text in texts if text[: len(known)] == known)
        node, depth = -1, 0
        while node in proposal.parents and len(known) + depth < len(text):
            node = proposal.parents.index(node)
            assert proposal.tokens[node] == text[len(known) + depth]
            depth += 1
        deepest = max(deepest, depth)
    assert deepest > 1
    assert any(len(set(proposal.parents)) < len(proposal.parents) for _, proposal in proposed)


def test_it_catches_up_with_a_long_prompt_over_several_steps(tmp_path: Path) -> None:
    target = write(tmp_path / "target", TARGET)
    local = engine(target, target)
    prompt = np.random.default_rng(0).integers(0, 96, 3 * MOST_AT_ONCE).tolist()
    done = local.generate([prompt], SamplingParams(max_tokens=40, temperature=0.0))[0]
    drafted = [delta.num_drafted for delta in done.deltas]
    assert drafted[:3] == [0, 0, 0] and max(drafted) > 1
    if isa() is not None:
        assert sum(drafted) == sum(delta.num_accepted for delta in done.deltas)


@pytest.mark.parametrize("cache", ["4MiB", "128KiB"])
def test_output_does_not_depend_on_another_model(tmp_path: Path, cache: str) -> None:
    target = write(tmp_path / "target", TARGET)
    draft = write(tmp_path / "draft", TARGET | {"num_hidden_layers": 1, "hidden_size": 32})
    prompts = [[1, 2, 3], list(range(40)), [5] * 20, [7, 8]]
    params = SamplingParams(max_tokens=50, temperature=0.9, seed=1)
    local = engine(target, draft, kv_cache_memory=cache)
    plain = LocalEngine(EngineConfig(model=str(target), dtype="float32", kv_cache_memory="4MiB"))
    for once, again in zip(plain.generate(prompts, params), local.generate(prompts, params), strict=True):
        assert again.tokens == once.tokens


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    target = write(tmp_path / "target", TARGET)
    draft = write(tmp_path / "draft", TARGET | {"vocab_size": 96 + MOST_PADDING + 1})
    with pytest.raises(ModelError, match="its vocabulary is 609, the model's 96"):
        engine(target, draft)
