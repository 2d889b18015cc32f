"""The gate's score of any head on the traffic of a store, outside of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream.drafter.head import layout
from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.manifest import MANIFEST_FILE
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.version_folder import read_folder
from slipstream.drafter.traffic.store import TrafficStore
from slipstream.drafter.training.course import Course, WorkerOptions
from slipstream.drafter.training.gate import Verdict, judge, score
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.target import Target
from slipstream.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Evaluation:
    verdict: Verdict
    live: int | None
    """The version it was compared with; None: drafting nothing."""
    accept_lengths: tuple[float, ...]
    """Accept lengths with at most 1, 2, … draft tokens."""
    live_accept_lengths: tuple[float, ...]


def evaluate(
    head: int | Path, options: WorkerOptions, registry: Registry | None, everything: bool = False
) -> Evaluation:
    """Scores a version, or a head in a folder, against what is live for the first route of the options.

    On texts held out of training, or on all with ``everything``: for stores that nothing was trained on.

    Raises UnknownVersionError, ModelError where the head is damaged or does not fit, and ConfigError where the store
    holds no text for it.
    """
    [route, *_] = options.routes
    store = TrafficStore(options.traffic, create=False)
    place = options.place()
    place.enter()
    target = Target(
        *(options.model, options.draft_vocab_size, options.longest + 1, options.lineage),
        place=place,
        quantize=options.quantize,
    )
    target.follow(store)
    trainable = _open(head, target, registry)
    course = Course(options, route, target, store)
    curriculum = course.curriculum
    curriculum.refresh()
    texts = curriculum.latest(options.gate_texts) if everything else curriculum.held_out(options.gate_texts)
    store.close()
    if not texts.examples:
        raise ConfigError(
            f"{options.traffic} has no held-out text to evaluate on: one question in ten is held out of training. "
            + course.described_passed_over()
        )
    found = score(trainable, texts.examples, options.depth).weighted(texts.weights)
    live = registry.serving(route) if registry is not None else None
    if live is None:
        compared = found.without_drafting()
    else:
        compared = score(_open(live.version, target, registry), texts.examples, options.depth).weighted(texts.weights)
    lengths = [tuple(each.accept_length(depth) for depth in range(1, options.depth + 1)) for each in (found, compared)]
    verdict = judge(found, compared, groups=texts.groups, repeated=texts.repeated)
    return Evaluation(verdict, live.version if live else None, *lengths)


def _open(head: int | Path, target: Target, registry: Registry | None) -> TrainableHead:
    if isinstance(head, int):
        assert registry is not None
        training = registry.get(head).manifest.training
        return target.trainable(*registry.open_version(head, target.fingerprint, target.name), training.shares_output)
    if (head / MANIFEST_FILE).is_file():
        training = manifests.read(head).training
        return target.trainable(*read_folder(head, target.fingerprint, target.name), training.shares_output)
    return target.trainable(*layout.read(head, target.config))
