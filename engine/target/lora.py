"""LoRA updates of the target: low-rank matrices that come instead of weights, and are added to these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.background import breathe
from slipstream.engine.errors import ModelError
from slipstream.engine.models.sent_names import find_place
from slipstream.engine.models.weights import ReadableWeights, row_pieces

PREFIX = "base_model.model."
"""Before the model's own names in what PEFT writes."""
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.[\w-]+)?\.weight")
UNSUPPORTED = re.compile(r"\.(lora_(embedding_[AB]|magnitude_vector|[AB]\.bias))")
OTHERWISE = (
    *("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config"),
)
"""Settings of PEFT with which its matrices are not simply multiplied and added, or not for every token."""
REBASED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin a training in which the model's weights are changed first, so that the matrices go with those."""


def plain_name(name: str) -> str:
    """The model's own name of a tensor that PEFT has written, or the trainer of its model."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


@dataclass(frozen=True, slots=True)
class LoraScale:
    """What the product of the matrices is multiplied with."""

    factor: float
    rank: int | None = None
    """That all matrices have, where it is said."""


def scale_of(config: Mapping[str, Any], path: Path | str) -> LoraScale:
    """What the product of the matrices is multiplied with, from PEFT's configuration.

    Raises ModelError for what cannot be merged.
    """
    if (kind := config.get("peft_type") or "LORA") != "LORA":
        raise ModelError(f"{path}: it is of the type {str(kind)[:40]} (peft_type), and LORA is supported alone")
    for name in OTHERWISE:
        if config.get(name):
            raise ModelError(f"{path}: a LoRA with {name} is not supported")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(REBASED):
        raise ModelError(
            f"{path}: a LoRA that began with {begun[:40]} (init_lora_weights) does not go with the model's weights, "
            "but with what that made of them; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{path} has no usable r and lora_alpha")
    return LoraScale(float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else rank), rank)


class Lora:
    """The matrices of one update, by the weights that they change."""

    def __init__(self) -> None:
        self._matrices: dict[str, dict[str, Tensor]] = {}
        self.scale: LoraScale | None = None
        """What their product is multiplied with, once it is known."""

    def __bool__(self) -> bool:
        return bool(self._matrices)

    def take(self, name: str, tensor: Tensor) -> bool:
        """Keeps a copy of it; False if it is none of a LoRA's matrices."""
        if UNSUPPORTED.search(name):
            raise ModelError(f"{name!r} belongs to a kind of LoRA that is not supported")
        found = MATRIX.fullmatch(plain_name(name))
        if found is None:
            return False
        if tensor.dim() != 2:
            raise ModelError(f"{name!r} has shape {list(tensor.shape)}, which is no matrix of a LoRA")
        matrix = tensor.detach().to("cpu", torch.float32, copy=True)
        self._matrices.setdefault(found["module"] + ".weight", {})[found["which"]] = matrix
        return True

    def pairs(
        self, shapes: Mapping[str, tuple[int, ...]], scale: LoraScale
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """A [rank, k] and B [n, rank], times the scale, by the names of the weights that they change.

        Raises ModelError for a matrix that fits none of these shapes, has no other half, or another rank than is said.
        """
        for name, pair in self._matrices.items():
            breathe()
            if len(pair) != 2:
                raise ModelError(f"of the LoRA for {name!r} only the matrix {'or'.join(pair)} has come")
            down, up = pair["A"], pair["B"]
            place = find_place(name, shapes)
            shape = place.shape(shapes)
            if shape != (len(up), down.shape[1]) or up.shape[1] != len(down):
                raise ModelError(
                    f"the LoRA for {name!r} has the shapes {list(up.shape)} times {list(down.shape)}, and that is "
                    f"{'no weight of this model' if shape is None else list(shape)}"
                )
            if scale.rank not in (None, len(down)):
                raise ModelError(
                    f"the LoRA for {name!r} has the rank {len(down)}, and its configuration says {scale.rank} (r): it "
                    "would be multiplied with a wrong number"
                )
            yield place.names[0], (down, scale.factor * up)

    def merged(self, base: ReadableWeights, factor: float | None) -> Iterator[tuple[str, Tensor, int]]:
        """Rows of the weights that it changes, with the name of each and its first row.

        Raises ModelError as ``pairs`` does.
        """
        scale = self.scale if factor is None else LoraScale(factor)
        if scale is None:
            raise ModelError("nobody has told what the LoRA is to be multiplied with (lora_scale: lora_alpha / r)")
        for name, (down, up) in self.pairs(base.shapes, scale):
            for first, count in row_pieces(base.shapes[name]):
                breathe()
                rows = base.read(name, first, count).to("cpu", torch.float32)
                yield name, rows + up[first : first + count] @ down, first
