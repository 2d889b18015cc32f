"""Loads the compiled kernels and mirrors the structs of csrc/api.h.

The library is built when the package is installed, if a compiler is there. It holds one variant per instruction set
and picks the best one this processor runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.batch import RaggedBatch

LIBRARY = Path(__file__).parent.parent / "_native.so"
ISA_VARIABLE = "SLIPSTREAM_ISA"
"""Environment variable: the variant to use instead of the best, to try what other machines run; --isa comes first."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
CACHE_FORMS = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""Those of a cache in another format than its model's."""


class IsaError(ValueError):
    """A variant of the compiled kernels is asked for that does not run here; its text tells people so."""


class CPart(Structure):
    _fields_ = (
        ("form", c_int32),
        ("first_panel", c_int32),
        ("panels", c_int32),
        ("reserved", c_int32),
        ("data", c_void_p),
    )


class CLinear(Structure):
    _fields_ = (
        ("n", c_int32),
        ("k", c_int32),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("parts", POINTER(CPart)),
        ("num_parts", c_int32),
        ("arithmetic", c_int32),
    )


MATRICES = ("qkv", "out", "gate_up", "down")
"""The matrices of a layer, in the order of SlipMatrix."""


class CAdapter(Structure):
    _fields_ = (
        ("down", CLinear * len(MATRICES)),
        ("up", c_void_p * len(MATRICES)),
        ("begins", c_void_p * len(MATRICES)),
        ("rank", c_int32 * len(MATRICES)),
    )


class CLayer(Structure):
    _fields_ = (
        ("qkv", CLinear),
        ("out", CLinear),
        ("gate_up", CLinear),
        ("down", CLinear),
        ("attn_norm", c_void_p),
        ("embed_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("k_scales", c_void_p),
        ("v_scales", c_void_p),
        ("window", c_int32),
        ("reserved", c_int32),
        ("adapters", POINTER(CAdapter)),
    )


class CModel(Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("num_layers", c_int32),
        ("norm_eps", c_float),
        ("rope_cos", c_void_p),
        ("rope_sin", c_void_p),
        ("layers", POINTER(CLayer)),
        ("embed", CLinear),
        ("lm_head", CLinear),
        ("final_norm", c_void_p),
        ("quantised", c_int32),
        ("given_hidden", c_int32),
        ("num_taps", c_int32),
        ("adapter_rank", c_int32),
        ("taps", c_void_p),
        ("features", c_void_p),
        ("cache_form", c_int32),
        ("reserved", c_int32),
    )


class CBatch(Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_segments", c_int32),
        ("token_ids", c_void_p),
        ("q_start", c_void_p),
        ("kv_len", c_void_p),
        ("block_tables", c_void_p),
        ("table_row", c_void_p),
        ("table_stride", c_int32),
        ("tiles_per_block", c_int32),
        ("num_mirrors", c_int32),
        ("mirrors", c_void_p),
        ("adapters", c_void_p),
    )


class CAttention(Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("cache_form", c_int32),
        ("reserved", c_int32),
        ("k_scales", c_void_p),
        ("v_scales", c_void_p),
    )


class CChains(Structure):
    _fields_ = (
        ("columns", c_int32),
        ("runners", c_int32),
        ("sharpness", c_double),
        ("stop_below", c_double),
        ("vocabulary", c_void_p),
        ("most", c_void_p),
        ("mapped", c_void_p),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("min_p", c_void_p),
        ("top_p", c_void_p),
        ("seeds", c_void_p),
        ("indices", c_void_p),
        ("depth", c_int32),
        ("reserved", c_int32),
        ("tokens", c_void_p),
        ("likely", c_void_p),
        ("counts", c_void_p),
    )


LAYOUT = functools.reduce(
    lambda found, struct: found * 131 + ctypes.sizeof(struct),
    (CPart, CLinear, CAdapter, CLayer, CModel, CBatch, CAttention, CChains),
    4,
)
"""As slip_layout, which begins with the same number: any other is that of a library that was built of other sources."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built of these sources, or this processor runs none of its variants.

    Raises IsaError if the environment asks for a variant that does not run here.
    """
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    if not hasattr(library, "slip_layout"):
        return None
    library.slip_layout.restype = c_int64
    if library.slip_layout() != LAYOUT:
        return None  # calls would read beyond what they are given
    library.slip_init.restype = c_char_p
    library.slip_init.argtypes = [c_int32]
    library.slip_isa.restype = c_char_p
    library.slip_variant.restype = c_char_p
    library.slip_variant.argtypes = [c_int32, c_void_p]
    library.slip_select.argtypes = [c_char_p]
    library.slip_set_threads.argtypes = [c_int32]
    library.slip_linear.argtypes = [c_int32, c_void_p, c_void_p, c_int32, c_void_p, c_int32]
    library.slip_form.argtypes = [c_char_p, c_int32]
    library.slip_part_bytes.argtypes = [c_int32] * 3
    library.slip_part_bytes.restype = c_int64
    library.slip_pack.argtypes = [c_char_p, c_void_p, c_int64, c_int32, c_void_p, c_int32, c_int32, c_int32, c_int32]
    library.slip_dequantise.argtypes = [c_char_p, c_void_p, c_int64, c_int32, c_int32, c_void_p, *[c_int32] * 4]
    library.slip_unpack.argtypes = [c_void_p, c_int32, c_void_p, c_int32, c_int32, c_int32, c_void_p]
    library.slip_keep.argtypes = library.slip_unpack.argtypes
    library.slip_store_kv.argtypes = [c_void_p] * 6
    library.slip_attention.argtypes = [c_void_p] * 6
    library.slip_workspace_bytes.argtypes = [c_void_p, c_int32]
    library.slip_workspace_bytes.restype = c_int64
    library.slip_forward.argtypes = [c_void_p] * 4
    library.slip_logits.argtypes = [c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_void_p]
    library.slip_argmax.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p]
    library.slip_log_probabilities.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int32, *[c_void_p] * 4]
    library.slip_distribution.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p]
    library.slip_race.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p]
    library.slip_draft.argtypes = [c_void_p] * 6
    library.slip_read.argtypes = [c_void_p, c_int64]
    library.slip_multiply.argtypes = [c_int32, c_int64]
    library.slip_multiply.restype = c_double
    for name in (
        "read",
        "set_threads",
        "argmax",
        "log_probabilities",
        "distribution",
        "race",
        "linear",
        "pack",
        "dequantise",
        "unpack",
        "keep",
        "store_kv",
        "attention",
        "forward",
        "logits",
        "draft",
    ):
        getattr(library, f"slip_{name}").restype = None
    if library.slip_init(torch.get_num_threads()) is None:
        return None
    if wanted := os.environ.get(ISA_VARIABLE):
        _select(library, wanted, f"{ISA_VARIABLE}={wanted}")
    return library


