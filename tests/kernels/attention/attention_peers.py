"""Stand-ins for FlashInfer and xFormers: every call is bound to the real signature, and computed by the plain formula.

The signatures are those of named versions (``scripts/peer_signatures.py``). What is passed is decoded as the libraries
document it: starts, blocks, lengths of last blocks, masks.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "signatures"
FLASHINFER = sorted(file.stem for file in FOLDER.glob("flashinfer-python-*.json"))
XFORMERS = sorted(file.stem for file in FOLDER.glob("xformers-*.json"))


class Signatures:
    def __init__(self, version: str) -> None:
        self._known: dict[str, list[tuple[str, str, bool]]] = json.loads((FOLDER / f"{version}.json").read_text())

    def bound(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments by the names they have there; TypeError where it does not take them."""
        parameters = [
            inspect.Parameter(each, getattr(inspect.Parameter, kind), default=None if optional else inspect._empty)
            for each, kind, optional in self._known[name]
        ]
        return inspect.Signature(parameters).bind(*args, **kwargs).arguments


def softmax_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [n, heads, d] over k, v [length, kv_heads, d], and the binary logarithm of its sums [n, heads]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float() * scale, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(k) - len(q), len(k))[:, None] if causal else torch.full((len(q), 1), len(k))
    key = torch.arange(len(k))
    seen = (key <= position) & (key >= position - window if window >= 0 else True)
    scores = scores.masked_fill(~seen, float("-inf"))
    sums = scores.logsumexp(-1).T / math.log(2)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype), sums


class FlashInfer:
    """Its module, in one version."""

    def __init__(self, version: str) -> None:
        self.signatures = Signatures(version)
        self.calls: list[dict[str, Any]] = []
        """What every plan was given."""

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> _Wrapper:  # noqa: N802
        given = self.signatures.bound("BatchPrefillWithPagedKVCacheWrapper.__init__", None, *args, **kwargs)
        assert given["backend"] == "fa2" and given["kv_layout"] == "NHD"
        assert given["float_workspace_buffer"].dtype is torch.uint8
        return _Wrapper(self)

    def merge_state(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        v_a, s_a, v_b, s_b = self.signatures.bound("merge_state", *args, **kwargs).values()
        assert v_a.shape == v_b.shape and s_a.shape == s_b.shape == v_a.shape[:2]
        assert s_a.dtype is s_b.dtype is torch.float32
        weights = torch.stack((s_a, s_b)).mul(math.log(2)).softmax(0)[..., None]
        return (weights[0] * v_a + weights[1] * v_b).to(v_a.dtype), torch.logaddexp2(s_a, s_b)


class _Wrapper:
    def __init__(self, owner: FlashInfer) -> None:
        self._owner = owner
        self._planned: dict[str, Any] = {}

    def plan(self, *args: Any, **kwargs: Any) -> None:
        given = self._owner.signatures.bound("BatchPrefillWithPagedKVCacheWrapper.plan", self, *args, **kwargs)
        starts, pages = given["qo_indptr"], given["paged_kv_indptr"]
        blocks, last = given["paged_kv_indices"], given["paged_kv_last_page_len"]
        assert all(x.dtype is torch.int32 for x in (starts, pages, blocks, last))
        assert len(starts) == len(pages) == len(last) + 1 and int(pages[-1]) == len(blocks)
        assert bool(((last > 0) & (last <= given["page_size"])).all()) and bool((pages[1:] > pages[:-1]).all())
        assert (given["fixed_split_size"] or 0) > 0 or given["disable_split_kv"]
        self._planned = given
        self._owner.calls.append(given)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        ran = self._owner.signatures.bound("BatchPrefillWithPagedKVCacheWrapper.run", self, *args, **kwargs)
        given, q, (keys, values) = self._planned, ran["q"], ran["paged_kv_cache"]
        assert keys.shape[1:] == (given["page_size"], given["num_kv_heads"], given["head_dim_qk"])
        assert q.shape == (int(given["qo_indptr"][-1]), given["num_qo_heads"], given["head_dim_qk"])
        assert given["q_data_type"] is q.dtype and given["kv_data_type"] is keys.dtype
        out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
        for segment, last in enumerate(given["paged_kv_last_page_len"].tolist()):
            begin, end = given["qo_indptr"][segment : segment + 2].tolist()
            first, stop = given["paged_kv_indptr"][segment : segment + 2].tolist()
            blocks = given["paged_kv_indices"][first:stop].long()
            length = (stop - first - 1) * given["page_size"] + last
            k, v = (x[blocks].flatten(0, 1)[:length] for x in (keys, values))
            settings = given["sm_scale"], given["causal"], given["window_left"], given["logits_soft_cap"] or 0.0
            out[begin:end], sums[begin:end] = softmax_part(q[begin:end], k, v, *settings)
        return (out, sums) if ran.get("return_lse") else out


def xformers(version: str) -> Any:
    """``xformers.ops.fmha`` of one version."""
    signatures = Signatures(version)

    class Mask:
        def __init__(self, given: dict[str, Any]) -> None:
            self.given = given

        @staticmethod
        def from_seqlens(*args: Any, **kwargs: Any) -> Mask:
            return Mask(signatures.bound("BlockDiagonalPaddedKeysMask.from_seqlens", Mask, *args, **kwargs))

        def make_paged(self, *args: Any, **kwargs: Any) -> PagedMask:
            more = signatures.bound("BlockDiagonalPaddedKeysMask.make_paged", self, *args, **kwargs)
            assert more["paged_type"] is PagedMask
            assert more["block_tables"].shape[1] * more["page_size"] == self.given["kv_padding"]
            return PagedMask(self.given | more)

    class PagedMask(Mask):
        def to(self, *args: Any, **kwargs: Any) -> PagedMask:
            signatures.bound("PagedBlockDiagonalPaddedKeysMask.to", self, *args, **kwargs)
            return self

    class FwOp:
        BLOCK_N = 64

        @classmethod
        def is_available(cls) -> bool:
            signatures.bound("BaseOperator.is_available", cls)
            return True

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signatures.bound("memory_efficient_attention_forward", *args, **kwargs)
        mask, q = given["attn_bias"].given, given["query"]
        assert issubclass(given["op"], FwOp) and mask["page_size"] % given["op"].BLOCK_N == 0
        assert set(mask["q_seqlen"]) == {1}, "its kernel takes segments of equal length"
        out = torch.empty_like(q)
        for row, length in enumerate(mask["kv_seqlen"]):
            size = mask["page_size"]
            blocks = mask["block_tables"][row, : -(-length // size)].long()
            k, v = (given[name][0, :, :, 0].unflatten(0, (-1, size))[blocks].flatten(0, 1) for name in ("key", "value"))
            states = q[0, row].flatten(0, 1)[None], k[:length], v[:length]
            out[0, row] = softmax_part(*states, given["scale"], True, -1, 0.0)[0].view(out[0, row].shape)
        return out

    masks = SimpleNamespace(BlockDiagonalPaddedKeysMask=Mask, PagedBlockDiagonalPaddedKeysMask=PagedMask)
    return SimpleNamespace(
        attn_bias=masks, triton_splitk=SimpleNamespace(FwOp=FwOp), memory_efficient_attention_forward=forward
    )
