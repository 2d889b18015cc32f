"""Every kernel as a case: what to give it, what must come out, and what it has to move and to compute for that.

One table for all that asks about kernels: whether they are right on this machine, how fast they are, and how they
compile for another one. Those of a backend are cases where the backend runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels import ops, reference
from slipstream.kernels.batch import RaggedBatch, make_batch
from slipstream.kernels.kv_cache import CacheShape, PagedKVCache, TorchKVCache, as_kept
from slipstream.kernels.triton import launch

Outputs = tuple[Tensor, ...]
TRITON = "triton"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference from the reference, relative to the largest number in it: a few roundings of the format."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model and a step over it look like."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int
    """Rows of a step, for operations on rows."""
    streams: int
    """Sequences that are decoded."""
    context: int
    """Their length."""
    chunk: int
    """Tokens of a prompt in one step."""
    block_size: int = 16

    def of_step(self, tokens: int) -> Sizes:
        """The same model, in steps of so many tokens."""
        return replace(self, tokens=tokens, streams=tokens, chunk=tokens)


TINY = Sizes(64, 96, 4, 2, 32, 96, tokens=5, streams=2, context=19, chunk=7)
LLAMA_8B = Sizes(4096, 14336, 32, 8, 128, 128256, tokens=2048, streams=32, context=8192, chunk=2048)
MIDDLE = replace(LLAMA_8B, vocab=32000, tokens=150, streams=9, context=700, chunk=150)
"""Sizes of the 8B shape, for steps whose reference is soon computed."""


class Source:
    """Where cases take tensors from: random ones, or of ``empty`` memory where only shapes matter."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0, empty: bool = False) -> None:
        self.device, self.dtype, self.empty = device, dtype, empty
        self._generator = torch.Generator(device).manual_seed(seed)
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        if self.empty:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        made = torch.empty(shape, dtype=torch.float32, device=self.device)
        return made.normal_(0.0, scale, generator=self._generator).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """[0, 1), float32."""
        made = torch.empty(shape, device=self.device)
        return made if self.empty else made.uniform_(generator=self._generator)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.from_numpy(self._random.integers(0, below, shape)).to(self.device, dtype)

    def batch(self, counts: list[int], lengths: list[int], block_size: int) -> tuple[RaggedBatch, int]:
        """Segments of so many tokens that end sequences of these lengths, and how many blocks these take.

        The sequences' blocks lie scattered in the cache.
        """
        widest = max(-(-length // block_size) for length in lengths)
        blocks = widest * len(lengths)
        tables = self._random.permutation(blocks).reshape(len(lengths), widest).astype(np.int32)
        ids = np.zeros(sum(counts), np.int32)
        rows = np.arange(len(lengths), dtype=np.int32)
        batch = make_batch(ids, np.array(counts, np.int32), np.array(lengths, np.int32), tables, rows, block_size)
        return batch, blocks


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel with its inputs."""

    run: Callable[[], object]
    """What is timed; may be called again and again."""
    found: Callable[[], Outputs]
    """Runs it, and returns what it computed."""
    expected: Callable[[], Outputs]
    """What the reference makes of the same inputs, computed in float32 or more."""
    moved: int
    """Bytes that must be read or written at least."""
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prepare: Callable[[Source, Sizes], Prepared]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def difference(found: Outputs, expected: Outputs) -> float:
    """The largest difference relative to the largest expected number; infinite for other shapes, integers, or NaN."""
    worst = 0.0
    if len(found) != len(expected):
        return float("inf")
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or not one.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(one.long(), other.long().to(one.device)) else float("inf"))
            continue
        ours, theirs = one.double(), other.double().to(one.device)
        ours, theirs = ours.nan_to_num(float("inf"), 1e30, -1e30), theirs.nan_to_num(0.0, 1e30, -1e30)
        if theirs.numel():
            scale = theirs.masked_fill(theirs.abs() > 1e29, 0.0).abs().max().clamp(min=1e-30)
            worst = max(worst, float((ours - theirs).abs().max() / scale))
    return worst


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cases(device: torch.device) -> Iterator[Case]:
    """All that run on this device, in this process."""
    for backend in ops.BACKENDS:
        if backend.runs_on(device) and backend.name != TRITON:
            yield from operations(backend.name)
    yield from attention(TorchKVCache)
    if launch.runs_on(device.type):
        yield from triton_cases(device)


def triton_cases(device: torch.device) -> Iterator[Case]:
    """Those of Triton's kernels, which are imported for that."""
    from slipstream.kernels.triton import cache_cases, linear_cases, row_cases

    yield from operations(TRITON)
    yield from cache_cases.cases(device)
    yield from row_cases.cases()
    yield from linear_cases.cases()


def operations(backend: str) -> Iterator[Case]:
    """The operations of ``ops``, by one backend."""
    float32 = (torch.float32,)
    yield Case(f"rms_norm, {backend}", partial(_rms_norm, backend))
    yield Case(f"rope, {backend}", partial(_rope, backend))
    yield Case(f"silu_mul, {backend}", partial(_silu_mul, backend))
    yield Case(f"linear, {backend}", partial(_linear, backend))
    yield Case(f"embedding, {backend}", partial(_embedding, backend))
    yield Case(f"argmax, {backend}", partial(_argmax, backend), float32)
    yield Case(f"argmax_with_probability, {backend}", partial(_argmax_with_probability, backend), float32)
    yield Case(f"distribution, {backend}", partial(_distribution, backend), float32)
    from slipstream.kernels import draw_cases

    yield from draw_cases.cases(backend)


def called(
    run: Callable[[], Tensor | Outputs], expected: Callable[[], Tensor | Outputs], moved: int, flops: int = 0
) -> Prepared:
    """Functions without arguments that return a tensor, or several."""

    def found() -> Outputs:
        return _outputs(run())

    return Prepared(found, found, lambda: _outputs(expected()), moved, flops)


def prepared(
    backend: str,
    run: Callable[..., object],
    expected: Callable[..., object],
    tensors: Outputs,
    moved: int,
    flops: int = 0,
) -> Prepared:
    """An operation on tensors, of which those of a float format are widened for the reference."""

    def called() -> Outputs:
        with ops.use_backend(backend):
            return _outputs(run(*tensors))

    def wide() -> Outputs:
        return _outputs(expected(*(each.float() if each.is_floating_point() else each for each in tensors)))

    return Prepared(called, called, wide, moved, flops)


def _outputs(found: object) -> Outputs:
    if isinstance(found, Tensor):
        return (found,)
    assert isinstance(found, tuple)
    return found


_PLAIN = reference.ReferenceOps()


def _rms_norm(backend: str, source: Source, sizes: Sizes) -> Prepared:
    x, weight = source.normal(sizes.tokens, sizes.hidden), source.normal(sizes.hidden)
    return prepared(
        backend,
        lambda x, weight: ops.rms_norm(x, weight, 1e-5),
        lambda x, weight: _PLAIN.rms_norm(x, weight, 1e-5),
        (x, weight),
        2 * size(x),
    )


def _rope(backend: str, source: Source, sizes: Sizes) -> Prepared:
    x = source.normal(sizes.tokens, sizes.heads, sizes.head_dim)
    angle = source.normal(sizes.tokens, sizes.head_dim // 2, dtype=torch.float32)
    return prepared(backend, ops.rope, _PLAIN.rope, (x, angle.cos(), angle.sin()), 2 * size(x) + 2 * size(angle))


def _silu_mul(backend: str, source: Source, sizes: Sizes) -> Prepared:
    gate, up = (source.normal(sizes.tokens, sizes.intermediate) for _ in range(2))
    return prepared(backend, ops.silu_mul, _PLAIN.silu_mul, (gate, up), 3 * size(gate))


def _linear(backend: str, source: Source, sizes: Sizes) -> Prepared:
    x, weight = source.normal(sizes.tokens, sizes.hidden), source.normal(sizes.intermediate, sizes.hidden, scale=0.02)
    moved = size(x, weight) + sizes.tokens * sizes.intermediate * x.element_size()
    return prepared(
        backend,
        ops.linear,
        lambda x, weight: x @ weight.T,
        (x, weight),
        moved,
        2 * sizes.tokens * sizes.hidden * sizes.intermediate,
    )


def _embedding(backend: str, source: Source, sizes: Sizes) -> Prepared:
    ids, weight = source.integers(sizes.vocab, sizes.tokens), source.normal(sizes.vocab, sizes.hidden)
    moved = 2 * sizes.tokens * sizes.hidden * weight.element_size()
    return prepared(backend, ops.embedding, _PLAIN.embedding, (ids, weight), moved)


def _argmax(backend: str, source: Source, sizes: Sizes) -> Prepared:
    logits = source.normal(sizes.streams, sizes.vocab)
    return prepared(backend, ops.argmax, _PLAIN.argmax, (logits,), size(logits))


def _argmax_with_probability(backend: str, source: Source, sizes: Sizes) -> Prepared:
    logits = source.normal(sizes.streams, sizes.vocab, scale=3.0)
    expected = _PLAIN.argmax_with_probability
    return prepared(backend, ops.argmax_with_probability, expected, (logits,), size(logits))


def _distribution(backend: str, source: Source, sizes: Sizes) -> Prepared:
    logits = source.normal(sizes.streams, sizes.vocab, scale=3.0)
    rows = logits.new_ones(sizes.streams)
    top_k = torch.full_like(rows, min(50, sizes.vocab // 2), dtype=torch.int32)
    parameters = (0.8 * rows, top_k, 0.01 * rows, 0.9 * rows)
    return prepared(
        backend,
        lambda logits, *rest: ops.distribution(logits.clone(), *rest),  # which may be overwritten
        lambda logits, *rest: _PLAIN.distribution(logits.clone(), *rest),
        (logits, *parameters),
        2 * size(logits),
    )


@dataclass(frozen=True, slots=True)
class Attended:
    """Segments of a step, and how they are attended to."""

    name: str
    segments: Callable[[Sizes], tuple[list[int], list[int]]]
    """Tokens of each, and how long its sequence is with them."""
    window: int = 0
    softcap: float = 0.0
    is_shared: bool = False
    """Whether the first half of all sequences is the same, and lies in the same blocks."""
    kept: torch.dtype | None = None
    """Format of keys and values in the cache; by default that of queries."""


def _mixed(sizes: Sizes) -> tuple[list[int], list[int]]:
    """A chunk, verifications and decodes of sequences of all lengths."""
    lengths = [max(sizes.context - 7 * i, 6) for i in range(sizes.streams)]
    counts = [min(1 + 2 * (i % 3), length) for i, length in enumerate(lengths)]
    return [sizes.chunk, *counts], [sizes.chunk, *lengths]


ATTENDED = (
    Attended("decode", lambda s: ([1] * s.streams, [s.context] * s.streams)),
    Attended("verify 5", lambda s: ([5] * s.streams, [s.context] * s.streams)),
    Attended("prompt", lambda s: ([s.chunk], [s.chunk])),
    Attended("chunk", lambda s: ([s.chunk], [max(s.context, s.chunk)])),
    Attended("mixed", _mixed),
    Attended("mixed, window", _mixed, window=11),
    Attended("mixed, soft cap", _mixed, softcap=20.0),
)


SHARED = Attended("decode, half of it shared", ATTENDED[0].segments, is_shared=True)
MakeCache = Callable[[CacheShape, int, torch.device], PagedKVCache]


def attention(kind: type[PagedKVCache]) -> Iterator[Case]:
    """Storing keys and values, and attention over them, in one layout of the cache."""
    name = kind.__name__.removesuffix("KVCache").lower()
    for attended in ATTENDED:
        yield attention_case(name, kind, attended)
    yield Case(f"store, {name}", partial(_store, kind))


def attention_case(name: str, make: MakeCache, attended: Attended) -> Case:
    """``name`` of what computes it."""
    return Case(f"attention {attended.name}, {name}", partial(_attention, make, attended))


def _attention(make: MakeCache, attended: Attended, source: Source, sizes: Sizes) -> Prepared:
    counts, lengths = attended.segments(sizes)
    whole, blocks = source.batch(lengths, lengths, sizes.block_size)
    cache = _cache(make, source, sizes, blocks, attended.kept)
    keys, values = (source.normal(sum(lengths), sizes.kv_heads, sizes.head_dim) for _ in range(2))
    shared = 0
    if attended.is_shared:
        shared = -(-sizes.context // 2 // sizes.block_size) * sizes.block_size
        whole.block_tables[:, : shared // sizes.block_size] = whole.block_tables[0, : shared // sizes.block_size]
        for begin in whole.q_start[:-1].tolist():
            for each in (keys, values):
                each[begin : begin + shared] = each[:shared]
    cache.plan(whole).store(0, keys, values)
    starts = np.array(lengths, np.int32)
    step = make_batch(
        np.zeros(sum(counts), np.int32),
        np.array(counts, np.int32),
        starts,
        whole.block_tables,
        whole.table_row,
        sizes.block_size,
    )
    q = source.normal(sum(counts), sizes.heads, sizes.head_dim)
    scale = sizes.head_dim**-0.5
    plan = cache.plan(step)

    def expected() -> Outputs:
        wide = (as_kept(x, attended.kept).split_with_sizes(lengths) for x in (keys, values))
        parts = zip(q.split_with_sizes(counts), *wide, strict=True)
        window, softcap = attended.window, attended.softcap
        return (torch.cat([reference.attention(q.float(), k, v, scale, window, softcap) for q, k, v in parts]),)

    # With a window, a segment sees the keys of its first token's window and its own.
    seen = [min(length, (attended.window or length) + count - 1) for count, length in zip(counts, lengths, strict=True)]
    pairs = sum(count * length - count * (count - 1) // 2 for count, length in zip(counts, seen, strict=True))
    kept = sum(seen) - shared * (len(lengths) - 1)
    moved = 2 * size(q) + kept * type(cache).block_bytes(cache.shape) // sizes.block_size
    flops = 4 * sizes.heads * sizes.head_dim * pairs

    def found() -> Outputs:
        return (plan.attend(0, q, scale, attended.window, attended.softcap),)

    return Prepared(found, found, expected, moved, flops)


def _store(kind: MakeCache, source: Source, sizes: Sizes) -> Prepared:
    """The keys and values that a step stores, read by attention of one token to itself."""
    batch, blocks = source.batch([sizes.tokens], [sizes.tokens], sizes.block_size)
    cache = _cache(kind, source, sizes, blocks, None)
    k, v = (source.normal(sizes.tokens, sizes.kv_heads, sizes.head_dim) for _ in range(2))
    q = source.normal(sizes.tokens, sizes.heads, sizes.head_dim)
    plan = cache.plan(batch)

    def found() -> Outputs:
        plan.store(0, k, v)
        return (plan.attend(0, q, 0.1, window=1),)

    def expected() -> Outputs:
        return (v.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1).float(),)

    return Prepared(lambda: plan.store(0, k, v), found, expected, 4 * size(k))


def _cache(make: MakeCache, source: Source, sizes: Sizes, blocks: int, kept: torch.dtype | None) -> PagedKVCache:
    shape = CacheShape(1, sizes.block_size, sizes.kv_heads, sizes.head_dim, kept or source.dtype)
    return make(shape, blocks, source.device)
