"""Log-probabilities: of a token, its rank, and the most likely ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slipstream.kernels.reference import NEVER
from slipstream.kernels.triton import launch, sampling
from slipstream.kernels.triton.logprobs import log_probabilities

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
SEVERAL_CHUNKS = 2 * sampling.CHUNK + 100


@settings(max_examples=12)
@given(
    rows=st.integers(1, 3),
    vocab=st.integers(1, 60) | st.sampled_from([sampling.CHUNK, SEVERAL_CHUNKS]),
    count=st.sampled_from([0, 1, 5, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_they_are_those_of_a_softmax(
    rows: int, vocab: int, count: int, dtype: torch.dtype, index: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab + 5, generator=generator)[:, :vocab] * 8).to(DEVICE, dtype)
    logits[:, 1:3] = NEVER
    tokens = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE, index)
    logprobs, ranks, top_tokens, top_logprobs = log_probabilities(logits, tokens, count)
    expected = logits.double().log_softmax(-1)
    chosen = tokens.long()[:, None]
    torch.testing.assert_close(logprobs.double(), expected.gather(1, chosen)[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((logits > logits.gather(1, chosen)).sum(-1) + 1).tolist()
    best = expected.sort(dim=-1, descending=True, stable=True)
    there = min(count, vocab)
    assert top_tokens[:, :there].tolist() == best.indices[:, :there].tolist()
    torch.testing.assert_close(top_logprobs[:, :there].double(), best.values[:, :there], rtol=1e-5, atol=1e-5)
    assert (top_tokens[:, there:] == -1).all() and (top_logprobs[:, there:] == NEVER).all()
    alone = log_probabilities(logits[-1:], tokens[-1:], count)
    for found, together in zip(alone, (logprobs, ranks, top_tokens, top_logprobs), strict=True):
        assert torch.equal(found[0], together[-1])


def test_broken_rows_have_none_and_rows_without_a_token_have_no_rank() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 3], logits[1, :], logits[2, 7] = float("nan"), NEVER, float("inf")
    tokens = torch.tensor([1, 1, 1, -1, 4], device=DEVICE)
    logprobs, ranks, _, top_logprobs = log_probabilities(logits, tokens, 3)
    assert logprobs[:3].isnan().all() and top_logprobs[:3].isnan().all()
    assert logprobs[3] == NEVER and ranks[3] == 0
    torch.testing.assert_close(top_logprobs[3:], logits[3:].log_softmax(-1).topk(3).values, rtol=1e-5, atol=1e-5)
    assert logprobs[4] == pytest.approx(float(logits[4].log_softmax(-1)[4]), abs=1e-5)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="33 log-probabilities"):
        log_probabilities(torch.ones(1, 4, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE), 33)
