"""The table of kernels' cases: what counts as a difference, and that every case's bytes and flops are counted."""

from __future__ import annotations

import torch

from slipstream.kernels.cases import LLAMA_8B, TINY, TOLERANCE, Source, cases, difference

CPU = torch.device("cpu")


def test_what_counts_as_a_difference() -> None:
    expected = torch.tensor([1.0, -4.0, float("-inf"), 0.0])
    assert difference((expected.clone(),), (expected,)) == 0
    assert difference((expected + torch.tensor([0.0, 0.5, 0.0, 0.0]),), (expected,)) == 0.125
    assert difference((expected.bfloat16(),), (expected,)) == 0
    for other in (
        torch.tensor([1.0, float("nan"), float("-inf"), 0.0]),
        torch.tensor([1.0, -4.0, 0.0, 0.0]),
        torch.tensor([float("inf"), -4.0, float("-inf"), 0.0]),
    ):
        assert difference((other,), (expected,)) > 1e6, other
    assert difference((expected[:3],), (expected,)) == float("inf")
    assert difference((), (expected,)) == float("inf")
    assert difference((torch.tensor([1, 2]),), (torch.tensor([1, 2], dtype=torch.int32),)) == 0
    assert difference((torch.tensor([1, 2]),), (torch.tensor([1, 3]),)) == float("inf")
    assert difference((torch.zeros(3),), (torch.zeros(3),)) == 0


def test_cases_have_names_of_their_own_and_move_something() -> None:
    found = list(cases(CPU))
    assert len({case.name for case in found}) == len(found) > 20
    for case in found:
        assert set(case.dtypes) <= set(TOLERANCE)
        assert case.prepare(Source(CPU, torch.float32, empty=True), TINY).moved > 0, case.name


def test_decoding_reads_every_key_and_value_once() -> None:
    decode = next(case for case in cases(CPU) if case.name == "attention decode, torch")
    small = LLAMA_8B.of_step(2)
    prepared = decode.prepare(Source(CPU, torch.bfloat16, empty=True), small)
    stored = 2 * 2 * small.context * small.kv_heads * small.head_dim * 2
    queries = 2 * 2 * small.heads * small.head_dim * 2
    assert prepared.moved == stored + queries
    assert prepared.flops == 4 * small.heads * small.head_dim * 2 * small.context
