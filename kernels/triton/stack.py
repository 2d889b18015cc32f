"""Decoder layers in Triton's kernels and cuBLAS: one copy to the device per step, and small steps as graphs."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.adapter import Adapter
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.compute import ChainInputs, Chains, Formats, Forward, LayerShape, LayerWeights
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.torch_stack import embedding_scale
from slipstream.kernels.triton import activation, experts, norm
from slipstream.kernels.triton.adapter import DOWN, GATE_UP, OUT, QKV, AdapterTable
from slipstream.kernels.triton.cache import Rotation, place
from slipstream.kernels.triton.chains import TritonChains
from slipstream.kernels.triton.device_batch import DeviceBatch
from slipstream.kernels.triton.graphs import GraphPool
from slipstream.kernels.triton.kv_cache import TritonKVCache, TritonPlan
from slipstream.kernels.triton.layer import FusedLayer
from slipstream.kernels.triton.room import Room, padded, update
from slipstream.kernels.triton.rows import take_rows
from slipstream.kernels.triton.staging import Array, Staging, TableMirror
from slipstream.kernels.weight import Weight

CONTEXTS = (4096, 32768)
"""Longest sequences that graphs are recorded for, besides the longest of all: a graph launches kernels for as many keys
as any sequence may have, and those that a sequence does not have cost a little."""
MOST_TABLES = 4
INVARIANT_TILE = 16
"""Rows of an expert's tile where bits may not depend on how many there are."""


