"""Which model a drafter was made for, as a hash: heads of another model load without a word and are never right."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import msgspec

from slipstream.engine.checkpoint import Checkpoint, open_checkpoint
from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.checkpoint.gguf_file import part_names
from slipstream.engine.checkpoint.shapes import FAMILIES
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config, need

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
WHOLE_BYTES = 32 << 20
"""Larger tensors are sampled."""
SAMPLES = 512
SAMPLE_BYTES = 64 << 10
END_BYTES = 1 << 20
"""Read of a file where it is only to be told from others."""


def target_fingerprint(checkpoint: Checkpoint, lineage: str = "", quantize: str = "none") -> str:
    """Hash over architecture, tokenizer, and embedding and output weights as they are stored.

    The same weights in another format or quantisation are another model.

    Args:
        lineage: a name that stands for the weights, where these change while the drafter goes on to fit: the steps of
            a reinforcement-learning run.
        quantize: what numbers become when they are loaded, as in ``EngineConfig``.

    Raises ModelError if the checkpoint is damaged or has no weights of these names.
    """
    digest = hashlib.sha256()
    for part in (_architecture(checkpoint), *checkpoint.tokenizer_data()):
        digest.update(b"%d " % len(part))  # so that parts cannot run into each other
        digest.update(part)
    if lineage:
        digest.update(b"lineage " + lineage.encode())
        return digest.hexdigest()
    if checkpoint.quantisation:  # most leave embeddings and output matrices as they were
        digest.update(b"quantised " + msgspec.json.encode(checkpoint.quantisation, order="deterministic"))
    names = [name for name in EMBEDDINGS if name in checkpoint.tensor_shapes()]
    if not names:
        raise ModelError(f"{checkpoint.path} has no {EMBEDDINGS[0]}, so drafters for it cannot be told apart")
    for name in names:
        _update_with_tensor(digest, checkpoint.stored(name).data.reshape(-1).data)
    digest.update(_of_quantize(quantize))
    return digest.hexdigest()


def served_fingerprint(config: EngineConfig) -> str:
    """Fingerprint of the model that an engine with this configuration runs."""
    lineage = config.target_lineage
    if not lineage and config.load_format == "dummy":
        lineage = f"dummy weights {config.seed}"
    return target_fingerprint(open_checkpoint(config.model), lineage, config.quantize)


def traffic_target(config: EngineConfig) -> str:
    """Whose traffic is kept in one store: that of a lineage, or of the same files."""
    return served_fingerprint(config) if config.target_lineage else files_fingerprint(config)


def files_fingerprint(config: EngineConfig) -> str:
    """Tells the files of target models apart in no time: by sizes, beginnings and ends."""
    path = locate(config.model)
    is_file = path.is_file()
    parts = [path.with_name(name) for name in part_names(path.name)] if is_file else path.glob("*.safetensors")
    files = sorted(parts if is_file else [path / "config.json", *parts])
    digest = hashlib.blake2b(digest_size=16)
    if config.load_format == "dummy":
        digest.update(b"dummy %d" % config.seed)
    for file in files:
        with Path(file).open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            digest.update(b"%d " % size)
            for begin in (0, max(size - END_BYTES, 0)):
                content.seek(begin)
                digest.update(content.read(END_BYTES))
    digest.update(_of_quantize(config.quantize))
    return digest.hexdigest()


def target_name(model: str, lineage: str, quantize: str = "none") -> str:
    """How people are told which target a drafter is for."""
    if lineage:
        return f"{model}, lineage {lineage!r}"
    return model if quantize == "none" else f"{model}, quantised to {quantize}"


def _architecture(checkpoint: Checkpoint) -> bytes:
    """Normalised for our own families, because configurations spell the same thing in several ways."""
    config = checkpoint.config
    if need(config, "model_type") not in FAMILIES:
        return msgspec.json.encode(config, order="deterministic")
    decoder = dataclasses.asdict(decoder_config(config))
    del decoder["sees"]
    for later in ("window_rope", "more"):  # fields that came later, without which fingerprints are as they were
        if not decoder[later]:
            del decoder[later]
    return msgspec.json.encode(decoder | {"parameters": None}, order="deterministic")


def _of_quantize(quantize: str) -> bytes:
    return b"" if quantize == "none" else b"quantize " + quantize.encode()


def _update_with_tensor(digest: hashlib._Hash, data: memoryview) -> None:
    digest.update(b"%d " % len(data))
    if len(data) <= WHOLE_BYTES:
        digest.update(data)
        return
    step = (len(data) - SAMPLE_BYTES) // (SAMPLES - 1)
    for start in range(0, len(data) - SAMPLE_BYTES + 1, step):
        digest.update(data[start : start + SAMPLE_BYTES])
