"""Decoder layers over operations, one after the other: on any device, with weights and caches of any format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.compute import (
    PACKED,
    ChainInputs,
    Chains,
    Compute,
    Formats,
    Forward,
    LayerShape,
    LayerWeights,
    Stack,
)
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache, TorchKVCache
from slipstream.kernels.mixture import ExpertMatrices, MixtureWeights
from slipstream.kernels.torch_adapter import TorchAdapter, add_low_rank, runs_of
from slipstream.kernels.weight import DenseWeight, Weight

Function = Callable[[Tensor], Tensor]

WEIGHTS: dict[str, Callable[[int, int, torch.device, bool], Weight]] = {
    "float32": lambda n, k, device, bias: DenseWeight(n, k, torch.float32, device, bias),
    "bfloat16": lambda n, k, device, bias: DenseWeight(n, k, torch.bfloat16, device, bias),
}
"""What makes a matrix [n, k] on a device, with or without a bias, by format."""

MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Names of a layer's matrices in its arithmetic, and in files."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The arithmetic of a layer, which follows transformers operation by operation.

    Matrices and norms are functions, so that it is the same for weights of any format, and for those that are trained.
    """

    head_dim: int
    q: Function
    k: Function
    v: Function
    out: Function
    gate: Function
    up: Function
    down: Function
    mlp_norm: Function
    attn_norm: Function | None
    """None where attention reads the hidden state as it is."""
    embed_norm: Function | None = None
    """Set where attention reads the embedding of the token, too."""
    q_norm: Function | None = None
    k_norm: Function | None = None
    gated: Callable[[Tensor, Tensor], Tensor] = ops.silu_mul
    """What the gate does to the other matrix's output."""
    mixture: Function | None = None
    """Instead of gate, up and down, where a layer has many of them."""
    out_norm: Function | None = None
    """Set where what attention gives is normed before it is added."""
    down_norm: Function | None = None
    """Set where what the MLP gives is."""

    def inputs(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        """What queries, keys and values are made from."""
        x = hidden if self.attn_norm is None else self.attn_norm(hidden)
        if self.embed_norm is None:
            return x
        assert embedding is not None
        return torch.cat((self.embed_norm(embedding), x), dim=-1)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[tokens, heads, head_dim], rotated; cos, sin [tokens, head_dim / 2]."""
        return ops.rope(self._heads(self.q, self.q_norm, x), cos, sin)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Each [tokens, kv_heads, head_dim]."""
        return ops.rope(self._heads(self.k, self.k_norm, x), cos, sin), self._heads(self.v, None, x)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and what attention made of it [tokens, heads * head_dim]."""
        given = self.out(attended)
        hidden = hidden + (given if self.out_norm is None else self.out_norm(given))
        x = self.mlp_norm(hidden)
        given = self.mixture(x) if self.mixture is not None else self.down(self.gated(self.gate(x), self.up(x)))
        return hidden + (given if self.down_norm is None else self.down_norm(given))

    def _heads(self, matrix: Function, norm: Function | None, x: Tensor) -> Tensor:
        heads = matrix(x)
        heads = heads.view(len(x), heads.shape[-1] // self.head_dim, self.head_dim)  # of no tokens, too
        return heads if norm is None else norm(heads)


class TorchLayer:
    """Weights by their Hugging Face names."""

    def __init__(self, shape: LayerShape, make: Compute) -> None:
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, inner = shape.hidden, shape.intermediate
        matrices = {
            "q": make.weight(q_width, shape.input_width, shape.qkv_bias, "q_proj"),
            "k": make.weight(kv_width, shape.input_width, shape.qkv_bias, "k_proj"),
            "v": make.weight(kv_width, shape.input_width, shape.qkv_bias, "v_proj"),
            "out": make.weight(hidden, q_width, shape.out_bias, "o_proj"),
        }
        self._mixture: MixtureWeights | ExpertMatrices | None = None
        if shape.mixture is not None:
            self._mixture = (ExpertMatrices if make.formats.weights == PACKED else MixtureWeights)(shape, make)
        if self._mixture is None:
            matrices |= {
                "gate": make.weight(inner, hidden, shape.mlp_bias, "gate_proj"),
                "up": make.weight(inner, hidden, shape.mlp_bias, "up_proj"),
                "down": make.weight(hidden, inner, shape.mlp_bias, "down_proj"),
            }
        self._matrices = {MATRICES[field]: weight for field, weight in matrices.items()}
        self._norms: dict[str, Tensor] = {}
        rms_norm = ops.rms_norm_plus_one if shape.is_gemma else ops.rms_norm

        def norm(name: str, width: int = hidden) -> Function:
            weight = self._norms[name] = make.norm(width)
            return lambda x: rms_norm(x, weight, shape.norm_eps)

        attn_norm = embed_norm = None
        if shape.reads == "both":  # a layer that reads embeddings calls their norm the input's
            attn_norm, embed_norm = norm("hidden_norm"), norm("input_layernorm")
        elif shape.reads == "normed":
            attn_norm = norm("input_layernorm")
        # Gemma's name for the norm behind attention is that of the others for the one before the MLP.
        mlp_norm = norm("pre_feedforward_layernorm" if shape.is_gemma else "post_attention_layernorm")
        functions: dict[str, Any] = {**dict.fromkeys(("gate", "up", "down"), _nothing), **matrices}
        self.arithmetic = DecoderLayer(
            shape.head_dim,
            **functions,
            mlp_norm=mlp_norm,
            attn_norm=attn_norm,
            embed_norm=embed_norm,
            q_norm=norm("self_attn.q_norm", shape.head_dim) if shape.qk_norm else None,
            k_norm=norm("self_attn.k_norm", shape.head_dim) if shape.qk_norm else None,
            gated=ops.gelu_tanh_mul if shape.is_gemma else ops.silu_mul,
            mixture=self._mixture,
            out_norm=norm("post_attention_layernorm") if shape.is_gemma else None,
            down_norm=norm("post_feedforward_layernorm") if shape.is_gemma else None,
        )

    @property
    def matrices(self) -> dict[str, Weight]:
        """By their names, without ``.weight``; of a mixture those that are in memory by themselves."""
        of_experts = self._mixture.matrices if isinstance(self._mixture, ExpertMatrices) else {}
        return self._matrices | of_experts

    @property
    def num_bytes(self) -> int:
        matrices = sum(weight.num_bytes for weight in self._matrices.values())
        matrices += 0 if self._mixture is None else self._mixture.num_bytes
        return matrices + sum(weight.nbytes for weight in self._norms.values())

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        if self._mixture is not None and self._mixture.fill(name, rows, first_row):
            return
        module, _, kind = name.rpartition(".")
        if module in self._norms:
            self._norms[module][first_row : first_row + len(rows)].copy_(rows)
        elif kind == "bias":
            self._matrices[module].fill_bias(rows, first_row)
        else:
            self._matrices[module].fill(rows, first_row)

    def read(self, name: str, rows: Tensor) -> Tensor:
        if self._mixture is not None and (found := self._mixture.read(name, rows)) is not None:
            return found
        module, _, kind = name.rpartition(".")
        if module in self._norms:
            return self._norms[module][rows]
        weight = self._matrices[module]
        return weight.biases(rows) if kind == "bias" else weight.rows(rows)


def _nothing(x: Tensor) -> Tensor:
    raise AssertionError("a layer with a mixture has no MLP of its own")


class TorchStack:
    def __init__(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        formats: Formats,
        device: torch.device,
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._shape, self._windows = shape, windows
        self._ropes = [tuple(table.to(device) for table in tables) for tables in (rope, window_rope or rope)]
        """Tables of layers without a window, and with one."""
        self._scale = embedding_scale(shape, formats.compute)
        self._dtype, self._device = formats.compute, device
        self._layers: list[DecoderLayer] = []
        self._adapters: Sequence[Adapter | None] = ()
        self._norm: Tensor | None = None
        self._embedding: Weight
        self._output: Weight

    def use(self, embedding: Weight, layers: Sequence[LayerWeights], norm: Tensor | None, output: Weight) -> None:
        self._layers = []
        for layer in layers:
            assert isinstance(layer, TorchLayer)
            self._layers.append(layer.arithmetic)
        self._embedding, self._norm, self._output = embedding, norm, output

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        self._adapters = adapters

    def forget(self) -> None:
        self._layers, self._norm = [], None
        del self._embedding, self._output

    def forward(
        self, batch: RaggedBatch, cache: PagedKVCache, hidden: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> Forward:
        positions = torch.from_numpy(batch.positions).to(self._device)
        tables = [(cos[positions], sin[positions]) for cos, sin in self._ropes]
        embedding = None
        if hidden is None or self._shape.reads == "both":
            ids = torch.from_numpy(batch.token_ids).to(self._device)
            if batch.latest is not None:
                ids = torch.where(ids < 0, batch.latest[-1 - ids.clamp(max=-1)], ids)
            embedding = self._embedding.rows(ids).to(self._dtype)
            if self._scale is not None:
                embedding = embedding * self._scale
        x = embedding if hidden is None else hidden.to(self._dtype)
        assert x is not None
        attention = cache.plan(batch)
        scale = self._shape.scale
        tapped = []
        runs = runs_of(batch, self._adapters)
        for index, (layer, window) in enumerate(zip(self._layers, self._windows, strict=True)):
            layer = adapted(layer, [(rows, adapter.layers[index]) for rows, adapter in runs]) if runs else layer
            if index in taps:
                tapped.append(x)
            cos, sin = tables[window > 0]
            read = layer.inputs(x, embedding)
            attention.store(index, *layer.keys_values(read, cos, sin))
            attended = attention.attend(index, layer.queries(read, cos, sin), scale, window)
            x = layer.finish(x, attended.flatten(1))
        if len(self._layers) in taps:
            tapped.append(x)
        columns = tuple(torch.from_numpy(column).to(self._device) for column in batch.columns)
        return Forward(x, torch.stack(tapped, dim=1).float() if tapped else None, columns)

    def chains(self, given: ChainInputs, cache: PagedKVCache) -> Chains | None:
        return None

    def draft(self, asked: HostChains, cache: PagedKVCache, hidden: Tensor) -> MadeChains | None:
        return None

    def logits(self, hidden: Tensor, rows: Int32 | Tensor | None = None) -> Tensor:
        x = hidden.to(self._dtype)
        if rows is not None:
            rows = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
            x = x[rows.to(self._device, torch.long)]
        if self._norm is not None:
            x = (ops.rms_norm_plus_one if self._shape.is_gemma else ops.rms_norm)(x, self._norm, self._shape.norm_eps)
        return self._output(x).float()


def adapted(layer: DecoderLayer, runs: Sequence[tuple[slice, LayerMatrices]]) -> DecoderLayer:
    """The layer with what adapters add to its matrices, each for some rows of a batch."""

    def plus(matrix: Function, added: Sequence[tuple[slice, tuple[Tensor, Tensor]]]) -> Function:
        def apply(x: Tensor) -> Tensor:
            y = matrix(x)
            add_low_rank(x, y, added)
            return y

        return apply

    changed: dict[str, Any] = {}
    for field, name in MATRICES.items():
        if added := [(rows, pairs[name]) for rows, pairs in runs if name in pairs]:
            changed[field] = plus(getattr(layer, field), added)
    return replace(layer, **changed)


def embedding_scale(shape: LayerShape, dtype: torch.dtype) -> float | None:
    """What embeddings are multiplied by, in the format of activations; None where they are not."""
    return None if shape.embedding_scale == 1.0 else float(torch.tensor(shape.embedding_scale, dtype=dtype))


class TorchCompute(Compute):
    cache_class: ClassVar[type[PagedKVCache]] = TorchKVCache
    takes_latest = True

    def __init__(self, formats: Formats, device: torch.device) -> None:
        super().__init__(formats, device)
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    @classmethod
    def supports(cls, shape: LayerShape, device: torch.device) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"torch-{self.device.type}"

    def weight(self, n: int, k: int, bias: bool = False, module: str = "") -> Weight:
        return WEIGHTS[self.formats.weights](n, k, self.device, bias)

    def norm(self, width: int) -> Tensor:
        return torch.ones(width, dtype=self.formats.compute, device=self.device)

    def layers(self, shape: LayerShape, count: int) -> Sequence[LayerWeights]:
        return [TorchLayer(shape, self) for _ in range(count)]

    def stack(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> Stack:
        return TorchStack(shape, windows, rope, self.formats, self.device, window_rope)

    def adapter(self, shape: LayerShape, layers: Iterable[LayerMatrices]) -> Adapter:
        return TorchAdapter(layers, self.formats.compute, self.device)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Fills weights on a stream of its own, so that steps do not wait for the transfer."""
        if self._stream is not None:  # what was there before may still be read by the last step that used it
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        if self._stream is not None:
            self._stream.synchronize()
