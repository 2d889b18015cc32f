import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.drafter.training import losses


def distributions(seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(7, 13, generator=generator)
    return logits, (spread * torch.randn(7, 13, generator=generator)).softmax(-1)


@pytest.mark.parametrize("name", [name for name in losses.NAMES if name not in ("ce", "tvpp")])
@given(seed=st.integers(0, 50))
@settings(max_examples=20)
def test_divergences_are_least_where_both_agree(name: losses.LossName, seed: int) -> None:
    logits, probs = distributions(seed)
    targets = torch.zeros(7, dtype=torch.int64)
    same = losses.loss(name, probs.log(), targets, probs)
    other = losses.loss(name, logits, targets, probs)
    assert torch.all(same.abs() < 1e-4)
    assert torch.all(other > same)


@pytest.mark.parametrize("name", losses.NAMES)
def test_following_the_gradient_raises_acceptance(name: losses.LossName) -> None:
    logits, probs = distributions(3)
    logits.requires_grad_(True)
    targets = probs.argmax(-1)

    @torch.no_grad()
    def acceptance() -> Tensor:
        return torch.minimum(logits.softmax(-1), probs).sum(-1).mean()

    before = float(acceptance())
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        losses.loss(name, logits, targets, probs).mean().backward()
        optimizer.step()
    right = (logits.argmax(-1) == targets).float().mean()
    if name == "ce":
        assert right == 1
    else:
        assert float(acceptance()) > before + 0.1


def test_known_values() -> None:
    probs, logits = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]]).log()
    targets = torch.tensor([0])
    for name, expected in [
        ("ce", torch.tensor(4.0).log()),
        ("kl", torch.tensor(2.0).log()),
        ("tv", torch.tensor(0.5)),
        ("nla", torch.tensor(2.0).log()),
        ("race", torch.tensor(2.0).log()),  # the third token wins the head's race in half of all cases
    ]:
        torch.testing.assert_close(losses.loss(name, logits, targets, probs)[0], expected)
    lam = torch.tensor(-1.5).exp()
    expected = lam * torch.tensor(2.0).log() + (1 - lam) * 0.5
    torch.testing.assert_close(losses.loss("lk", logits, targets, probs)[0], expected)


def test_what_cannot_be_drafted_does_not_count() -> None:
    logits, _ = distributions(0)
    targets = torch.tensor([0, -1, 2, -1, 4, 5, 6])
    found = losses.loss("ce", logits, targets, None)
    assert found[1] == found[3] == 0 and torch.all(found[[0, 2, 4]] > 0)


def test_most_likely_tokens_become_a_distribution() -> None:
    to_draft = torch.tensor([-1, 0, 1, -1, 2])
    ids, logprobs = torch.tensor([[1, 0, 4], [3, 2, -1]]), torch.tensor([[0.5, 0.3, 0.1], [0.6, 0.2, 1.0]]).log()
    torch.testing.assert_close(
        losses.dense(ids, logprobs, to_draft, 3), torch.tensor([[0.5, 0.0, 0.1], [0.0, 0.2, 0.0]])
    )


def test_the_race_loss_is_the_chance_that_both_races_end_alike() -> None:
    """Drawn with noise for all tokens, of which the loss sees the most likely ones."""
    generator = torch.Generator().manual_seed(0)
    target, other = 2.5 * torch.randn(2, 1, 60, generator=generator)
    logits = target + 0.5 * other
    probs = target.softmax(-1)
    noise = -torch.rand(40_000, 60, generator=generator).log()
    alike = (probs / noise).argmax(-1) == (logits.softmax(-1) / noise).argmax(-1)
    found = float(losses.loss("race", logits, torch.zeros(1), probs).neg().exp())
    assert 0.9 * alike.float().mean() < found < 1.01 * alike.float().mean()
