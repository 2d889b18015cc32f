"""Tensors as trainers call and cut them, and where their rows go in weights that are called and cut otherwise.

Files have the experts of a mixture one by one. Modules of transformers 5 have those of a layer in two tensors, whose
rows are those of all of them, one expert after the other; trainers send parameters of modules, and so these. Models
that see have the decoder under a prefix, and some files other names than modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

JOINED = re.compile(r"(?P<experts>.+\.experts)\.(?P<which>gate_up_proj|down_proj)")
CUT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What of one expert lies in such a tensor."""
RENAMED = (
    (re.compile(r"^(.+\.)?(language_model|text_model)\.(model\.)?(?=(layers|embed_tokens|norm)\.)"), "model."),
    (re.compile(r"^(.+\.)?language_model\.(?=lm_head\.)"), ""),
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".block_sparse_moe.experts.gate_up_proj"),  # Granite
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".block_sparse_moe.experts.down_proj"),
    (re.compile(r"\.router\.layer\.weight$"), ".router.weight"),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),  # Mixtral, Phi-3.5-MoE
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"\.mlp\.gate\.weight$"), ".mlp.router.weight"),  # Phi-3.5-MoE
    (re.compile(r"^embed_out\.weight$"), "lm_head.weight"),  # GPT-NeoX
)
"""Names in files and in whole models, and those that weights have here; put in one after the other, until one fits."""
SEES = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|connector|image_newline)(\.|$)")
"""What models that see have beside the decoder that is served of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes that a trainer sends."""

    names: tuple[str, ...]
    """Weights here that it is, or whose rows it has; none where nothing is done with it."""
    per_row: int = 0
    """How many of them are in each of its rows, where it joins those of all experts."""

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The tensor's, where weights here have such ``shapes``; None if they have none of this name."""
        one = shapes.get(self.names[0]) if self.names else None
        if one is None or not self.per_row:
            return one
        return (len(self.names) // self.per_row, self.per_row * one[0], *one[1:])

    def of_rows(self, first: int, count: int) -> tuple[str, ...]:
        """The weights in so many of its rows, where it joins those of all experts."""
        return self.names[first * self.per_row : (first + count) * self.per_row]


def find_place(name: str, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None) -> Place:
    """``aliases``: names by which some weights go, too. A name that is not known goes to a weight of this name."""
    known = name
    for pattern, plain in ((None, ""), *RENAMED):
        known = known if pattern is None else pattern.sub(plain, known)
        known = (aliases or {}).get(known, known)
        if known in shapes:
            return Place((known,))
        if joined := JOINED.fullmatch(known):
            kinds, found = CUT[joined["which"]], list[str]()
            while f"{joined['experts']}.{len(found) // len(kinds)}.{kinds[0]}.weight" in shapes:
                expert = f"{joined['experts']}.{len(found) // len(kinds)}"
                found += [f"{expert}.{kind}.weight" for kind in kinds]
            if found:
                return Place(tuple(found), len(kinds))
    return Place((name,))


def experts_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory, with the matrices of a module's experts each by itself, called as in files."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        joined = JOINED.fullmatch(name)
        if joined is None or not _are_rows(tensors, joined["experts"]):
            found[name] = tensor
            continue
        kinds = CUT[joined["which"]]
        for index, expert in enumerate(tensor):
            for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                found[f"{joined['experts']}.{index}.{kind}.weight"] = part
    return found


def _are_rows(tensors: Mapping[str, Tensor], experts: str) -> bool:
    """Whether matrices are [experts, out, in], all gates before what goes through them: not so those of gpt-oss."""
    up, down = (tensors.get(f"{experts}.{which}") for which in CUT)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return False
    return tuple(up.shape) == (len(down), 2 * down.shape[2], down.shape[1])
