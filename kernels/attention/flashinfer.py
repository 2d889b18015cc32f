"""FlashInfer's attention over the paged cache (Ye et al. 2025): its FA2 kernels for segments of any length.

Decode, verification, branches and chunks all go through the wrapper for prompts with a paged cache, as ragged segments.
What would make a segment's bits depend on the others in its batch is taken out as far as FlashInfer lets us: keys go in
splits of a fixed number of blocks, and since it chooses the tile of a call by the mean length of its segments,
there is a call for each tile, with the segments that would get this tile alone. A chunk of another length may still get
another tile.

Where many segments begin with the same blocks, as those of requests with one system prompt do, these are read once for
all of them (cascade inference), and both parts of the softmax are merged; this does depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.attention.backend import Step, StepAttention, UnavailableError
from slipstream.kernels.batch import Int32, RaggedBatch

WORKSPACE_BYTES = 256 << 20
"""For the results of splits, of one call at a time."""
SPLIT_TOKENS = 1024
"""Keys of a split, whatever the batch."""
SHARED_TOKENS, SHARERS = 512, 4
"""A beginning is read once for all where it is so long, and so many segments have it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Segments that go through one call: tokens of the batch, and the blocks that they see."""

    name: str
    tokens: Int32 | None
    """Which tokens of the batch, in the order of the segments; None for all of them as they are."""
    q_start: Int32
    """[segments + 1], into the tokens."""
    kv_start: Int32
    """[segments + 1], into the blocks."""
    blocks: Int32
    last_length: Int32
    """[segments]: tokens in the last block of each."""
    causal: bool = True
    """Whether the tokens are the last of what they see, or come behind all of it."""
    is_split: bool = True
    """Whether keys are cut into splits, whose results go through the workspace."""


def tile(tokens: int, group: int, head_dim: int) -> int:
    """Rows of the tile that FlashInfer takes for such a segment, with ``group`` query heads per KV head."""
    rows = tokens * group
    return 16 if rows <= 16 else 64 if rows <= 64 or head_dim >= 256 else 128


def parts(batch: RaggedBatch, heads: int, group: int, head_dim: int, cascade: bool) -> list[Part]:
    """The calls that a batch takes; with ``cascade``, what is common to many segments is one of them.

    Segments of one tile of rows go in splits, as many in a call as the workspace has room for; longer ones have enough
    tiles to occupy a GPU, and room for the splits of all of them would take gigabytes.
    """
    counts = np.diff(batch.q_start)
    sharing = shared_beginnings(batch) if cascade else []
    skipped = np.zeros(batch.num_segments, np.int32)
    """Blocks of each segment that another call reads."""
    for members, blocks in sharing:
        skipped[members] = blocks
    found: list[Part] = []
    kinds: dict[tuple[bool, int, bool, int], list[int]] = {}
    taken: dict[tuple[bool, int], int] = {}
    for segment, count in enumerate(counts.tolist()):
        if count:
            rows = tile(count, group, head_dim)
            splits = -(-(int(batch.kv_len[segment]) - int(skipped[segment]) * batch.block_size) // SPLIT_TOKENS)
            room = WORKSPACE_BYTES // split_bytes(heads, rows, head_dim)
            is_split, call = count * group <= rows and splits <= room, 0
            if is_split:  # in another call where the room of this one ends
                begin = taken.get((bool(skipped[segment]), rows), 0)
                if begin % room + splits > room:
                    begin = (begin // room + 1) * room
                taken[bool(skipped[segment]), rows] = begin + splits
                call = begin // room
            kinds.setdefault((bool(skipped[segment]), rows, is_split, call), []).append(segment)
    for (is_rest, rows, is_split, call), segments in kinds.items():
        name = f"{'rest' if is_rest else 'whole'} {rows} {call if is_split else 'long'}"
        found.append(_part(name, batch, segments, skipped, is_split))
    if sharing:
        found.append(_beginnings(batch, sharing, split_bytes(heads, 128, head_dim), group))
    return found


def split_bytes(heads: int, rows: int, head_dim: int) -> int:
    """What FlashInfer takes of the workspace for one split of one tile (0.6; 0.7 takes less)."""
    return heads * rows * (head_dim + 1) * 4


def shared_beginnings(batch: RaggedBatch) -> list[tuple[list[int], int]]:
    """Segments that begin with the same full blocks, enough of both to be worth a call; and how many blocks."""
    size = batch.block_size
    before = (batch.kv_len - np.diff(batch.q_start)) // size
    """Full blocks that lie before the tokens of a segment."""
    least = SHARED_TOKENS // size
    families: dict[int, list[int]] = {}
    for segment in np.flatnonzero((before >= least) & (np.diff(batch.q_start) > 0)).tolist():
        families.setdefault(int(batch.block_tables[batch.table_row[segment], 0]), []).append(segment)
    found = []
    for members in families.values():
        if len(members) >= SHARERS:
            tables = batch.block_tables[batch.table_row[members], : int(before[members].min())]
            same = (tables == tables[0]).all(axis=0)
            blocks = len(same) if same.all() else int(same.argmin())
            if blocks >= least:
                found.append((members, blocks))
    return found


def _part(name: str, batch: RaggedBatch, segments: Sequence[int], skipped: Int32, is_split: bool) -> Part:
    size = batch.block_size
    counts, lengths = np.diff(batch.q_start)[segments], batch.kv_len[segments]
    ends = -(-lengths // size)
    listed = [
        batch.block_tables[row, first:end]
        for row, first, end in zip(batch.table_row[segments], skipped[segments], ends, strict=True)
    ]
    is_all = len(segments) == batch.num_segments
    tokens = None if is_all else np.concatenate([_tokens(batch, segment) for segment in segments])
    last = lengths - (ends - 1) * size
    begins = _starts(ends - skipped[segments])
    return Part(name, tokens, _starts(counts), begins, _joined(listed), _int32(last), is_split=is_split)


def _beginnings(batch: RaggedBatch, sharing: list[tuple[list[int], int]], bytes_of_split: int, group: int) -> Part:
    tokens = [np.concatenate([_tokens(batch, segment) for segment in members]) for members, _ in sharing]
    blocks = [batch.block_tables[batch.table_row[members[0]], :count] for members, count in sharing]
    splits = sum(
        -(-len(each) * group // 16) * -(-count * batch.block_size // SPLIT_TOKENS)
        for each, (_, count) in zip(tokens, sharing, strict=True)
    )
    return Part(
        "beginnings",
        _joined(tokens),
        _starts(np.array([len(each) for each in tokens])),
        _starts(np.array([count for _, count in sharing])),
        _joined(blocks),
        np.full(len(sharing), batch.block_size, np.int32),
        causal=False,
        is_split=splits * bytes_of_split <= WORKSPACE_BYTES,
    )


def _tokens(batch: RaggedBatch, segment: int) -> Int32:
    return np.arange(batch.q_start[segment], batch.q_start[segment + 1], dtype=np.int32)


def _starts(counts: Any) -> Int32:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _joined(arrays: Sequence[Int32]) -> Int32:
    return _int32(np.concatenate(arrays))


def _int32(array: Any) -> Int32:
    return np.ascontiguousarray(array, np.int32)


class Backend:
    name: ClassVar[str] = "flashinfer"

    def __init__(self, library: Any = None) -> None:
        """``library`` is FlashInfer's module; by default the one that is installed."""
        try:
            self.library = import_module("flashinfer") if library is None else library
        except (ImportError, OSError, RuntimeError) as error:
            raise UnavailableError(f"FlashInfer does not start: {error}") from error
        self._workspaces: dict[torch.device, Tensor] = {}
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        """By wrapper: its last plan has left the host's memory."""

    def plan(self, step: Step) -> StepAttention:
        return _Step(self, step)

    def planned(self, part: Part, q: Tensor, keys: Tensor, scale: float, window: int, softcap: float) -> Any:
        """A wrapper that computes this part with these settings, until the next one with the same name and settings.

        All of them share one workspace, since they run one after the other.
        """
        device = q.device
        key = (part.name, device, q.shape[1:], keys.shape[1:], q.dtype, keys.dtype, scale, window, softcap)
        wrapper = self._wrappers.get(key)
        if wrapper is None:
            if device not in self._workspaces:
                self._workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self._workspaces[device], "NHD", backend="fa2")
            self._wrappers[key] = wrapper
        if (event := self._copied.get(id(wrapper))) is not None:
            event.synchronize()  # it plans in memory that its last copy to the device may still read
        on_host = (torch.from_numpy(each) for each in (part.q_start, part.kv_start, part.blocks, part.last_length))
        size = keys.shape[1]
        wrapper.plan(
            *on_host,
            num_qo_heads=q.shape[1],
            num_kv_heads=keys.shape[2],
            head_dim_qk=q.shape[2],
            page_size=size,
            causal=part.causal,
            sm_scale=scale,
            window_left=window - 1,  # keys before its own; -1 for all
            logits_soft_cap=softcap or None,
            q_data_type=q.dtype,
            kv_data_type=keys.dtype,
            fixed_split_size=SPLIT_TOKENS // size if part.is_split else None,
            disable_split_kv=not part.is_split,
        )
        if device.type == "cuda":
            event = self._copied[id(wrapper)] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return wrapper


