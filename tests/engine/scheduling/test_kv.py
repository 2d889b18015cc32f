"""The block pool and the sharing of blocks, against a model of what they promise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.scheduling.kv import prefix
from slipstream.engine.scheduling.kv.manager import Admission, KVManager, Wait
from slipstream.engine.scheduling.kv.pool import BlockPool
from slipstream.engine.scheduling.request import Request


class PoolMachine(RuleBasedStateMachine):
    """Random takers of blocks; after every action the pool's own books must balance."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5)
        self.holders: list[list[int]] = []
        self.names = 0

    @precondition(lambda self: self.pool.num_available)
    @rule(target=held)
    def allocate(self) -> list[int]:
        holder = [self.pool.allocate()]
        self.holders.append(holder)
        return holder

    @rule(holder=held, name=st.integers(0, 6))
    def publish(self, holder: list[int], name: int) -> None:
        if holder:
            self.pool.publish(holder[0], bytes([name]))

    @rule(target=held, name=st.integers(0, 6))
    def share(self, name: int) -> list[int]:
        block = self.pool.find(bytes([name]))
        if block is None:
            return multiple()  # type: ignore[no-any-return]
        self.pool.share(block)
        holder = [block]
        self.holders.append(holder)
        return holder

    @rule(holder=consumes(held))
    def release(self, holder: list[int]) -> None:
        if holder:
            self.pool.release(holder.pop())

    @rule()
    def forget(self) -> None:
        self.pool.forget_all()
        assert all(self.pool.find(bytes([name])) is None for name in range(7))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(self.holders)
        assert self.pool.num_used + self.pool.num_available == 5


TestPool = PoolMachine.TestCase


def test_the_oldest_cached_block_is_given_up_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for name, block in enumerate(blocks):
        pool.publish(block, bytes([name]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    pool.share(blocks[1])  # used again: now the youngest
    pool.release(blocks[1])
    assert pool.allocate() == blocks[0]
    assert pool.allocate() == blocks[2]
    assert pool.find(bytes([1])) == blocks[1]


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_equal_chains_mean_equal_beginnings(a: list[int], b: list[int], block_size: int) -> None:
    chains: list[list[bytes]] = [[], []]
    for chain, tokens in zip(chains, (a, b), strict=True):
        prefix.extend(chain, prefix.seed(0, ""), tokens, block_size)
        assert len(chain) == len(tokens) // block_size
    for index, (left, right) in enumerate(zip(*chains, strict=False)):
        end = (index + 1) * block_size
        assert (left == right) == (a[:end] == b[:end])


def test_chains_grow_as_tokens_come() -> None:
    tokens = list(range(50))
    whole: list[bytes] = []
    grown: list[bytes] = []
    prefix.extend(whole, b"root", tokens, 16)
    for end in range(51):
        prefix.extend(grown, b"root", tokens[:end], 16)
    assert grown == whole


@pytest.mark.parametrize(("version", "salt"), [(1, ""), (0, "x"), (1, "x")])
def test_other_weights_and_other_salts_have_other_roots(version: int, salt: str) -> None:
    assert prefix.seed(version, salt) != prefix.seed(0, "")


def new_request(
    tokens: list[int], request_id: int = 1, prompt_logprobs: int | None = None, prompt_logprobs_from: int = 0
) -> Request:
    params = SamplingParams(max_tokens=5, prompt_logprobs=prompt_logprobs, prompt_logprobs_from=prompt_logprobs_from)
    return Request(NewRequest(request_id=request_id, prompt=tokens, params=params), 0.0, prefix.seed(0, ""))


def admit(kv: KVManager, tokens: list[int], **fields: int) -> tuple[Request, Admission]:
    request = new_request(tokens, **fields)
    admission = kv.admit(request, spare=0)
    assert isinstance(admission, Admission)
    request.num_computed = len(tokens)
    kv.publish(request)
    return request, admission


def test_a_beginning_is_shared_while_held_and_after() -> None:
    kv = KVManager(10, 4, prefix_caching=True)
    first, _ = admit(kv, list(range(10)))
    second, admission = admit(kv, [*range(8), 99, 98])
    assert admission == Admission(8, ())
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    shared = first.blocks[:2]
    kv.free(first)
    kv.free(second)
    assert kv.pool.num_used == 0
    third, admission = admit(kv, list(range(9)))
    assert admission.num_cached == 8 and third.blocks[:2] == shared


def test_a_wholly_cached_prompt_copies_its_last_block() -> None:
    kv = KVManager(10, 4, prefix_caching=True)
    first, _ = admit(kv, list(range(8)))
    second, admission = admit(kv, list(range(8)))
    assert admission.num_cached == 7
    assert admission.copies == ((first.blocks[1], second.blocks[1]),)
    assert first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]


def test_a_request_waits_for_a_beginning_that_is_being_computed() -> None:
    kv = KVManager(10, 4, prefix_caching=True)
    first = new_request(list(range(12)))
    assert isinstance(kv.admit(first, spare=0), Admission)
    second = new_request(list(range(11)), request_id=2)
    assert kv.admit(second, spare=0) is Wait.PREFIX
    first.num_computed = 4
    kv.publish(first)
    assert kv.admit(second, spare=0) is Wait.PREFIX  # the second block is still to come
    kv.free(first)  # aborted: nobody computes it any more
    admission = kv.admit(second, spare=0)
    assert isinstance(admission, Admission) and admission.num_cached == 4


def test_too_few_blocks_change_nothing() -> None:
    kv = KVManager(4, 4, prefix_caching=True)
    first, _ = admit(kv, list(range(8)))
    request = new_request(list(range(8)) + [1] * 9, request_id=2)
    assert kv.admit(request, spare=0) is Wait.BLOCKS
    assert request.blocks == [] and kv.pool.num_available == 2
    kv.pool.check([first.blocks])
    assert kv.admit(new_request([7] * 8, request_id=3), spare=1) is Wait.BLOCKS


def test_prompt_logprobs_compute_every_position() -> None:
    kv = KVManager(10, 4, prefix_caching=True)
    admit(kv, list(range(8)))
    assert admit(kv, list(range(8)), prompt_logprobs=1)[1] == Admission(0, ())


@pytest.mark.parametrize(("position", "cached"), [(0, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (40, 11)])
def test_prompt_logprobs_from_a_position_on_compute_what_tells_them(position: int, cached: int) -> None:
    """That of a token is told by the position before it."""
    kv = KVManager(10, 4, prefix_caching=True)
    admit(kv, list(range(12)))
    request, admission = admit(kv, list(range(12)), prompt_logprobs=1, prompt_logprobs_from=position)
    assert admission.num_cached == cached
    assert len(request.prompt_logprobs) == min(max(1, position), 12)


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"pooling": "mean"}])
def test_nobody_waits_for_a_beginning_that_is_of_no_use_to_it(asked: dict[str, Any]) -> None:
    """Else requests with a beginning in common, as those for embeddings have, would be computed one after the other."""
    kv = KVManager(12, 4, prefix_caching=True)
    tokens = list(range(9))
    kv.admit(new_request(tokens), spare=0)
    params = SamplingParams(max_tokens=0, **asked)
    for request_id in (2, 3):
        request = Request(NewRequest(request_id=request_id, prompt=tokens, params=params), 0.0)
        assert kv.admit(request, spare=0) == Admission(0, ())


def test_caching_can_be_switched_off() -> None:
    kv = KVManager(10, 4, prefix_caching=False)
    admit(kv, list(range(8)))
    assert admit(kv, list(range(8)))[1] == Admission(0, ())
