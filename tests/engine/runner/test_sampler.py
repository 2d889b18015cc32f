"""Sampling parameters, each against its definition, and their independence of the rest of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.reported import LOWEST_LOGPROB
from slipstream.engine.runner.sampler import Sampled, SamplingColumns, cleared, restrict
from slipstream.engine.runner.sampler import sample as sample_batch
from slipstream.kernels import ops

VOCAB = 12


@dataclass(frozen=True)
class Row:
    """A request that samples its next token."""

    params: SamplingParams
    seed: int
    num_prompt: int
    history: list[int]


def row(prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 1, **params: Any) -> Row:
    prompt, output = prompt or [0], output or []
    return Row(SamplingParams(max_tokens=50, **params), seed, len(prompt), prompt + output)


def sample(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    """Through a table that holds them in reverse, as in the runner no row has its own number."""
    columns = SamplingColumns(len(rows))
    for slot, entry in enumerate(reversed(rows)):
        columns.enter(slot, entry.params, entry.seed, entry.num_prompt)
    slots = np.arange(len(rows), dtype=np.int32)[::-1]
    lengths = np.array([len(entry.history) for entry in rows], np.int32)
    batch = columns.take(slots, lengths, lambda i: np.array(rows[i].history, np.int32))
    return sample_batch(logits, batch).wait()[0]


def possible(logits: list[float] | torch.Tensor, samples: int = 400, **params: Any) -> set[int]:
    """Tokens that come up at high temperature among many samples."""
    params.setdefault("temperature", 5.0)
    rows = [row(seed=seed, **params) for seed in range(samples)]
    tensor = torch.as_tensor(logits, dtype=torch.float32).expand(samples, -1).contiguous()
    return set(sample(tensor, rows).tokens)


RISING = [float(i) / 4 for i in range(VOCAB)]


def test_temperature_zero_takes_the_most_likely() -> None:
    assert possible(RISING, temperature=0.0) == {VOCAB - 1}


def test_without_limits_everything_comes_up() -> None:
    assert possible(RISING) == set(range(VOCAB))


@pytest.mark.parametrize("k", [1, 3, VOCAB, 99])
def test_top_k(k: int) -> None:
    assert possible(RISING, top_k=k) == set(range(VOCAB)[-k:])


def test_top_p_keeps_the_smallest_set_with_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert possible(logits, temperature=1.0, top_p=0.79) == {0, 1}
    assert possible(logits, temperature=1.0, top_p=0.81) == {0, 1, 2}


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert possible(logits, temperature=1.0, min_p=0.29) == {0, 1, 2}


def test_allowed_tokens() -> None:
    assert possible(RISING, allowed_token_ids=(0, 3)) == {0, 3}


def test_logit_bias_adds_to_the_logits() -> None:
    assert possible(RISING, temperature=0.0, logit_bias={2: 100.0}) == {2}
    assert possible(RISING, logit_bias={11: -1000.0}) == set(range(11))


def test_a_bias_for_each_of_many_tokens_and_a_penalty() -> None:
    """Took as long as there are biases times tokens before: minutes here, and in every step."""
    said = list(range(1, 120_001))
    bias = dict.fromkeys(range(50_000, 200_000), 5.0)
    logits = torch.full((1, 200_000), 1.0)
    sample(logits, [row(prompt=said, logit_bias=bias, repetition_penalty=2.0, temperature=0.0)])
    assert logits[0, [0, 1, 50_000, 120_000, 120_001, 199_999]].tolist() == [1.0, 0.5, 3.0, 3.0, 6.0, 6.0]


def test_bad_words_complete_only_after_their_beginning() -> None:
    words = ((11,), (4, 5, 10))
    assert possible(RISING, temperature=0.0, bad_words=words) == {10}
    assert possible(RISING, temperature=0.0, bad_words=words, output=[1, 4, 5]) == {9}
    assert possible(RISING, temperature=0.0, bad_words=words, output=[4, 5, 1]) == {10}
    assert possible(RISING, temperature=0.0, bad_words=words, prompt=[4, 5]) == {10}  # the prompt does not count


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (11, 10)}
    assert possible(RISING, output=[1], **params) == {9}
    assert possible(RISING, output=[1, 2], **params) == {11}


def test_frequency_penalty_counts_the_output_only() -> None:
    params = {"temperature": 0.0, "frequency_penalty": 0.1}
    assert possible(RISING, prompt=[11] * 9, output=[11, 11], **params) == {11}  # 0.2 off, 0.25 ahead
    assert possible(RISING, prompt=[11] * 9, output=[11, 11, 11], **params) == {10}


def test_presence_penalty_counts_once() -> None:
    params = {"temperature": 0.0, "presence_penalty": 0.2}
    assert possible(RISING, output=[11] * 9, **params) == {11}
    assert possible(RISING, output=[11], **params | {"presence_penalty": 0.3}) == {10}


def test_repetition_penalty_covers_the_prompt_and_both_signs() -> None:
    params = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert possible(RISING, prompt=[11, 10], **params) == {9}
    assert possible([-1.0, -1.5], prompt=[0], **params) == {1}


def test_processors_change_what_greedy_takes_but_not_raw_logprobs() -> None:
    logits = torch.tensor([RISING])
    expected = logits[0].log_softmax(-1)
    result = sample(logits.clone(), [row(temperature=0.0, logprobs=2, logit_bias={0: 99.0})])
    entry = result.logprobs[0]
    assert result.tokens == [0] and entry.token == 0
    assert entry.logprob == pytest.approx(float(expected[0])) and entry.rank == VOCAB
    assert [token for token, _ in entry.top] == [11, 10]
    assert entry.top[0][1] == pytest.approx(float(expected[11]))


def test_processed_logprobs_are_of_the_distribution_sampled_from() -> None:
    params = {"temperature": 0.5, "top_k": 2, "logprobs": 3, "logprobs_mode": "processed"}
    result = sample(torch.tensor([RISING]), [row(**params)])
    expected = torch.tensor([2.75, 2.5]).div(0.5).log_softmax(-1)
    top = result.logprobs[0].top
    assert [token for token, _ in top[:2]] == [11, 10]
    assert [value for _, value in top[:2]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert top[2][1] == LOWEST_LOGPROB
    assert result.logprobs[0].logprob in [pytest.approx(value, abs=1e-5) for value in expected.tolist()]


def test_processed_and_raw_logprobs_differ_in_one_batch() -> None:
    logits = torch.tensor([RISING, RISING, RISING])
    rows = [
        row(temperature=0.0, logprobs=0, logprobs_mode="processed", logit_bias={3: 50.0}),
        row(temperature=2.0, logprobs=0, logprobs_mode="raw"),
        row(temperature=2.0, logprobs=0, logprobs_mode="processed"),
    ]
    result = sample(logits.clone(), rows)
    assert result.logprobs[0].logprob == pytest.approx(0.0, abs=1e-6)
    raw = logits[0].log_softmax(-1)
    warm = (logits[0] / 2).log_softmax(-1)
    assert result.logprobs[1].logprob == pytest.approx(float(raw[result.tokens[1]]), abs=1e-5)
    assert result.logprobs[2].logprob == pytest.approx(float(warm[result.tokens[2]]), abs=1e-5)


def test_broken_logits_are_an_error_of_their_row_only() -> None:
    logits = torch.tensor([RISING, RISING, RISING])
    logits[1, 3] = float("nan")
    result = sample(logits, [row(), row(), row(temperature=0.0)])
    assert list(result.errors) == [1] and result.tokens[2] == 11


any_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 4]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {3: 2.0}]),
        "bad_words": st.sampled_from([(), ((5,),)]),
        "allowed_token_ids": st.sampled_from([(), (1, 2, 3, 4, 5)]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "logprobs_mode": st.sampled_from(["raw", "processed"]),
    }
)


@settings(max_examples=60)
@given(params=st.lists(any_params, min_size=1, max_size=6), seed=st.integers(0, 100))
def test_a_row_is_sampled_alike_alone_and_in_any_batch(params: list[dict[str, Any]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), VOCAB, generator=generator) * 2
    rows = [row(output=[3, 5, 3], seed=seed + i, **entry) for i, entry in enumerate(params)]
    together = sample(logits.clone(), rows)
    for i in range(len(rows)):
        alone = sample(logits[i : i + 1].clone(), rows[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs.get(0) == together.logprobs.get(i)


def test_seed_and_position_make_the_stream() -> None:
    logits = torch.zeros(1, 5000)

    def stream(seed: int) -> list[int]:
        rows = [row(seed=seed, output=[0] * n) for n in range(20)]
        return [sample(logits.clone(), [entry]).tokens[0] for entry in rows]

    assert stream(1) == stream(1) != stream(2)
    assert len(set(stream(1))) > 15


@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_masks_leave_what_they_allow(vocab: int, rows: int, data: st.DataObject) -> None:
    logits = torch.arange(rows * vocab, dtype=torch.float32).view(rows, vocab)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True))
    bits = {row: np.frombuffer(data.draw(st.binary(min_size=8, max_size=8)), np.uint8) for row in chosen}
    expected = logits.clone()
    for row, mask in bits.items():
        for token in range(vocab):
            if not mask[token >> 3] >> (token & 7) & 1:
                expected[row, token] = ops.NEVER
    restrict(logits, bits)
    assert torch.equal(logits, expected)
    stack = np.stack(list(bits.values()))
    assert cleared(torch.from_numpy(stack)).numpy().tolist() == (
        np.unpackbits(~stack, axis=1, bitorder="little").astype(bool).tolist()
    )
