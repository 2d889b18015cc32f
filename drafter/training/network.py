"""An EAGLE-3 head as something to train: its draft tokens after its own draft tokens, for many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.drafter.head import layout
from slipstream.drafter.head.config import LAYER, OUTPUT, HeadConfig
from slipstream.drafter.training.candidates import Candidates
from slipstream.drafter.training.packing import Pack
from slipstream.engine.models.config import DecoderConfig, rope_tables
from slipstream.kernels import ops
from slipstream.kernels.torch_stack import MATRICES, DecoderLayer, Function

MULTIPLE = 64
"""Rows that go on come in multiples of this, as far as there are so many."""


class TrainableHead:
    """What is trained in float32, computed with in ``dtype``, by the arithmetic of the layer that serves."""

    def __init__(
        self,
        config: HeadConfig,
        target: DecoderConfig,
        embedding: Tensor,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            embedding: [vocabulary, hidden], the target's, frozen; the head computes on its device.
            tensors: in the published layout, on the CPU.
        """
        self.config = config
        self.dtype = dtype
        self.shares_output = False
        """Whether its output rows are the target's own, to be replaced by what these are now."""
        self.between: Callable[[], object] = lambda: None
        """Called between two matrices on the way forward and on the way back, some hundredths of a second apart."""
        self.read_from(embedding)
        # The output rows are not trained, so they need no more digits than are computed with.
        self.weights = {
            name: tensor.detach().to(self.device, dtype if name == OUTPUT else torch.float32, copy=True)
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        self.maps = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
        # In one order wherever the tensors come from: the state of optimizers goes by it.
        self.trained = sorted(name for name in self.weights if name != OUTPUT)
        # As long as the target's: some published heads state only the length they were trained with.
        tables = rope_tables(config.as_decoder(target), target.shape.max_positions)
        self._cos, self._sin = (table.to(self.device) for table in tables)
        self._cast: dict[str, Tensor] = {}
        self.refresh()
        self._map(layout.draft_tokens(config, tensors))

    def _map(self, draft_tokens: Tensor) -> None:
        self.to_target = draft_tokens.to(self.device)
        self.to_draft = torch.full((self.config.vocab_size,), -1, device=self.device)
        self.to_draft[self.to_target] = torch.arange(len(draft_tokens), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._embedding.device

    def read_from(self, embedding: Tensor) -> None:
        """Has the head read this embedding: the target's weights have changed."""
        self._embedding = embedding.to(self.dtype)

    def set_draft_vocabulary(self, draft_tokens: Tensor, output: Tensor) -> None:
        """Changes the draft vocabulary (ascending tokens); ``output`` [vocabulary, hidden] is the target's head.

        Both are on the CPU. Nothing learned is lost as long as the rows are the target's own.
        """
        assert len(draft_tokens) == self.config.draft_vocab_size
        self.weights[OUTPUT] = self._cast[OUTPUT] = output[draft_tokens].to(self.device, self.dtype)
        self.maps = layout.draft_maps(draft_tokens, self.config.vocab_size)
        self._map(draft_tokens)

    def has_rows_of(self, output: Tensor) -> bool:
        """Whether the head's rows are those of this output matrix; ``set_draft_vocabulary`` would lose other ones."""
        rows = output[self.to_target.cpu()].to(torch.bfloat16)
        return torch.equal(self.weights[OUTPUT].bfloat16().cpu(), rows)

    def refresh(self) -> None:
        """Has it compute with the weights as they are now, by copies in ``dtype``; called after each change."""
        self._cast = {
            name: weight.detach().to(self.dtype) if weight.dim() > 1 else weight.detach()
            for name, weight in self.weights.items()
        }
        for name in self.trained:
            self._cast[name].requires_grad_(True)

    @property
    def inputs(self) -> list[Tensor]:
        """What it computes with in place of each of ``trained``: gradients are taken by these."""
        return [self._cast[name] for name in self.trained]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the head in the published layout, detached, on the CPU."""
        return {**{name: weight.detach().cpu() for name, weight in self.weights.items()}, **self.maps}

    def draft(self, pack: Pack) -> Drafting:
        """Drafting at all learned rows, with no draft token before it yet. Several threads may do this at once."""
        return Drafting(self, pack)

    def logits(self, hidden: Tensor, some: Candidates | None = None) -> Tensor:
        """[n, hidden] -> [n, draft vocabulary]; or of these candidates, each with what it stands for."""
        normed, rows = self._norm("norm.weight")(hidden), self._cast[OUTPUT]
        return ops.linear(normed, rows) if some is None else ops.linear(normed, rows[some.columns]).float() + some.bias

    def layer(self) -> DecoderLayer:
        def norm(name: str) -> Function:
            return self._norm(LAYER + name + ".weight")

        matrices: dict[str, Any] = {field: self._linear(name) for field, name in MATRICES.items()}
        return DecoderLayer(
            self.config.head_dim,
            **matrices,
            mlp_norm=norm("post_attention_layernorm"),
            attn_norm=norm("hidden_norm"),
            embed_norm=norm("input_layernorm"),
        )

    def _linear(self, name: str) -> Function:
        weight = self._cast[f"{LAYER}{name}.weight"]
        return lambda x: ops.linear(_Between.apply(x, self.between), weight)  # type: ignore[no-untyped-call]

    def _norm(self, name: str) -> Function:
        weight, eps = self._cast[name], self.config.norm_eps
        return lambda x: functional.rms_norm(x.float(), x.shape[-1:], weight, eps).to(self.dtype)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]

    def context(self, features: Tensor) -> Tensor:
        """[n, taps, hidden] -> [n, hidden]: what the layer reads of the target's features."""
        return ops.linear(features.to(self.dtype).flatten(1), self._cast["fc.weight"])

    def embedded(self, tokens: Tensor) -> Tensor:
        return ops.embedding(tokens, self._embedding)


class _Between(torch.autograd.Function):
    """Returns its input; calls a function now, and once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], object]) -> Tensor:
        ctx.function = function
        function()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return gradient, None


class Drafting:
    """Chains of draft tokens at the learned rows of a pack, all one token longer at a time; each is the one that came.

    This is the training-time test of EAGLE-3: after i draft tokens, a row attends to the true features up to its own
    position and to what the head made of the i draft tokens after it.
    """

    def __init__(self, head: TrainableHead, pack: Pack) -> None:
        self._head, self._pack = head, pack
        self._layer = head.layer()
        self.rows = torch.arange(len(pack.learned), device=head.device)
        """[n], ascending: the learned rows that still draft, as places in ``pack.learned``."""
        self.counts = torch.ones(len(pack.learned), dtype=torch.bool, device=head.device)
        """[n]: those that were kept, in contrast to some that fill up their number."""
        context = head.context(pack.features)
        x = self._layer.inputs(context, head.embedded(pack.tokens[:, 0]))
        self._keys, self._values = self._keys_values(x, pack.positions)
        self._own: list[tuple[Tensor, Tensor]] = []
        self.hidden = self._compute(context[pack.learned], x[pack.learned])
        """[n, hidden]: outputs at these rows. After i draft tokens row r belongs to position r + i of the text."""

    def extend(self, keep: Tensor) -> None:
        """Takes the token that came as the next draft token at the rows of ``keep`` [n] bool, and leaves the others.

        Some of these go on as well, and do not count: for each new number of rows a CPU's matrix library compiles
        products anew.
        """
        others = (~keep).nonzero().flatten()[: -int(keep.sum()) % MULTIPLE]
        going = keep.index_fill(0, others, True)
        self.counts, self.rows, hidden = keep[going], self.rows[going], self.hidden[going]
        self._own = [(key[going], value[going]) for key, value in self._own]
        at, length = self._pack.learned[self.rows], len(self._own) + 1
        x = self._layer.inputs(hidden, self._head.embedded(self._pack.tokens[at, length]))
        self._own.append(self._keys_values(x, self._pack.positions[at] + length))
        self.hidden = self._compute(hidden, x)

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """In float32, as attention: in bfloat16 a CPU's matrix library compiles products for each text's length."""
        keys, values = self._layer.keys_values(x, *self._head.rope(positions))
        return keys.float(), values.float()

    def _compute(self, hidden: Tensor, x: Tensor) -> Tensor:
        positions = self._pack.positions[self._pack.learned[self.rows]] + len(self._own)
        return self._layer.finish(hidden, self._attend(self._layer.queries(x, *self._head.rope(positions))))

    def _attend(self, q: Tensor) -> Tensor:
        """q [n, heads, head_dim] of these rows -> [n, heads * head_dim]."""
        config = self._head.config
        group = config.heads // config.kv_heads
        scale = config.head_dim**-0.5
        at = self._pack.learned[self.rows]
        limits = torch.tensor([segment.end for segment in self._pack.segments]).to(at.device)
        ends = torch.searchsorted(at, limits).cpu().tolist()
        q, outputs = q.float(), []
        for segment, first, last in zip(self._pack.segments, [0, *ends], ends, strict=False):
            rows, length = slice(first, last), segment.end - segment.begin
            count = last - first
            # [KV heads, group * n, head_dim] against [KV heads, length, head_dim]
            query = q[rows].view(count, config.kv_heads, group, config.head_dim).permute(1, 2, 0, 3) * scale
            key = self._keys[segment.begin : segment.end].transpose(0, 1)
            value = self._values[segment.begin : segment.end].transpose(0, 1)
            scores = query.flatten(1, 2) @ key.transpose(1, 2)
            scores = scores.view(config.kv_heads, group, count, length)
            future = torch.arange(length, device=at.device) > (at[rows] - segment.begin)[:, None]
            scores = scores.masked_fill(future, float("-inf"))
            if self._own:
                k = torch.stack([k[rows] for k, _ in self._own], dim=1)  # [n, draft tokens, KV heads, head_dim]
                scores = torch.cat((scores, torch.einsum("hgnd,nshd->hgns", query, k)), dim=-1)
            shares = scores.softmax(-1)
            mixed = (shares[..., :length].flatten(1, 2) @ value).view(config.kv_heads, group, count, config.head_dim)
            if self._own:
                v = torch.stack([v[rows] for _, v in self._own], dim=1)
                mixed = mixed + torch.einsum("hgns,nshd->hgnd", shares[..., length:], v)
            outputs.append(mixed.permute(2, 0, 1, 3).flatten(1))
        return torch.cat(outputs).to(self._head.dtype)
