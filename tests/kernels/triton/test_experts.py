"""A mixture of experts: the reference's numbers, and rows that do not depend on each other."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels import reference
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.experts import (
    Routes,
    experts_mlp,
    order_by_expert,
    route,
)

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 6),
    experts=st.integers(1, 130),
    top=st.integers(1, 8),
    renormalize=st.booleans(),
    ties=st.booleans(),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_routes_are_the_references(
    tokens: int, experts: int, top: int, renormalize: bool, ties: bool, dtype: torch.dtype, seed: int
) -> None:
    top = min(top, experts)
    logits = some(tokens, experts + 3, dtype=dtype, seed=seed)[:, :experts] * 3
    if ties:
        logits = logits.round()
    found, expected = route(logits, top, renormalize), Routes(*reference.route(logits, top, renormalize))
    assert found.experts.tolist() == expected.experts.tolist()
    torch.testing.assert_close(found.shares, expected.shares, rtol=1e-5, atol=1e-7)
    if renormalize:
        torch.testing.assert_close(found.shares.sum(-1), torch.ones(tokens, device=DEVICE))


@settings(max_examples=12)
@given(
    pairs=st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=60),
    tile=st.sampled_from([16, 32, 64]),
)
@example(pairs=[[0, 0]] * 700, tile=16).via("more pairs than a block")
def test_pairs_are_put_in_order_in_tiles_of_one_expert(pairs: list[list[int]], tile: int) -> None:
    order = order_by_expert(torch.tensor(pairs, dtype=torch.int32, device=DEVICE), 5, tile)
    flat = [expert for both in pairs for expert in both]
    expected_pairs, expected_tiles = [], []
    for expert in range(5):
        mine = [pair for pair, other in enumerate(flat) if other == expert]
        mine += [-1] * (-len(mine) % tile)
        expected_pairs += mine
        expected_tiles += [expert] * (len(mine) // tile)
    used = len(expected_tiles)
    assert order.pairs[: used * tile].tolist() == expected_pairs
    assert order.tile_experts.tolist() == expected_tiles + [-1] * (len(order.tile_experts) - used)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(2, 5),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    tile_rows=st.sampled_from([0, 16, 64]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_tokens_get_the_sum_of_their_experts_and_the_same_bits_alone(
    tokens: int, experts: int, hidden: int, inner: int, tile_rows: int, dtype: torch.dtype, seed: int
) -> None:
    x = some(tokens, hidden + 1, dtype=dtype, seed=seed)[:, :hidden]
    gate_up = some(experts, 2 * inner, hidden, dtype=dtype, seed=seed + 1) * hidden**-0.5
    down = some(experts, hidden, inner, dtype=dtype, seed=seed + 2) * inner**-0.5
    routes = route(some(tokens, experts, seed=seed + 3), 2, renormalize=True)
    routes.experts[0] = -1  # as where there is no token
    routes.shares[0] = float("nan")
    found = experts_mlp(x, routes, gate_up, down, tile_rows)
    expected = reference.experts_mlp(x, routes.experts, routes.shares, gate_up, down)
    assert found.dtype is dtype and not found[0].any()
    torch.testing.assert_close(found, expected, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])
    last = Routes(routes.experts[-1:], routes.shares[-1:])
    alone = experts_mlp(x[-1:], last, gate_up, down, tile_rows or (16 if tokens * 2 <= 16 * experts else 64))
    assert torch.equal(alone[0], found[-1])


def test_what_does_not_fit_is_said() -> None:
    logits = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="5 of 4 experts"):
        route(logits, 5, renormalize=True)
    routes = route(logits, 2, renormalize=False)
    gate_up, down = torch.ones(4, 6, 8, device=DEVICE), torch.ones(4, 8, 3, device=DEVICE)
    assert experts_mlp(torch.ones(2, 8, device=DEVICE), routes, gate_up, down).shape == (2, 8)
    with pytest.raises(ValueError, match="x \\(2, 7\\)"):
        experts_mlp(torch.ones(2, 7, device=DEVICE), routes, gate_up, down)
