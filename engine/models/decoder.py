"""The Llama family: weights by their Hugging Face names, computed by whatever ``Compute`` the device has."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from slipstream.engine.background import breathe
from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.errors import MisfitError, ModelError
from slipstream.engine.models.config import (
    DecoderConfig,
    cache_shape,
    decoder_config,
    is_own,
    rope_tables,
    window_rope_tables,
)
from slipstream.engine.models.protocol import DecoderModel, Forward
from slipstream.engine.models.sent_names import SEES, Place
from slipstream.engine.models.weights import ExpectedTensors, Rows, Weights, pieces
from slipstream.kernels import ops
from slipstream.kernels.adapter import ADAPTED, ADAPTED_MLP, Adapter, LayerMatrices
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.compute import Compute, LayerWeights
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.stored import Stored
from slipstream.kernels.weight import Weight


class DecoderWeights:
    """All weights of a decoder, to be filled."""

    def __init__(self, config: DecoderConfig, compute: Compute, forms: Sequence[Hashable] = ()) -> None:
        """``forms`` of other weights of the same model, in which numbers that come are packed."""
        self.embedding = compute.weight(config.shape.vocab_size, config.hidden)
        self.output = self.embedding if config.tied else compute.weight(config.shape.vocab_size, config.hidden)
        self.layers = compute.layers(config.layer, config.shape.num_layers)
        self.norm = compute.norm(config.hidden)
        self._compute, self._expected, self._sees = compute, ExpectedTensors(config.parameters), config.sees
        for part, each in zip(self._parts, forms, strict=bool(forms)):
            compute.take_forms(part, each)

    @property
    def _parts(self) -> list[Weight | LayerWeights]:
        return [self.embedding, self.output, *self.layers]

    @property
    def forms(self) -> list[Hashable]:
        return [self._compute.forms(part) for part in self._parts]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected.shapes

    def fill(self, name: str, rows: Rows, first_row: int | None = None, exact: bool = False) -> None:
        if self._expected.take(name, rows, first_row):
            with self._compute.filling():
                if exact and isinstance(rows, Tensor) and rows.dim() > 1:
                    self._compute.widen(*self._part(name))
                for row, part in pieces(rows, first_row or 0):
                    # Blocks come only where matrices take them, see ``Decoder.tensors``.
                    self._fill(name, cast(Tensor, part), row)

    def place(self, name: str) -> Place:
        return Place(()) if self._sees and SEES.search(name) else self._expected.place(name)

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        rows = self._rows(name, first_row, count)
        match name.split(".", 3):
            case ["model", "embed_tokens", "weight"]:
                return self.embedding.rows(rows)
            case ["lm_head", "weight"]:
                return self.output.rows(rows)
            case ["model", "layers", index, rest]:
                return self.layers[int(index)].read(rest, rows)
        return self.norm[first_row : first_row + count]

    def kept(self, name: str, first_row: int, count: int) -> Rows:
        found = None
        if len(self.shapes[name]) > 1:
            found = self._compute.kept(*self._part(name), self._rows(name, first_row, count))
        return self.read(name, first_row, count) if found is None else found

    @property
    def numbers(self) -> Callable[[Stored], Tensor]:
        return self._compute.numbers

    @property
    def num_missing(self) -> int:
        return self._expected.num_missing

    def missing(self) -> Sequence[tuple[str, int, int]]:
        return self._expected.missing()

    def check_complete(self) -> None:
        self._expected.check_complete()

    def _rows(self, name: str, first_row: int, count: int) -> Tensor:
        self._expected.check_rows(name, first_row, count)
        return torch.arange(first_row, first_row + count, device=self._compute.device)

    def _part(self, name: str) -> tuple[Weight | LayerWeights, str]:
        """What holds a matrix, and what the matrix is called there."""
        match name.split(".", 3):
            case ["lm_head", rest]:
                return self.output, rest
            case ["model", "layers", index, rest]:
                return self.layers[int(index)], rest
        return self.embedding, "weight"

    def _fill(self, name: str, rows: Tensor, first_row: int) -> None:
        match name.split(".", 3):
            case ["model", "embed_tokens", "weight"]:
                self.embedding.fill(rows, first_row)
            case ["lm_head", "weight"]:
                self.output.fill(rows, first_row)
            case ["model", "norm", "weight"]:
                self.norm[first_row : first_row + len(rows)].copy_(rows)
            case ["model", "layers", index, rest]:
                self.layers[int(index)].fill(rest, rows, first_row)


class Decoder:
    def __init__(self, config: DecoderConfig, compute: Compute, max_length: int) -> None:
        """``max_length`` of sequences, in tokens. It computes once it was told which weights to use."""
        self.shape = config.shape
        self.switch_length = 0
        self.formats, self.kernels, self.takes_latest = compute.formats, compute.name, compute.takes_latest
        self.config, self.compute = config, compute
        self._weights: DecoderWeights
        self._forms: Sequence[Hashable] = ()
        """How its first weights are packed, and so those of updates."""
        ropes = rope_tables(config, max_length), window_rope_tables(config, max_length)
        self._stack = compute.stack(config.layer, config.windows, *ropes)

    @property
    def decoder(self) -> DecoderModel:
        return self

    @property
    def weights(self) -> DecoderWeights:
        return self._weights

    @property
    def embedding(self) -> Weight:
        return self._weights.embedding

    @property
    def output(self) -> Weight:
        return self._weights.output

    def new_weights(self) -> DecoderWeights:
        return DecoderWeights(self.config, self.compute, self._forms)

    def use(self, weights: Weights) -> None:
        assert isinstance(weights, DecoderWeights)
        self._forms, self._weights = self._forms or weights.forms, weights
        self._stack.use(weights.embedding, weights.layers, weights.norm, weights.output)

    def forget(self) -> None:
        self._stack.forget()
        del self._weights

    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.config.parameters

    def adapter(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        shape = self.config.layer
        known = ADAPTED if shape.mixture is not None else (*ADAPTED, *ADAPTED_MLP)
        layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(self.shape.num_layers)]
        for name, pair in pairs.items():
            match name.split(".", 3):
                case ["model", "layers", index, rest] if (module := rest.removesuffix(".weight")) in known:
                    layers[int(index)][module] = pair
                case _:
                    raise ModelError(
                        f"a LoRA beside the weights cannot change {name!r}, only {', '.join(known)} of layers"
                    )
        with self.compute.filling():
            return self.compute.adapter(shape, _one_by_one(layers))

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        self._stack.use_adapters(adapters)

    def tensors(self, checkpoint: Checkpoint) -> Iterable[tuple[str, Rows]]:
        theirs = decoder_config(checkpoint.config) if is_own(checkpoint.config) else None
        if theirs is None or (wrong := self.config.differences(theirs)):
            what = checkpoint.config.get("model_type") if theirs is None else f"its {wrong[0][0]} is {wrong[0][1]}"
            raise MisfitError(f"{checkpoint.path} is not the model that runs here: {what}")
        return checkpoint.packed_tensors(partial(self.compute.takes_blocks, self.config.layer))

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return self.compute.cache(cache_shape(self.shape, block_size, self.formats), num_blocks)

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        return self._stack.forward(batch, cache, taps=taps)

    def logits(self, hidden: Tensor, rows: Int32 | Tensor) -> Tensor:
        return self._stack.logits(hidden, rows)

    def final_norm(self, hidden: Tensor) -> Tensor:
        rms_norm = ops.rms_norm_plus_one if self.config.layer.is_gemma else ops.rms_norm
        return rms_norm(hidden, self._weights.norm, self.config.norm_eps)


def _one_by_one(layers: Iterable[LayerMatrices]) -> Iterator[LayerMatrices]:
    """With time for a step before each."""
    for layer in layers:
        breathe()
        yield layer
