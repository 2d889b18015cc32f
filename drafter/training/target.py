"""The target as training needs it: its embeddings, its head, and features of text on demand."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.drafter.traffic.recompute import Recompute
from slipstream.drafter.training.network import TrainableHead
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.loader import build_model, find_device
from slipstream.kernels.compute import Formats
from slipstream.kernels.machine import fast_dtype


class Target:
    """Reads the embeddings and the last layer; loads the whole model only when features are to be recomputed."""

    def __init__(self, model: str, draft_vocab_size: int, max_length: int, lineage: str = "") -> None:
        """``max_length`` in tokens, of texts whose features are recomputed. Raises ModelError."""
        self._checkpoint = open_checkpoint(model)
        self.config = decoder_config(self._checkpoint.config)
        self.fingerprint = target_fingerprint(self._checkpoint, lineage)
        self.name = Path(self._checkpoint.path).name
        self.version = 0
        self.dtype = fast_dtype(torch.device("cpu"))
        """What heads are computed with, in training and in the gate: what this processor multiplies fastest."""
        self.head = layout.config_for(self.config, draft_vocab_size)
        self.taps = self.head.taps
        self._max_length = min(max_length, self.config.shape.max_positions)
        self._last_layer = layout.last_layer(self._checkpoint.tensors(), self.config.shape.num_layers)
        # As the model that serves has it, and in the format of training, so that heads share it.
        self.embedding = self._last_layer["model.embed_tokens.weight"].to(torch.bfloat16).to(self.dtype)
        self.output = self._last_layer.get("lm_head.weight", self.embedding)
        self._recompute: Recompute | None = None

    def cold_head(self, draft_tokens: Tensor) -> tuple[HeadConfig, dict[str, Tensor]]:
        """A head that starts as the last layer."""
        return self.head, layout.from_target(self.head, self._last_layer, draft_tokens.tolist())

    def trainable(self, config: HeadConfig, tensors: Mapping[str, Tensor]) -> TrainableHead:
        """Raises ModelError for a head that does not read what traffic keeps."""
        if config.kind != "eagle3":
            raise ModelError(
                "only EAGLE-3 heads are trained and scored here; an EAGLE-1 or -2 head can be served as it is"
            )
        layout.check_target(config, self.config)
        if config.taps != self.taps:
            raise ModelError(
                f"the drafter reads layers {list(config.taps)}; what is kept of the traffic, and trained with, are "
                f"layers {list(self.taps)}"
            )
        return TrainableHead(config, self.config, self.embedding, tensors, self.dtype)

    def draft_tokens(self, counts: Mapping[int, float], size: int) -> Tensor:
        """The ``size`` most frequent tokens, and the first of the vocabulary where there are not enough; ascending."""
        chosen = heapq.nlargest(size, counts, key=counts.__getitem__)
        known = set(chosen)
        rest = (token for token in range(self.config.shape.vocab_size) if token not in known)
        chosen += [token for token, _ in zip(rest, range(size - len(chosen)), strict=False)]
        return torch.tensor(sorted(chosen))

    def recompute(self) -> Recompute:
        """Raises ConfigError for models that do not show hidden states."""
        if self._recompute is None:
            options = EngineConfig(model=str(self._checkpoint.path))
            device = find_device(options)
            model = build_model(self._checkpoint, options, Formats.of(torch.bfloat16), device, self._max_length)
            self._recompute = Recompute(model, self.taps, self._max_length)
        return self._recompute
