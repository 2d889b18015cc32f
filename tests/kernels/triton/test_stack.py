"""Layers in Triton's kernels: the same numbers as torch's, one copy to the device, and graphs that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from recorded_graph import HostTraffic, NotRecordedError, RecordedGraph
from stacks import CPU, SMALL, VOCAB, WHOLE, batch, built, names, recording
from torch import Tensor

from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.compute import PACKED, ChainInputs, Compute, Formats, LayerShape, Mixture, Stack
from slipstream.kernels.kv_cache import PagedKVCache, bits
from slipstream.kernels.torch_stack import TorchCompute
from slipstream.kernels.triton import attention, kv_cache
from slipstream.kernels.triton.compute import TritonCompute
from slipstream.kernels.triton.graphs import GraphPool
from slipstream.kernels.triton.kv_cache import TritonKVCache

PLAIN = LayerShape(hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=16, norm_eps=1e-5)
SHAPES = {
    "llama": PLAIN,
    "qwen2": LayerShape(32, 48, 4, 2, 16, 1e-6, qkv_bias=True),
    "qwen3": LayerShape(32, 48, 2, 1, 32, 1e-6, qk_norm=True),
    "eagle": LayerShape(32, 48, 4, 2, 16, 1e-5, reads="both"),
    "plain": LayerShape(32, 48, 4, 2, 16, 1e-5, reads="plain"),
    "gemma": LayerShape(32, 48, 4, 2, 16, 1e-6, qk_norm=True, is_gemma=True, score_scale=0.3, embedding_scale=32**0.5),
    "mixture": LayerShape(32, 48, 4, 2, 16, 1e-6, qk_norm=True, mixture=Mixture(5, 2, 24, True)),
}
STEPS = (
    batch([0, 1], [9, 3], [9, 3]),
    batch([0, 1, 2], [1, 4, 2], [10, 7, 2]),  # decode, verification, and a prompt
    batch([0, 3], [2, 2], [12, 12], np.array([[0, 0, 10]], np.int32)),  # a branch, which shares a token
)


def computed(stack: Stack, cache: PagedKVCache, shape: LayerShape) -> list[Tensor]:
    found = []
    generator = torch.Generator().manual_seed(1)
    for step in STEPS:
        given = None if shape.reads == "normed" else torch.randn(step.num_tokens, shape.hidden, generator=generator)
        done = stack.forward(step, cache, given, taps=(0, 2))
        assert done.features is not None
        found += [done.hidden, done.features, stack.logits(done.hidden, step.q_start[1:] - 1).clone()]
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_torch_does(name: str, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and name != "llama":
        pytest.skip("formats of numbers are a matter of kernels")
    shape, formats = SHAPES[name], Formats.of(dtype)
    expected = computed(*built(TorchCompute(formats, CPU), shape, (0, 4)), shape)
    found = computed(*built(TritonCompute(formats, CPU), shape, (0, 4)), shape)
    for one, other in zip(found, expected, strict=True):
        away = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert one.dtype == other.dtype and away < (2e-5 if dtype is torch.float32 else 0.03)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [TorchCompute, TritonCompute])
def test_what_is_filled_is_read_again(name: str, kind: type[Compute]) -> None:
    """By rows: tensors may be parts of larger ones."""
    [layer] = kind(Formats.of(torch.float32), CPU).layers(SHAPES[name], 1)
    sizes = names(SHAPES[name])
    tensors = {each: torch.randn(size) for each, size in sizes.items()}
    for each, tensor in tensors.items():
        layer.fill(each, tensor[:3])
        layer.fill(each, tensor[3:], 3)
    for each, tensor in tensors.items():
        rows = torch.arange(1, len(tensor))
        assert torch.equal(layer.read(each, rows), tensor[1:]), each
    assert layer.num_bytes == sum(4 * tensor.numel() for tensor in tensors.values())


NUMBERS = Formats.of(torch.float32)
KEPT = {
    "numbers": (SMALL, NUMBERS),
    "int8": (SMALL, replace(NUMBERS, kv=torch.int8)),
    "fp8": (SMALL, replace(NUMBERS, kv=torch.float8_e4m3fn)),
    "q8": (WHOLE, replace(NUMBERS, weights=PACKED, quantize="q8")),
    "q4, int8": (WHOLE, replace(NUMBERS, weights=PACKED, quantize="q4", kv=torch.int8)),
}
"""How weights and the cache are kept."""


@pytest.mark.parametrize("kept", KEPT)
def test_a_graph_serves_every_batch_of_its_size(kept: str) -> None:
    shape, formats = KEPT[kept]
    eager, cache = built(TritonCompute(formats, CPU), shape, (5,))
    compute, graphs = recording(formats)
    replayed, other_cache = built(compute, shape, (5,))
    for step in (
        batch([0, 1], [5, 3], [5, 3]),  # prompts
        batch([0, 1, 2], [1, 4, 2], [6, 7, 2]),  # decode, verification, and a prompt
        batch([0, 3, 1], [2, 2, 1], [8, 8, 8], np.array([[0, 0, 6], [4, 4, 15]], np.int32)),  # a branch, and decode
    ):
        one, other = eager.forward(step, cache, taps=(1,)), replayed.forward(step, other_cache, taps=(1,))
        assert torch.equal(one.hidden, other.hidden)
        assert one.features is not None and other.features is not None and torch.equal(one.features, other.features)
        logits = [stack.logits(done.hidden) for stack, done in ((eager, one), (replayed, other))]
        assert torch.equal(*logits)
    assert isinstance(cache, TritonKVCache) and isinstance(other_cache, TritonKVCache)
    assert torch.equal(bits(cache.memory), bits(other_cache.memory)) and torch.equal(cache._scales, other_cache._scales)
    assert len(graphs) == 1 and cache._scales.any() == formats.cache.startswith(("int", "fp8"))


@pytest.mark.parametrize("kept", KEPT)
def test_nothing_of_a_batch_is_baked_into_a_graph(kept: str) -> None:
    """Two graphs of a size, recorded of different batches, are the same."""
    shape, formats = KEPT[kept]
    compute, graphs = recording(formats)
    stack, cache = built(compute, shape, (5,))
    steps = batch([0, 1], [2, 1], [2, 1]), batch([1, 0, 2], [1, 2, 1], [20, 11, 2], np.array([[0, 7, 3]], np.int32))
    for step in steps:
        stack.forward(step, cache)
        compute.graphs.forget(stack)
    one, other = (graph.trace for graph in graphs)
    assert one == other and len(one) > 10


class Likeliest:
    kind = "likeliest"

    def __call__(self, logits: Tensor, step: Tensor, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        tokens = logits.argmax(-1).int()
        return tokens, torch.stack((tokens, columns[0] + step), 1)


@dataclass
class Verified:
    """A sequence in a step, of which ``right`` draft tokens are right."""

    row: int
    known: int  # new tokens that are known
    length: int  # with these
    drafted: int
    right: int
    places: int
    wanted: int


CHAINS = (
    [Verified(0, 1, 5, 3, 1, 6, 3), Verified(1, 1, 9, 0, 0, 3, 1), Verified(2, 2, 16, 1, 1, 2, 2)],
    [Verified(2, 1, 12, 0, 0, 4, 3), Verified(3, 3, 20, 2, 0, 3, 0), Verified(1, 1, 31, 1, 1, 1, 3)],
    [Verified(0, 1, 3, 3, 3, 13, 3), Verified(1, 1, 9, 2, 1, 7, 2)],
)


@pytest.mark.parametrize("bucket", [True, False], ids=["graphs", "piece by piece"])
def test_a_chain_is_that_of_one_token_after_another(bucket: bool) -> None:
    """Also after runs before recording, and of sequences that have no place for so many tokens."""
    shape = replace(SMALL, reads="both")
    eager, cache = built(TritonCompute(Formats.of(torch.float32), CPU), shape, (5,))
    compute, graphs = recording() if bucket else (TritonCompute(Formats.of(torch.float32), CPU), [])
    record = compute.graphs._record
    compute.graphs._record = lambda graph, work: (work(), record(graph, work))[1]  # type: ignore[method-assign]
    replayed, other_cache = built(compute, shape, (5,))
    generator, chance = torch.Generator().manual_seed(2), np.random.default_rng(3)
    for rows in CHAINS:
        counts, ends = [each.known + each.drafted for each in rows], [each.length + each.drafted for each in rows]
        step = batch([each.row for each in rows], counts, ends)
        hidden = torch.randn(sum(counts), shape.hidden, generator=generator)
        drawn = chance.integers(0, VOCAB, sum(each.drafted + 1 for each in rows) + 2).astype(np.int32)
        first = np.cumsum([0, *(each.drafted + 1 for each in rows)], dtype=np.int32)
        verified = np.full((len(rows), 3), -1, np.int32)
        ids = step.token_ids.copy()
        for at, each in enumerate(rows):
            own = drawn[2 + first[at] : 2 + first[at + 1]]
            verified[at, : each.drafted] = own[: each.drafted]
            if each.right < each.drafted:
                verified[at, each.right] = (own[each.right] + 1) % VOCAB
            ids[step.q_start[at] + each.known - 1 : step.q_start[at + 1]] = np.arange(
                -1 - first[at], -1 - first[at + 1], -1
            )
        last = step.q_start[1:] - 1 - np.array([each.drafted for each in rows], np.int32)
        column = np.array([each.row for each in rows], np.int32)
        places, wanted = (
            np.array(x, np.int32) for x in zip(*((each.places, each.wanted) for each in rows), strict=True)
        )
        samples = np.arange(2, 2 + first[-1], dtype=np.int32)  # the first ones are somebody else's
        given = ChainInputs(
            replace(step, token_ids=ids), samples, first[:-1], verified, last, places, wanted, 4, (column,)
        )
        chains = replayed.chains(given, other_cache)
        assert chains is not None
        columns = [torch.from_numpy(array) for array in chains.arrays]
        told, standing = chains.make(columns, torch.from_numpy(drawn), hidden.clone(), Likeliest())
        assert told.shape == (4, len(rows), 2)
        for at, each in enumerate(rows):
            begin, length = int(step.q_start[at]), each.length + each.right
            count = each.known + each.right
            tokens = step.token_ids[begin : begin + count].copy()
            tokens[each.known - 1 :] = drawn[2 + first[at] : 2 + first[at] + each.right + 1]
            known = replace(batch([each.row], [count], [length]), token_ids=tokens)
            x = eager.forward(known, cache, hidden[begin : begin + count].clone()).hidden[-1:]
            left = max(0, min(each.wanted, each.places - each.right))
            for node in range(left + 1):
                [token] = eager.logits(x).argmax(-1).tolist()
                assert told[node, at].tolist() == [token, each.row + each.right + node]
                if node < left:
                    one = replace(batch([each.row], [1], [length + node + 1]), token_ids=np.array([token], np.int32))
                    x = eager.forward(one, cache, x).hidden
            assert standing[at].tolist()[:2] == [each.drafted - each.right, drawn[2 + first[at] + each.right]]
            assert standing[at].tolist()[2:] == told[:, at, 0].tolist()
            blocks = step.block_tables[each.row]
            for position in range(each.length - each.known, length + left):
                cell = int(blocks[position // step.block_size]) * step.block_size + position % step.block_size
                mine, theirs = (kept.memory.view(1, 2, -1, 16)[:, :, cell] for kept in (cache, other_cache))
                torch.testing.assert_close(mine, theirs)
    if bucket:
        assert len(graphs) == 3, "what is new is of one size, and there are chains of two"


def test_another_cache_or_other_weights_need_other_graphs() -> None:
    compute, graphs = recording()
    stack, cache = built(compute, SMALL, (0,))
    step = batch([0], [2], [2])
    first = stack.forward(step, cache).hidden
    stack.forward(step, cache)
    assert len(graphs) == 1
    cache.release()
    cache.restore()
    assert torch.equal(stack.forward(step, cache).hidden, first) and len(graphs) == 2
    embedding, norm = compute.weight(VOCAB, SMALL.hidden), compute.norm(SMALL.hidden)
    embedding.fill(torch.ones(VOCAB, SMALL.hidden))
    layers = compute.layers(SMALL, 1)
    for name, size in names(SMALL).items():
        layers[0].fill(name, torch.ones(size))
    stack.use(embedding, layers, norm, embedding)
    assert not torch.equal(stack.forward(step, cache).hidden, first) and len(graphs) == 3


class Unkept:
    """Keeps nothing of what it recorded, as a graph of CUDA's keeps addresses only."""

    def record(self, work: Callable[[], Any]) -> Any:
        return work()

    def replay(self) -> None: ...