class TritonStack:
    def __init__(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        formats: Formats,
        device: torch.device,
        graphs: GraphPool,
        invariant: bool = False,
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``invariant``: with the same bits for a row in any batch, however sequences are cut."""
        self._shape, self._windows = shape, windows
        self.is_invariant = invariant
        self._ropes = [
            tuple(table.to(device, torch.float32).contiguous() for table in tables)
            for tables in (rope, window_rope or rope)
        ]
        """Tables of layers without a window, and with one."""
        self._scale = embedding_scale(shape, formats.compute)
        self.dtype, self._device = formats.compute, device
        self.graphs = graphs
        self._staging = Staging(device)
        self._mirrors: OrderedDict[int, TableMirror] = OrderedDict()
        self._rooms: dict[int, Room] = {}
        self._adapters = AdapterTable(shape, len(windows), self.dtype, device)
        self._recorded_for: weakref.ref[Tensor] | None = None
        """Memory of the cache that graphs were recorded for; not kept from being released."""
        self._layers: list[FusedLayer] = []
        self._rotations: list[Rotation] = []
        self._norm: Tensor | None = None
        self._embedding: Weight
        self._output: Weight

    def use(self, embedding: Weight, layers: Sequence[LayerWeights], norm: Tensor | None, output: Weight) -> None:
        self._layers, self._rotations = [], []
        shape = self._shape
        for layer, window in zip(layers, self._windows, strict=True):
            assert isinstance(layer, FusedLayer)
            self._layers.append(layer)
            cos, sin = self._ropes[window > 0]
            self._rotations.append(Rotation(cos, sin, layer.q_norm, layer.k_norm, shape.norm_eps, shape.is_gemma))
        self._embedding, self._norm, self._output = embedding, norm, output
        self.graphs.forget(self)

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        if not self._adapters.use(adapters):
            self.graphs.forget(self)

    def forget(self) -> None:
        self._layers, self._rotations, self._norm = [], [], None
        del self._embedding, self._output
        self.graphs.forget(self)

    def forward(
        self, batch: RaggedBatch, cache: PagedKVCache, hidden: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> Forward:
        assert isinstance(cache, TritonKVCache)
        self.follow(cache)
        mirror = self.mirror(batch.block_tables)
        changes = mirror.changes(batch)
        longest, tokens = int(batch.kv_len.max(initial=1)), batch.num_tokens
        bucket = None
        if cache.is_recordable:
            bucket = self.graphs.bucket(max(tokens, batch.num_segments, len(batch.mirrors)))
        room = None if bucket is None else self.room(bucket)
        arrays: list[Array] = [] if room is None else [*padded(batch, room.tokens), changes, *batch.columns]
        if room is None or not room.has_room(arrays):
            return self._piece_by_piece(batch, cache, hidden, taps, mirror, changes, longest)
        on_device, columns = self._send(arrays, mirror, changes, batch, room.slab, room.positions, room.cells)
        if hidden is not None:
            room.hidden[:tokens].copy_(hidden)
        context = self.reach(longest)
        given = None if hidden is None else room.hidden

        def work() -> Forward:
            now = on_device.settled()
            return self.run(now, cache.plan_on_device(now, context, prompt=False), given, taps)

        ranks = None if batch.adapters is None else self._adapters.ranks
        key = (room.tokens, context, given is None, taps, id(mirror), id(batch.latest), id(batch.missed), ranks)
        done = self.graphs.run(self, key, work)
        # The next step overwrites what a graph returns.
        features = None if done.features is None else done.features[:tokens].clone()
        return Forward(done.hidden[:tokens].clone(), features, columns)

    def chains(self, given: ChainInputs, cache: PagedKVCache) -> Chains | None:
        assert isinstance(cache, TritonKVCache)
        # Other attention is planned by the host, which does not know where a chain begins.
        return TritonChains(self, given, cache) if cache.is_recordable else None

    def draft(self, asked: HostChains, cache: PagedKVCache, hidden: Tensor) -> MadeChains | None:
        return None

    def follow(self, cache: TritonKVCache) -> None:
        """Graphs read and write one cache."""
        if self._recorded_for is None or cache.memory is not self._recorded_for():
            self.graphs.forget(self)
            self._recorded_for = weakref.ref(cache.memory, lambda _: self.graphs.forget(self))

    def reach(self, longest: int) -> int:
        """The reach of the graph that such sequences take."""
        return next((most for most in CONTEXTS if longest <= most), len(self._ropes[0][0]))

    def logits(self, hidden: Tensor, rows: Int32 | Tensor | None = None) -> Tensor:
        x = hidden.to(self.dtype)
        if rows is not None:
            x = take_rows(x, rows if isinstance(rows, Tensor) else self._staging.send([rows])[0])
        if self._norm is not None:
            x = (ops.rms_norm_plus_one if self._shape.is_gemma else ops.rms_norm)(x, self._norm, self._shape.norm_eps)
        return self._output(x).float()

    def _piece_by_piece(
        self,
        batch: RaggedBatch,
        cache: TritonKVCache,
        hidden: Tensor | None,
        taps: tuple[int, ...],
        mirror: TableMirror,
        changes: Int32,
        longest: int,
    ) -> Forward:
        """Without a graph: with as much room as there are tokens, and tiles for long segments."""
        arrays = [batch.token_ids, batch.q_start, batch.kv_len, batch.table_row, batch.mirrors]
        arrays += [each for each in (batch.adapters, batch.whose) if each is not None]
        arrays += [changes, *batch.columns]
        # Two of them, as kernels are compiled for how pointers align.
        positions, cells = (torch.empty(batch.num_tokens, dtype=torch.int32, device=self._device) for _ in range(2))
        on_device, columns = self._send(arrays, mirror, changes, batch, None, positions, cells)
        on_device = on_device.settled()
        plan = cache.plan_on_device(on_device, longest, prompt=not self.is_invariant, host=batch)
        done = self.run(on_device, plan, None if hidden is None else hidden.to(self.dtype), taps)
        return Forward(done.hidden, done.features, columns)

    def _send(
        self,
        arrays: list[Array],
        mirror: TableMirror,
        changes: Int32,
        host: RaggedBatch,
        slab: Tensor | None,
        positions: Tensor,
        cells: Tensor,
    ) -> tuple[DeviceBatch, tuple[Tensor, ...]]:
        """The batch on the device, and its columns.

        ``arrays``: five of the batch, and two more if it has them; the changes; and the columns.
        """
        ids, starts, lengths, rows, mirrors, *others = self._staging.send(arrays, slab)
        adapters, whose = (None if each is None else others.pop(0) for each in (host.adapters, host.whose))
        changed, *columns = others
        update(mirror, changed, changes)
        given = (ids, starts, lengths, rows, mirrors, mirror.tables, positions, cells)
        return DeviceBatch(*given, host.block_size, host.latest, adapters, host.missed, whose), tuple(columns)

    def run(
        self,
        batch: DeviceBatch,
        plan: TritonPlan,
        hidden: Tensor | None,
        taps: tuple[int, ...],
        stored: Tensor | None = None,
    ) -> Forward:
        """Everything of a step that only reads and writes memory of the device.

        Only ``stored`` tokens [tokens] have a place for keys and values; by default all.
        """
        shape, eps = self._shape, self._shape.norm_eps
        place(batch)
        if stored is not None:
            batch.cells.masked_fill_(~stored, -1)
        embedding = None
        if hidden is None or shape.reads == "both":
            embedding = self._embedding.rows(batch.token_ids).to(self.dtype)
            if self._scale is not None:
                embedding = embedding * self._scale
        first = embedding if hidden is None else hidden
        assert first is not None
        stream = first.clone()  # layers add to it in place
        tapped = []
        added: Tensor | None = None
        """What the layer before adds to the stream, which the next norm does."""
        for index, (layer, window) in enumerate(zip(self._layers, self._windows, strict=True)):
            stream, x = self._normed(stream, added, layer.attn_norm)
            if index in taps:
                tapped.append(stream.clone())
            if layer.embed_norm is not None:
                assert embedding is not None
                x = torch.cat((norm.rms_norm(embedding, layer.embed_norm, eps), x), dim=-1)
            qkv = self._adapted(batch, index, QKV, x, layer.qkv(x)).view(len(x), -1, shape.head_dim)
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            plan.rotate_and_store(index, q, k, v, self._rotations[index])
            attended = plan.attend(index, q, shape.scale, window).flatten(1)
            given = self._adapted(batch, index, OUT, attended, layer.out(attended))
            if layer.out_norm is not None:
                given = norm.rms_norm(given, layer.out_norm, eps, plus_one=True)
            stream, x = self._normed(stream, given, layer.mlp_norm)
            added = self._mlp(batch, index, layer, x)
            if layer.down_norm is not None:
                added = norm.rms_norm(added, layer.down_norm, eps, plus_one=True)
        if added is not None:
            stream = stream.add_(added)
        if len(self._layers) in taps:
            tapped.append(stream.clone())
        return Forward(stream, torch.stack(tapped, dim=1).float() if tapped else None)

    def _adapted(self, batch: DeviceBatch, layer: int, matrix: int, x: Tensor, given: Tensor) -> Tensor:
        """What a matrix of a layer gives for x, with what adapters add to it."""
        if batch.adapters is not None:
            self._adapters.add(batch.adapters, layer, matrix, x, given)
        return given

    def _mlp(self, batch: DeviceBatch, index: int, layer: FusedLayer, x: Tensor) -> Tensor:
        if (mixture := layer.mixture) is not None:
            settings = mixture.settings
            routes = experts.route(mixture.router(x), settings.top, settings.renormalize)
            tile = INVARIANT_TILE if self.is_invariant else 0
            return experts.experts_mlp(x, routes, mixture.gate_up, mixture.down, tile)
        assert layer.gate_up is not None and layer.down is not None
        gated = activation.gelu_tanh_mul_halves if self._shape.is_gemma else activation.silu_mul_halves
        inner = gated(self._adapted(batch, index, GATE_UP, x, layer.gate_up(x)))
        return self._adapted(batch, index, DOWN, inner, layer.down(inner))

    def _normed(self, stream: Tensor, added: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream with what is added to it, in place; and that behind a norm, if there is one."""
        eps = self._shape.norm_eps
        if weight is None:
            stream = stream if added is None else stream.add_(added)
            return stream, stream
        if added is None:
            return stream, norm.rms_norm(stream, weight, eps, self._shape.is_gemma)
        return stream, norm.add_rms_norm(added, stream, weight, eps, self._shape.is_gemma)

    def mirror(self, tables: Int32) -> TableMirror:
        """The device's copy of the table."""
        found = self._mirrors.get(id(tables))
        if found is None:  # it keeps the host's array, so that no other one has its id
            found = self._mirrors[id(tables)] = TableMirror(tables, self._device)
            if len(self._mirrors) > MOST_TABLES:
                self._mirrors.popitem(last=False)
                self.graphs.forget(self)  # one of them may read the table that is gone
        self._mirrors.move_to_end(id(tables))
        return found

    def room(self, tokens: int) -> Room:
        """What graphs of so many tokens read."""
        if tokens not in self._rooms:
            self._rooms[tokens] = Room(tokens, self._shape.hidden, self.dtype, self._device)
        return self._rooms[tokens]
