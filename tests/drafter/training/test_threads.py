"""Parts computed side by side: in order, in what the caller computes in, and nothing left running after a failure."""

import threading
from collections.abc import Callable

import pytest
import torch

from slipstream.drafter.training.gate import score
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example
from slipstream.drafter.training.threads import Threads
from slipstream.drafter.training.trainer import Trainer, TrainOptions


def test_results_are_in_the_order_of_the_items_and_all_threads_take_part() -> None:
    together = threading.Barrier(3, timeout=60)

    def meet(item: int) -> tuple[int, str]:
        if item < 3:
            together.wait()  # would break if fewer threads computed at once
        return item, threading.current_thread().name

    found = Threads(3).map(meet, range(20))
    assert [item for item, _ in found] == list(range(20))
    assert len({name for _, name in found[:3]}) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_is_raised_and_the_threads_go_on_to_be_used(count: int) -> None:
    threads = Threads(count)

    def fail(item: int) -> int:
        if item == 3:
            raise ValueError("the third")
        return item

    with pytest.raises(ValueError, match="the third"):
        threads.map(fail, range(8))
    assert threads.map(fail, range(3)) == [0, 1, 2]


def test_training_in_two_threads_is_bit_by_bit_that_in_one(
    make_head: Callable[..., TrainableHead], make_example: Callable[..., Example]
) -> None:
    texts = [make_example(30 + 7 * seed, seed=seed) for seed in range(5)]
    alone, beside = (Trainer(make_head(), TrainOptions(), threads=Threads(count)) for count in (1, 3))
    for _ in range(3):
        for trainer in (alone, beside):
            trainer.learn([[text] for text in texts])
    for name in alone.head.trained:
        assert torch.equal(alone.head.weights[name], beside.head.weights[name]), name
    one, many = (score(trainer.head, texts * 20, 2, trainer._threads) for trainer in (alone, beside))
    assert (one.tokens == many.tokens).all() and (one.steps == many.steps).all()
