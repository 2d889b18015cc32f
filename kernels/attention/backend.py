"""What computes attention over the paged cache of a GPU, besides Triton's kernels, which own its layout.

That layout was decided once: tokens as rows, [blocks, block_size, kv_heads, head_dim] (FlashInfer's NHD), which
storing, copying, scratch blocks and all of these backends take as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import CacheShape
from slipstream.kernels.triton.device_batch import DeviceBatch


class UnavailableError(Exception):
    """A backend cannot be used here; the message is one sentence that says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch over one cache, as the host made it and as kernels see it."""

    host: RaggedBatch
    device: DeviceBatch
    shape: CacheShape


class StepAttention(Protocol):
    """Attention of one step: what layers share of it is worked out once."""

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """As ``AttentionPlan.attend``; keys, values [blocks, block_size, kv_heads, head_dim] of one layer."""


class AttentionBackend(Protocol):
    """A way to compute attention that is planned on the host anew for every step, so graphs cannot hold it."""

    name: ClassVar[str]

    def plan(self, step: Step) -> StepAttention:
        """Once per step. The batch on the device may not be placed yet."""
