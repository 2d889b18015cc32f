"""Stacks of layers with weights that are always the same, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recorded_graph import RecordedGraph

from slipstream.kernels.batch import NO_MIRRORS, Int32, RaggedBatch, make_batch
from slipstream.kernels.compute import Compute, Formats, LayerShape, Stack
from slipstream.kernels.kv_cache import CacheShape, PagedKVCache
from slipstream.kernels.torch_stack import MATRICES
from slipstream.kernels.triton.compute import TritonCompute
from slipstream.kernels.triton.graphs import GraphPool

CPU = torch.device("cpu")
SMALL = LayerShape(hidden=16, intermediate=48, heads=2, kv_heads=1, head_dim=16, norm_eps=1e-5)
WHOLE = LayerShape(hidden=32, intermediate=64, heads=2, kv_heads=1, head_dim=16, norm_eps=1e-5)
"""Whose rows are whole blocks of 32 numbers."""
TABLES = np.array([[3, 1], [2, 5], [6, 7], [0, 4]], np.int32)
VOCAB = 50


def names(shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer, with their shapes."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner, width = shape.intermediate, shape.input_width
    rows = {"q": q, "k": kv, "v": kv, "out": shape.hidden, "gate": inner, "up": inner, "down": shape.hidden}
    columns = {"q": width, "k": width, "v": width, "out": q, "down": inner}
    if shape.mixture is not None:
        rows = {name: n for name, n in rows.items() if name not in ("gate", "up", "down")}
    found: dict[str, tuple[int, ...]] = {
        f"{MATRICES[name]}.weight": (n, columns.get(name, shape.hidden)) for name, n in rows.items()
    }
    if shape.mixture is not None:
        inner, network = shape.mixture.intermediate, {"gate": 0, "up": 0, "down": 1}
        found["mlp.gate.weight"] = (shape.mixture.experts, shape.hidden)
        for expert in range(shape.mixture.experts):
            for name, turned in network.items():
                size = (shape.hidden, inner) if turned else (inner, shape.hidden)
                found[f"mlp.experts.{expert}.{name}_proj.weight"] = size
    if shape.is_gemma:
        found |= {f"{name}_feedforward_layernorm.weight": (shape.hidden,) for name in ("pre", "post")}
    if shape.qkv_bias:
        found |= {f"{MATRICES[name]}.bias": (rows[name],) for name in "qkv"}
    found["post_attention_layernorm.weight"] = (shape.hidden,)
    if shape.reads == "both":
        found["hidden_norm.weight"] = (shape.hidden,)
    if shape.reads != "plain":
        found["input_layernorm.weight"] = (shape.hidden,)
    if shape.qk_norm:
        found |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    return found


def built(make: Compute, shape: LayerShape, windows: tuple[int, ...]) -> tuple[Stack, PagedKVCache]:
    """Always the same weights."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.outer(torch.arange(64.0), 100.0 ** -torch.linspace(0, 1, shape.head_dim // 2))
    local = angle * 3  # what layers with a window rotate by
    rope = angle.cos(), angle.sin()
    stack = make.stack(shape, windows, rope, (local.cos(), local.sin()) if shape.is_gemma else None)
    embedding, norm = make.weight(VOCAB, shape.hidden), make.norm(shape.hidden)
    embedding.fill(torch.randn(VOCAB, shape.hidden, generator=generator))
    layers = make.layers(shape, len(windows))
    for layer in layers:
        for name, size in names(shape).items():
            layer.fill(name, torch.randn(size, generator=generator) * 0.3 + (0.7 if "norm" in name else 0))
    stack.use(embedding, layers, norm, embedding)
    cache = make.cache(CacheShape(len(windows), 16, shape.kv_heads, shape.head_dim, make.formats.kv), 8)
    return stack, cache


def batch(
    rows: list[int], counts: list[int], ends: list[int], mirrors: Int32 = NO_MIRRORS, columns: tuple[Any, ...] = ()
) -> RaggedBatch:
    numbers = (np.array(x, np.int32) for x in ([7 * i % VOCAB for i in range(sum(counts))], counts, ends))
    made = make_batch(*numbers, TABLES, np.array(rows, np.int32), 16, mirrors)
    return RaggedBatch(**{name: getattr(made, name) for name in made.__slots__} | {"columns": columns})


def recording(formats: Formats | None = None) -> tuple[TritonCompute, list[RecordedGraph]]:
    """``formats``: float32 by default."""
    made: list[RecordedGraph] = []

    def make() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    return TritonCompute(formats or Formats.of(torch.float32), CPU, GraphPool(CPU, 1 << 30, make)), made
