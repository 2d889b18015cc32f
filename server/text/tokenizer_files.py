"""Reads the tokenizer files of a Hugging Face folder.

As in transformers 5, tokenizer.json says how text is encoded (its post-processor decides about beginning and end
tokens), and tokenizer_config.json names the special tokens and may add tokens. One difference: transformers rebuilds
the tokenizers of some classes from their vocabulary alone, here tokenizer.json is always taken as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from slipstream.engine.checkpoint.json_file import again, read_json_object
from slipstream.engine.errors import ModelError
from slipstream.server.text.chat_template import TemplateError

logger = logging.getLogger(__name__)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "tiktoken.model", "spiece.model")


@dataclass(frozen=True)
class TokenizerParts:
    """What the loaders read from a model's files."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    """Token text by role: bos_token, eos_token, pad_token, …"""
    end_token_ids: tuple[int, ...]
    """The tokens that the model's configurations end a text with."""
    chat_templates: dict[str, str | TemplateError]
    """Chat templates by name; an error says why one cannot be read."""
    source: Path = Path()
    """The folder or file."""


def read_folder(folder: Path) -> TokenizerParts:
    file = folder / "tokenizer.json"
    if not file.is_file():
        present = [name for name in OTHER_FORMATS if (folder / name).is_file()]
        hint = f" It has {', '.join(present)}, which is read by other programs only." if present else ""
        raise ModelError(
            f"the folder {folder} has no tokenizer: tokenizer.json was not found.{hint} Download it, or write it with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file} is not a valid tokenizer: {error}. {again(file)}") from error
    config = _optional(folder / "tokenizer_config.json")
    named = dict(config)
    if "added_tokens_decoder" not in config:  # files from before that field
        named |= _optional(folder / "special_tokens_map.json")
    try:
        special_tokens = {role: _content(_first(token)) for role, token in _named_tokens(named).items() if token}
        ends = named.get("eos_token")
        also = [_content(token) for token in ends[1:]] if isinstance(ends, list) else []
        _add_tokens(backend, config, named, special_tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'} (or special_tokens_map.json) has a malformed token: {error!r}. "
            "Download the files again."
        ) from error
    chat_templates = _chat_templates(folder, config)
    more_ends = (token_id for token in also if (token_id := backend.token_to_id(token)) is not None)
    end_token_ids = (*_end_token_ids(folder), *more_ends)
    return TokenizerParts(backend, special_tokens, end_token_ids, chat_templates, folder)


def _named_tokens(named: dict[str, Any]) -> dict[str, Any]:
    """The tokens that templates may call by names: those of ROLES, and what a model has besides (``image_token``)."""
    found = {role: named[role] for role in ROLES if role in named}
    found |= {
        name: token
        for name, token in named.items()
        if name.endswith("_token") and name not in found and isinstance(token, str | dict)
    }
    more = named.get("extra_special_tokens")
    return found | more if isinstance(more, dict) else found


def _add_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Adds what tokenizer_config.json declares and tokenizer.json lacks."""
    known = {_flags(token) for token in backend.get_added_tokens_decoder().values()}
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = [_added_token(entry) for _, entry in declared]
    backend.add_tokens([token for token in tokens if _flags(token) not in known])
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TypeError(f"a list of tokens is {extra!r}")
    extra = [] if isinstance(extra, dict) else extra  # those with names are special tokens already
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    wanted = dict.fromkeys([*special_tokens.values(), *map(_content, extra)])
    backend.add_special_tokens([token for token in wanted if token not in present])


def _added_token(entry: dict[str, Any]) -> tokenizers.AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in flags if flag in entry})


def _flags(token: tokenizers.AddedToken) -> tuple[object, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _content(token: Any) -> str:
    """A token is given as text or as an object with its flags."""
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"a token is {content!r}")
    return content


def _end_token_ids(folder: Path) -> tuple[int, ...]:
    """End tokens from generation_config.json, or config.json if that names none; one id or a list of them."""
    generation, config = folder / "generation_config.json", folder / "config.json"
    try:
        found = _optional(generation)
    except ModelError as error:
        logger.warning("going on without it: %s", error)
        found = {}
    whole = _optional(config)
    text = whole.get("text_config")  # the decoder's own, in a model that also sees
    return (
        _end_tokens(generation, found)
        or _end_tokens(config, whole)
        or _end_tokens(config, text if isinstance(text, dict) else {})
    )


def _end_tokens(path: Path, found: dict[str, Any]) -> tuple[int, ...]:
    value = found.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    if not all(each is None or (isinstance(each, int) and not isinstance(each, bool)) for each in values):
        raise ModelError(f"{path}: eos_token_id is {value!r}, not a token id or a list of them")
    return tuple(each for each in values if each is not None)


def _first(tokens: Any) -> Any:
    """An end token is mostly one, and a list of them in some files."""
    return tokens[0] if isinstance(tokens, list) and tokens else tokens


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str | TemplateError]:
    """Chat templates by name; the one without a name is called default. Template files win over the configuration.

    A broken one concerns only requests that need it, so it is kept as the error to answer them with.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in files.items()}
    declared, file = config.get("chat_template"), folder / "tokenizer_config.json"
    if not declared:
        file = folder / "chat_template.json"
        try:
            declared = _optional(file).get("chat_template")
        except ModelError as error:
            return {"default": TemplateError(f"the chat template cannot be read: {error}")}
    if declared is None:
        return {}
    if isinstance(declared, list):
        try:
            declared = {each["name"]: each["template"] for each in declared}
        except (KeyError, TypeError):
            declared = {"default": declared}
    entries = declared if isinstance(declared, dict) else {"default": declared}
    return {
        str(name): text
        if isinstance(text, str)
        else TemplateError(f"the chat template {name!r} of {file} is no text: {type(text).__name__}")
        for name, text in entries.items()
    }


def _text(path: Path) -> str | TemplateError:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return TemplateError(f"cannot read the chat template {path}: {error}")


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
