"""Training sees what live drafting sees: offline acceptance is live acceptance."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.drafter.head.network import HeadNetwork, HeadWeights
from slipstream.drafter.training import network
from slipstream.drafter.training.gate import score
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, Pack, pack
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.decoder import Decoder
from slipstream.kernels.batch import make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.torch_stack import TorchCompute

MakeHead, MakeExample = Callable[..., TrainableHead], Callable[..., Example]

BLOCK = 16


class _Live:
    """The head as it serves, drafting after known text."""

    def __init__(self, head: TrainableHead, target: DecoderConfig, embedding: Tensor) -> None:
        model = Decoder(target, TorchCompute(Formats.of(torch.float32), torch.device("cpu")), 256)
        weights = model.new_weights()
        weights.embedding.fill(embedding)
        model.use(weights)
        self._table = np.arange(16, dtype=np.int32)[None]
        self._network = HeadNetwork(head.config, model, 16, BLOCK, 256)
        ours = HeadWeights(head.config, model)
        ours.fill(head.tensors(), head.to_target)
        self._network.use(ours)

    def outputs(self, tokens: np.ndarray, features: Tensor, known: int, drafts: int) -> Tensor:
        """After ``known`` tokens, then after so many draft tokens, which are those that came: [1 + drafts, hidden]."""
        count = known - 1
        fused = self._network.fuse(features[:count])
        hidden = self._network.forward(self._batch(tokens[1:known], count), fused)[-1:]
        result = [hidden]
        for i in range(drafts):
            hidden = self._network.forward(self._batch(tokens[known + i : known + i + 1], count + i + 1), hidden)
            result.append(hidden)
        return torch.cat(result)

    def _batch(self, ids: np.ndarray, end: int):  # type: ignore[no-untyped-def]
        counts = np.array([len(ids)], np.int32)
        return make_batch(ids, counts, np.array([end], np.int32), self._table, np.zeros(1, np.int32), BLOCK)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._network.logits(hidden)


@pytest.fixture
def live(make_head: MakeHead, target: DecoderConfig, embedding: Tensor) -> _Live:
    return _Live(make_head(), target, embedding)


def outputs(head: TrainableHead, batch: Pack, steps: int) -> list[Tensor]:
    """After 0, 1, … draft tokens, at all learned rows."""
    drafting = head.draft(batch)
    found = [drafting.hidden]
    for _ in range(steps - 1):
        drafting.extend(torch.ones(len(drafting.rows), dtype=torch.bool))
        found.append(drafting.hidden)
    return found


def test_unrolled_outputs_are_those_of_live_drafting(
    make_head: MakeHead, make_example: MakeExample, live: _Live
) -> None:
    head = make_head()
    examples = [make_example(24, seed=1), make_example(37, num_prompt=11, seed=2)]
    batch = pack(examples, 3)
    with torch.inference_mode():
        unrolled = outputs(head, batch, 3)
        at = 0
        for example in examples:
            for position in range(example.num_context, example.length):
                drafts = min(2, len(example.tokens) - position - 3)
                expected = live.outputs(example.tokens, example.features, position + 2, drafts)
                for step in range(drafts + 1):
                    torch.testing.assert_close(unrolled[step][at], expected[step], rtol=1e-4, atol=1e-4)
                at += 1
        torch.testing.assert_close(head.logits(unrolled[0]), live.logits(unrolled[0]), rtol=1e-4, atol=1e-4)


def test_offline_accept_length_is_that_of_a_live_walk(
    make_head: MakeHead, make_example: MakeExample, live: _Live
) -> None:
    head = make_head()
    # Answers that the head itself would give now and then.
    example = make_example(60, num_prompt=4)
    with torch.inference_mode():
        for known in range(5, 58, 2):
            index = live.logits(live.outputs(example.tokens, example.features, known, 0)).argmax(-1)
            example.tokens[known] = int(head.to_target[index])
        found = score(head, [example], 3)
        for depth in range(4):
            known, steps = example.num_prompt + 1, 0
            while known < len(example.tokens):
                right = 0
                while right < depth and known + right < len(example.tokens):
                    outputs = live.outputs(example.tokens, example.features, known, right)
                    if int(head.to_target[live.logits(outputs[-1:]).argmax(-1)]) != example.tokens[known + right]:
                        break
                    right += 1
                known += right + 1
                steps += 1
            assert found.steps[0, depth] == steps
    assert found.tokens[0] == len(example.tokens) - example.num_prompt - 1
    assert found.accept_length(3) > 1, "the walk is worth nothing if no draft token is right"


def test_texts_side_by_side_do_not_see_each_other(make_head: MakeHead, make_example: MakeExample) -> None:
    head = make_head()
    one, other = make_example(25, seed=3), make_example(31, seed=4)
    alone = outputs(head, pack([other], 3), 3)
    together = outputs(head, pack([one, other], 3), 3)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b[-len(a) :], rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 999), share=st.floats(0, 1), multiple=st.integers(1, 8))
@settings(max_examples=20)
def test_rows_that_go_on_do_not_need_the_others(
    make_head: MakeHead, make_example: MakeExample, seed: int, share: float, multiple: int
) -> None:
    head = make_head()
    batch = pack([make_example(25, seed=3), make_example(31, seed=4), make_example(9, seed=5)], 3)
    generator = torch.Generator().manual_seed(seed)
    drafting = head.draft(batch)
    with mock.patch.object(network, "MULTIPLE", multiple):
        for expected in outputs(head, batch, 3):
            torch.testing.assert_close(drafting.hidden, expected[drafting.rows], rtol=1e-5, atol=1e-5)
            keep = torch.rand(len(drafting.rows), generator=generator) < share
            before, kept = len(drafting.rows), drafting.rows[keep]
            drafting.extend(keep)
            assert torch.equal(drafting.rows[drafting.counts], kept)
            assert len(drafting.rows) in (before, -(-len(kept) // multiple) * multiple)


def test_drafting_from_other_tokens_keeps_what_was_learned(make_head: MakeHead, make_example: MakeExample) -> None:
    head = make_head()
    batch = pack([make_example()], 1)
    output = torch.randn(96, 64)
    head.set_draft_vocabulary(torch.arange(48), output)
    hidden = head.draft(batch).hidden
    first = head.logits(hidden)
    head.set_draft_vocabulary(torch.arange(24, 72), output)
    assert head.to_draft[30] == 6 and head.to_draft[10] == -1 and head.to_target[0] == 24
    hidden = head.draft(batch).hidden
    torch.testing.assert_close(head.logits(hidden)[:, :24], first[:, 24:])
    maps = cast(dict[str, Tensor], head.tensors())
    assert (maps["d2t"] + torch.arange(48)).tolist() == list(range(24, 72))
    assert maps["t2d"].nonzero().flatten().tolist() == list(range(24, 72))
