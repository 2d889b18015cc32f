"""An EAGLE-3 head as something to train: its draft tokens after its own draft tokens, for many texts at once."""

from __future__ import annotations

from collections.abc import Mapping
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


class TrainableHead:
    """Weights in float32, computed with in ``dtype``, by the arithmetic of the layer that serves."""

    def __init__(
        self,
        config: HeadConfig,
        target: DecoderConfig,
        embedding: Tensor,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """``embedding`` [vocabulary, hidden] is the target's, frozen; ``tensors`` in the published layout."""
        self.config = config
        self.dtype = dtype
        self.shares_output = False
        """Whether its output rows are the target's own, to be replaced by what these are now."""
        self.read_from(embedding)
        self.weights = {
            name: tensor.detach().clone().float() for name, tensor in tensors.items() if tensor.is_floating_point()
        }
        self.maps = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
        # In one order wherever the tensors come from: the state of optimizers goes by it.
        self.trained = sorted(name for name in self.weights if name != OUTPUT)
        # As long as the target's: some published heads state only the length they were trained with.
        self._cos, self._sin = rope_tables(config.as_decoder(target), target.shape.max_positions)
        self._cast: dict[str, Tensor] = {}
        self.refresh()
        self._map(layout.draft_tokens(config, tensors))

    def _map(self, draft_tokens: Tensor) -> None:
        self.to_target = draft_tokens
        self.to_draft = torch.full((self.config.vocab_size,), -1)
        self.to_draft[draft_tokens] = torch.arange(len(draft_tokens))

    def read_from(self, embedding: Tensor) -> None:
        """Has the head read this embedding: the target's weights have changed."""
        self._embedding = embedding.to(self.dtype)

    def set_draft_vocabulary(self, draft_tokens: Tensor, output: Tensor) -> None:
        """Changes the draft vocabulary (ascending tokens); ``output`` [vocabulary, hidden] is the target's head.

        Nothing learned is lost as long as the rows are the target's own.
        """
        assert len(draft_tokens) == self.config.draft_vocab_size
        self.weights[OUTPUT] = output[draft_tokens].float()
        self._cast[OUTPUT] = self.weights[OUTPUT].to(self.dtype)
        self.maps = layout.draft_maps(draft_tokens, self.config.vocab_size)
        self._map(draft_tokens)

    def has_rows_of(self, output: Tensor) -> bool:
        """Whether the head's rows are those of this output matrix; ``set_draft_vocabulary`` would lose other ones."""
        rows = output[self.to_target].to(torch.bfloat16)
        return torch.equal(self.weights[OUTPUT].bfloat16(), rows)

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
        """The tensors of the head in the published layout, detached."""
        return {**{name: weight.detach() for name, weight in self.weights.items()}, **self.maps}

    def unroll(self, pack: Pack, steps: int) -> list[Tensor]:
        """Outputs after 0, 1, … draft tokens at the learned rows, each [n, hidden]; draft token i is the one that came.

        This is the training-time test of EAGLE-3: after i draft tokens, a row attends to the true features up to its
        own position and to what the head made of the i draft tokens after it. The output after i draft tokens at row r
        belongs to position r + i of the text. Several threads may do this at once.
        """
        layer = self._layer()
        learned = pack.learned
        context = ops.linear(pack.features.to(self.dtype).flatten(1), self._cast["fc.weight"])
        x = layer.inputs(context, ops.embedding(pack.tokens[:, 0], self._embedding))
        keys, values = layer.keys_values(x, *self._rope(pack.positions))
        outputs: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        hidden, x = context[learned], x[learned]
        for step in range(steps):
            rope = self._rope(pack.positions[learned] + step)
            if step:
                x = layer.inputs(hidden, ops.embedding(pack.tokens[learned, step], self._embedding))
                own.append(layer.keys_values(x, *rope))
            attended = self._attend(pack, layer.queries(x, *rope), keys, values, own)
            hidden = layer.finish(hidden, attended)
            outputs.append(hidden)
        return outputs

    def logits(self, hidden: Tensor, some: Candidates | None = None) -> Tensor:
        """[n, hidden] -> [n, draft vocabulary]; or of these candidates, each with what it stands for."""
        normed, rows = self._norm("norm.weight")(hidden), self._cast[OUTPUT]
        return ops.linear(normed, rows) if some is None else ops.linear(normed, rows[some.columns]).float() + some.bias

    def _attend(self, pack: Pack, q: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
        """q [n, heads, head_dim] of the learned rows -> [n, heads * head_dim]."""
        group = self.config.heads // self.config.kv_heads
        outputs = []
        at = 0
        for segment in pack.segments:
            count, length = segment.end - segment.learned, segment.end - segment.begin
            rows = slice(at, at + count)
            at += count
            # [KV heads, group * n, head_dim] against [KV heads, length, head_dim]
            query = (
                q[rows].view(count, -1, group, self.config.head_dim).permute(1, 2, 0, 3) * self.config.head_dim**-0.5
            )
            key = keys[segment.begin : segment.end].transpose(0, 1)
            value = values[segment.begin : segment.end].transpose(0, 1)
            scores = query.flatten(1, 2) @ key.transpose(1, 2)
            scores = scores.view(-1, group, count, length)
            future = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
            scores = scores.masked_fill(future, float("-inf"))
            if own:
                k = torch.stack([k[rows] for k, _ in own], dim=1)  # [n, draft tokens, KV heads, head_dim]
                scores = torch.cat((scores, torch.einsum("hgnd,nshd->hgns", query, k)), dim=-1)
            shares = scores.float().softmax(-1).to(self.dtype)
            mixed = (shares[..., :length].flatten(1, 2) @ value).view(-1, group, count, self.config.head_dim)
            if own:
                v = torch.stack([v[rows] for _, v in own], dim=1)
                mixed = mixed + torch.einsum("hgns,nshd->hgnd", shares[..., length:], v)
            outputs.append(mixed.permute(2, 0, 1, 3).flatten(1))
        return torch.cat(outputs)

    def _layer(self) -> DecoderLayer:
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
        return lambda x: ops.linear(x, weight)

    def _norm(self, name: str) -> Function:
        weight, eps = self._cast[name], self.config.norm_eps
        return lambda x: functional.rms_norm(x.float(), x.shape[-1:], weight, eps).to(self.dtype)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]
