"""How decoder layers are computed on a device: what makes weights, caches and stacks of layers that fit each other.

``native.stack`` runs all layers in one compiled call, ``torch_stack`` goes from operation to operation on any device.
Models and drafters name neither: they ask their ``Compute`` for what they need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import CacheShape, PagedKVCache
from slipstream.kernels.stored import Quantize, Stored
from slipstream.kernels.weight import Weight

Reads = Literal["normed", "both", "plain"]
"""What the attention reads: the hidden state behind a norm; [embedding of the token, hidden state], each behind a norm
of its own; or the hidden state as it is."""


Arithmetic = Literal["exact", "bfloat16", "int16", "int8"]
"""How quantised weights are computed with: widened to float32; rounded to bfloat16 where they are used; or with
activations quantised by blocks of 32."""
PACKED = "packed"
"""Format of matrices that are kept as they came, quantised ones in their own precision."""
EIGHT_BITS, FOUR_BITS = "Q8_0", "Q4_1"
"""The types of GGUF files whose blocks they become: of 8 bits, or of 4 where q4 has them."""
KEPT_IN_EIGHT = ("", "v_proj", "down_proj", "gate")
"""Where q4 has 8 bits: outside of layers; for values, which are few, and the last matrices of MLPs, by which most is
lost; and for what chooses among experts."""


@dataclass(frozen=True, slots=True)
class Formats:
    """In which numbers a model is kept and computed."""

    weights: str
    """Format of matrices: "float32", "bfloat16", PACKED, or another format that the ``Compute`` has."""
    compute: torch.dtype
    """Format of activations between operations; of what is not packed among packed matrices, too."""
    kv: torch.dtype
    """Format of keys and values in the cache."""
    arithmetic: Arithmetic = "exact"
    """How quantised matrices are computed."""
    quantize: Quantize = "none"
    """What numbers of packed matrices become."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> Formats:
        """The same for all three."""
        return cls(str(dtype).removeprefix("torch."), dtype, dtype)

    @property
    def cache(self) -> str:
        """Name of the format of keys and values, for example ``bfloat16``, ``int8`` or ``fp8``."""
        return "fp8" if self.kv is torch.float8_e4m3fn else str(self.kv).removeprefix("torch.")

    @property
    def numbers(self) -> str:
        """Name of the number format in which weights are told to others, and compared with theirs."""
        return str(self.compute).removeprefix("torch.") if self.weights == PACKED else self.weights

    def blocks_of_numbers(self, module: str = "") -> str:
        """The type of GGUF files whose blocks numbers of a matrix become; empty if they stay.

        ``module``: the last part of its name where it is of a layer, for example ``v_proj``.
        """
        if self.quantize == "none":
            return ""
        return EIGHT_BITS if self.quantize == "q8" or module in KEPT_IN_EIGHT else FOUR_BITS


@dataclass(frozen=True, slots=True)
class Mixture:
    """Gated networks of which each token goes through a few (Shazeer et al. 2017)."""

    experts: int
    top: int
    """How many a token goes through."""
    intermediate: int
    renormalize: bool
    """Whether the shares of those are made to add up to 1."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A pre-norm decoder layer: rotary positions, grouped-query attention, gated MLP or a mixture of them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    reads: Reads = "normed"
    mixture: Mixture | None = None
    is_gemma: bool = False
    """Gemma's arithmetic: norms multiply by 1 + weight, what attention and MLP give is normed before it is added, and
    the gate is a GELU by tanh."""
    score_scale: float | None = None
    """What attention multiplies scores by; None for head_dim ** -0.5."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by, in the format of activations."""

    @property
    def is_plain(self) -> bool:
        """Whether it is as in Llama, Mistral and Qwen."""
        return self.mixture is None and not self.is_gemma and self.score_scale is None and self.embedding_scale == 1.0

    @property
    def scale(self) -> float:
        """What attention multiplies scores by."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def input_width(self) -> int:
        """Width of what queries, keys and values are made from."""
        return 2 * self.hidden if self.reads == "both" else self.hidden


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward pass computed, one row per token of its batch."""

    hidden: Tensor
    """[num_tokens, hidden], as ``logits`` takes it."""
    features: Tensor | None = None
    """[num_tokens, taps, hidden] float32: the inputs of the layers that were asked for; None where none were."""
    columns: tuple[Tensor, ...] = ()
    """The batch's columns on the device; valid until the next forward pass."""


