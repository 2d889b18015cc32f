"""The target as training needs it: its embeddings and its head as they serve now, and features of text on demand."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.fingerprint import target_fingerprint, target_name, traffic_target
from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.recompute import Recompute
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.target_file import EMBEDDING, OUTPUT, UpdatedWeights
from slipstream.drafter.training.device import CPU, Place
from slipstream.drafter.training.network import TrainableHead
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.loader import build_model
from slipstream.kernels.compute import PACKED, Arithmetic, Formats
from slipstream.kernels.machine import fast_dtype
from slipstream.kernels.stored import Quantize

Unusable = Literal["other weights", "no features", "damaged"]
AHEAD = 5.0
"""So many times a token counts as seen because the head proposed it before. The head that is shipped, 289,000 tokens of
other chats: its draft vocabulary has 93.95 % of their answers, that of their counts alone 92.98, with this 94.15."""
RECOMPUTING_BYTES = 1 << 30
"""What recomputing features takes of a GPU's memory besides the model's weights."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Which weights of the target serve."""

    updated: UpdatedWeights | None = None
    """None: those of its files."""
    files_since: float = 0.0
    """When these became the files, in seconds since 1970; see ``TrafficIndex.files_since``."""

    @property
    def version(self) -> int:
        return self.updated.version if self.updated else 0

    def answered(self, sample: Sample) -> bool:
        """Whether these weights did, from the first token to the last."""
        since = self.updated.since if self.updated else self.files_since
        return sample.target_version == self.version and sample.time >= since

    def files_answered(self, sample: Sample) -> bool:
        """Whether the weights of the files did, which serve or served."""
        return sample.target_version == 0 and sample.time >= self.files_since


