"""EAGLE heads: their arithmetic, their alignment with the target, their files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.drafter.choosing import RUNNERS, SHARPNESS
from slipstream.drafter.head import layout
from slipstream.drafter.head.config import LAYER, HeadConfig
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.training.target import Target
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.speculation.protocol import DraftRow, Proposal
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine, policy, write_policy
from slipstream.kernels import random
from slipstream.kernels.batch import make_batch
from slipstream.kernels.native.library import isa

TARGET = TINY_LLAMA
KERNELS = ["torch", *(["native"] if isa() else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("target"), policy(0, TARGET, 8), TARGET)


def first_head(target: DecoderConfig) -> FirstHead:
    return FirstHead(*make_head(target))


def make_head(target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Random, with weights large enough to matter; its draft vocabulary is every second token."""
    config = layout.config_for(target, 48)
    tensors = layout.random_tensors(config, 1)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            tensors[name] = tensor * 8
        elif tensor.is_floating_point():
            tensors[name] = torch.linspace(0.5, 1.5, len(tensor))
    tensors["d2t"] = torch.arange(48)  # index i is token 2 i
    tensors["t2d"] = torch.arange(96) % 2 == 0
    return config, tensors


def make_first(target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    """A head of EAGLE-1 or -2, with weights large enough to matter."""
    config = replace(layout.config_for(target, 96, taps=(4,)), kind="eagle", fc_bias=True)
    tensors = layout.random_tensors(config, 1)
    return config, {
        name: tensor * 8 if tensor.ndim == 2 else torch.linspace(0.5, 1.5, len(tensor))
        for name, tensor in tensors.items()
    }


MAKERS = {"eagle3": make_head, "eagle": make_first}


@dataclass(frozen=True)
class Known:
    tokens: list[int]
    seed: int
    index: int
    races: bool
    """At temperature 1, without filters."""

    def likely(self, scores: Tensor, depth: int) -> Tensor:
        """By target token, how likely the draft token ``depth`` after the next one is to be it."""
        if not self.races:
            return scores.softmax(-1)
        seed, index = np.array([self.seed], np.uint64), np.array([self.index + depth], np.uint64)
        wins = scores.double().softmax(-1) / torch.from_numpy(random.exponential(seed, index, np.arange(96)))
        first = wins.topk(RUNNERS)
        shares = first.values**SHARPNESS
        return torch.zeros(96).index_copy(0, first.indices, (shares / shares.sum()).float())


class Recorder(HeadDrafter):
    """Keeps what was known at each proposal, and the proposal."""

    def __init__(self, load: Any, width: int = 1) -> None:
        super().__init__(lambda target: FirstHead(*load(target)), stop_below=0.0, width=width)
        self.seen: list[tuple[Known, Proposal]] = []

    def propose(self, rows: Any) -> list[Proposal | None]:
        proposals = super().propose(rows)
        for row, proposal in zip(rows, proposals, strict=True):
            assert proposal is not None
            known = Known(row.known.tolist(), row.seed, row.index, row.params.temperature > 0)
            self.seen.append((known, proposal))
        return proposals


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def published_forward(config: HeadConfig, w: dict[str, Tensor], embedding: Tensor, hidden: Tensor) -> Tensor:
    """The layer over a whole sequence, as the papers' code has it: [T, hidden] in, [T, hidden] out."""
    prefix = config.layer
    if config.kind == "eagle":
        x = hidden = torch.cat((embedding, hidden), -1) @ w["fc.weight"].T + w["fc.bias"]
    else:
        x = torch.cat(
            (
                rms_norm(embedding, w[LAYER + "input_layernorm.weight"], config.norm_eps),
                rms_norm(hidden, w[LAYER + "hidden_norm.weight"], config.norm_eps),
            ),
            -1,
        )
    length = len(x)
    q, k, v = (
        (x @ w[f"{prefix}self_attn.{name}_proj.weight"].T).view(length, -1, config.head_dim).transpose(0, 1)
        for name in "qkv"
    )
    angles = torch.arange(length)[:, None] * (
        config.rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    )
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)

    def rotate(y: Tensor) -> Tensor:
        left, right = y.chunk(2, -1)
        return y * cos + torch.cat((-right, left), -1) * sin

    values = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    hidden = hidden + values.transpose(0, 1).flatten(1) @ w[prefix + "self_attn.o_proj.weight"].T
    x = rms_norm(hidden, w[prefix + "post_attention_layernorm.weight"], config.norm_eps)
    gate, up = x @ w[prefix + "mlp.gate_proj.weight"].T, x @ w[prefix + "mlp.up_proj.weight"].T
    return hidden + (functional.silu(gate) * up) @ w[prefix + "mlp.down_proj.weight"].T