def select(isa: str) -> None:
    """Computes with this variant from now on, in the whole process; raises IsaError if it does not run here."""
    library = load()
    if library is None:
        raise IsaError(f"--isa {isa}: there are no compiled kernels here; install a C++ compiler, and Slipstream again")
    _select(library, isa, f"--isa {isa}")


def variants() -> dict[str, bool]:
    """The variants that were compiled, the best one first, and whether this processor runs them."""
    library = load()
    return {} if library is None else _variants(library)


def _variants(library: ctypes.CDLL) -> dict[str, bool]:
    found: dict[str, bool] = {}
    runs = c_int32()
    while name := library.slip_variant(len(found), ctypes.byref(runs)):
        found[name.decode()] = bool(runs.value)
    return found


def _select(library: ctypes.CDLL, isa: str, asked: str) -> None:
    if library.slip_select(isa.encode()):
        found = _variants(library)
        why = "this processor does not run them" if isa in found else "there are no such kernels"
        raise IsaError(f"{asked}: {why}; here are {', '.join(name for name, runs in found.items() if runs)}")


def isa() -> str | None:
    """Name of the instruction set in use, None without native kernels."""
    library = load()
    return library.slip_isa().decode() if library is not None else None


def supports(head_dim: int, *widths: int) -> bool:
    """Whether the kernels handle these sizes: vectors of 16 lanes, head_dim up to 256."""
    return head_dim <= 256 and head_dim % 32 == 0 and all(width % 16 == 0 for width in widths)


def address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def c_batch(batch: RaggedBatch) -> CBatch:
    """A view of the batch; valid while the batch lives."""
    for array in (batch.token_ids, batch.q_start, batch.kv_len, batch.table_row, batch.mirrors):
        assert array.dtype == np.int32 and array.flags.c_contiguous
    assert batch.adapters is None or (batch.adapters.dtype == np.int32 and batch.adapters.flags.c_contiguous)
    assert batch.block_tables.dtype == np.int32 and batch.block_tables.strides[1] == 4
    return CBatch(
        batch.num_tokens,
        batch.num_segments,
        batch.token_ids.ctypes.data,
        batch.q_start.ctypes.data,
        batch.kv_len.ctypes.data,
        batch.block_tables.ctypes.data,
        batch.table_row.ctypes.data,
        batch.block_tables.strides[0] // 4,
        batch.block_size // 16,
        len(batch.mirrors),
        batch.mirrors.ctypes.data,
        None if batch.adapters is None else batch.adapters.ctypes.data,
    )