class Target:
    """Reads the embeddings and the last layer; loads the whole model only when features are to be recomputed."""

    def __init__(
        self,
        model: str,
        draft_vocab_size: int,
        max_length: int,
        lineage: str = "",
        between: Callable[[], object] = lambda: None,
        place: Place | None = None,
        quantize: Quantize = "none",
    ) -> None:
        """
        Args:
            max_length: in tokens, of texts whose features are recomputed.
            between: called now and then while heads and the model compute.
            place: where heads are trained and scored, which read the embeddings there; the CPU if not told.
            quantize: what the server quantises numbers to; features are recomputed likewise.

        Raises ModelError.
        """
        self._between = between
        self._place = place or Place()
        self.device = self._place.device
        self._checkpoint = open_checkpoint(model)
        self._model = EngineConfig(model=model, target_lineage=lineage, graph_memory="0", quantize=quantize)
        self._traffic_target = traffic_target(self._model)
        self.config = decoder_config(self._checkpoint.config)
        self.fingerprint = target_fingerprint(self._checkpoint, lineage, quantize)
        self.name = target_name(Path(self._checkpoint.path).name, lineage, quantize)
        self.lineage = lineage
        self.serving = Serving()
        self.dtype = fast_dtype(self.device)
        """What heads are computed with, in training and in the gate: what the device multiplies fastest."""
        self.head = layout.config_for(self.config, draft_vocab_size)
        self.taps = self.head.taps
        self._max_length = min(max_length, self.config.shape.max_positions)
        of_files = layout.last_layer(self._checkpoint.tensors(), self.config.shape.num_layers)
        if self.config.tied:
            of_files.pop(OUTPUT, None)  # some checkpoints hold it all the same
        self._of_files = of_files | self._as_served(of_files)
        self.output: Tensor
        """[vocabulary, hidden], on the CPU: heads have only some of its rows."""
        self._use({})
        self._output_of_files = self.output
        self._recompute: Recompute | None = None

    def _as_served(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embedding and output matrix as the model that serves has them, and in the format of training, so that heads
        share them."""
        return {
            name: tensors[name].to(torch.bfloat16).to(self.dtype) for name in (EMBEDDING, OUTPUT) if name in tensors
        }

    def _use(self, matrices: Mapping[str, Tensor]) -> None:
        """Instead of what the files have, as far as there are any."""
        self._last_layer = self._of_files | self._as_served(matrices)
        embedding = self._last_layer[EMBEDDING]
        self.embedding = embedding.to(self.device)
        self.output = self._last_layer.get(OUTPUT, embedding)

    def follow(self, store: TrafficStore) -> bool:
        """Takes over the weights that serve now, of which the server tells beside the traffic; whether they are others.

        Raises ModelError where these cannot be read: then they are as they were. Raises ConfigError for a store that
        holds the traffic of another target.
        """
        store.index.check(self._traffic_target)
        folder, files_since = store.index.folder, store.index.files_since()
        found = target_file.read(folder, self.fingerprint, self.serving.updated)
        serving = Serving(found[0] if found else None, files_since)
        if serving == self.serving:
            return False
        if serving.updated != self.serving.updated:
            matrices = found[1] if found else {}
            if found is not None:
                self._check(folder, matrices)
            self._use(matrices)
        self.serving = serving
        return True

    def _check(self, folder: Path, matrices: Mapping[str, Tensor]) -> None:
        size = (self.config.shape.vocab_size, self.config.hidden)
        wanted = {name: size for name in (EMBEDDING, OUTPUT) if name in self._of_files}
        if (shapes := {name: tuple(matrix.shape) for name, matrix in matrices.items()}) != wanted:
            raise ModelError(f"{folder / target_file.FILE} holds {shapes}, and the model has {wanted}")

    def unusable(self, sample: Sample) -> Unusable | None:
        """Why nothing can be learned from a sample, if so: it is of weights that do not serve, and no lineage says that
        a drafter fits them all; or its features are not there, and cannot be computed again without its weights. Or it
        is damaged: tokens are none of the model's.
        """
        if len(sample.tokens) and not 0 <= sample.tokens.min() <= sample.tokens.max() < self.config.shape.vocab_size:
            return "damaged"
        if not self.lineage and not self.serving.answered(sample):
            return "other weights"
        return None if self.has_features(sample) or self.serving.files_answered(sample) else "no features"

    def has_features(self, sample: Sample) -> bool:
        """Whether those of the whole answer were kept, also of samples that are read without them."""
        return sample.taps == self.taps and sample.start < sample.num_prompt

    def cold_head(self, draft_tokens: Tensor) -> tuple[HeadConfig, dict[str, Tensor]]:
        """A head that starts as the last layer."""
        return self.head, layout.from_target(self.head, self._last_layer, draft_tokens.tolist())

    def trainable(
        self, config: HeadConfig, tensors: Mapping[str, Tensor], shares_output: bool = False
    ) -> TrainableHead:
        """``shares_output``: its output rows are the target's, of whatever version, and become those that serve now.

        Raises ModelError for a head that does not read what traffic keeps.
        """
        if config.kind != "eagle3":
            raise ModelError(
                "only EAGLE-3 heads are trained and scored here; an EAGLE-1 or -2 head can be served as it is"
            )
        layout.check_target(config, self.config)
        if config.taps != self.taps:
            raise ModelError(
                f"the drafter reads layers {list(config.taps)}; what is kept of the traffic, and trained with, are "
                f"layers {list(self.taps)}"
            )
        head = TrainableHead(config, self.config, self.embedding, tensors, self.dtype)
        head.between = self._between
        is_current = head.has_rows_of(self.output)
        head.shares_output = shares_output or is_current or head.has_rows_of(self._output_of_files)
        if head.shares_output and not is_current:
            head.set_draft_vocabulary(head.to_target, self.output)
        return head

    def draft_tokens(self, counts: Mapping[int, float], size: int, before: Collection[int] = ()) -> Tensor:
        """The ``size`` most frequent tokens, ascending; where there are not enough, the first ones of the vocabulary.

        Those that the head proposed ``before`` are ahead of others: traffic before this was counted for them.
        """
        known = {token: counts.get(token, 0.0) + AHEAD for token in before}
        chosen = heapq.nlargest(size, {**counts, **known}.items(), key=itemgetter(1))
        tokens = dict.fromkeys(chain((token for token, _ in chosen), range(self.config.shape.vocab_size)))
        return torch.tensor(sorted(islice(tokens, size)))

    def recompute(self) -> Recompute:
        """With the weights of the files, on the CPU where a GPU has no room for them besides training.

        Raises ConfigError for models that do not show hidden states.
        """
        if self._recompute is None:
            size = self._checkpoint.weights_bytes(torch.bfloat16) + RECOMPUTING_BYTES
            device = self.device if self._place.has_room_for(size) else CPU
            formats = Formats.of(torch.bfloat16)
            if (bits := self._model.quantize) != "none":
                arithmetic: Arithmetic = "bfloat16" if device.type == "cpu" else "exact"
                formats = replace(formats, weights=PACKED, arithmetic=arithmetic, quantize=bits)
            model = build_model(self._checkpoint, self._model, formats, device, self._max_length)
            self._recompute = Recompute(model, self.taps, self._max_length, between=self._between)
        return self._recompute
