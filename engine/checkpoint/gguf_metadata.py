"""Typed look-ups in the metadata of GGUF files."""

from __future__ import annotations

import math
from typing import Any

from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.errors import ModelError


class ModelMetadata:
    """With errors that name the file and the key. Keys that begin with a dot are those of the file's architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._values = file.metadata
        self.arch = self.text("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(self.full(key), default)

    def __contains__(self, key: str) -> bool:
        return self.full(key) in self._values

    def full(self, key: str) -> str:
        """As the file calls it."""
        return self.arch + key if key.startswith(".") else key

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]  # given per layer, the same for every layer
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(key, value, "one positive whole number")
        return value

    def token_id(self, name: str) -> int | None:
        return next(iter(self.token_ids(name)), None)

    def token_ids(self, name: str) -> list[int]:
        """One, several where the file has a list, or none, which some write as -1."""
        value = self.get(f"tokenizer.ggml.{name}")
        values = value if isinstance(value, list) else [value]
        return [each for each in values if isinstance(each, int) and not isinstance(each, bool) and each >= 0]

    def unsupported(self, what: str) -> ModelError:
        return ModelError(
            f"{self.file.path}: {what} is not supported in GGUF form. Use the Hugging Face folder of this model "
            "instead, which works natively or through the transformers fallback."
        )

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        found = "is missing" if value is None else f"is {str(value)[:40]!r}"
        return ModelError(
            f"{self.file.path}: the metadata {self.full(key)} {found}; {wanted} is needed. Convert the model again."
        )
