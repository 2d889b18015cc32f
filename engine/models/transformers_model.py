"""Any causal model that transformers knows, with the paged cache as its attention implementation.

Slower than the families implemented here, but the same scheduler, cache and sampler drive it. The model sees one long
row of tokens: positions say where each token stands in its sequence, and attention looks up the paged cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.models.config import ModelShape, model_shape, need
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch
from slipstream.kernels.kv_cache import PagedKVCache, TorchKVCache

ATTENTION = "slipstream_paged"


class _GivenOutput(torch.nn.Module):
    """Stands in for the body of a causal model, so that its forward pass applies the head to hidden states we have."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class TransformersModel:
    def __init__(
        self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, folder: Path | None, seed: int = 0
    ) -> None:
        """Loads the weights of a Hugging Face folder with transformers' own loader; without one they are random."""
        module = _build(config, dtype, folder, seed).to(device).eval().requires_grad_(False)
        self.dtype = dtype
        self.kernels = f"transformers-{device.type}"
        self.shape = transformers_shape(config)
        self._device = device
        self._name = type(module).__name__
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._head = module
        self._body = module.base_model
        self._given = _GivenOutput()
        setattr(module, module.base_model_prefix, self._given)
        self.features = torch.empty(0)
        self._probe()

    def tap(self, layers: tuple[int, ...]) -> None:
        raise ConfigError(f"{self.shape.model_type} models run through transformers, which does not show hidden states")

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            target = self._parameters.get(name)
            if target is None:
                raise ModelError(f"{self._name} has no parameter {name!r}")
            if target.shape != tensor.shape:
                raise ModelError(f"tensor {name!r} has shape {list(tensor.shape)}, needed is {list(target.shape)}")
            target.copy_(tensor)

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        shape = self.shape
        return TorchKVCache(
            shape.num_layers, num_blocks, block_size, shape.kv_heads, shape.head_dim, self.dtype, self._device
        )

    def forward(self, batch: RaggedBatch, cache: PagedKVCache) -> Tensor:
        output = self._body(
            input_ids=torch.from_numpy(batch.token_ids).to(self._device, torch.long)[None],
            position_ids=torch.from_numpy(batch.positions).to(self._device, torch.long)[None],
            use_cache=False,
            slipstream_step=(batch, cache),
        )
        self._given.output = output
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, rows: Int32) -> Tensor:
        chosen = hidden[torch.from_numpy(rows).to(self._device, torch.long)]
        self._given.output.last_hidden_state = chosen[None]
        logits: Tensor = self._head(input_ids=torch.zeros(1, len(rows), dtype=torch.long, device=self._device)).logits
        return logits[0].float()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Runs one token: every layer must reach the cache, or the model keeps state that pages cannot hold."""
        cache = _ProbeCache(self.shape, self.dtype, self._device)
        one = np.ones(1, np.int32)
        batch = make_batch(np.zeros(1, np.int32), one, one, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), 16)
        try:
            self.logits(self.forward(batch, cache), np.zeros(1, np.int32))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self._name} cannot run with a paged cache ({type(error).__name__}: {error}); "
                "it needs transformers' attention interface"
            ) from error
        if cache.layers != list(range(self.shape.num_layers)):
            raise ModelError(
                f"{self._name} has {self.shape.num_layers} layers, but attention ran in layers {cache.layers}; "
                "recurrent and hybrid models are not supported"
            )


class _ProbeCache(TorchKVCache):
    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape.num_layers, 1, 16, shape.kv_heads, shape.head_dim, dtype, device)
        self.layers: list[int] = []

    def store(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch) -> None:
        expected = (batch.num_tokens, self.kv_heads, self.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ModelError(
                f"layer {layer} has keys {list(k.shape[1:])} and values {list(v.shape[1:])}; "
                f"the cache holds {self.kv_heads} heads of {self.head_dim} for both"
            )
        self.layers.append(layer)
        super().store(layer, k, v, batch)


def transformers_shape(config: dict[str, Any]) -> ModelShape:
    """As model_shape, for any configuration that transformers knows, whatever it calls its sizes."""
    from transformers import AutoConfig

    need(config, "model_type")
    try:
        settings = AutoConfig.for_model(**config).get_text_config()
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"transformers does not know the model type {config['model_type']!r}: {error}") from error
    names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads")
    sizes = {name: getattr(settings, name, None) for name in (*names, "head_dim", "max_position_embeddings")}
    return model_shape({"model_type": config["model_type"], **sizes})


def _build(config: dict[str, Any], dtype: torch.dtype, folder: Path | None, seed: int) -> Any:
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.utils import logging

    logging.disable_progress_bar()
    AttentionInterface.register(ATTENTION, _paged_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    try:
        if folder is None:
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **options)
        module, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except (ValueError, KeyError, ImportError, AttributeError, TypeError, OSError, SafetensorError) as error:
        kind = config["model_type"]
        raise ModelError(f"transformers cannot load a causal model of type {kind!r}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:3])
        raise ModelError(f"the checkpoint in {folder} lacks {len(missing)} tensors, for example {some}")
    return module


def _paged_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    slipstream_step: tuple[RaggedBatch, PagedKVCache] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if slipstream_step is None:
        raise ModelError(f"{type(module).__name__} does not pass its arguments on to attention")
    if s_aux is not None or position_bias is not None:
        raise ModelError(f"{type(module).__name__} adds sinks or biases to attention scores, which is not supported")
    batch, cache = slipstream_step
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    cache.store(layer, k, v, batch)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = cache.attend(layer, q.contiguous(), batch, scale, sliding_window or 0, softcap or 0.0)
    return out[None], None  # [1, tokens, heads, head_dim]