class Offline:
    """What the head should propose after a text, from the definition: features of t and token t + 1 predict t + 2."""

    def __init__(self, folder: Path, kind: str = "eagle3") -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config, self.weights = MAKERS[kind](decoder_config(TARGET))

    @torch.inference_mode()
    def features(self, tokens: list[int]) -> Tensor:
        """What the head reads of all tokens but the last."""
        states = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        if self.config.kind == "eagle":
            return states[-1][0, :-1]  # behind the final norm already
        taps = torch.cat([states[layer][0] for layer in self.config.taps], -1)
        return (taps @ self.weights["fc.weight"].T)[:-1]

    @torch.inference_mode()
    def scores(self, inputs: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """By target token, how likely it is to follow the last input (-inf: never); ``hidden`` after that input."""
        embedding = self.model.get_input_embeddings()
        out = published_forward(self.config, self.weights, embedding(torch.tensor(inputs)), hidden)
        if self.config.kind == "eagle":
            return self.model.lm_head(out[-1]), torch.cat((hidden, out[-1:]))
        normed = rms_norm(out[-1], self.weights["norm.weight"], self.config.norm_eps)
        scores = torch.full((96,), float("-inf"))
        scores[torch.arange(48) + self.weights["d2t"]] = normed @ self.weights["lm_head.weight"].T
        return scores, torch.cat((hidden, out[-1:]))

    def drafts(self, known: Known, count: int) -> list[tuple[int, float]]:
        """Draft tokens, with how far the second best is behind."""
        inputs, hidden = list(known.tokens[1:]), self.features(known.tokens)
        found = []
        for depth in range(count):
            scores, hidden = self.scores(inputs, hidden)
            best = known.likely(scores, depth).log().topk(2)
            found.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
            inputs.append(found[-1][0])
        return found

    def tree_values(self, known: Known, proposal: Proposal, width: int) -> tuple[float, float]:
        """Expected number of accepted draft tokens, as the head sees it: in the best tree, and in this one."""
        seen: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

        def after(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            if path not in seen:
                before = after(path[:-1])[1] if path else self.features(known.tokens)
                scores, hidden = self.scores([*known.tokens[1:], *path], before)
                seen[path] = known.likely(scores, len(path)), hidden
            return seen[path]

        most = len(proposal.tokens)
        found: list[float] = []
        level = {(): 1.0}
        for _ in range(most):
            children: dict[tuple[int, ...], float] = {}
            for path, chance in level.items():
                best = after(path)[0].topk(width)
                for likely, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    children[(*path, token)] = chance * likely
            found += children.values()
            level = dict(sorted(children.items(), key=lambda item: -item[1])[:width])
        paths: list[tuple[int, ...]] = []
        chances: list[float] = []
        for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
            before = paths[parent] if parent >= 0 else ()
            chances.append((chances[parent] if parent >= 0 else 1.0) * float(after(before)[0][token]))
            paths.append((*before, token))
        assert len(set(paths)) == most, "a token is proposed twice"
        return sum(sorted(found)[-most:]), sum(chances)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", MAKERS)
def test_drafts_are_those_of_the_definition(folder: Path, kernels: Any, kind: str) -> None:
    """Through chunked prompts, verification, rejected and accepted draft tokens, pauses and preemption."""
    recorder = Recorder(MAKERS[kind])
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        kernels=kernels,
        drafter="given",
        speculation_policy="fixed",
        max_draft_tokens=3,
        max_step_tokens=32,
        kv_cache_memory="8MiB",
    )
    local = LocalEngine(config, [recorder])
    rng = np.random.default_rng(0)
    for length, temperature in ((3, 1.0), (20, 0.0), (50, 1.0), (17, 1.0)):
        prompt = rng.integers(0, 96, length).tolist()
        local.submit(prompt, SamplingParams(max_tokens=25, temperature=temperature, seed=length))
    local.finish()
    assert len(recorder.seen) > 60
    offline = Offline(folder, kind)
    compared = 0
    for known, proposal in recorder.seen:
        drafts = offline.drafts(known, len(proposal.tokens))
        for token, (expected, gap) in zip(proposal.tokens, drafts, strict=True):
            if gap < 1e-3:
                break  # too close to call in float32
            assert token == expected
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("kernels", KERNELS)
def test_trees_are_those_of_the_definition(folder: Path, kernels: Any) -> None:
    """Branches read the right keys and values: with wrong ones, other nodes would seem to be the best."""
    recorder = Recorder(make_head, width=3)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        kernels=kernels,
        drafter="given",
        speculation_policy="fixed",
        max_draft_tokens=6,
        draft_width=3,
        kv_cache_memory="8MiB",
    )
    local = LocalEngine(config, [recorder])
    rng = np.random.default_rng(0)
    for length, temperature in ((3, 0.0), (29, 1.0)):  # the second crosses a border of blocks soon
        prompt = rng.integers(0, 96, length).tolist()
        local.submit(prompt, SamplingParams(max_tokens=20, temperature=temperature, seed=length))
    local.finish()
    assert len(recorder.seen) > 20
    offline = Offline(folder)
    branching = 0
    for known, proposal in recorder.seen:
        best, value = offline.tree_values(known, proposal, 3)
        assert value == pytest.approx(best, abs=1e-3)
        branching += proposal.parents != list(range(-1, len(proposal.parents) - 1))
    assert branching > 10


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize("make", MAKERS.values())
def test_native_bfloat16_stays_close_to_float32(folder: Path, make: Any) -> None:
    outputs = []
    for kernels, dtype in (("torch", "float32"), ("native", "bfloat16")):
        drafter = HeadDrafter(lambda target: FirstHead(*make(target)))
        config = EngineConfig(model=str(folder), dtype=dtype, kernels=kernels, kv_cache_memory="4MiB")  # type: ignore[arg-type]
        LocalEngine(config, [drafter])
        network = drafter._network
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(12, len(drafter._config.taps), 64, generator=generator)
        counts, ends = np.array([5, 7], np.int32), np.array([5, 7], np.int32)
        batch = make_batch(
            np.arange(12, dtype=np.int32),
            counts,
            ends,
            np.arange(4, dtype=np.int32).reshape(2, 2),
            np.arange(2, dtype=np.int32),
            16,
        )
        with torch.inference_mode():
            outputs.append(network.logits(network.forward(batch, network.fuse(features))).clone())
    assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 0.05