class _Step:
    def __init__(self, owner: Backend, step: Step) -> None:
        self._owner, self._batch = owner, step.host
        self._calls: dict[tuple[float, int, float], list[tuple[Part, Tensor | None, Any]]] = {}
        """Parts by the settings of a layer, with their tokens on the device, and what computes them."""

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        assert sinks is None
        settings = scale, window, softcap
        if (calls := self._calls.get(settings)) is None:
            calls = self._calls[settings] = self._planned(q, keys, *settings)
        if len(calls) == 1 and calls[0][1] is None:
            whole: Tensor = calls[0][2].run(q, (keys, values))
            return whole
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        merged = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        """Logarithms of the sums of exponentials, where a beginning is still to be merged."""
        for part, tokens, wrapper in calls:
            given = q if tokens is None else q[tokens]
            if part.name.startswith("whole"):
                _put(out, tokens, wrapper.run(given, (keys, values)))
                continue
            found, sums = wrapper.run(given, (keys, values), return_lse=True)
            if part.causal:
                _put(out, tokens, found)
                _put(merged, tokens, sums)
            else:
                assert tokens is not None
                out[tokens] = self._owner.library.merge_state(out[tokens], merged[tokens], found, sums)[0]
        return out

    def _planned(
        self, q: Tensor, keys: Tensor, scale: float, window: int, softcap: float
    ) -> list[tuple[Part, Tensor | None, Any]]:
        # A window counts from a token's own position, which a beginning that is read apart does not know.
        found = parts(self._batch, q.shape[1], q.shape[1] // keys.shape[2], q.shape[2], cascade=not window)
        calls = []
        for part in found:
            tokens = None if part.tokens is None else torch.from_numpy(part.tokens).to(q.device, torch.long)
            calls.append((part, tokens, self._owner.planned(part, q, keys, scale, window, softcap)))
        return calls


def _put(into: Tensor, tokens: Tensor | None, values: Tensor) -> None:
    if tokens is None:
        into.copy_(values)
    else:
        into[tokens] = values
