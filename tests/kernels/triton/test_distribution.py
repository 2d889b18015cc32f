"""What tokens are sampled from, found by search: the same sets as by sorting."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.reference import NEVER, ReferenceOps
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.distribution import ROOM, distribution

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
REFERENCE = ReferenceOps()


def columns(rows: int, t: float, k: int, m: float, p: float) -> tuple[Tensor, ...]:
    def column(value: float) -> Tensor:
        return torch.full((rows,), value, device=DEVICE)

    return column(t), column(k).int(), column(m), column(p)


def check(logits: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """The weights, which are the reference's but for tokens at the border of the nucleus that rounding decides on."""
    weights = distribution(logits, *parameters)
    expected = REFERENCE.distribution(logits.float(), *parameters)
    for found, wanted, top_p in zip(weights, expected, parameters[3].tolist(), strict=True):
        kept, meant = found > 1.2e-38, wanted > 1.2e-38
        if not torch.equal(kept, meant):
            mass = max(float(wanted.double().sum()), float(found.double().sum()))
            border = (found + wanted)[kept ^ meant]
            assert top_p < 1 and len(border.unique()) == 1, "more than the border of the nucleus differs"
            above = float(wanted.double()[wanted > border[0]].sum())
            assert above == pytest.approx(top_p * mass, rel=1e-5), "the border is somewhere else"
            continue
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-7)
    return weights


@settings(max_examples=12)
@given(
    vocab=st.integers(1, 200) | st.sampled_from([ROOM, ROOM + 1000]),
    scale=st.sampled_from([0.01, 3.0, 20.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 500, 2500]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]),
    masked=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@example(vocab=ROOM + 1000, scale=3.0, temperature=1.0, top_k=2500, min_p=0.0, top_p=0.999, masked=3, seed=0).via(
    "more than fits aside"
)
def test_it_keeps_what_the_definition_keeps(
    vocab: int,
    scale: float,
    temperature: float,
    top_k: int,
    min_p: float,
    top_p: float,
    masked: int,
    seed: int,
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * scale
    logits[:, 1 : 1 + masked] = NEVER
    parameters = columns(1, temperature, top_k, min_p, top_p)
    weights = check(logits, parameters)
    in_place = distribution(logits, *parameters, out=logits)
    assert in_place is logits and torch.equal(weights, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_parameters_of_their_own_and_the_same_bits_alone(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 4).to(DEVICE, dtype)
    parameters = (
        torch.tensor([0.7, 1.0, 1e-30, 1.5], device=DEVICE),
        torch.tensor([0, 20, 5, 300], device=DEVICE),
        torch.tensor([0.0, 0.05, 0.0, 0.0], device=DEVICE),
        torch.tensor([0.9, 1.0, 0.5, 0.6], device=DEVICE),
    )
    weights = check(logits, parameters)
    for row in range(4):
        alone = distribution(logits[row : row + 1], *(column[row : row + 1] for column in parameters))
        assert torch.equal(alone[0], weights[row])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_ties_at_the_border_stay(top_k: int) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, -0.0, -1.0, -0.0, -5.0]], device=DEVICE)
    weights = distribution(logits, *columns(2, 1.0, top_k, 0.0, 1.0))
    assert (weights[0] > 0).tolist() == [False, True, True, top_k > 3, True]
    assert (weights[1] > 0).tolist() == [True, True, top_k > 3, True, False]


def test_many_ties_do_not_fit_aside() -> None:
    logits = torch.zeros(1, ROOM + 500, device=DEVICE)
    logits[0, 3] = 1.0
    logits[0, -400:] = -1.0
    for parameters, kept in (((10, 1.0), ROOM + 100), ((1, 1.0), 1), ((0, 0.5), ROOM + 100), ((0, 1e-6), 1)):
        top_k, top_p = parameters
        weights = check(logits, columns(1, 1.0, top_k, 0.0, top_p))
        assert int((weights > 0).sum()) == kept


@settings(max_examples=10)
@given(
    logits=st.lists(
        st.sampled_from([0.0, -0.0, 1e-3, -30.0, 7.5, 88.0, -1e30, 1e30, 3.4e38, -3.4e38, NEVER]), max_size=9
    ),
    t=st.sampled_from([0.0, 1e-45, 1.2e-38, 1e-7, 1.0, 2.0]),
    k=st.sampled_from([0, 1, 3, 2**31 - 1]),
    m=st.sampled_from([0.0, 1e-45, 1e-7, 1.0, 1 - 2**-24]),
    p=st.sampled_from([0.0, 1e-45, 1e-7, 1.0, 1 - 2**-24]),
)
def test_extreme_parameters(logits: list[float], t: float, k: int, m: float, p: float) -> None:
    row = torch.tensor([[*logits, 3.0]], device=DEVICE)
    temperature, top_k, min_p, top_p = columns(1, t, 0, m, p)
    top_k.fill_(k)
    found = distribution(row, temperature, top_k, min_p, top_p)
    expected = REFERENCE.distribution(
        row.double(), temperature.double().clamp(min=1.1754943508222875e-38), top_k, min_p.double(), top_p.double()
    )
    expected /= expected.sum()
    assert torch.allclose(found.double() / found.double().sum(), expected, atol=1e-6)


def test_broken_rows_leave_the_others_alone() -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 3], logits[1, :], logits[2, 7] = float("nan"), NEVER, float("inf")
    for parameters in (columns(4, 1.0, 5, 0.1, 0.7), columns(4, 1.0, 0, 0.0, 1.0)):
        weights = distribution(logits, *parameters)
        alone = distribution(logits[3:], *(column[3:] for column in parameters))
        assert torch.equal(weights[3], alone[0]) and weights[3].max() == 1
        assert not weights[1].any()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="contiguous rows"):
        distribution(torch.ones(3, 4, device=DEVICE).t(), *columns(4, 1.0, 0, 0.0, 1.0))
    assert distribution(torch.ones(0, 4, device=DEVICE), *columns(0, 1.0, 0, 0.0, 1.0)).shape == (0, 4)
