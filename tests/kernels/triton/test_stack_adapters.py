"""Layers in Triton's kernels with adapters: as torch computes them, in graphs that stay when adapters come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from recorded_graph import HostTraffic, RecordedGraph
from stacks import CPU, SMALL, VOCAB, batch, built, names, recording
from torch import Tensor

from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.compute import Compute, Formats, LayerShape, Mixture, Stack
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.torch_stack import MATRICES, TorchCompute
from slipstream.kernels.triton import adapter, attention
from slipstream.kernels.triton.compute import TritonCompute
from slipstream.kernels.triton.graphs import GraphPool

RANKS = (3, 20)


def matrices(shape: LayerShape, rank: int, layers: int, only: str = "") -> list[dict[str, tuple[Tensor, Tensor]]]:
    random = torch.Generator().manual_seed(rank)
    known = {f"{name}.weight": name for name in MATRICES.values() if only in name}
    sizes = {known[name]: size for name, size in names(shape).items() if name in known}
    return [
        {
            name: (torch.randn(rank, k, generator=random), 0.3 * torch.randn(n, rank, generator=random))
            for name, (n, k) in sizes.items()
        }
        for _ in range(layers)
    ]


def with_adapters(
    make: Compute, shape: LayerShape, windows: tuple[int, ...], ranks: tuple[int, ...] = RANKS
) -> tuple[Stack, PagedKVCache]:
    stack, cache = built(make, shape, windows)
    stack.use_adapters([make.adapter(shape, matrices(shape, rank, len(windows))) for rank in ranks])
    return stack, cache


def told(step: RaggedBatch, numbers: list[int]) -> RaggedBatch:
    """With an adapter for each segment."""
    found = np.repeat(np.array(numbers, np.int32), np.diff(step.q_start)) if any(numbers) else None
    return RaggedBatch(**{name: getattr(step, name) for name in step.__slots__} | {"adapters": found})


STEPS = (
    told(batch([0, 1], [9, 3], [9, 3]), [1, 0]),
    told(batch([0, 1, 2], [1, 4, 2], [10, 7, 2]), [1, 0, 2]),  # decode, verification, and a prompt
    told(batch([0, 3], [2, 2], [12, 12], np.array([[0, 0, 10]], np.int32)), [1, 1]),  # a branch, which shares a token
    told(batch([1], [1], [8]), [0]),
)


@pytest.mark.parametrize("name", ["llama", "gemma", "mixture"])
def test_it_computes_what_torch_does(name: str) -> None:
    shapes = {
        "llama": SMALL,
        "gemma": replace(SMALL, qk_norm=True, is_gemma=True),
        "mixture": replace(SMALL, mixture=Mixture(3, 2, 16, True)),
    }
    formats = Formats.of(torch.float32)
    windows = (0, 4) if name == "llama" else (4,)
    found, plain = [], []
    for kind in (TorchCompute, TritonCompute):
        stack, cache = with_adapters(kind(formats, CPU), shapes[name], windows)
        found.append([stack.forward(step, cache).hidden for step in STEPS])
        stack, cache = built(kind(formats, CPU), shapes[name], windows)
        plain.append([stack.forward(replace(step, adapters=None), cache).hidden for step in STEPS])
    for step, (expected, one, without) in enumerate(zip(*found, plain[1], strict=True)):
        assert (one - expected).abs().max() / expected.abs().max() < 5e-5
        assert torch.equal(one, without) == (STEPS[step].adapters is None)
        if step < 2:
            second = slice(*STEPS[step].q_start[1:3])
            assert torch.equal(one[second], without[second]), "rows without an adapter have the bits they have"


def test_a_graph_serves_whatever_adapters_there_are() -> None:
    """One that was recorded with some, and other ones come, with their number or another; no step needs another."""
    compute, graphs = recording()
    stack, cache = with_adapters(compute, SMALL, (5,), ranks=(3, 16))
    plain = TritonCompute(Formats.of(torch.float32), CPU)
    eager, other_cache = with_adapters(plain, SMALL, (5,), ranks=(3, 16))
    steps = [
        told(batch([0, 1], [5, 3], [5, 3]), [1, 2]),
        told(batch([0, 1, 2], [1, 4, 2], [6, 7, 2]), [2, 0, 1]),
        told(batch([0, 1], [4, 4], [10, 11]), [3, 1]),
    ]
    for at, step in enumerate(steps):
        if at == 2:  # one leaves, others come
            for made, each in ((compute, stack), (plain, eager)):
                first, third = (made.adapter(SMALL, matrices(SMALL, rank, 1)) for rank in (9, 5))
                each.use_adapters([first, None, third])
        one, other = eager.forward(step, other_cache), stack.forward(step, cache)
        assert torch.equal(one.hidden, other.hidden)
    assert len(graphs) == 1
    stack.forward(told(batch([3], [8], [8]), [0]), cache)
    assert len(graphs) == 2, "steps without any do not compute them"
    stack.use_adapters([compute.adapter(SMALL, matrices(SMALL, 17, 1))])
    stack.forward(told(batch([3], [8], [8]), [1]), cache)
    assert len(graphs) == 3, "there was no room for so large a rank"


def test_nothing_of_a_batch_is_baked_into_a_graph() -> None:
    compute, graphs = recording()
    stack, cache = with_adapters(compute, SMALL, (5,))
    others = [compute.adapter(SMALL, matrices(SMALL, rank, 1)) for rank in (20, 2, 7)]
    steps = told(batch([0, 1], [2, 1], [2, 1]), [2, 0]), told(batch([1, 0, 2], [1, 2, 1], [20, 11, 2]), [0, 3, 1])
    for step in steps:
        stack.forward(step, cache)
        compute.graphs.forget(stack)
        stack.use_adapters(others)
    one, other = (graph.trace for graph in graphs)
    assert one == other
    kernels = [entry[0] for entry in one]
    assert kernels.count("shrink_kernel") == kernels.count("expand_kernel") == 4


def test_what_no_adapter_changes_is_not_launched_and_more_adapters_than_there_was_room_for() -> None:
    compute, graphs = recording()
    stack, cache = built(compute, SMALL, (5,))
    one = compute.adapter(SMALL, matrices(SMALL, 4, 1, only="v_proj"))
    stack.use_adapters([one])
    step = told(batch([0], [2], [2]), [1])
    before = stack.forward(step, cache).hidden
    assert [entry[0] for entry in graphs[0].trace].count("expand_kernel") == 1
    many = adapter.LEAST_ADAPTERS + 3
    stack.use_adapters([None] * (many - 1) + [one])
    assert torch.equal(stack.forward(told(batch([0], [2], [2]), [many]), cache).hidden, before) and len(graphs) == 2


def test_a_step_is_one_copy_to_the_device() -> None:
    for compute in (recording()[0], TritonCompute(Formats.of(torch.float32), CPU)):
        stack, cache = with_adapters(compute, SMALL, (0,))
        step = told(batch([0], [2], [2], columns=(np.array([1], np.int32),)), [2])
        stack.forward(step, cache)
        with HostTraffic() as counted:
            done = stack.forward(step, cache)
            assert stack.logits(done.hidden, done.columns[0]).shape == (1, VOCAB)
        assert (counted.to_device, counted.to_host) == (1, 0)


def test_deterministic_rows_have_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, beside rows with other adapters, in one piece, in several, and by graphs; whatever number it has."""
    monkeypatch.setattr(attention, "prompt_tiles", None)
    pool = GraphPool(CPU, 1 << 30, RecordedGraph)
    made = TritonCompute(Formats.of(torch.float32), CPU, invariant=True)
    found = []
    for compute, ranks, steps in (
        (made, (20,), [(batch([0], [7], [7]), [1])]),
        (made, (3, 20), [(batch([1, 0], [3, 7], [3, 7]), [1, 2])]),
        (made, (3, 5, 20), [(batch([0], [3], [3]), [3]), (batch([2, 0], [2, 4], [2, 7]), [0, 3])]),
        (
            TritonCompute(Formats.of(torch.float32), CPU, pool, invariant=True),
            (20, 40),
            [(batch([0, 2], [7, 1], [7, 1]), [1, 2])],
        ),
    ):
        stack, cache = with_adapters(compute, SMALL, (0,), ranks)
        rows = []
        for step, numbers in steps:
            step = told(step, numbers)
            row = step.table_row.repeat(np.diff(step.q_start))
            step = replace(step, token_ids=((7 * step.positions + 11 * row) % VOCAB).astype(np.int32))
            own = step.table_row.tolist().index(0)
            rows.append(stack.forward(step, cache).hidden[step.q_start[own] : step.q_start[own + 1]].clone())
        found.append(torch.cat(rows))
    assert all(torch.equal(found[0], other) for other in found[1:])
