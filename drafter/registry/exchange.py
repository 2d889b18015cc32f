"""Heads from and for elsewhere: the published EAGLE-3 layout, and version folders of other registries."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slipstream.drafter.head.config import (
    HeadConfig,
    check_shapes,
    check_target,
    find_weights,
    is_pickled,
    read_config,
    write_config,
)
from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.fingerprint import target_fingerprint, target_name
from slipstream.drafter.registry.manifest import MANIFEST_FILE, WEIGHTS_FILE
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Version
from slipstream.drafter.registry.version_folder import Weights, check_fit, head_config, intact
from slipstream.engine.checkpoint import Checkpoint
from slipstream.engine.checkpoint.safetensors_files import SINGLE_FILE
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
    weights = registry.weights(version)
    config = head_config(registry.get(version).manifest)
    try:
        write_config(folder, config)
        shutil.copyfile(weights, folder / SINGLE_FILE)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error}") from error
    cautions: list[str] = []
    if config.kind != "eagle3":
        return cautions
    if len(config.taps) != SGLANG_TAPS:
        cautions.append(f"SGLang loads heads that read {SGLANG_TAPS} layers; this one reads {len(config.taps)}")
    elif config.taps[0] == 1:
        cautions.append("SGLang would take the numbers of the layers this head reads for others, and draft badly")
    return cautions


def check_import(folder: Path, target: Checkpoint, *, lineage: str = "", quantize: str = "none") -> HeadConfig:
    """What is to be imported, as far as can be told without numpy; raises ModelError as ``import_head`` does.

    Of a published head, whose numbers may be anything, only small files are read; of a version all bytes.
    """
    decoder = decoder_config(target.config)
    if (folder / MANIFEST_FILE).is_file():
        manifest = manifests.read(folder)
        fingerprint = target_fingerprint(target, lineage, quantize)
        check_fit(manifest, fingerprint, target_name(target.path.name, lineage, quantize))
        intact(folder, manifest)
        config = head_config(manifest)
    else:
        config = read_config(folder, decoder.shape.num_layers)
        if not is_pickled(folder):
            check_shapes(config, {name: tensor.shape for name, tensor in find_weights(folder).items()})
    check_target(config, decoder)
    return config


def import_head(
    registry: Registry,
    folder: Path,
    target: Checkpoint,
    *,
    lineage: str = "",
    quantize: str = "none",
    route: str = "",
    note: str = "",
) -> Version:
    """Adds a published head, or a version folder of another registry, as a candidate for a target.

    Raises ModelError if it is damaged, of an unsupported kind, or does not fit the target. Of a published head only
    sizes can be compared; a version folder says which model it was made for. Imports no torch but for weights in the
    form of the first EAGLE heads.
    """
    from slipstream.drafter.head import stored  # imports numpy

    config = check_import(folder, target, lineage=lineage, quantize=quantize)
    decoder = decoder_config(target.config)
    weights: Weights
    if (folder / MANIFEST_FILE).is_file():
        known = manifests.read(folder)
        tensors = stored.read(folder / WEIGHTS_FILE)
        # Its parent's number means nothing here.
        origin, training, gate, note = known.origin, known.training, known.gate, note or known.note
    else:
        tensors = {} if is_pickled(folder) else stored.read_published(folder)
        # Many published configurations state the length that was trained, at which loaders would cut it off.
        config = replace(config, max_positions=decoder.shape.max_positions)
        origin, training, gate, note = "imported", None, {}, note or folder.name
    if tensors:
        stored.check(config, tensors)
        weights = stored.published(config, tensors)
    else:
        from slipstream.drafter.head import layout

        weights = layout.read(folder, decoder)[1]
    return registry.add(
        config,
        weights,
        target=target_fingerprint(target, lineage, quantize),
        target_name=target_name(target.path.name, lineage, quantize),
        origin=origin,
        route=route,
        training=training,
        gate=gate,
        note=note,
    )
