"""Heads that come with Slipstream, trained by ``scripts/make_warm_drafter.py``.

A file leaves out the rows of the target's own output matrix, half of a head's size: they are read from the target. Its
metadata says which model it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.config import OUTPUT
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError

FOLDER = Path(__file__).parent


def find(config: EngineConfig) -> Path | None:
    """The file for the model of this configuration; None if there is none.

    It is looked for by the weights of the model's files, whatever lineage these begin.
    """
    files = sorted(FOLDER.glob("*.safetensors"))
    if not files or config.load_format == "dummy":
        return None
    fingerprint = target_fingerprint(open_checkpoint(config.model), quantize=config.quantize)
    return next((file for file in files if _metadata(file).get("target") == fingerprint), None)


def read(config: EngineConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    """The head for the model of this configuration; raises ConfigError if there is none."""
    file = find(config)
    if file is None:
        raise ConfigError(f"--drafter warm: no drafter for {config.model} comes with Slipstream; use --drafter cold")
    head = layout.parse_config(json.loads(_metadata(file)["head"]), num_layers=0)
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    checkpoint = open_checkpoint(config.model)
    output = layout.output_name(checkpoint.tensor_shapes())
    rows = next(tensor for name, tensor in checkpoint.tensors() if name == output)
    tensors[OUTPUT] = rows[layout.draft_tokens(head, tensors)]
    layout.check(head, tensors)
    return head, tensors


def write(file: Path, fingerprint: str, config: HeadConfig, tensors: Mapping[str, Tensor], note: str) -> None:
    """Writes a head whose output rows are the target's."""
    kept = {name: tensor for name, tensor in layout.stored(tensors).items() if name != OUTPUT}
    metadata = {"target": fingerprint, "head": json.dumps(config.to_json()), "note": note}
    save_file(kept, file, metadata)


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as stored:
        return dict(stored.metadata() or {})
