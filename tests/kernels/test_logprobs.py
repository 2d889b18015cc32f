"""Log-probabilities on the CPU: of a token, its rank, and the most likely ones, by every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.runner.sampler import most_likely
from slipstream.kernels import ops

NEVER = float("-inf")


@pytest.mark.parametrize("count", [0, 1, 5, 20, 200])
@pytest.mark.parametrize("vocab", [1, 7, 16, 50, 1000, 4099])
def test_they_are_those_of_a_softmax(isa: str, vocab: int, count: int) -> None:
    generator = torch.Generator().manual_seed(vocab + count)
    logits = torch.randn(3, vocab, generator=generator) * 8
    logits[:, 1:3] = NEVER
    tokens = torch.randint(0, vocab, (3,), generator=generator)
    expected, chosen, there = logits.double().log_softmax(-1), tokens[:, None], min(count, vocab)
    best = expected.sort(dim=-1, descending=True, stable=True)
    for backend in ops.backend_names():
        with ops.use_backend(backend):
            logprobs, ranks, top_tokens, top_logprobs = ops.log_probabilities(logits, tokens, count)
            alone = ops.log_probabilities(logits[-1:], tokens[-1:], count)
        torch.testing.assert_close(logprobs.double(), expected.gather(1, chosen)[:, 0], rtol=1e-5, atol=1e-5)
        assert ranks.tolist() == ((logits > logits.gather(1, chosen)).sum(-1) + 1).tolist()
        torch.testing.assert_close(top_logprobs[:, :there].double(), best.values[:, :there], rtol=1e-5, atol=1e-5)
        finite = best.values[:, :there] > NEVER
        assert top_tokens[:, :there][finite].tolist() == best.indices[:, :there][finite].tolist()
        assert (top_tokens[:, there:] == -1).all() and (top_logprobs[:, there:] == NEVER).all()
        for found, together in zip(alone, (logprobs, ranks, top_tokens, top_logprobs), strict=True):
            assert torch.equal(found[0], together[-1])


@given(
    st.lists(st.integers(-3, 3) | st.just(NEVER), min_size=1, max_size=70).filter(lambda row: max(row) > NEVER),
    st.integers(1, 9),
)
def test_of_equals_the_first_comes_first(row: list[float], count: int) -> None:
    with ops.use_backend("native" if "native" in ops.backend_names() else "reference"):
        _, _, tokens, _ = ops.log_probabilities(torch.tensor([row], dtype=torch.float32), torch.tensor([0]), count)
    expected = sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    if "native" in ops.backend_names():
        assert tokens[0, : len(expected)].tolist() == expected
    assert [row[token] for token in tokens[0].tolist() if token >= 0] == [row[token] for token in expected]


def test_broken_rows_have_none_and_rows_without_a_token_have_no_rank(isa: str) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, :], logits[2, 39] = float("nan"), NEVER, float("inf")
    tokens = torch.tensor([1, 1, 1, -1, 4])
    for backend in ops.backend_names():
        with ops.use_backend(backend):
            logprobs, ranks, _, top_logprobs = ops.log_probabilities(logits, tokens, 3)
        assert logprobs[:3].isnan().all() and top_logprobs[:3].isnan().all()
        assert ranks.tolist()[:4] == [1, 1, 1, 0] and logprobs[3] == NEVER
        torch.testing.assert_close(top_logprobs[3:], logits[3:].log_softmax(-1).topk(3).values, rtol=1e-5, atol=1e-5)
        assert logprobs[4] == pytest.approx(float(logits[4].log_softmax(-1)[4]), abs=1e-5)


def test_the_most_likely_tokens_for_listeners_are_as_exact_as_they_are_kept() -> None:
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * 5
    tokens, logprobs = most_likely(logits, 8)
    best = logits.log_softmax(-1).topk(8)
    assert tokens.dtype is torch.int32 and tokens.tolist() == best.indices.tolist()
    assert logprobs.dtype is torch.float16
    torch.testing.assert_close(logprobs.float(), best.values, rtol=1e-3, atol=1e-3)
    assert most_likely(logits[:, :3], 8)[0].shape == (4, 3)
