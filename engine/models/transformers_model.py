"""Any causal model that transformers knows, with the paged cache as its attention implementation.

Slower than the families implemented here, but the same scheduler, cache and sampler drive it. The model sees one long
row of tokens: positions say where each token stands in its sequence, and attention looks up the paged cache. What a
model computes from the whole row must be computed per sequence: rotary positions that depend on length are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.errors import MisfitError, ModelError
from slipstream.engine.models.attention import CacheMaker
from slipstream.engine.models.config import cache_shape
from slipstream.engine.models.paged_attention import STEP, Probe, Step
from slipstream.engine.models.protocol import Forward
from slipstream.engine.models.sent_names import Place, experts_apart, find_place
from slipstream.engine.models.transformers_files import (
    build_module,
    transformers_shape,
    transformers_switch_length,
)
from slipstream.engine.models.weights import ExpectedTensors, Rows, Weights, pieces
from slipstream.kernels.adapter import Adapter
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.kv_cache import PagedKVCache, TorchKVCache
from slipstream.kernels.stored import Stored
from slipstream.kernels.torch_adapter import TorchAdapter, add_low_rank, runs_of

EXPERTS = "experts"
"""What modules are called whose matrices see the tokens that are routed to them only."""


class _GivenOutput(torch.nn.Module):
    """Stands in for the body of a causal model, so that its forward pass applies the head to hidden states we have."""

    output: Any = None

    @property
    def decoder(self) -> _GivenOutput:
        """What models call that keep their body one level deeper."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Parameters:
    """What files have of a module, by name: its parameters, of which some have several names, and what it keeps
    besides, as corrections of scores of experts."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.by_name: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        self.besides = {
            name: each for name, each in module.state_dict(keep_vars=True).items() if name not in self.by_name
        }
        self.first: dict[str, str] = {}
        """The first name of each parameter, by every name that it has."""
        names: dict[int, str] = {}
        for name, parameter in self.by_name.items():
            self.first[name] = names.setdefault(id(parameter), name)
        self._like = {name: torch.empty_like(self.by_name[name], device="meta") for name in names.values()}
        self._device = next(iter(self.by_name.values())).device

    def new_values(self) -> dict[str, Tensor]:
        values = {name: torch.empty_like(like, device=self._device) for name, like in self._like.items()}
        return values | {name: value.detach().clone() for name, value in self.besides.items()}

    @property
    def values(self) -> dict[str, Tensor]:
        """Those that the module computes with."""
        return {name: self.by_name[name].data for name in self._like} | {
            name: value.detach() for name, value in self.besides.items()
        }

    def use(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.by_name.items():
            parameter.data = values[self.first[name]]
        for name, value in self.besides.items():
            value.data = values[name]

    def forget(self) -> None:
        for parameter in self.by_name.values():
            parameter.data = parameter.data.new_empty(0)


class _ModuleWeights:
    """Values for all parameters of a module; one that has several names needs to come under one of them."""

    def __init__(self, names: Mapping[str, str], values: dict[str, Tensor], optional: Collection[str]) -> None:
        """``names``: the one of each value, by every name that it has; ``optional``: values that need not come."""
        self._names, self.values = names, values
        self._parts = experts_apart(values)
        required = {name: tuple(part.shape) for name, part in self._parts.items()}
        self._expected = ExpectedTensors(required, optional)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected.shapes

    def fill(self, name: str, rows: Rows, first_row: int | None = None, exact: bool = False) -> None:
        assert isinstance(rows, Tensor), "nothing is packed here"
        name = self._names.get(name, name)
        if self._expected.take(name, rows, first_row):
            value = self._parts[name]
            if not value.dim():
                value.copy_(rows.reshape(()))
                return
            for row, part in pieces(rows, first_row or 0):
                value[row : row + len(part)].copy_(part)

    def place(self, name: str) -> Place:
        return find_place(name, self.shapes, self._names)

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        name = self._names.get(name, name)
        self._expected.check_rows(name, first_row, count)
        value = self._parts[name]
        return value[first_row : first_row + count] if value.dim() else value[None]

    def kept(self, name: str, first_row: int, count: int) -> Rows:
        return self.read(name, first_row, count)

    @property
    def numbers(self) -> Callable[[Stored], Tensor]:
        return _no_numbers

    @property
    def num_missing(self) -> int:
        return self._expected.num_missing

    def missing(self) -> Sequence[tuple[str, int, int]]:
        return self._expected.missing()

    def check_complete(self) -> None:
        self._expected.check_complete()


def _no_numbers(rows: Stored) -> Tensor:
    raise AssertionError("nothing is packed here")


class TransformersModel:
    def __init__(
        self,
        config: dict[str, Any],
        formats: Formats,
        device: torch.device,
        checkpoint: Checkpoint | None,
        seed: int = 0,
        make_cache: CacheMaker = TorchKVCache,
    ) -> None:
        """Loads the weights with transformers' own loader; without a checkpoint they are random."""
        self._make_cache = make_cache
        self.shape = transformers_shape(config)
        self.switch_length = transformers_switch_length(config)
        module = build_module(config, formats.compute, checkpoint, seed).to(device).eval().requires_grad_(False)
        self.formats = formats
        self.kernels, self.takes_latest = f"transformers-{device.type}", False
        self._device = device
        self._name = type(module).__name__
        self._parameters = _Parameters(module)
        self._head = module
        prefix = module.base_model_prefix if hasattr(module, module.base_model_prefix) else "model"
        self._body: Any = getattr(module, prefix, None)
        if self._body is None or "position_ids" not in inspect.signature(self._body.forward).parameters:
            raise ModelError(
                f"{self._name} does not take the positions of its tokens (its attention goes by distance, as ALiBi "
                "does, or it has none), so sequences cannot share a step; such models are not supported"
            )
        self._adapters: Sequence[Adapter | None] = ()
        self._hooks: list[RemovableHandle] = []
        self._shapes = {name: tuple(value.shape) for name, value in self._parameters.by_name.items()}
        self._linear = {
            f"{prefix}.{name}.weight": part
            for name, part in self._body.named_modules()
            # A subclass may return something else: Phi-3.5-MoE's router, which experts it chose.
            if type(part).forward is torch.nn.Linear.forward and EXPERTS not in name.split(".")
        }
        """Matrices that adapters may add to, by the names of their weights; their modules return the product itself."""
        self._given = _GivenOutput()
        setattr(module, prefix, self._given)
        self._windows: dict[int, int] = {}
        if self.switch_length:
            self._follow_lengths()
        self._windows = self._probe()

    @property
    def decoder(self) -> None:
        """transformers does not show hidden states."""
        return None

    @property
    def weights(self) -> _ModuleWeights:
        return self._weights_of(self._parameters.values)

    def new_weights(self) -> _ModuleWeights:
        return self._weights_of(self._parameters.new_values())

    def _weights_of(self, values: dict[str, Tensor]) -> _ModuleWeights:
        return _ModuleWeights(self._parameters.first, values, self._parameters.besides)

    def use(self, weights: Weights) -> None:
        assert isinstance(weights, _ModuleWeights)
        self._parameters.use(weights.values)

    def forget(self) -> None:
        self._parameters.forget()

    def tensors(self, checkpoint: Checkpoint) -> Iterable[tuple[str, Tensor]]:
        if (theirs := checkpoint.config.get("model_type")) != self.shape.model_type:
            raise MisfitError(f"{checkpoint.path} is not the model that runs here: {theirs}")
        module = build_module(checkpoint.config, self.formats.compute, checkpoint, 0)
        found = _Parameters(module)
        return experts_apart(found.values).items()

    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def adapter(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        for name in pairs:
            if name not in self._linear:
                raise ModelError(
                    f"a LoRA beside the weights cannot change {name!r}, only linear layers that all tokens go through"
                )
        return TorchAdapter([pairs], self.formats.compute, self._device)

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        self._adapters = adapters
        for hook in self._hooks:
            hook.remove()
        names = {name for each in adapters if isinstance(each, TorchAdapter) for name in each.layers[0]}
        self._hooks = [self._linear[name].register_forward_hook(partial(_add_adapted, name)) for name in names]

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return self._make_cache(cache_shape(self.shape, block_size, self.formats), num_blocks, self._device)

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        assert not taps
        columns = tuple(torch.from_numpy(column).to(self._device) for column in batch.columns)
        step = Step(batch, cache.plan(batch), self._windows, adapted=runs_of(batch, self._adapters))
        return Forward(self._forward(step), columns=columns)

    def logits(self, hidden: Tensor, rows: Int32 | Tensor) -> Tensor:
        rows = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
        chosen = hidden[rows.to(self._device, torch.long)]
        self._given.output.last_hidden_state = chosen[None]
        logits: Tensor = self._head(input_ids=torch.zeros(1, len(rows), dtype=torch.long, device=self._device)).logits
        return logits[0].float()

    def final_norm(self, hidden: Tensor) -> Tensor:
        return hidden  # the body ends with it

    def _forward(self, step: Step) -> Tensor:
        token = STEP.set(step)
        try:
            self._given.output = self._body(
                input_ids=torch.from_numpy(step.batch.token_ids).to(self._device, torch.long)[None],
                position_ids=torch.from_numpy(step.batch.positions).to(self._device, torch.long)[None],
                use_cache=False,
            )
        finally:
            STEP.reset(token)
        hidden: Tensor = self._given.output.last_hidden_state[0]
        return hidden

    def _follow_lengths(self) -> None:
        """Rotary modules take the longest position of a call for the length of everything in it: not any more."""
        rotary = [module for module in self._body.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        if not rotary:
            raise ModelError(f"{self._name} rotates positions by length, in code that could not be found")
        for module in rotary:
            module.forward = self._by_length(module.forward)

    def _by_length(self, rotate: Callable[..., Any]) -> Callable[..., Any]:
        """``rotate`` (x, position_ids [1, tokens]) → cos and sin, for every token as in a call with its sequence only.

        Both sets of frequencies are computed for all tokens, and each token takes its own.
        """
        longest = self.shape.max_positions - 1

        def rotate_by_length(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            step = STEP.get()
            assert step is not None and position_ids.dim() == 2
            batch = step.batch
            outgrown = np.repeat(batch.known > self.switch_length, np.diff(batch.q_start))
            long = torch.from_numpy(outgrown).to(position_ids.device)
            rotate(x, torch.zeros_like(position_ids[:, :1]), *args, **kwargs)  # forgets how long the last call was
            of_short = rotate(x, position_ids.masked_fill(long, 0), *args, **kwargs)
            if not outgrown.any():
                return of_short
            # One position more, which says that the sequence is long.
            of_long = rotate(x, torch.nn.functional.pad(position_ids, (0, 1), value=longest), *args, **kwargs)
            return _choose(long, of_long, of_short)

        return rotate_by_length

    @torch.inference_mode()
    def _probe(self) -> dict[int, int]:
        """Runs one token: every layer must reach the cache, or the model keeps state that pages cannot hold.

        Returns the sliding window of each layer.
        """
        probe = Probe(self.shape)
        hooks = [part.register_forward_hook(partial(_count_rows, name)) for name, part in self._linear.items()]
        one = np.ones(1, np.int32)
        batch = make_batch(np.zeros(1, np.int32), one, one, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), 16)
        try:
            hidden = self._forward(Step(batch, self.new_cache(1, 16).plan(batch), {}, probe))
            self.logits(hidden, np.zeros(1, np.int32))
        except ModelError as error:
            raise ModelError(f"{self._name} is not supported: {error}") from error
        except Exception as error:
            raise ModelError(
                f"{self._name} cannot run with a paged cache: its code does not leave attention to others "
                f"({type(error).__name__}: {error})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self._linear = {name: part for name, part in self._linear.items() if probe.rows.get(name) == [1]}
        if probe.layers != list(range(self.shape.num_layers)):
            raise ModelError(
                f"{self._name} has {self.shape.num_layers} layers, but attention ran in layers {probe.layers}; "
                "recurrent and hybrid models, which keep a state beside keys and values, are not supported"
            )
        return probe.windows


def _add_adapted(name: str, module: torch.nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
    """After a linear layer: adds what adapters make of the rows of its input."""
    step = STEP.get()
    assert step is not None
    [x], y = given, output
    pairs = [(rows, each.layers[0]) for rows, each in step.adapted]
    added = [(rows, pair[name]) for rows, pair in pairs if name in pair]
    add_low_rank(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), added)


def _count_rows(name: str, module: torch.nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
    step = STEP.get()
    assert step is not None and step.probe is not None
    step.probe.rows.setdefault(name, []).append(output[..., 0].numel())


def _choose(long: Tensor, of_long: Any, of_short: Any) -> Any:
    """Chooses by token, dimension 1; the last row of ``of_long`` is the one that was added."""
    if isinstance(of_short, tuple):
        return tuple(_choose(long, *pair) for pair in zip(of_long, of_short, strict=True))
    shape = [1, -1] + [1] * (of_short.dim() - 2)
    return torch.where(long.view(shape), of_long[:, :-1], of_short)
