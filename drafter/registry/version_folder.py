"""A drafter version as a folder of weights and manifest: written whole or not at all, read only if intact."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from slipstream.drafter.head.config import HeadConfig, parse_config
from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest, unreadable
from slipstream.engine.background import breathe
from slipstream.engine.errors import MisfitError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

Weights: TypeAlias = "Mapping[str, Tensor] | bytes"
"""Tensors, or a safetensors file that was checked and holds them as they are published."""
PIECE_BYTES = 1 << 18


def write_weights(folder: Path, config: HeadConfig, weights: Weights) -> tuple[int, str]:
    """Writes the weights as they will be published (matrices in bfloat16) to the disk; their size and SHA-256.

    Raises ModelError if a tensor is missing or has another shape than the configuration says.
    """
    data = weights if isinstance(weights, bytes) else _file_of(config, weights)
    _write(folder / WEIGHTS_FILE, data)
    return len(data), hashlib.sha256(data).hexdigest()


def _file_of(config: HeadConfig, tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    from slipstream.drafter.head import layout

    layout.check(config, tensors)
    data: bytes = save(layout.stored({name: tensors[name] for name in config.shapes if name in tensors}))
    return data


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a folder; after this it is complete on the disk."""
    _write(folder / MANIFEST_FILE, manifests.encode(manifest))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes what was created, renamed or removed in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_fit(manifest: Manifest, fingerprint: str, fingerprint_name: str = "") -> None:
    """Raises MisfitError if the version was made for another model."""
    if manifest.target != fingerprint:
        made_for = f"{manifest.target_name} ({manifest.target})" if manifest.target_name else manifest.target
        runs = f"{fingerprint_name} ({fingerprint})" if fingerprint_name else fingerprint
        raise MisfitError(
            f"drafter version {manifest.version} does not fit the model: it was made for the model with fingerprint "
            f"{made_for}, and this one's is {runs}"
        )


def intact(folder: Path, manifest: Manifest) -> Path:
    """The file of a version's weights; raises ModelError if a byte of it is not what was written."""
    path = folder / WEIGHTS_FILE
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != manifest.weights_bytes:
            what = "truncated" if size < manifest.weights_bytes else "too long"
            raise ModelError(f"{path} is {what}: it has {size} bytes, {manifest.weights_bytes} were written")
        with path.open("rb") as file:
            while part := file.read(PIECE_BYTES):
                digest.update(part)
                breathe()
    except OSError as error:
        raise unreadable(error, f"drafter version {manifest.version}: cannot read {path}") from None
    if (found := digest.hexdigest()) != manifest.weights_sha256:
        raise ModelError(f"{path} is damaged: its SHA-256 is {found}, its manifest says {manifest.weights_sha256}")
    return path


def head_config(manifest: Manifest) -> HeadConfig:
    """Raises ModelError for what is no head."""
    # Taps are always written into the manifest, so the target's number of layers is not needed to find them.
    return parse_config(manifest.head, num_layers=0)


def read_weights(folder: Path, manifest: Manifest) -> tuple[HeadConfig, dict[str, Tensor]]:
    """The head in a version folder; raises ModelError if a byte of its weights is not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from slipstream.drafter.head import layout

    path = intact(folder, manifest)
    config = head_config(manifest)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    layout.check(config, tensors)
    return config, tensors


def read_folder(folder: Path, fingerprint: str, fingerprint_name: str = "") -> tuple[HeadConfig, dict[str, Tensor]]:
    """The head in a version folder, wherever it lies; raises ModelError if it is not intact or does not fit."""
    manifest = manifests.read(folder)
    check_fit(manifest, fingerprint, fingerprint_name)
    return read_weights(folder, manifest)


@contextmanager
def lock(path: Path, kind: int) -> Iterator[bool]:
    """Holds a file lock (fcntl.LOCK_SH or LOCK_EX); whether it was had, with LOCK_NB. The kernel frees it at death."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder for a version that is being written; removed unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
