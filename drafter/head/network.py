"""The forward pass of an EAGLE head over the paged cache, with compiled kernels and in plain torch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from slipstream.drafter.head.config import LAYER, HeadConfig
from slipstream.engine.background import breathe
from slipstream.engine.models.config import cache_shape, rope_tables
from slipstream.engine.models.native_decoder import NativeDecoder
from slipstream.engine.models.native_layer import NativeLayer
from slipstream.engine.models.torch_decoder import TorchDecoder
from slipstream.engine.speculation.protocol import DraftHost
from slipstream.kernels import ops
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache, TorchKVCache
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.library import DTYPE_CODES, CLayer, CModel, address, c_batch, load
from slipstream.kernels.native.linear import COLUMNS, PANEL, PackedLinear

PIECE_ELEMS = 1 << 16
"""Elements of a matrix that are laid out between two moments at which steps may go first."""


class HeadWeights(Protocol):
    """One version's weights as they are computed with; networks of several routes may share them."""

    memory_bytes: int

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Lays them out; may run in another thread, while networks compute with other weights."""


class HeadNetwork(Protocol):
    cache_bytes: int
    """Bytes of keys and values."""

    def use(self, weights: HeadWeights) -> None:
        """Computes with these from now on; called before the first computation, and between two."""

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [n, taps, hidden] as they wait for their tokens, [n, hidden] float32."""

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden] float32 from the tokens of the batch and what came before each of them, ``hidden``.

        Position p holds token p + 1 and the features of position p (or the head's own output there), and predicts
        token p + 2. Writes the head's keys and values; may overwrite ``hidden``.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary] float32; valid until the next call."""

    @property
    def cache(self) -> PagedKVCache:
        """The head's keys and values."""


def _weights_bytes(config: HeadConfig, dtype: torch.dtype) -> int:
    mapped = ("d2t", "t2d")
    return sum(math.prod(size) for name, size in config.shapes.items() if name not in mapped) * dtype.itemsize


def make_network(config: HeadConfig, host: DraftHost) -> HeadNetwork:
    """With the target's embeddings; the drafter has refused other models before."""
    if isinstance(host.model, NativeDecoder):
        return NativeHead(config, host.model, host)
    assert isinstance(host.model, TorchDecoder)
    return TorchHead(config, host.model, host)


def make_weights(config: HeadConfig, host: DraftHost) -> HeadWeights:
    """Room for those of a network of this configuration."""
    if isinstance(host.model, NativeDecoder):
        return NativeWeights(config, host.model)
    assert isinstance(host.model, TorchDecoder)
    return TorchWeights(config, host.model)


class NativeWeights:
    """As panels; what EAGLE-1 and -2 heads lack is the target's, or not there."""

    def __init__(self, config: HeadConfig, target: NativeDecoder) -> None:
        decoder = config.as_decoder(target.config)
        self._prefix = config.layer
        dtype, is_third = target.dtype, config.kind == "eagle3"
        width, read = config.shapes["fc.weight"]
        self.fc = PackedLinear(width, read, dtype, config.fc_bias)
        self.layer = NativeLayer(decoder, dtype, reads="both" if is_third else "plain")
        self.lm_head = PackedLinear(config.draft_vocab_size, config.hidden, dtype) if is_third else target.head
        self.norm = torch.ones(config.hidden) if is_third else None
        self.memory_bytes = _weights_bytes(config, dtype)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        _fill(self.fc, tensors["fc.weight"])
        if "fc.bias" in tensors:
            self.fc.fill_bias(tensors["fc.bias"])
        if self.norm is not None:
            _fill(self.lm_head, tensors["lm_head.weight"])
            self.norm.copy_(tensors["norm.weight"])
        for name, tensor in tensors.items():
            if name.startswith(self._prefix):
                for row, part in _pieces(tensor):
                    self.layer.fill(name.removeprefix(self._prefix).split("."), part, row)


def _fill(linear: PackedLinear, weight: Tensor) -> None:
    for row, part in _pieces(weight):
        linear.fill(part, row // PANEL)


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First rows and rows, a multiple of what panels are filled with; steps go on between them."""
    if tensor.dim() < 2:
        yield 0, tensor
        return
    rows = max(PIECE_ELEMS // tensor.shape[1] // COLUMNS, 1) * COLUMNS
    for number, part in enumerate(torch.split(tensor, rows)):
        breathe()
        yield number * rows, part


class NativeHead:
    """A swap points the compiled code at other weights, which takes microseconds."""

    def __init__(self, config: HeadConfig, target: NativeDecoder, host: DraftHost) -> None:
        decoder = config.as_decoder(target.config)
        library = load()
        assert library is not None
        self._library = library
        self._weights: NativeWeights
        self._target, self._is_third = target, config.kind == "eagle3"
        self._cos, self._sin = rope_tables(decoder, host.block_tables.shape[1] * host.block_size)
        cache = NativeKVCache(cache_shape(decoder.shape, host.block_size, target.dtype), host.num_blocks, target.device)
        self.cache: PagedKVCache = cache
        self._c_layers = (CLayer * 1)()
        keys, values = cache.layers[0]
        self._c_layers[0].k_cache, self._c_layers[0].v_cache = address(keys), address(values)
        self._c = CModel(
            dtype=DTYPE_CODES[target.dtype],
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate,
            num_layers=1,
            norm_eps=config.norm_eps,
            rope_cos=address(self._cos),
            rope_sin=address(self._sin),
            layers=self._c_layers,
            embed=target.embedding.c,
            given_hidden=1,
        )
        self.cache_bytes = self.cache.num_bytes
        self._vocab = config.draft_vocab_size
        self._rows, self._logits = torch.empty(0, dtype=torch.int32), torch.empty(0, self._vocab)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def use(self, weights: HeadWeights) -> None:
        assert isinstance(weights, NativeWeights)
        self._weights = weights
        weights.layer.describe(self._c_layers[0], 0)
        self._c.lm_head, self._c.final_norm = weights.lm_head.c, address(weights.norm)

    def fuse(self, features: Tensor) -> Tensor:
        if self._is_third:
            return self._weights.fc(features.flatten(1))
        return self._target.final_norm(features.flatten(1))

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        if not self._is_third:
            hidden = self._weights.fc(torch.cat((self._target.embedding.rows(batch.token_ids), hidden), dim=1))
        c = c_batch(batch)
        self._library.slip_forward(ctypes.byref(self._c), ctypes.byref(c), address(hidden), self._memory(len(hidden)))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        if rows > len(self._rows):
            self._rows, self._logits = torch.arange(rows, dtype=torch.int32), torch.empty(rows, self._vocab)
        out = self._logits[:rows]
        self._library.slip_logits(
            *(ctypes.byref(self._c), address(hidden), address(self._rows), rows, address(out), self._vocab),
            self._memory(rows),
        )
        return out

    def _memory(self, tokens: int) -> int:
        size = self._library.slip_workspace_bytes(ctypes.byref(self._c), tokens)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()


class TorchWeights:
    def __init__(self, config: HeadConfig, target: TorchDecoder) -> None:
        self._device = target.device
        self.tensors = {
            name: torch.empty(shape, dtype=target.dtype, device=target.device)
            for name, shape in config.shapes.items()
            if name not in ("d2t", "t2d")
        }
        on_gpu = target.device.type == "cuda"
        self._stream = torch.cuda.Stream(target.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.memory_bytes = _weights_bytes(config, target.dtype)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        # On a stream of its own, so that steps do not wait for the transfer; over once this returns.
        if self._stream is not None:  # what was in these tensors before may still be read by the last step that used it
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, weight in self.tensors.items():
                for row, part in _pieces(tensors[name]):
                    weight[row : row + len(part)].copy_(part)
        if self._stream is not None:
            self._stream.synchronize()


class TorchHead:
    """Specifies what the compiled head computes; runs on every device."""

    def __init__(self, config: HeadConfig, target: TorchDecoder, host: DraftHost) -> None:
        self._config = config
        self._device, self._dtype = target.device, target.dtype
        self._target = target
        self._weights: Mapping[str, Tensor]
        decoder = config.as_decoder(target.config)
        length = host.block_tables.shape[1] * host.block_size
        self._cos, self._sin = (table.to(self._device) for table in rope_tables(decoder, length))
        self.cache: PagedKVCache = TorchKVCache(
            cache_shape(decoder.shape, host.block_size, self._dtype), host.num_blocks, self._device
        )
        self.cache_bytes = self.cache.num_bytes

    def use(self, weights: HeadWeights) -> None:
        assert isinstance(weights, TorchWeights)
        self._weights = weights.tensors

    def fuse(self, features: Tensor) -> Tensor:
        if self._config.kind == "eagle":
            return self._target.final_norm(features.flatten(1)).float()
        return ops.linear(features.flatten(1).to(self._dtype), self._weights["fc.weight"]).float()

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        config, weights, eps = self._config, self._weights, self._config.norm_eps
        positions = torch.from_numpy(batch.positions).to(self._device)
        cos, sin = self._cos[positions], self._sin[positions]
        token_ids = torch.from_numpy(batch.token_ids).to(self._device)
        hidden = hidden.to(self._dtype)
        embedding = ops.embedding(token_ids, self._target.embedding)
        if config.kind == "eagle":
            both = torch.cat((embedding, hidden), dim=-1)
            x = hidden = ops.linear(both, weights["fc.weight"], weights.get("fc.bias"))
        else:
            x = torch.cat(
                (
                    ops.rms_norm(embedding, weights[LAYER + "input_layernorm.weight"], eps),
                    ops.rms_norm(hidden, weights[LAYER + "hidden_norm.weight"], eps),
                ),
                dim=-1,
            )
        q, k, v = (self._linear(f"self_attn.{name}_proj", x).view(len(x), -1, config.head_dim) for name in "qkv")
        attention = self.cache.plan(batch)
        attention.store(0, ops.rope(k, cos, sin), v)
        values = attention.attend(0, ops.rope(q, cos, sin), config.head_dim**-0.5)
        hidden = hidden + self._linear("self_attn.o_proj", values.flatten(1))
        x = ops.rms_norm(hidden, weights[config.layer + "post_attention_layernorm.weight"], eps)
        inner = ops.silu_mul(self._linear("mlp.gate_proj", x), self._linear("mlp.up_proj", x))
        return (hidden + self._linear("mlp.down_proj", inner)).float()

    def logits(self, hidden: Tensor) -> Tensor:
        if self._config.kind == "eagle":
            return ops.linear(hidden.to(self._dtype), self._target.head).float()
        x = ops.rms_norm(hidden.to(self._dtype), self._weights["norm.weight"], self._config.norm_eps)
        return ops.linear(x, self._weights["lm_head.weight"]).float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return ops.linear(x, self._weights[f"{self._config.layer}{name}.weight"])
