"""Attention by FlashInfer, xFormers and torch over the cache of GPUs: the plain formula's, for whatever is in a batch.

The first two are stand-ins here that take nothing but what the real signatures of named versions do, and compute what
it means; a slow test runs xFormers' own kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_peers import FLASHINFER, XFORMERS, FlashInfer, xformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
import bf16_interpreter  # noqa: F401  (mends the interpreter)

from slipstream.kernels import reference
from slipstream.kernels.attention import flashinfer, sdpa
from slipstream.kernels.attention import xformers as ours
from slipstream.kernels.attention.backend import AttentionBackend
from slipstream.kernels.batch import RaggedBatch, make_batch
from slipstream.kernels.kv_cache import CacheShape
from slipstream.kernels.triton.kv_cache import TritonKVCache

CPU = torch.device("cpu")
SIZE = 16
Segments = Sequence[tuple[int, int]]
"""Tokens of each segment, and how many of its sequence are before them."""
segments = st.lists(st.tuples(st.integers(1, 3) | st.integers(4, 45), st.integers(0, 70)), min_size=1, max_size=5)


def ragged(asked: Segments, shared: int = 0, seed: int = 0) -> tuple[RaggedBatch, int]:
    """Sequences whose blocks lie scattered, the first ``shared`` of them common to all; and how many there are."""
    counts = np.array([count for count, _ in asked], np.int32)
    lengths = counts + np.array([before for _, before in asked], np.int32)
    widest = -(-int(lengths.max()) // SIZE)
    number = widest * len(asked) + 2
    tables = np.random.default_rng(seed).permutation(number)[: widest * len(asked)].reshape(len(asked), widest)
    tables[:, :shared] = tables[0, :shared]
    rows = np.random.default_rng(seed).permutation(len(asked)).astype(np.int32)
    ids = np.zeros(int(counts.sum()), np.int32)
    return make_batch(ids, counts, lengths, tables.astype(np.int32), rows, SIZE), number


def attended(
    backend: AttentionBackend | None,
    batch: RaggedBatch,
    blocks: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What it computes, and what the formula does."""
    generator = torch.Generator().manual_seed(3)
    cache = TritonKVCache(CacheShape(2, SIZE, *heads[1:], dtype), blocks, CPU, backend, prompt=True)
    cache.memory.copy_(torch.randn(cache.memory.shape, generator=generator))
    qkv = torch.randn(batch.num_tokens, sum(heads[:2]), heads[2], generator=generator).to(dtype)
    q = qkv[:, : heads[0]]  # as a part of what one matrix makes
    plan = cache.plan(batch)
    found = [plan.attend(layer, q, 0.2, window, softcap) for layer in (0, 1)][1]
    keys, values = cache.memory.view(2, 2, blocks, SIZE, *heads[1:])[1]
    expected = []
    for segment, length in enumerate(batch.kv_len.tolist()):
        begin, end = batch.q_start[segment : segment + 2]
        table = torch.from_numpy(batch.block_tables[batch.table_row[segment], : -(-length // SIZE)]).long()
        k, v = (x[table].flatten(0, 1)[:length] for x in (keys, values))
        expected.append(reference.attention(q[begin:end], k, v, 0.2, window, softcap))
    return found, torch.cat(expected)


def check(found: Tensor, expected: Tensor) -> None:
    most = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found.dtype]
    assert found.shape == expected.shape and found.dtype is expected.dtype
    assert float((found.float() - expected.float()).abs().max()) < most


@pytest.mark.parametrize("version", FLASHINFER)
@settings(max_examples=12)
@given(
    asked=segments,
    heads=st.sampled_from([(4, 2, 64), (8, 1, 64), (2, 2, 128)]),
    window=st.sampled_from([0, 0, 7]),
    softcap=st.sampled_from([0.0, 0.0, 15.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    shared=st.integers(0, 3),
)
@example(asked=[(1, 60), (2, 50)], heads=(4, 2, 64), window=0, softcap=0.0, dtype=torch.float16, shared=2).via(
    "what is shared ends before what could be"
)
def test_flashinfer_is_called_as_it_is_to_be(
    version: str,
    asked: Segments,
    heads: tuple[int, int, int],
    window: int,
    softcap: float,
    dtype: torch.dtype,
    shared: int,
) -> None:
    """With beginnings that are read once for all, where segments share some."""
    asked = [(count, max(before, shared * SIZE)) for count, before in asked]
    library = FlashInfer(version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "SHARED_TOKENS", SIZE)
        patch.setattr(flashinfer, "SHARERS", 2)
        check(*attended(flashinfer.Backend(library), *ragged(asked, shared), heads, dtype, window, softcap))
    is_shared = shared and not window and len(asked) > 1
    assert any(not call["causal"] for call in library.calls) == bool(is_shared)
    for call in library.calls:
        assert call["fixed_split_size"] == (None if call["disable_split_kv"] else flashinfer.SPLIT_TOKENS // SIZE)


@given(
    asked=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 400)), min_size=1, max_size=9),
    group=st.sampled_from([1, 4, 8]),
    head_dim=st.sampled_from([64, 256]),
)
def test_calls_fit_into_the_workspace(asked: Segments, group: int, head_dim: int) -> None:
    """What does not fit is computed without splits only if it would not fit alone, or is long."""
    batch, _ = ragged(asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "SPLIT_TOKENS", 2 * SIZE)
        patch.setattr(flashinfer, "WORKSPACE_BYTES", 6 * flashinfer.split_bytes(8, 64, head_dim))
        made = flashinfer.parts(batch, 8, group, head_dim, cascade=False)
    assert len({part.name for part in made}) == len(made)
    seen: list[int] = []
    for part in made:
        counts, blocks = np.diff(part.q_start), np.diff(part.kv_start)
        rows = flashinfer.tile(int(counts.mean()), group, head_dim)
        taken = -(-blocks // 2) * flashinfer.split_bytes(8, rows, head_dim)
        room = 6 * flashinfer.split_bytes(8, 64, head_dim)
        if part.is_split:
            assert taken.sum() <= room and (counts * group <= rows).all()
        else:
            assert ((taken > room) | (counts * group > rows)).all()
        seen += (np.arange(batch.num_tokens) if part.tokens is None else part.tokens).tolist()
    assert sorted(seen) == list(range(batch.num_tokens))


@given(asked=segments, group=st.sampled_from([1, 4, 8]), head_dim=st.sampled_from([64, 256]))
def test_a_segment_goes_through_flashinfer_as_it_would_alone(asked: Segments, group: int, head_dim: int) -> None:
    """It chooses a tile by the mean length of what is in a call, so all of these would choose the same one."""
    batch, _ = ragged(asked)
    made = flashinfer.parts(batch, 8, group, head_dim, cascade=False)
    seen: list[int] = []
    for part in made:
        tokens = np.arange(batch.num_tokens) if part.tokens is None else part.tokens
        seen += tokens.tolist()
        counts = np.diff(part.q_start)
        tiles = {flashinfer.tile(count, group, head_dim) for count in counts.tolist()}
        assert tiles == {flashinfer.tile(int(counts.mean()), group, head_dim)}
        for index, first in enumerate(part.q_start[:-1].tolist()):
            segment = int(np.searchsorted(batch.q_start, tokens[first], side="right")) - 1
            one = replace(
                batch,
                token_ids=batch.token_ids[: counts[index]],
                q_start=np.array([0, counts[index]], np.int32),
                kv_len=batch.kv_len[[segment]],
                table_row=batch.table_row[[segment]],
                known=batch.known[[segment]],
            )
            [alone] = flashinfer.parts(one, 8, group, head_dim, cascade=False)
            begin, end = part.kv_start[index : index + 2]
            assert alone.name == part.name and np.array_equal(alone.blocks, part.blocks[begin:end])
            assert alone.last_length[0] == part.last_length[index]
    assert sorted(seen) == list(range(batch.num_tokens))


@pytest.mark.parametrize("version", XFORMERS)
@settings(max_examples=5)
@given(asked=segments, heads=st.sampled_from([(4, 2, 16), (2, 2, 16)]), dtype=st.sampled_from([torch.float16]))
def test_xformers_is_called_as_it_is_to_be(
    version: str, asked: Segments, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Long segments are Triton's, of which one is always there in some examples, and none in others."""
    check(*attended(ours.Backend(xformers(version)), *ragged(asked), heads, dtype))


@settings(max_examples=12)
@given(
    asked=segments,
    heads=st.sampled_from([(4, 2, 16), (3, 1, 40)]),
    window=st.sampled_from([0, 0, 1, 7, 60]),
    softcap=st.sampled_from([0.0, 0.0, 15.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_torch_computes_the_formula(
    asked: Segments, heads: tuple[int, int, int], window: int, softcap: float, dtype: torch.dtype
) -> None:
    check(*attended(sdpa.Backend(), *ragged(asked), heads, dtype, window, softcap))


@pytest.mark.parametrize("make", [lambda: sdpa.Backend(), lambda: flashinfer.Backend(FlashInfer(FLASHINFER[0]))])
def test_a_layer_that_a_backend_does_not_cover_is_tritons(make: Any) -> None:
    """A model may have more than its configuration says."""
    batch, blocks = ragged([(2, 20), (1, 3)])
    cache = TritonKVCache(CacheShape(1, SIZE, 1, 64, torch.float16), blocks, CPU, make())
    cache.memory.copy_(torch.randn(cache.memory.shape))
    assert not cache.is_recordable
    q, sinks = torch.randn(3, 2, 64, dtype=torch.float16), torch.tensor([3.0, -1.0])
    plain = TritonKVCache(CacheShape(1, SIZE, 1, 64, torch.float16), blocks, CPU)
    plain.memory.copy_(cache.memory)
    found, expected = (each.plan(batch).attend(0, q, 0.3, 9, 0.0, sinks) for each in (cache, plain))
    check(found, expected)
