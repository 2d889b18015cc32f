"""Drafts with an EAGLE-3 head: one small layer that continues the target's own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.chain import ChainDrafter
from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.head.network import HeadNetwork, make_network
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.native_decoder import NativeDecoder
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.torch_decoder import TorchDecoder
from slipstream.engine.speculation.protocol import Computed, DraftHost, DraftRow
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache

MOST_PENDING = 512
"""Positions per request that wait for the head while nobody asks it; older ones are left out."""

Load = Callable[[DecoderConfig], tuple[HeadConfig, Mapping[str, Tensor]]]
"""Reads or makes a head for a target."""


@dataclass(slots=True)
class _Pending:
    """Features that the head has not seen: positions start, start + 1, …, as the head reads them."""

    start: int
    fused: Tensor  # [positions, hidden]


class HeadDrafter(ChainDrafter):
    """Position p of the head holds the features of position p and token p + 1, and predicts token p + 2.

    The features of accepted tokens are the target's own; while drafting, the head's output stands in for them.
    """

    name = "head"

    def __init__(self, load: Load, stop_below: float = 0.05, width: int = 1) -> None:
        super().__init__(stop_below, width)
        self._load = load
        self._config: HeadConfig
        self._tensors: Mapping[str, Tensor]
        self._network: HeadNetwork
        self._to_target: Int32

    def taps(self, model: CausalModel) -> tuple[int, ...]:
        if not isinstance(model, NativeDecoder | TorchDecoder):
            raise ConfigError(
                f"a head reads hidden states, which {model.shape.model_type} models, run through transformers, do not "
                "show; use --speculation ngram,suffix"
            )
        self._config, self._tensors = self._load(model.config)
        layout.check_target(self._config, model.config)
        return self._config.taps

    def attach(self, host: DraftHost) -> None:
        super().attach(host)
        config = self._config
        self._network = make_network(config, host)
        self._network.load(self._tensors)
        offsets = self._tensors.get("d2t", torch.zeros(config.draft_vocab_size))
        self._to_target = (offsets.long() + torch.arange(config.draft_vocab_size)).numpy().astype(np.int32)
        self._tensors = {}

    def observe(self, computed: Sequence[Computed]) -> None:
        if not computed:
            return
        fused = self._network.fuse(torch.cat([entry.features for entry in computed]))
        parts = torch.split(fused, [len(entry.features) for entry in computed])
        for entry, rows in zip(computed, parts, strict=True):
            pending = entry.row.memory.get(self.name)
            if isinstance(pending, _Pending) and pending.start + len(pending.fused) == entry.start:
                rows = torch.cat((pending.fused, rows))
                entry_start = pending.start
            else:
                entry_start = entry.start
            left_out = max(len(rows) - MOST_PENDING, 0)
            entry.row.memory[self.name] = _Pending(entry_start + left_out, rows[left_out:])

    def _is_ready(self, row: DraftRow) -> bool:
        """Whether the features up to the last but one token, after which the next guess comes, are at hand."""
        pending = row.memory.get(self.name)
        return isinstance(pending, _Pending) and pending.start + len(pending.fused) == row.length - 1

    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the head what the target computed since it was asked last; its output at the last positions."""
        pendings = []
        for row in rows:
            pending = row.memory.pop(self.name)
            assert isinstance(pending, _Pending)
            pendings.append(pending)
        ids = np.concatenate([row.known[pending.start + 1 :] for row, pending in zip(rows, pendings, strict=True)])
        counts = np.array([len(pending.fused) for pending in pendings], np.int32)
        ends = np.array([row.length - 1 for row in rows], np.int32)
        batch = self._batch(rows, ids, counts, ends)
        hidden = self._network.forward(batch, torch.cat([pending.fused for pending in pendings]))
        return hidden[np.cumsum(counts) - 1]

    @property
    def _kv(self) -> PagedKVCache:
        return self._network.cache

    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        return self._network.forward(batch, hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return self._network.logits(hidden)

    def _tokens(self, choices: Int32) -> Int32:
        return self._to_target[choices]

    def _position(self, row: DraftRow) -> int:
        return row.length - 1  # with the token at this place and the output before it