class Choose(Protocol):
    """Chooses draft tokens on the device, by operations that can be recorded."""

    @property
    def kind(self) -> Hashable:
        """Those of the same kind do the same with the same memory."""

    def __call__(self, logits: Tensor, step: Tensor, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens [rows] int32, and what is to be told of them [rows, …] int32; may overwrite logits [rows, n].

        ``step`` [rows] int32: tokens before each, from where the columns are right.
        """


@dataclass(frozen=True, slots=True)
class ChainInputs:
    """What chains of draft tokens are made of behind a step whose tokens only the device knows.

    A step samples a token for each draft token that it verifies, and one more. Of a sequence of which the first n draft
    tokens are right, what is new goes on n places further, and so does its chain. The arrays are int32.
    """

    batch: RaggedBatch
    """A segment per sequence: what is new of it, as if all draft tokens were right. A token id of -1 - i stands for
    the one that ``samples`` has at i; ``latest`` is for ``verified``."""
    samples: Int32
    """Which of the step's samples there are; those of a sequence follow each other."""
    first: Int32
    """[sequences] where in these those of a sequence begin."""
    verified: Int32
    """[sequences, n] the draft tokens that each of them is held against; -2 - i for ``latest[i]``, -1 behind them."""
    last: Int32
    """[sequences] token of the batch that its chain follows if no draft token is right."""
    places: Int32
    """[sequences] places with a block for keys and values of the chain, likewise."""
    wanted: Int32
    """[sequences] draft tokens that are fed back, at most: tokens after those and one more say nothing."""
    depth: int
    """Draft tokens that are made, more than ``wanted``."""
    columns: tuple[NDArray[Any], ...] = ()
    """With an entry per sequence, for ``Choose``."""


class Chains(Protocol):
    """Chains that are about to be made."""

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What has to be on the device for that, and travels there as columns of the step's batch."""

    def make(self, columns: Sequence[Tensor], samples: Tensor, hidden: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        """Makes them, without the host knowing anything of the step; called once, between the step and the next.

        Args:
            columns: ``arrays``, there.
            samples: [samples] int32, all that the step sampled; 0 for what could not be.
            hidden: [tokens of the batch, width], the input of the first layer; may be overwritten.
        Returns:
            What ``choose`` tells, [depth, sequences, …] int32; and of each sequence how many of its draft tokens were
            wrong, the token that was sampled last, and those of its chain, [sequences, 2 + depth] int32.
        """


class LayerWeights(Protocol):
    """The weights of one layer."""

    @property
    def num_bytes(self) -> int: ...

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Copies rows of one tensor to their place, as ``Weight.fill`` does.

        ``name`` is the tensor's Hugging Face name within the layer, for example ``self_attn.q_proj.weight``.
        """

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor, by indices on the device of the weights, in some number format."""


class Stack(Protocol):
    """Layers with what is before and after them, ready to run; which weights they have can be changed at any time."""

    def use(self, embedding: Weight, layers: Sequence[LayerWeights], norm: Tensor | None, output: Weight) -> None:
        """Computes with these from now on; ``norm`` is before the output matrix, if there is one."""

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        """The first of these is number 1 of ``RaggedBatch.adapters`` from now on, and so on."""

    def forget(self) -> None:
        """Holds no weights from now on, until it is told to use some; nothing is computed meanwhile."""

    def forward(
        self, batch: RaggedBatch, cache: PagedKVCache, hidden: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> Forward:
        """Runs all layers over a batch, and writes its keys and values to a cache of the same ``Compute``.

        ``hidden`` [num_tokens, hidden], which may be overwritten, is the input of the first layer; without it that is
        the embeddings of the tokens. ``taps``, ascending: layers whose inputs are wanted; their number for the last
        one's output.
        """

    def chains(self, given: ChainInputs, cache: PagedKVCache) -> Chains | None:
        """Prepares to make draft tokens, each fed back, behind a step; None where it cannot do that."""

    def draft(self, asked: HostChains, cache: PagedKVCache, hidden: Tensor) -> MadeChains | None:
        """Makes draft tokens, each fed back, behind ``hidden`` [sequences, hidden] float32, which is overwritten.

        None where that is no faster than ``logits`` and ``forward`` in turn.
        """

    def logits(self, hidden: Tensor, rows: Int32 | Tensor | None = None) -> Tensor:
        """[rows, outputs] float32 of some rows of hidden, or of all; valid until the next call.

        ``rows`` int32, on the host, or on the device as a column of the batch.
        """


class Compute(ABC):
    """What a model asks for its parts; all of one ``Compute`` work together."""

    cache_class: ClassVar[type[PagedKVCache]]
    is_batch_invariant: bool = False
    """Whether a row has the same bits in any batch."""
    can_be_batch_invariant: ClassVar[bool] = False
    """Whether it is, or would be if it was made to be."""
    takes_latest: ClassVar[bool] = False
    """Whether its stacks read ``RaggedBatch.latest``, so that a step can be launched before the last one is read."""
    makes_chains: ClassVar[bool] = False
    """Whether its stacks make ``Chains``."""
    is_fast_in_bfloat16: ClassVar[bool] = False
    """Whether bfloat16 is fast on whatever processor it supports."""

    def __init__(self, formats: Formats, device: torch.device) -> None:
        self.formats = formats
        self.device = device

    @classmethod
    @abstractmethod
    def supports(cls, shape: LayerShape, device: torch.device) -> bool:
        """Whether it is there, and computes such layers on this device."""

    @classmethod
    def packed_bytes(cls, shape: LayerShape, kind: str, n: int, k: int) -> int:
        """What a matrix [n, k] of a type of GGUF files takes as it came, in a model of such layers; 0 if it cannot."""
        return 0

    @classmethod
    def rounds_fast(cls) -> bool:
        """Whether packed matrices that are rounded to bfloat16 where they are used are faster than ones in bfloat16."""
        return False

    def takes_blocks(self, shape: LayerShape, kind: str, n: int, k: int) -> bool:
        """Whether weights [n, k] are filled with blocks of this type of GGUF files; of others they are with numbers."""
        return self.formats.weights == PACKED and self.packed_bytes(shape, kind, n, k) > 0

    @classmethod
    def set_threads(cls, count: int) -> None:
        """What it computes on a CPU, this many threads of the process do."""
        torch.set_num_threads(count)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for logs and metrics."""

    @property
    def for_drafts(self) -> Compute:
        """What drafters compute with, of which no answer depends: fewer bits, where that is faster."""
        return self

    @abstractmethod
    def weight(self, n: int, k: int, bias: bool = False, module: str = "") -> Weight:
        """A matrix to be filled; ``module`` as in ``Formats.blocks_of_numbers``."""

    @abstractmethod
    def norm(self, width: int) -> Tensor:
        """The weight of a norm, to be filled."""

    @abstractmethod
    def layers(self, shape: LayerShape, count: int) -> Sequence[LayerWeights]:
        """Weights of layers that are read one after the other."""

    @abstractmethod
    def stack(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> Stack:
        """A stack of layers, to be given weights.

        Args:
            windows: for each layer, the last positions it attends to; 0 for all.
            rope: cos and sin, each [positions, head_dim / 2] float32.
            window_rope: those of layers with a window, where they have others.
        """

    @abstractmethod
    def adapter(self, shape: LayerShape, layers: Iterable[LayerMatrices]) -> Adapter:
        """What an adapter adds to some layers, which are asked for one by one."""

    def forms(self, part: Weight | LayerWeights) -> Hashable:
        """What of a matrix or layer is packed, and how; for ``take_forms``. None where numbers are never packed."""
        return None

    def take_forms(self, part: Weight | LayerWeights, forms: Hashable) -> None:  # noqa: B027
        """Has numbers that come for an empty matrix or layer packed in these forms."""

    def widen(self, part: Weight | LayerWeights, name: str) -> None:  # noqa: B027
        """Has all of a matrix kept as numbers: ``part``, or the one of a layer that has this tensor."""

    def kept(self, part: Weight | LayerWeights, name: str, rows: Tensor) -> Tensor | Stored | None:
        """Rows of a matrix, or of one of a layer, as they are kept: filled into another one, nothing is rounded.

        None where that is as they are read.
        """
        return None

    def numbers(self, rows: Stored) -> Tensor:
        """What ``kept`` has told of a matrix, in the number format in which it is read."""
        n, k = rows.shape
        matrix = self.weight(n, k)
        matrix.fill(cast(Tensor, rows))
        return matrix.rows(torch.arange(n, device=self.device))

    def cache(self, shape: CacheShape, num_blocks: int) -> PagedKVCache:
        return self.cache_class(shape, num_blocks, self.device)

    def filling(self) -> AbstractContextManager[None]:
        """Around filling weights that no step uses, while steps run: over, on the device too, when it is left."""
        return nullcontext()
