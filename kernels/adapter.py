"""Low-rank adapters (Hu et al. 2021): what they add to the matrices of layers, for some rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LayerMatrices = Mapping[str, tuple[Tensor, Tensor]]
"""A [rank, k] and B [n, rank] of matrices of a layer, by their names within it, for example ``self_attn.q_proj``: x A^T
B^T is added to what the matrix makes of x."""
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ADAPTED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""Matrices that can have one; those of the MLP where a layer has a single one."""


class Adapter:
    """The matrices of one adapter, as the ``Compute`` that made it wants them."""