def test_with_a_caches_memory_goes_that_of_its_graphs() -> None:
    """An engine that sleeps gives both back."""
    compute = TritonCompute(Formats.of(torch.float32), CPU, GraphPool(CPU, 1 << 30, Unkept))
    stack, cache = built(compute, SMALL, (0,))
    stack.forward(batch([0], [2], [2]), cache)
    assert len(compute.graphs) == 1
    cache.release()
    assert len(compute.graphs) == 0


def test_graphs_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded is replayed, and the rest launched piece by piece; without memory, everything is."""
    compute, graphs = recording()
    taken = iter(range(0, 9 << 30, 600 << 20))
    monkeypatch.setattr(compute.graphs, "_memory", lambda: next(taken))
    done: list[str] = []
    for key in ("one", "two", "three", "one"):
        compute.graphs.run(compute, key, lambda: done.append(key))  # noqa: B023
    assert done == ["one", "two", "three"] and len(graphs) == 2 and compute.graphs.num_bytes == 1200 << 20
    assert GraphPool(CPU, 0).bucket(1) is None


def test_nothing_is_launched_for_rows_where_there_are_only_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside prompts no more than there are, whatever the prompts' length."""
    asked: list[tuple[int, int]] = []

    def attended(*given: Any, **options: Any) -> Tensor:
        assert options["prompt"]
        asked.append((options["row_tokens"], options["max_context"]))
        return attention.attention(*given, **options)

    monkeypatch.setattr(kv_cache, "attention", attended)
    stack, cache = built(TritonCompute(Formats.of(torch.float32), CPU), SMALL, (0,))
    stack.forward(batch([0], [40], [40]), cache)
    stack.forward(batch([1, 0], [3, 40], [3, 45]), cache)
    assert set(asked) == {(0, 1), (3, 3)}


