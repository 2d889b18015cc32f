"""What a head would have had on texts of a traffic store: the gate's accept length, without a worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.store import TrafficStore
from slipstream.drafter.training.gate import score
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.target import Target
from slipstream.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Evaluation:
    accept_lengths: list[float]
    """Tokens per verification step with at most 0, 1, … guesses in a chain, greedy."""
    texts: int
    tokens: int
    """Of their answers."""

    def fields(self) -> dict[str, Any]:
        return asdict(self) | {"accept_length": self.accept_lengths[-1]}


def evaluate(
    registry: Registry, version: int, traffic: Path, model: str, depth: int, texts: int, longest: int = 2048
) -> Evaluation:
    """Of the latest ``texts`` of the store, held out from training or not.

    Raises:
        RegistryError: there is no such version, or it is for another model.
        ConfigError: the folder holds no traffic store, or no text that a head can be scored on.
    """
    store = TrafficStore(traffic, create=False)
    found = registry.get(version)
    target = Target(model, found.manifest.head["draft_vocab_size"], longest + 1)
    config, tensors = registry.open_version(version, target.fingerprint)
    head = TrainableHead(config, target.config, target.embedding, tensors)
    samples = store.samples(order="recent")
    examples = list(islice((e for s in samples if (e := target.example(s, longest)) is not None), texts))
    store.close()
    if not examples:
        raise ConfigError(f"{traffic} holds no answers of this model with at least three tokens")
    result = score(head, examples, depth)
    lengths = [result.accept_length(most) for most in range(depth + 1)]
    return Evaluation(lengths, len(examples), int(result.tokens.sum()))
