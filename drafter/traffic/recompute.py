"""Features of text that is already there, from one chunked forward pass of the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.traffic.store import Int32, Sample
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.protocol import CausalModel
from slipstream.kernels.batch import make_batch

BLOCK_SIZE = 16


class Recompute:
    """Owns a cache for one sequence; the model may be shared."""

    def __init__(
        self,
        model: CausalModel,
        taps: tuple[int, ...],
        max_length: int,
        chunk: int = 512,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        """``max_length`` in tokens; ``between`` is called before each chunk.

        Raises ConfigError if the model does not show hidden states.
        """
        if model.decoder is None:
            raise ConfigError(f"{model.shape.model_type} models, run through transformers, do not show hidden states")
        self.taps = taps
        self._model = model
        self._max_length = max_length
        self._chunk = chunk
        self._between = between
        blocks = -(-max_length // BLOCK_SIZE)
        self._cache = model.new_cache(blocks, BLOCK_SIZE)
        self._table = np.arange(blocks, dtype=np.int32)[None]

    @torch.inference_mode()
    def features(self, tokens: Int32) -> Tensor:
        """[len(tokens) - 1, taps, hidden] bfloat16, as they are captured: the last token is not computed.

        Raises ValueError for more than ``max_length`` tokens.
        """
        if len(tokens) > self._max_length:
            raise ValueError(f"{len(tokens)} tokens are more than {self._max_length}")
        parts = []
        for start in range(0, len(tokens) - 1, self._chunk):
            self._between()
            part = np.ascontiguousarray(tokens[start : min(start + self._chunk, len(tokens) - 1)], np.int32)
            counts, ends = np.array([len(part)], np.int32), np.array([start + len(part)], np.int32)
            batch = make_batch(part, counts, ends, self._table, np.zeros(1, np.int32), BLOCK_SIZE)
            features = self._model.forward(batch, self._cache, self.taps).features
            assert features is not None
            parts.append(features.to("cpu", torch.bfloat16))
        return torch.cat(parts) if parts else torch.empty(0, len(self.taps), 0, dtype=torch.bfloat16)


def recompute(sample: Sample, model: Recompute) -> Sample:
    """The sample with the features of all its positions (but the last); its own where they are complete."""
    if sample.features is not None and sample.start == 0 and sample.taps == model.taps:
        return sample
    return dataclasses.replace(sample, features=model.features(sample.tokens), start=0, taps=model.taps)
