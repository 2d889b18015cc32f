"""From configuration to a model in memory and a cache that fits beside it."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from slipstream.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.checkpoint.quantised.schemes import find_scheme
from slipstream.engine.checkpoint.shapes import check_shapes
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.limits import free_memory, usable_cores
from slipstream.engine.models.attention import attention_choice, cache_maker
from slipstream.engine.models.cache_size import NO_DRAFTS, Drafts, fit_cache
from slipstream.engine.models.config import ModelShape, cache_shape, decoder_config, is_own, model_shape
from slipstream.engine.models.decoder import Decoder
from slipstream.engine.models.gpu_memory import (
    MOST_PENDING,
    budget,
    has_own_memory,
    head_bytes,
    pending_bytes,
    step_bytes,
)
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.transformers_files import is_of_transformers, transformers_shape
from slipstream.engine.models.transformers_model import TransformersModel
from slipstream.engine.models.weight_formats import DTYPES, choose_formats, describe, packed_formats, weights_bytes
from slipstream.engine.models.weights import Rows, ahead, load, require_numbers
from slipstream.engine.units import human_size, parse_size
from slipstream.kernels.attention.choice import backend
from slipstream.kernels.compute import PACKED, Compute, Formats, LayerShape
from slipstream.kernels.machine import FORMATS, describe_speed, fast_dtype
from slipstream.kernels.native import library
from slipstream.kernels.native.piecewise import PiecewiseCompute
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.torch_stack import TorchCompute
from slipstream.kernels.triton import launch

log = logging.getLogger(__name__)
COMPUTES: dict[str, type[Compute]] = {"native": NativeCompute, "torch": TorchCompute}
"""Ways to run layers by the names that --kernels takes, preferred ones first; besides Triton's, which GPUs have."""
SPARE_BYTES = 200 << 20
"""Memory that loading something more beside the model leaves free."""
HEADROOM_BYTES = 400 << 20
"""Memory for the interpreter, torch and activations, besides weights and cache."""
SCRATCH_BLOCKS = 64
"""Cache blocks for branches of trees; one takes one block mostly, two where it crosses a border."""
GENERATES = re.compile(r"ForCausalLM|ForConditionalGeneration|ForGeneration")
"""What the names of architectures contain that generate text; those of other heads have another word behind "For"."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: CausalModel
    max_model_len: int
    num_blocks: int
    scratch_blocks: int
    """Besides, for branches of trees."""
    block_bytes: int
    weights_bytes: int
    update_bytes: int
    """What another set of weights takes that comes as numbers, as updates do; with --quantize they become blocks."""
    weights: str
    """In which form the weights are kept, for people."""
    weights_because: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """How a model is computed here."""

    checkpoint: Checkpoint
    device: torch.device
    shape: ModelShape
    kind: type[Compute]
    formats: Formats
    because: str
    """Why in these, for people."""


def load_model(config: EngineConfig, branches: bool = False) -> LoadedModel:
    """Loads the weights and sizes the cache; ``branches``: with scratch blocks for those of draft trees.

    Raises:
        ModelError: the model is broken, unknown, or does not fit into memory.
        ConfigError: an option does not fit the model or the machine.
    """
    began = time.monotonic()
    choice = _choose(config)
    checkpoint, device, shape, kind = choice.checkpoint, choice.device, choice.shape, choice.kind
    formats = choice.formats
    size = weights_bytes(checkpoint, config, formats, kind)
    block_bytes = kind.cache_class.block_bytes(cache_shape(shape, config.block_size, formats))
    scratch_blocks = SCRATCH_BLOCKS if branches else 0
    on_gpu = has_own_memory(device)
    layer_bytes = block_bytes // shape.num_layers
    drafts = _drafting(checkpoint, config, formats, device, layer_bytes) if on_gpu else NO_DRAFTS
    besides = HEADROOM_BYTES + drafts.fixed + scratch_blocks * (block_bytes + drafts.per_block)
    available = budget(device, config.gpu_memory_utilization) if on_gpu else available_memory(device)
    room = partial(fit_cache, config, shape, size, block_bytes, drafts)
    num_blocks, max_model_len = room(besides, available, on_gpu)
    model = build_model(checkpoint, config, formats, device, max_model_len)
    if on_gpu:
        rows = config.max_running * (1 + (config.max_draft_tokens if config.speculation != "off" else 0))
        # Draft tokens of all requests together may be more than the prompts of a step.
        tokens = max(config.max_step_tokens, rows)
        step = step_bytes(model, device, tokens, rows, max_model_len, config.block_size)
        besides += step + parse_size(config.graph_memory, "graph-memory")
        num_blocks, max_model_len = room(besides, available, on_gpu)
    as_sent = formats if formats.quantize != "none" else Formats.of(formats.compute)
    return LoadedModel(
        model=model,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        scratch_blocks=scratch_blocks,
        block_bytes=block_bytes,
        weights_bytes=size,
        update_bytes=weights_bytes(checkpoint, config, as_sent, kind),
        weights=describe(checkpoint, config, formats, kind),
        weights_because=choice.because,
        seconds=time.monotonic() - began,
    )


def weights_here(config: EngineConfig) -> tuple[str, str]:
    """How the weights of a model would be kept on this machine, and why, for people; raises as ``load_model`` does."""
    choice = _choose(config)
    return describe(choice.checkpoint, config, choice.formats, choice.kind), choice.because


def _choose(config: EngineConfig) -> _Choice:
    checkpoint, device = open_checkpoint(config.model), find_device(config)
    _check_kind(checkpoint)
    shape = _shape(checkpoint.config)
    if config.load_format != "dummy" and is_own(checkpoint.config):
        check_shapes(checkpoint.config, checkpoint.tensor_shapes())
    _select_isa(config.isa)
    kind = _choose_compute(checkpoint, config, device)
    kind.set_threads(config.threads or usable_cores())  # first: torch's speed in number formats is measured with them
    formats, because = choose_formats(checkpoint, config, kind, _choose_dtype(checkpoint, config, device, kind))
    return _Choice(checkpoint, device, shape, kind, formats, because)


def _shape(config: dict[str, Any]) -> ModelShape:
    return model_shape(config) if is_own(config) else transformers_shape(config)


def _select_isa(isa: str) -> None:
    """Before anything asks how the compiled kernels compute; also finds out what the environment asks for."""
    try:
        if isa == "auto":
            library.load()
        else:
            library.select(isa)
    except library.IsaError as error:
        raise ConfigError(str(error)) from None


def _check_kind(checkpoint: Checkpoint) -> None:
    """Refuses quantised weights that cannot be read, and models that are made for other things than generating text."""
    config = checkpoint.config
    if checkpoint.quantisation is not None:
        find_scheme(checkpoint.quantisation, checkpoint.path)
    stated = config.get("architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    if names and all("For" in name and not GENERATES.search(name) for name in names):
        raise ModelError(f"{checkpoint.path} holds a {names[0]}, which does not generate text")


def build_model(
    checkpoint: Checkpoint, options: EngineConfig, formats: Formats, device: torch.device, max_length: int
) -> CausalModel:
    """The fastest implementation that covers this model, with its weights loaded."""
    config, dummy = checkpoint.config, options.load_format == "dummy"
    if not is_own(config):
        _refuse_deterministic(options, "models that run through transformers")
        cache = cache_maker(config, options, formats, device)
        found = TransformersModel(config, formats, device, None if dummy else checkpoint, options.seed, cache)
        stored = checkpoint.formats() if is_of_transformers(checkpoint) and not dummy else {}
        for name in found.weights.shapes:
            require_numbers(name, not stored.get(name, "F").startswith(("F", "BF")))
        return found
    kind = _choose_compute(checkpoint, options, device)
    if options.kernels == "native" and kind is not COMPUTES["native"]:
        raise ConfigError(
            "--kernels native: the compiled kernels are not available here (no compiler at install, an older "
            "processor, a GPU, or sizes that are not multiples of 16); use --kernels auto"
        )
    if kind is TorchCompute and formats.weights == PACKED:  # of a drafter; the model has others
        formats = replace(Formats.of(formats.compute), kv=formats.kv)
    if not kind.can_be_batch_invariant:
        _refuse_deterministic(options, "torch's kernels, which run here instead of the compiled ones,")
    model = Decoder(decoder_config(config), _made(kind, config, formats, device, options), max_length)
    load(model, dummy_tensors(config, options.seed, device) if dummy else _tensors(model, checkpoint))
    return model


def _tensors(model: CausalModel, checkpoint: Checkpoint) -> Iterable[tuple[str, Rows]]:
    """Each is read while the one before is laid out, if none is so large that two of them may not fit into memory."""
    largest = max(map(math.prod, checkpoint.tensor_shapes().values()), default=0) * torch.float32.itemsize
    return ahead(model.tensors(checkpoint)) if largest <= SPARE_BYTES else model.tensors(checkpoint)


def file_tensors(options: EngineConfig, model: CausalModel, device: torch.device) -> Iterable[tuple[str, Rows]]:
    """The weights that a model of these options begins with, to be filled in again."""
    checkpoint = open_checkpoint(options.model)
    if options.load_format == "dummy" and is_own(checkpoint.config):
        return dummy_tensors(checkpoint.config, options.seed, device)
    return model.tensors(checkpoint)


def _refuse_deterministic(options: EngineConfig, what: str) -> None:
    if options.deterministic:
        raise ConfigError(f"--deterministic: {what} give results that depend on the batch in their last bits")


def find_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)  # by its number: some of torch takes no other, as where NCCL's thread enters it


def _choose_compute(checkpoint: Checkpoint, options: EngineConfig, device: torch.device) -> type[Compute]:
    """The first that computes this model here; torch computes all of them."""
    if options.kernels == "torch" or not is_own(checkpoint.config):
        return TorchCompute
    layer = decoder_config(checkpoint.config).layer
    if options.kernels == "triton" or device.type == "cuda":
        if launch.runs_on(device.type):
            from slipstream.kernels.triton.compute import TritonCompute  # takes a while, and a CPU does without

            if TritonCompute.supports(layer, device):
                return TritonCompute
        if options.kernels == "triton":
            raise ConfigError(
                f"--kernels triton: Triton's kernels do not run here: {_without_triton(device, layer)}; "
                "use --kernels auto"
            )
    in_pieces = not NativeCompute.supports(layer, device) and PiecewiseCompute.supports(layer, device)
    if in_pieces and _stays_packed(checkpoint, options):
        return PiecewiseCompute
    return next(compute for compute in COMPUTES.values() if compute.supports(layer, device))


def _stays_packed(checkpoint: Checkpoint, options: EngineConfig) -> bool:
    """Whether matrices of layers that the compiled call does not cover are kept as blocks, not widened for torch."""
    if options.weights == PACKED or options.packed_arithmetic != "auto" or options.quantize != "none":
        return True
    is_free = options.weights == "auto" and options.dtype != "float32"
    return is_free and PiecewiseCompute.rounds_fast() and bool(packed_formats(checkpoint, options, PiecewiseCompute))


def _without_triton(device: torch.device, layer: LayerShape) -> str:
    return launch.why_not(device.type) or f"heads of size {layer.head_dim} have no kernel"


def _made(
    kind: type[Compute], config: dict[str, Any], formats: Formats, device: torch.device, options: EngineConfig
) -> Compute:
    if kind in (*COMPUTES.values(), PiecewiseCompute):
        _refuse_backend(options, kind)
        return kind(formats, device)
    from slipstream.kernels.triton.compute import TritonCompute
    from slipstream.kernels.triton.graphs import GraphPool

    graphs = GraphPool(device, parse_size(options.graph_memory, "graph-memory"))
    attention = backend(attention_choice(config, options, formats, device).name)
    return TritonCompute(formats, device, graphs, attention, options.deterministic)


def _refuse_backend(options: EngineConfig, kind: type[Compute]) -> None:
    own = "torch's" if kind is TorchCompute else "compiled"
    if options.attention_backend not in (("auto", "torch") if kind is TorchCompute else ("auto",)):
        raise ConfigError(
            f"--attention-backend {options.attention_backend}: {own} kernels run here, which have an attention of "
            "their own; others are for Triton's kernels, on a GPU"
        )


def _choose_dtype(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device, kind: type[Compute]
) -> torch.dtype:
    """The kernels of this project are as fast with bfloat16 on any CPU; torch's are where it has such instructions."""
    asked = config.weights if config.dtype == "auto" else config.dtype
    if asked in DTYPES:
        return DTYPES[asked]
    if kind.is_fast_in_bfloat16 or device.type != "cpu" or fast_dtype(device) is torch.bfloat16:
        return torch.bfloat16
    size, free = weights_bytes(checkpoint, config, Formats.of(torch.float32), kind), available_memory(device)
    if 2 * size > free:
        log.info("bfloat16, which is slow on this CPU: in float32, weights would take %s", human_size(size))
        return torch.bfloat16
    log.info(
        "float32, since torch computes slowly in bfloat16 on this CPU: %s", " and ".join(map(describe_speed, FORMATS))
    )
    return torch.float32


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still have now."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def _drafting(
    checkpoint: Checkpoint, config: EngineConfig, formats: Formats, device: torch.device, layer_bytes: int
) -> Drafts:
    """What networks that draft take of a GPU: a head, ``layer_bytes`` per block; and a draft model."""
    if config.speculation == "off":
        return NO_DRAFTS
    fixed = per_block = waits = 0
    if config.drafter is not None and is_own(checkpoint.config):
        target = decoder_config(checkpoint.config)
        fixed, per_block = head_bytes(target, formats.compute), layer_bytes
        waits = pending_bytes(target, formats.compute)
    if config.draft_model is not None:
        draft = open_checkpoint(config.draft_model)
        kind = _choose_compute(draft, config, device)
        fixed += weights_bytes(draft, config, Formats.of(formats.compute), kind)
        fixed += parse_size(config.graph_memory, "graph-memory")
        per_block += kind.cache_class.block_bytes(cache_shape(_shape(draft.config), config.block_size, formats))
    return Drafts(fixed, per_block, config.max_running * MOST_PENDING * waits, config.block_size * waits)
