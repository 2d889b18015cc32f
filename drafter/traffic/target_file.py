"""The target's embedding and output matrix after an update of its weights, in a file beside the traffic it answered.

Who trains on the traffic needs them, and finds in the model's own files only those that served first. Without this file
they are those that serve.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.engine.errors import ModelError
from slipstream.kernels.weight import Weight

FILE = "target.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PIECE_BYTES = 1 << 20
PAUSE_S = 0.001
"""Between two pieces, so that the steps of the engine come first."""


@dataclass(frozen=True, slots=True)
class UpdatedWeights:
    """What identifies the weights of an update."""

    version: int
    """The target version that samples carry; counted anew from 0 whenever the engine starts."""
    since: float
    """When they began to serve, in seconds since 1970: the same version before then was that of other weights."""
    target: str
    """Fingerprint of the target; see ``served_fingerprint``."""


def write(folder: Path, updated: UpdatedWeights, matrices: dict[str, Weight], device: torch.device) -> None:
    """Replaces the file at once when the new one is complete.

    ``matrices``: EMBEDDING and, unless the two are tied, OUTPUT; stored in bfloat16. Raises OSError.
    """
    described: dict[str, object] = {"__metadata__": {"updated": msgspec.json.encode(updated).decode()}}
    end = 0
    for name, matrix in matrices.items():
        begin, end = end, end + 2 * matrix.n * matrix.k
        described[name] = {"dtype": "BF16", "shape": [matrix.n, matrix.k], "data_offsets": [begin, end]}
    head = msgspec.json.encode(described)
    head += b" " * (-len(head) % 8)
    draft = folder / f"{FILE}.tmp"
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for matrix in matrices.values():
                for piece in _pieces(matrix, device):
                    file.write(piece.view(torch.uint8).numpy().data)
                    time.sleep(PAUSE_S)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder / FILE)
    finally:
        draft.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """The weights are those of the model's files again."""
    (folder / FILE).unlink(missing_ok=True)


def read(
    folder: Path, target: str, known: UpdatedWeights | None = None
) -> tuple[UpdatedWeights, dict[str, Tensor]] | None:
    """The weights of the last update and their matrices, by name; none of them where these weights are ``known``.

    None where the model's own files have what serves, or the file is another target's. Raises ModelError for a file
    that is damaged.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as stored:
            found = msgspec.json.decode((stored.metadata() or {})["updated"], type=UpdatedWeights)
            if found.target != target:
                return None
            names = [] if found == known else list(stored.keys())
            # Copies: what the library returns may be the file's own memory, which dies with who cuts it short.
            return found, {name: stored.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        return None
    except (SafetensorError, msgspec.DecodeError, OSError, LookupError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}, the target's weights after an update, is damaged: {error}") from None


def _pieces(matrix: Weight, device: torch.device) -> Iterator[Tensor]:
    rows = max(PIECE_BYTES // (2 * matrix.k), 1)
    for first in range(0, matrix.n, rows):
        indices = torch.arange(first, min(first + rows, matrix.n), device=device)
        yield matrix.rows(indices).to("cpu", torch.bfloat16).contiguous()
