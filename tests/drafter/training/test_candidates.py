"""Some of the draft vocabulary stand for all of it."""

import pytest
import torch

from slipstream.drafter.training import candidates, losses

SIZE = 4096


def test_every_target_is_among_them_and_none_is_there_twice() -> None:
    targets = [torch.tensor([5, -1, 4000]), torch.tensor([[5, 7]])]
    some = candidates.choose(targets, SIZE, seed=1, most=300)
    assert some is not None and len(some.columns) == 300 == len(some.columns.unique())
    for token in (5, 7, 4000):
        assert some.columns[some.place[token]] == token and some.bias[some.place[token]] == 0
    assert some.place[-1] == -1, "what cannot be drafted stays that"
    again, other = (candidates.choose(targets, SIZE, seed, most=300) for seed in (1, 2))
    assert again is not None and torch.equal(again.columns, some.columns)
    assert other is not None and not torch.equal(other.columns, some.columns)


def test_where_they_would_be_nearly_all_it_is_all() -> None:
    assert candidates.choose([torch.arange(10)], 1000, seed=0, most=600) is None


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_loss_and_its_gradient_are_those_of_the_whole_vocabulary_on_average(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(SIZE, 16, generator=generator)
    hidden = (spread / 4 * torch.randn(8, 16, generator=generator)).requires_grad_()
    targets = torch.randint(SIZE, (8,), generator=generator)
    whole = losses.cross_entropy(hidden @ rows.T, targets).sum()
    [expected] = torch.autograd.grad(whole, hidden)
    loss, gradient = 0.0, torch.zeros_like(hidden)
    draws = 200
    for seed in range(draws):
        some = candidates.choose([targets], SIZE, seed, most=512)
        assert some is not None
        part = losses.cross_entropy(hidden @ rows[some.columns].T + some.bias, some.place[targets]).sum()
        loss += float(part.detach()) / draws
        gradient += torch.autograd.grad(part, hidden)[0] / draws
    assert loss == pytest.approx(float(whole.detach()), rel=0.03)
    assert float((gradient - expected).norm() / expected.norm()) < 0.1
