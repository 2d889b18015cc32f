"""Reads the JSON files of a model folder; what to do about files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.engine.errors import ModelError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that Git LFS has put in place of the one that is meant."""


def again(path: Path) -> str:
    """What to do about a file that is damaged: fetch it, in the way that brings it."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        is_pointer = False
    return (
        "It only says where Git LFS keeps the file: get it with `git lfs pull`."
        if is_pointer
        else "Download the file again."
    )


def leads_nowhere(path: Path) -> str:
    """Says so of a link without a file behind it, as caches have them that lost one; else nothing."""
    if not path.is_symlink() or path.exists():
        return ""
    return f" {path} is a link to {path.readlink()}, which is no file. {again(path)}"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError that names the file and the place if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}. {again(path)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__} where an object is needed")
    return value
