"""Keys and values in 8 bits: what is lost, and that compiled code keeps the very bytes of the specification."""

import pytest
import torch
from cached import BF16, CPU, F32, FP8, INT8, KEPT, KINDS, Kept, Sequences, new_cache, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels.kv_cache import LARGEST, CacheShape, DenseKVCache, TorchKVCache, bits, quantise
from slipstream.kernels.native.kv_cache import NativeKVCache

native = pytest.mark.skipif(NativeKVCache not in KINDS, reason="no native kernels on this machine")
EIGHT = [kept for kept in KEPT if kept[0] in LARGEST]


@pytest.mark.parametrize("dtype", [INT8, FP8])
@settings(max_examples=60)
@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=16, max_size=16),
    st.sampled_from([1.0, 1e-3, 1e-20, 1e-38]),
)
def test_what_is_lost_is_a_share_of_the_largest_number(dtype: torch.dtype, numbers: list[float], by: float) -> None:
    x = torch.tensor(numbers) * by
    kept, scale = quantise(x, dtype)
    largest = x.abs().max()
    again = kept.float() * scale.float()
    assert again.isfinite().all()
    # A scale that is rounded upwards is at most a 128th too large; one below 2^-126 has fewer digits.
    step = (largest / LARGEST[dtype] * (1 + 2**-7) + 2**-133).double()
    lost, size = (again.double() - x.double()).abs(), x.double().abs()
    most = step / 2 if dtype is INT8 else torch.maximum(size / 16, step * 2**-10)
    assert (lost <= most * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_zeros_stay_zeros_and_what_is_no_number_is_told(dtype: torch.dtype) -> None:
    kept, scale = quantise(torch.zeros(2, 32), dtype)
    assert not kept.float().any() and not scale.any()
    for wrong in (float("inf"), float("nan")):
        kept, scale = quantise(torch.tensor([1.0, wrong]), dtype)
        assert not scale.isfinite().any() and kept.float().isfinite().all()


def rows(cache: DenseKVCache, compute: torch.dtype) -> list[torch.Tensor]:
    """Bytes and scales of a compiled cache, in the order of the plain one: of keys, then of values."""
    shape, data = cache.shape, bits(cache._data)[0]
    pair, dim = 2 if compute is BF16 else 1, shape.head_dim
    keys = data[0].view(-1, shape.kv_heads, dim // pair, 16, pair).permute(0, 3, 1, 2, 4)
    values = data[1].view(-1, shape.kv_heads, dim // 16, 16 // pair, 16, pair).permute(0, 3, 5, 1, 2, 4)
    scales = cache._scales[0].view(2, -1, shape.kv_heads, 16).transpose(2, 3)
    return [each.flatten() for each in (keys, values, *scales)]


@native
@pytest.mark.parametrize("kept", EIGHT)
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    shape=shapes,
    block_size=st.sampled_from([16, 32]),
    window=st.sampled_from([0, 0, 5, 130]),
    size=st.sampled_from([1e-30, 1.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_compiled_code_keeps_the_bytes_of_the_specification(
    isa: str,
    kept: Kept,
    lengths: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    window: int,
    size: float,
    seed: int,
) -> None:
    s = Sequences(lengths, *shape, block_size, seed)
    for k, v in zip(s.k, s.v, strict=True):
        v *= size * torch.rand(len(v), 1, 1)
        k *= size if size < 1 else 1  # larger ones would make the softmax of the two differ
    ours, plain = new_cache(NativeKVCache, s, kept), new_cache(TorchKVCache, s, kept)
    assert ours.num_bytes == plain.num_bytes
    found, expected = (
        s.run(cache, list(range(len(lengths))), [0] * len(lengths), lengths, window) for cache in (ours, plain)
    )
    ours_rows = rows(ours, kept[1])
    plain_rows = [bits(plain._data)[0, 0], bits(plain._data)[0, 1], *plain._scales[0]]
    assert all(torch.equal(a, b.flatten()) for a, b in zip(ours_rows, plain_rows, strict=True))
    close = 2e-5 if kept[1] is F32 else 0.03
    assert (found - expected).abs().max() <= close * expected.abs().max()


@native
@pytest.mark.parametrize("kept", EIGHT)
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_no_number_is_seen_by_whoever_attends_to_it(isa: str, kept: Kept, wrong: float) -> None:
    for kind in KINDS:
        s = Sequences([40], 2, 1, 64, 16, seed=1)
        s.v[0][20, 0, 3] = wrong
        found = s.run(new_cache(kind, s, kept), [0], [0], [40], 0)
        assert found[20:].isnan().all(1).all(1).all()


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_block_takes_half_of_what_it_takes_in_bfloat16(dtype: torch.dtype) -> None:
    half, whole = (DenseKVCache.block_bytes(CacheShape(2, 16, 3, 64, each)) for each in (dtype, BF16))
    assert half / whole == 66 / 128
    assert TorchKVCache(CacheShape(2, 16, 3, 64, dtype), 5, CPU).num_bytes == 5 * half
