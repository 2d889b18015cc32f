"""Text to tokens and back, for a Hugging Face folder or a GGUF file, without transformers and torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from slipstream.engine.checkpoint import locate
from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.errors import ModelError
from slipstream.engine.grammars.token_bytes import TokenBytes
from slipstream.server.text.chat_template import ChatTemplate
from slipstream.server.text.gguf_tokenizer import build_from_gguf
from slipstream.server.text.tokenizer_files import TokenizerParts, read_folder


@dataclass(frozen=True)
class TurnEnds:
    """What ends an answer in a conversation."""

    token_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    """Texts for which there is no token."""


MOST_TOKENS = 1 << 24
"""More than vocabularies have: a file that names larger ids is damaged."""


class Tokenizer:
    """Encodes, decodes and describes tokens. Safe to use from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = parts.special_tokens
        self.chat_templates = parts.chat_templates
        self.source = parts.source
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """One more than the largest token id. A model's own vocabulary may be padded to more."""
        if self.vocab_size > MOST_TOKENS:  # all of which would get a place in lists
            raise ModelError(
                f"{self.source}: no vocabulary has a token {self.vocab_size - 1}. Download the file again."
            )
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        tokens: list[str | None] = [None] * self.vocab_size
        for text, token_id in vocab.items():
            tokens[token_id] = text
        for token_id, added_token in added.items():
            tokens[token_id] = added_token.content
        decoders = _decoder_types(self._backend)
        self._byte_level = decoders == ["ByteLevel"]
        self.byte_fallback_ids: dict[int, int] = {}
        """Token id to byte, for the tokens <0x00> to <0xFF> of vocabularies with byte fallback."""
        if "ByteFallback" in decoders:
            for token_id, token in enumerate(tokens):
                if token is not None and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
                    self.byte_fallback_ids[token_id] = int(match[1], 16)
        known = tokens if self._byte_level else []
        self._bytes = TokenBytes(b"" if text is None else _byte_level_bytes(text) for text in known)
        self._visible_bytes = self._bytes.without(self.special_ids)
        self.fingerprint = hashlib.sha256(json.dumps([tokens, sorted(self.special_ids)]).encode()).hexdigest()
        """Over what every token id stands for; in most cases the same for a model's Hugging Face and GGUF form."""
        self.bos_token_id = self.token_id(self.special_tokens.get("bos_token"))
        eos_token_id = self.token_id(self.special_tokens.get("eos_token"))
        self._added = {token_id: token.content for token_id, token in added.items()}
        own = self.own_template()
        ends = (eos_token_id, *(self.turn_ends(own).token_ids if own else ()), *parts.end_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        """Tokens that end a text: the tokenizer's, those its own chat templates put after an answer, and those of the
        generation configuration."""

    @property
    def chat_template(self) -> str | None:
        """The model's default chat template."""
        found = self.chat_templates.get("default")
        return found if isinstance(found, str) else None

    def own_template(self) -> ChatTemplate | None:
        """The model's own chat templates; None if it has none."""
        return ChatTemplate(self.chat_templates, self.special_tokens, str(self.source)) if self.chat_templates else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written out in the text are recognised."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def count(self, text: str) -> int:
        """How many tokens a part of an answer has."""
        return len(self.encode(text, add_special_tokens=False)) if text else 0

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Unknown token ids have no text; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, text: str | None) -> int | None:
        """The id of a token by its exact text in the vocabulary."""
        return None if text is None else self._backend.token_to_id(text)

    def token_name(self, token_id: int) -> str | None:
        """The exact text of a token in the vocabulary; None for unknown ids."""
        return self._backend.id_to_token(token_id)

    def save(self, file: Path) -> None:
        """Writes a tokenizer.json; special tokens and chat templates stand elsewhere in a Hugging Face folder."""
        self._backend.save(str(file))

    def drop_boundaries(self, vocab_size: int) -> list[str]:
        """Puts tokens that a model with so many tokens does not have before and after texts no more; returns them."""
        processor = self._backend.post_processor
        if processor is None or all(token < vocab_size for token in self.encode("")):
            return []
        state = json.loads(processor.__getstate__())
        dropped: set[str] = set()
        for step in state.get("processors", [state]):
            if step["type"] == "TemplateProcessing":
                lacking = {name for name, token in step["special_tokens"].items() if max(token["ids"]) >= vocab_size}
                for kind in ("single", "pair"):
                    step[kind] = [part for part in step[kind] if part.get("SpecialToken", {}).get("id") not in lacking]
                dropped |= lacking
        processor.__setstate__(json.dumps(state).encode())
        self._backend.post_processor = processor
        return sorted(dropped)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that has already begun; empty for unknown ids."""
        if self._byte_level:
            return self._bytes[token_id] if token_id < len(self._bytes) else b""
        if token_id in self.byte_fallback_ids:
            return bytes([self.byte_fallback_ids[token_id]])
        alone = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :].encode()

    @cached_property
    def special_texts(self) -> dict[str, int]:
        """Special tokens by their text."""
        return {text: token for token, text in self._added.items() if token in self.special_ids and text}

    def symbols(self, text: str) -> str:
        """A text as symbols of a grammar in Lark's notation; special tokens in it are tokens there, too."""
        pattern = "|".join(re.escape(each) for each in sorted(self.special_texts, key=len, reverse=True))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        written = [
            f"<[{self.special_texts[part]}]>" if part in self.special_texts else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        ]
        return " ".join(written)

    def all_bytes(self) -> list[bytes]:
        """``token_bytes`` of every token."""
        return list(self._bytes) if self._byte_level else [self.token_bytes(token) for token in range(self.vocab_size)]

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are only part of a character are written as ``\\xe2``."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def byte_table(self, skip_special_tokens: bool) -> Sequence[bytes] | None:
        """The bytes of every token id; None if the vocabulary is not byte-level, so that tokens have no fixed bytes."""
        if not self._byte_level:
            return None
        return self._visible_bytes if skip_special_tokens else self._bytes

    def turn_ends(self, template: ChatTemplate) -> TurnEnds:
        """What a template puts right after an answer: a token where there is one for it, or else a text."""
        ids: list[int] = []
        stops: list[str] = []
        for text in template.texts_after_answer():
            text = text.strip()
            found = [token_id for token_id, content in self._added.items() if text.startswith(content)]
            if found:
                ids.append(max(found, key=lambda token_id: len(self._added[token_id])))
            elif text:
                stops.append(text)
        return TurnEnds(tuple(ids), tuple(stops))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model named as for ``open_checkpoint``; ModelError if there is none or it is broken."""
    found = locate(path)
    return Tokenizer(read_folder(found) if found.is_dir() else build_from_gguf(GGUFFile(found)))


def _decoder_types(backend: tokenizers.Tokenizer) -> list[str]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [each["type"] for each in state.get("decoders", [state])]


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's spelling of bytes as printable characters, undone: character code to the character of that byte.

    Printable Latin-1 stands for itself, the other bytes for the characters from 256 on. The characters below 256 that
    spell no byte are mapped to one that Latin-1 cannot encode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | dict.fromkeys(others, "\ufffd")
    return alphabet | {256 + index: chr(byte) for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(text: str) -> bytes:
    """The bytes a byte-level token stands for; a token not in that spelling stands for itself, as in tokenizers."""
    try:
        return text.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()
