"""The optimizer: the steps of torch's own, in a number format of our choice."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.training.muon import BLOCK, Muon, orthogonalize

SHAPES = ((24, 24), (16, 48), (48, 16))


def gradients(steps: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(steps)]


def run(make: type, steps: list[list[torch.Tensor]], **options: object) -> tuple[list[torch.Tensor], dict[str, object]]:
    weights = [torch.ones(shape, requires_grad=True) for shape in SHAPES]
    optimizer = make(weights, lr=0.02, weight_decay=0.1, **options)
    for step in steps:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer.state_dict()


def test_steps_are_nearly_those_of_torch() -> None:
    """Torch's iteration leaves singular values between 0.7 and 1.2, this one between 0.7 and 1.3."""
    steps = gradients(4)
    ours, state = run(Muon, steps, dtype=torch.bfloat16)
    theirs, their_state = run(torch.optim.Muon, steps, adjust_lr_fn="match_rms_adamw")
    for found, expected in zip(ours, theirs, strict=True):
        assert (found - expected).norm() < 0.35 * (expected - 1).norm()
    found, expected = state["state"], their_state["state"]  # so checkpoints made with torch's go on
    assert found.keys() == expected.keys()
    assert {name for each in found.values() for name in each} == {"momentum_buffer"}


@given(rows=st.integers(1, 500), columns=st.integers(1, 500), seed=st.integers(0, 9), size=st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_each_block_is_made_orthogonal(rows: int, columns: int, seed: int, size: float) -> None:
    matrix = size * torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    found = orthogonalize(matrix, torch.float32)
    if rows > columns:
        matrix, found = matrix.T, found.T
    for before, after in zip(matrix.split(BLOCK), found.split(BLOCK), strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        near = values > 0.012 * before.norm()
        on = torch.einsum("mi,mn,in->i", left, after, right)  # the same directions, other lengths
        assert ((on[near] > 0.7) & (on[near] < 1.3)).all()
        assert (on > 0).all() and (on < 1.3).all()


def test_formats_agree() -> None:
    steps = gradients(4)
    exact, _ = run(Muon, steps, dtype=torch.float32)
    rough, _ = run(Muon, steps, dtype=torch.bfloat16)
    for found, expected in zip(rough, exact, strict=True):
        assert (found - expected).abs().max() < 0.1 * (expected - 1).abs().max()


def test_weights_without_a_gradient_stay() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))