def test_a_head_of_the_first_form_is_not_trained(folder: Path) -> None:
    target = Target(str(folder), 48, 64)
    with pytest.raises(ModelError, match="only EAGLE-3 heads are trained"):
        target.trainable(*make_first(target.config))


def test_a_head_for_another_model_is_refused(folder: Path) -> None:
    other = decoder_config(TARGET | {"vocab_size": 128})
    config = EngineConfig(model=str(folder), kv_cache_memory="4MiB")
    with pytest.raises(ModelError, match="vocabulary is 128, the model's 96"):
        LocalEngine(config, [HeadDrafter(lambda _: FirstHead(*make_head(other)))])


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
def test_a_head_that_the_kernels_of_its_model_do_not_compute_is_refused(folder: Path) -> None:
    def make(target: DecoderConfig) -> FirstHead:
        config = replace(layout.config_for(target, 48), intermediate=100)
        return FirstHead(config, layout.random_tensors(config, 1))

    with pytest.raises(ModelError, match=r"an MLP of 100\) .* --kernels torch"):
        LocalEngine(EngineConfig(model=str(folder), kv_cache_memory="4MiB"), [HeadDrafter(make)])
    LocalEngine(EngineConfig(model=str(folder), kv_cache_memory="4MiB", kernels="torch"), [HeadDrafter(make)])


def test_a_model_that_does_not_show_its_states_is_refused(opaque: Path) -> None:
    config = EngineConfig(model=str(opaque), load_format="dummy", kv_cache_memory="4MiB")
    with pytest.raises(ConfigError, match="gpt_neox"):
        LocalEngine(config, [HeadDrafter(first_head)])


def test_rows_that_were_not_watched_get_no_proposal(folder: Path) -> None:
    drafter = HeadDrafter(first_head)
    LocalEngine(EngineConfig(model=str(folder), kv_cache_memory="4MiB"), [drafter])
    row = DraftRow(0, "", 3, np.zeros(20, np.int32), 5, frozenset({"head"}), mapped=16, most=3)
    assert drafter.propose([row]) == [None]


@torch.inference_mode()
def test_a_cold_head_is_the_last_layer_of_its_target(folder: Path) -> None:
    """With the inputs of the last layer as its features it predicts exactly what the target does at that place."""
    from transformers import AutoModelForCausalLM

    target = decoder_config(TARGET)
    config = layout.config_for(target, 40, taps=(0, 1, 3))
    parameters = layout.last_layer(open_checkpoint(folder).tensors(), 4)
    vocabulary = [(7 * i) % 96 for i in range(40)]
    weights = layout.from_target(config, parameters, vocabulary)
    layout.check(config, weights)
    tokens = weights["d2t"] + torch.arange(40)
    assert tokens.tolist() == sorted(vocabulary)
    assert weights["t2d"].nonzero().flatten().tolist() == sorted(vocabulary)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = torch.arange(30) * 5 % 96
    answer = model(text[None], output_hidden_states=True)
    features = torch.cat([answer.hidden_states[layer][0] for layer in config.taps], -1)
    embedding = model.get_input_embeddings()(text.roll(-1))
    out = published_forward(config, weights, embedding, features @ weights["fc.weight"].T)
    logits = rms_norm(out, weights["norm.weight"], config.norm_eps) @ weights["lm_head.weight"].T
    torch.testing.assert_close(logits, answer.logits[0][:, tokens], atol=1e-3, rtol=1e-3)
