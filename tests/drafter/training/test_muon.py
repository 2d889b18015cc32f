"""The optimizer: the steps of torch's own, in a number format of our choice."""

from __future__ import annotations

import pytest
import torch

from slipstream.drafter.training.muon import Muon, orthogonalize

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


def test_steps_are_those_of_torch() -> None:
    steps = gradients(4)
    ours, state = run(Muon, steps, dtype=torch.bfloat16)
    theirs, their_state = run(torch.optim.Muon, steps, adjust_lr_fn="match_rms_adamw")
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    found, expected = state["state"], their_state["state"]  # so checkpoints made with torch's go on
    assert found.keys() == expected.keys()
    assert {name for each in found.values() for name in each} == {"momentum_buffer"}


def test_formats_agree() -> None:
    steps = gradients(4)
    exact, _ = run(Muon, steps, dtype=torch.float32)
    rough, _ = run(Muon, steps, dtype=torch.bfloat16)
    for found, expected in zip(rough, exact, strict=True):
        assert (found - expected).abs().max() < 0.1 * (expected - 1).abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix, torch.float32))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_weights_without_a_gradient_stay() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))
