"""Gated activations: the reference's numbers, from two tensors or from the halves of one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")
from slipstream.kernels.triton import activation, launch

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
Gated = Callable[..., Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """torch's, but for what it loses far below zero, where 1 and the hyperbolic tangent cancel out."""
    exact = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    assert torch.allclose(exact, functional.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-12)
    return exact


KINDS: list[tuple[Gated, Gated, Callable[[Tensor], Tensor]]] = [
    (activation.silu_mul, activation.silu_mul_halves, functional.silu),
    (activation.gelu_tanh_mul, activation.gelu_tanh_mul_halves, gelu_tanh),
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(
    tokens=st.integers(1, 4),
    inner=st.integers(1, 40) | st.sampled_from([1024, 1500]),
    dtype=st.sampled_from(list(ROUNDING)),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_it_is_torchs_activation_times_the_other(
    kind: tuple[Gated, Gated, Callable[[Tensor], Tensor]],
    tokens: int,
    inner: int,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    gated, gated_halves, function = kind
    both = (torch.randn(tokens, 2 * inner, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = function(gate.double()).to(dtype) * up
    found = gated_halves(both)
    assert found.dtype is dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2 * ROUNDING[dtype], atol=1e-6)
    assert dtype is torch.float32 or (found != expected).sum() <= 1 + found.numel() // 50, "it rounds elsewhere"
    assert torch.equal(gated(gate.contiguous(), up.contiguous()), found)
    assert torch.equal(gated(gate[-1:], up[-1:]), found[-1:])
    gated_halves(both, out=gate)
    assert torch.equal(gate, found)


def test_what_is_far_from_zero_is_all_or_nothing() -> None:
    gate = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], device=DEVICE)
    for gated, _, _ in KINDS:
        assert gated(gate, torch.ones_like(gate)).tolist() == [[0.0, 0.0, 100.0, 1e4]]


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="a gate of shape"):
        activation.silu_mul(torch.ones(2, 4, device=DEVICE), torch.ones(2, 5, device=DEVICE))
    assert activation.silu_mul(torch.ones(0, 4, device=DEVICE), torch.ones(0, 4, device=DEVICE)).shape == (0, 4)
