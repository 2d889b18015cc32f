"""Checks a stream of named tensors against what a model needs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slipstream.engine.errors import ModelError

BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached|cos|sin)|(attn|attention)\.(masked_bias|bias)|position_ids)$"
)
"""What exporters wrote besides weights: tables and masks that every implementation makes itself."""


def is_buffer(name: str) -> bool:
    return BUFFERS.search(name) is not None


class WeightSlots:
    """Every parameter is taken once with the right shape; the rest of the checkpoint must be known leftovers."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = dict(expected)
        self._missing = set(expected)

    def take(self, name: str, tensor: Tensor) -> bool:
        """True when the model has this parameter; raises ModelError on a wrong shape or an unknown name."""
        size = self._expected.get(name)
        if size is None:
            # A tied head is stored by some although it repeats the embedding.
            if is_buffer(name) or name == "lm_head.weight":
                return False
            raise ModelError(f"the checkpoint holds a tensor {name!r} that this architecture does not have")
        if tuple(tensor.shape) != size:
            raise ModelError(f"tensor {name!r} has shape {list(tensor.shape)}, the configuration needs {list(size)}")
        self._missing.discard(name)
        return True

    def check_complete(self) -> None:
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise ModelError(f"the checkpoint lacks {len(self._missing)} tensors, for example {some}")