@pytest.mark.parametrize(("tokens", "kept"), [(2, "numbers"), (5, "numbers"), (5, "q4, int8")])
def test_a_step_is_one_copy_to_the_device(tokens: int, kept: str) -> None:
    """Whatever travels with it, and whether it is replayed or launched piece by piece."""
    shape, formats = KEPT[kept]
    for compute in (recording(formats)[0], TritonCompute(formats, CPU)):
        stack, cache = built(compute, shape, (0,))
        columns = np.array([tokens - 1], np.int32), np.array([0.5], np.float32), np.array([0.25], np.float64)
        step = batch([0], [tokens], [tokens], columns=columns)
        stack.forward(step, cache)
        with HostTraffic() as counted:
            done = stack.forward(step, cache)
            logits = stack.logits(done.hidden, done.columns[0])
        assert (counted.to_device, counted.to_host) == (1, 0)
        assert logits.shape == (1, VOCAB) and [float(column) for column in done.columns[1:]] == [0.5, 0.25]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x + torch.from_numpy(np.ones(2, np.float32)),
    ],
)
def test_what_cuda_would_refuse_is_refused(work: Any) -> None:
    x = torch.ones(2)
    with pytest.raises(NotRecordedError):
        RecordedGraph().record(lambda: work(x))


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_deterministic_rows_have_the_same_bits_in_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, beside others, in one piece, in several, and by graphs; so do their logits."""
    shape = SMALL if name == "llama" else replace(SMALL, mixture=Mixture(3, 2, 16, True))
    made = TritonCompute(Formats.of(torch.float32), CPU, invariant=True)
    # Tiles of prompts, which have other bits on a GPU: a segment must not get them for being long.
    monkeypatch.setattr(attention, "prompt_tiles", None)
    assert made.is_batch_invariant and TritonCompute.can_be_batch_invariant
    counted: list[RecordedGraph] = []

    def graph() -> RecordedGraph:
        counted.append(RecordedGraph())
        return counted[-1]

    pool = GraphPool(CPU, 1 << 30, graph)
    found = []
    for compute, steps in (
        (made, [batch([0], [7], [7])]),
        (made, [batch([1, 0], [3, 7], [3, 7])]),
        (made, [batch([0], [3], [3]), batch([2, 0], [2, 4], [2, 7])]),
        (TritonCompute(Formats.of(torch.float32), CPU, pool, invariant=True), [batch([0, 2], [7, 1], [7, 1])]),
    ):
        stack, cache = built(compute, shape, (0,))
        rows = []
        for step in steps:
            done = stack.forward(tokens_of_sequences(step), cache)
            logits = stack.logits(done.hidden)
            own = step.table_row.tolist().index(0)
            rows.append(torch.cat((done.hidden, logits), 1)[step.q_start[own] : step.q_start[own + 1]].clone())
        found.append(torch.cat(rows))
    assert counted and all(torch.equal(found[0], other) for other in found[1:])


def tokens_of_sequences(step: RaggedBatch) -> RaggedBatch:
    """The same, with tokens that go by sequence and position."""
    row = step.table_row.repeat(np.diff(step.q_start))
    ids = ((7 * step.positions + 11 * row) % VOCAB).astype(np.int32)
    return RaggedBatch(**{name: getattr(step, name) for name in step.__slots__} | {"token_ids": ids})
