"""Heads from and for elsewhere: the published EAGLE-3 layout, and version folders of other registries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slipstream.drafter.head import layout
from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.drafter.registry.manifest import MANIFEST_FILE
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Version
from slipstream.drafter.registry.version_folder import read_folder
from slipstream.engine.checkpoint import Checkpoint
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config

SGLANG_TAPS = 3
"""Layers whose features SGLang's loader expects, whatever the configuration says."""


def export_version(registry: Registry, version: int, folder: Path) -> Sequence[str]:
    """Writes a version as config.json and model.safetensors, which SGLang and vLLM load; says what they will not.

    Raises UnknownVersionError, and ModelError if the version is damaged or the folder holds something already.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty; export into a new folder")
    config, tensors = registry.open_version(version, fingerprint=None)
    try:
        layout.write(folder, config, tensors)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error}") from error
    cautions: list[str] = []
    if config.kind != "eagle3":
        return cautions
    if len(config.taps) != SGLANG_TAPS:
        cautions.append(f"SGLang loads heads that read {SGLANG_TAPS} layers; this one reads {len(config.taps)}")
    elif config.taps[0] == 1:
        cautions.append("SGLang would take the numbers of the layers this head reads for others, and guess badly")
    return cautions


def import_head(
    registry: Registry, folder: Path, target: Checkpoint, *, lineage: str = "", route: str = "", note: str = ""
) -> Version:
    """Adds a published head, or a version folder of another registry, as a candidate for a target.

    Raises ModelError if it is damaged, of an unsupported kind, or does not fit the target. Of a published head only
    sizes can be compared; a version folder says which model it was made for.
    """
    decoder = decoder_config(target.config)
    fingerprint, name = target_fingerprint(target, lineage), target.path.name
    if (folder / MANIFEST_FILE).is_file():
        config, tensors = read_folder(folder, fingerprint, name)
        known = manifests.read(folder)
        # Its parent's number means nothing here.
        origin, training, gate, note = known.origin, known.training, known.gate, note or known.note
    else:
        config, tensors = layout.read(folder, decoder)
        # Many published configurations state the length that was trained, at which loaders would cut it off.
        config = replace(config, max_positions=decoder.shape.max_positions)
        origin, training, gate, note = "imported", None, {}, note or folder.name
    layout.check_target(config, decoder)
    return registry.add(
        config,
        tensors,
        target=fingerprint,
        target_name=name,
        origin=origin,
        route=route,
        training=training,
        gate=gate,
        note=note,
    )
