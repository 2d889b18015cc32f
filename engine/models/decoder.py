"""The Llama family: weights by their Hugging Face names, computed by whatever ``Compute`` the device has."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from slipstream.engine.models.config import DecoderConfig, cache_shape, rope_tables
from slipstream.engine.models.protocol import DecoderModel, Forward
from slipstream.engine.models.weights import WeightSlots
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.compute import Compute
from slipstream.kernels.kv_cache import PagedKVCache


class Decoder:
    def __init__(self, config: DecoderConfig, compute: Compute, max_length: int) -> None:
        """``max_length`` of sequences, in tokens. Its weights are still to be loaded."""
        self.shape = config.shape
        self.switch_length = 0
        self.formats, self.kernels = compute.formats, compute.name
        self.config, self.compute = config, compute
        self.embedding = compute.weight(self.shape.vocab_size, config.hidden)
        self.output = self.embedding if config.tied else compute.weight(self.shape.vocab_size, config.hidden)
        self._layers = compute.layers(config.layer, self.shape.num_layers)
        self._norm = compute.norm(config.hidden)
        self._stack = compute.stack(config.layer, config.windows, self.embedding, rope_tables(config, max_length))
        self._stack.use(self._layers, self._norm, self.output)

    @property
    def decoder(self) -> DecoderModel:
        return self

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        slots = WeightSlots(self.config.parameters)
        for name, tensor in tensors:
            if slots.take(name, tensor):
                self._fill(name, tensor)
        slots.check_complete()

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return self.compute.cache(cache_shape(self.shape, block_size, self.formats.kv), num_blocks)

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        return self._stack.forward(batch, cache, taps=taps)

    def logits(self, hidden: Tensor, rows: Int32) -> Tensor:
        return self._stack.logits(hidden, rows)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return ops.rms_norm(hidden, self._norm, self.config.norm_eps)

    def _fill(self, name: str, tensor: Tensor) -> None:
        match name.split(".", 3):
            case ["model", "embed_tokens", "weight"]:
                self.embedding.fill(tensor)
            case ["lm_head", "weight"]:
                self.output.fill(tensor)
            case ["model", "norm", "weight"]:
                self._norm.copy_(tensor)
            case ["model", "layers", index, rest]:
                self._layers[int(index)].fill(rest, tensor)
