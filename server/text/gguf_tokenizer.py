"""Builds a tokenizer from the metadata of a GGUF file.

Two vocabulary models are known: ``gpt2``, byte-level BPE, whose splitting of text into words the file names in
``tokenizer.ggml.pre``; and ``llama``, SentencePiece with byte fallback, built as the tokenizer.json of these models is
(transformers' own conversion of GGUF files drops spaces after special tokens and at the beginning of a text).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slipstream.engine.checkpoint.gguf_config import translate_generation_config
from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.checkpoint.json_file import again
from slipstream.engine.errors import ModelError
from slipstream.server.text.chat_template import TemplateError
from slipstream.server.text.tokenizer_files import TokenizerParts

# tokenizer.ggml.token_type
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + GPT4O_ENDING + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + GPT4O_ENDING + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER_WORDS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (LLAMA3_WORDS,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2_WORDS,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O_WORDS,)),
    "tekken": (TEKKEN_WORDS,),
    "deepseek-coder": DEEPSEEK_CODER_WORDS,
}
"""What a text is split at, one after the other, by the names of pre-tokenizers."""
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact")
"""Those that split as GPT-2 does, and numbers into digits before."""
AS_GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "olmo")
LONGEST = 1024
"""Characters of a token of SentencePiece's, 16 to 100 of which are usual: each is cut in all ways there are."""
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of Phi-3 after which spaces count."""
LLAMA3_STYLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Pre-tokenizers of models that take a word that is a token as it is, without going through the merges, and whose
texts begin with the bos token where the file does not say."""


def build_from_gguf(file: GGUFFile) -> TokenizerParts:
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    tokens = meta.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{file.path}: tokenizers of type {kind!r} cannot be built from a GGUF file (gpt2 and llama can). "
            "Use the Hugging Face folder of this model."
        )
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens). Convert the model again.")
    types = _numbers(file, "token_type", len(tokens)) or [1] * len(tokens)
    # Converters fill up the vocabulary to the size of the embedding with such tokens.
    padding = re.compile(r"\[PAD\d+\]")
    vocab = {
        token: index for index, token in enumerate(tokens) if not (types[index] == UNUSED and padding.fullmatch(token))
    }
    backend = _byte_level(file, vocab) if kind == "gpt2" else _sentencepiece(file, tokens, vocab, types)
    # Like the spaces after them, in tokenizer.json of Phi-3; the file does not say so.
    strips = kind == "llama" and meta.get("general.architecture") == "phi3"
    backend.add_special_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=True, rstrip=strips and tokens[i] not in UNSTRIPPED)
            for i, each in enumerate(types)
            if each == CONTROL
        ]
    )
    backend.add_tokens(
        [AddedToken(tokens[i], normalized=False) for i, each in enumerate(types) if each == USER_DEFINED]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: _token(file, tokens, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    special = {role: token for role, token in found.items() if token is not None}
    adds_bos = kind == "llama" or meta.get("tokenizer.ggml.pre") in LLAMA3_STYLE
    _add_boundaries(
        backend,
        special.get("bos_token") if meta.get("tokenizer.ggml.add_bos_token", adds_bos) else None,
        special.get("eos_token") if meta.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    ends = translate_generation_config(file).get("eos_token_id", [])
    return TokenizerParts(backend, special, tuple(ends), _chat_templates(meta), file.path)


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    backend = Tokenizer(_bpe(file, vocab, _merges(file), ignore_merges=name in LLAMA3_STYLE))
    backend.pre_tokenizer = _pre_tokenizer(file, name)
    if name in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(file: GGUFFile, name: object) -> pre_tokenizers.PreTokenizer:
    """How text is split into words before the merges. Files from before the key mean GPT-2's way."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in AS_GPT2:
        return gpt2
    if name in DIGIT_BY_DIGIT:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name not in WORDS:
        known = ", ".join((*DIGIT_BY_DIGIT, *AS_GPT2[1:], *WORDS))
        raise ModelError(
            f"{file.path}: the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known, so text would be split into "
            f"other tokens than in training. Known are {known}. Use the Hugging Face folder of this model."
        )
    splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in WORDS[str(name)]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(file: GGUFFile, tokens: list[str], vocab: dict[str, int], types: list[Any]) -> Tokenizer:
    """A tokenizer with the space that SentencePiece puts before a text as tokenizer.json of the model does.

    Llama 2 and what descends from it put it before every text between special tokens. The tokenizers of Mistral's
    version 3, known by their control token [INST], put it before the first one only, and not before another space.
    Gemma's put none.
    """
    prefix_space = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _merges(file)
    else:
        scores = _numbers(file, "scores", len(tokens))
        if scores is None:
            raise ModelError(f"{file.path} has neither tokenizer.ggml.scores nor merges. Convert the model again.")
        if longest := next((token for token in tokens if len(token) > LONGEST), None):
            raise ModelError(
                f"{file.path}: the token {longest[:20]!r}… has {len(longest)} characters, which those of a vocabulary "
                f"with scores do not ({LONGEST} at most). {again(file.path)}"
            )
        merges = _merges_from_scores(vocab, scores)
    unknown_token = _token(file, tokens, "tokenizer.ggml.unknown_token_id", default=0)
    backend = Tokenizer(_bpe(file, vocab, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    if not prefix_space:
        backend.normalizer = normalizers.Replace(" ", "▁")
    elif "[INST]" in vocab and types[vocab["[INST]"]] == CONTROL:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    return backend


def _bpe(file: GGUFFile, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file.path}: the vocabulary and its merges do not fit together: {error}") from error


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    merges = file.metadata.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges if isinstance(merge, str)] if isinstance(merges, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"{file.path} has no valid merges (tokenizer.ggml.merges). Convert the model again.")
    return [(left, right) for left, right in pairs]


def _token(file: GGUFFile, tokens: list[str], key: str, default: int = -1) -> str | None:
    """The token that a key names; None where there is none, which some files say with -1."""
    index = file.metadata.get(key, default)
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint piece has the best score: every way to cut a piece into two
    others is a merge, ordered by the score of the piece, then as transformers breaks ties."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        found = [(vocab[left], vocab[right], left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += [(scores[index], len(left), len(right), left, right) for _, _, left, right in sorted(found)]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in merges]


def _add_boundaries(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in ends],
        )


def _numbers(file: GGUFFile, name: str, count: int) -> list[Any] | None:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(each, int | float) for each in values)
    ):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.{name} does not have one number per token. Convert the model again."
        )
    return values


def _chat_templates(meta: Mapping[str, Any]) -> dict[str, str | TemplateError]:
    prefix = "tokenizer.chat_template"
    named = {key.removeprefix(prefix + "."): meta[key] for key in meta if key.startswith(prefix + ".")}
    if prefix in meta:
        named["default"] = meta[prefix]
    return {name: text for name, text in named.items() if isinstance(text, str)}
