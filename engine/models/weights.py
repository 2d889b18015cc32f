"""Checks a stream of named tensors against what a model needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slipstream.engine.errors import ModelError


class WeightSlots:
    """Every parameter is taken once with the right shape; the rest of the checkpoint must be known leftovers."""

    # Buffers that older exporters wrote; a tied head is stored by some although it repeats the embedding.
    IGNORED = ("rotary_emb.inv_freq", "lm_head.weight", "attn.masked_bias", "attn.bias")

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = dict(expected)
        self._missing = set(expected)

    def take(self, name: str, tensor: Tensor) -> bool:
        """True when the model has this parameter; raises ModelError on a wrong shape or an unknown name."""
        size = self._expected.get(name)
        if size is None:
            if name.endswith(self.IGNORED):
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
