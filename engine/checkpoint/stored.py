"""Makes ``Stored`` tensors of what lies in a file."""

from __future__ import annotations

from slipstream.kernels.stored import Stored


def in_rows(kind: str, shape: tuple[int, ...], data: memoryview) -> Stored:
    """``data`` is all of a tensor of this format."""
    import numpy as np  # not above: configurations are also read where there is no need of it

    rows = shape[0] if len(shape) > 1 else 1
    flat = np.frombuffer(data, np.uint8)
    return Stored(kind, shape, flat.reshape(rows, -1) if len(flat) else flat.reshape(rows, 0))
