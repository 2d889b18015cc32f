"""Which drafters a server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import Tensor

from slipstream.drafter import warm
from slipstream.drafter.draft_model import ModelDrafter
from slipstream.drafter.head import layout
from slipstream.drafter.head.config import OUTPUT
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.drafter.names import drafter_names
from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.fingerprint import served_fingerprint, target_name
from slipstream.drafter.registry.manifest import MANIFEST_FILE
from slipstream.drafter.registry.registry import Registry, is_registry
from slipstream.drafter.registry.version_folder import read_folder
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.loader import build_model, find_device
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.speculation.protocol import Drafter

logger = logging.getLogger(__name__)
SUFFIX_CAPACITY = 200_000
"""Tokens of earlier answers that are kept; about 100 bytes each."""
DRAFT_VOCAB_SIZE = 8192
"""Draft vocabulary of a cold or an untrained head: the first tokens, the most frequent of a byte-pair vocabulary."""


def make_drafters(config: EngineConfig) -> Sequence[Drafter]:
    """The drafters of a configuration, in the order in which they are asked."""
    fingerprint = cache(lambda: served_fingerprint(config))  # reads all embeddings: 0.15 s for a small model
    makers: dict[str, Callable[[], Drafter]] = {
        "ngram": NGramDrafter,
        "suffix": lambda: SuffixDrafter(SUFFIX_CAPACITY),
        "head": lambda: HeadDrafter(
            lambda target: _load_head(config, target, fingerprint()),
            width=config.draft_width,
            most=config.max_drafters,
            read=lambda folder, target: _read_head(config, folder, target, fingerprint()),
        ),
        "draft": lambda: ModelDrafter(
            lambda target, length: _load_model(config, target, length), width=config.draft_width
        ),
    }
    return [makers[name]() for name in drafter_names(config)]


def _load_head(config: EngineConfig, target: DecoderConfig, fingerprint: str) -> FirstHead:
    if config.drafter == "random":
        head = layout.config_for(target, DRAFT_VOCAB_SIZE)
        return FirstHead(head, layout.random_tensors(head, config.seed))
    if config.drafter == "cold":
        return _cold_head(config, target)
    if config.drafter == "warm":
        return FirstHead(*warm.read(config))
    assert config.drafter is not None
    folder = Path(config.drafter).expanduser()
    if is_registry(folder):
        return _serving_head(config, folder, target, fingerprint)
    version = manifests.read(folder).version if (folder / MANIFEST_FILE).is_file() else 1
    return FirstHead(*_read_head(config, folder, target, fingerprint), version)


def _serving_head(config: EngineConfig, folder: Path, target: DecoderConfig, fingerprint: str) -> FirstHead:
    """The registry's live version. What is damaged or made for another model must not keep the server from starting:
    then one that was live before, or else a head that is still to learn, with the number 0, which no version has.
    """
    try:
        registry = Registry(folder, create=False)
        versions = registry.may_serve()
        if not versions:
            return replace(_cold_head(config, target), version=0)
        for version in versions:
            try:
                path = registry.path(version)
                head, tensors = _read_head(config, path, target, fingerprint)
                layout.check_target(head, target)
                return FirstHead(head, tensors, version, str(path))
            except ModelError as error:
                logger.error("drafter version %d cannot serve, so another one is looked for: %s", version, error)
    except ModelError as error:
        logger.error("%s", error)
    logger.error("%s has no version that can serve: starting with a head that is still to learn", folder)
    return replace(_cold_head(config, target), version=0)


def _cold_head(config: EngineConfig, target: DecoderConfig) -> FirstHead:
    head = layout.config_for(target, DRAFT_VOCAB_SIZE)
    return FirstHead(head, layout.from_target(head, _last_layer(config, target), range(head.draft_vocab_size)))


def _read_head(
    config: EngineConfig, folder: Path, target: DecoderConfig, fingerprint: str
) -> tuple[layout.HeadConfig, Mapping[str, Tensor]]:
    if not (folder / MANIFEST_FILE).is_file():
        return layout.read(folder, target)
    head, tensors = read_folder(folder, fingerprint, target_name(config.model, config.target_lineage, config.quantize))
    if manifests.read(folder).training.shares_output:  # the target's weights may be others than when it was trained
        tensors.pop(OUTPUT)
    return head, tensors


def _last_layer(config: EngineConfig, target: DecoderConfig) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(config.model)
    dummy = config.load_format == "dummy"
    made_on = find_device(config)
    tensors = dummy_tensors(checkpoint.config, config.seed, made_on) if dummy else checkpoint.tensors()
    return {name: each.cpu() for name, each in layout.last_layer(tensors, target.shape.num_layers).items()}


def _load_model(config: EngineConfig, target: CausalModel, length: int) -> CausalModel:
    assert config.draft_model is not None
    checkpoint = open_checkpoint(config.draft_model)
    return build_model(checkpoint, config, target.formats, find_device(config), length)
