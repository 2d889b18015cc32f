"""GGUF files with a SentencePiece vocabulary encode as tokenizer.json of these models does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from slipstream.engine.checkpoint.gguf_config import translate_generation_config
from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.errors import ModelError
from slipstream.server.text import load_tokenizer

TRICKY = [
    "",
    " ",
    "\n\n  indented\ttabs\r\n",
    "It's 12345 o'clock, WE'LL see: don't!",
    "naïve café — “quotes” … ½ ② Ⅳ",
    "你好，世界 👩‍👩‍👧 नमस्ते \u0301combining",
    "\x00\x7f\u200b\ufffd",
]
FORMS = {
    # The normalizer, the pre-tokenizer and the decoder's last step, as in tokenizer.json of these models.
    "llama": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        [decoders.Strip(" ", 1, 0)],
    ),
    "mistral v3": (None, pre_tokenizers.Metaspace("▁", "first", False), [decoders.Strip(" ", 1, 0)]),
    "gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), []),
}


def published_form(form: str, vocab: list[tuple[str, float, int]], rstrip: bool = False) -> Backend:
    """tokenizer.json as the conversion of a SentencePiece model writes it."""
    ids = {piece: number for number, (piece, _, _) in enumerate(vocab)}
    merges = []
    for piece, score, _ in vocab:
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        parts = sorted((ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids)
        merges += [(score, a, b) for _, _, a, b in parts]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    pairs = [(a, b) for _, a, b in merges]
    backend = Backend(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer, steps = FORMS[form]
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps])
    for piece, _, kind in vocab:
        if kind in (2, 3):
            backend.add_special_tokens(
                [AddedToken(piece, normalized=False, special=True, rstrip=rstrip and piece not in ("<unk>", "<s>"))]
            )
        elif kind == 4:
            backend.add_tokens([AddedToken(piece, normalized=False, special=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return backend


CONTROLS = ["<s>", "</s>", "<|user|>", "<think>"]
mixed = st.lists(
    st.sampled_from([*CONTROLS, "[INST]", "[/INST]", " ", "  ", "\n", "▁", "Hello", " the capital of", "你", "😀"])
    | st.text(max_size=8),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("form", [*FORMS, "phi3"])
def test_gguf_sentencepiece_is_the_models_own_tokenizer(
    write_gguf: Any, sentencepiece_vocab: list[tuple[str, float, int]], conversation_texts: list[str], form: str
) -> None:
    vocab = [*sentencepiece_vocab, ("<|user|>", 0.0, 3), ("<think>", 0.0, 4)]
    vocab += [("[INST]", 0.0, 3), ("[/INST]", 0.0, 3)] if form == "mistral v3" else []
    tokens, scores, types = map(list, zip(*vocab, strict=True))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": form != "gemma"}
    arch = "phi3" if form == "phi3" else "llama"
    found = load_tokenizer(write_gguf(tokens, types, model="llama", arch=arch, scores=scores, **ids))
    theirs = published_form("llama" if form == "phi3" else form, vocab, rstrip=form == "phi3")

    def check(text: str) -> None:
        for add in (True, False):
            ids = found.encode(text, add_special_tokens=add)
            assert ids == theirs.encode(text, add_special_tokens=add).ids, text
            for skip in (True, False):
                assert found.decode(ids, skip) == theirs.decode(ids, skip), text

    for text in [*TRICKY, *conversation_texts[:60], "<s>[INST] Hi [/INST]", " hello", "<|user|>\nHi<think>so"]:
        check(text)
    settings(max_examples=150)(given(mixed)(check))()
    if form == "llama":
        assert [tokens[token] for token in found.encode("<s>[", add_special_tokens=False)][:2] in (
            ["<s>", "▁["],
            ["<s>", "▁"],
        )


def test_rows_of_spaces_that_are_tokens_of_gemma_come_first(
    write_gguf: Any, sentencepiece_vocab: list[tuple[str, float, int]]
) -> None:
    """Converters write such tokens with spaces, where the model has ▁."""
    vocab = [*sentencepiece_vocab, *((" " * count, -1000.0, 4) for count in (2, 3))]
    tokens, scores, types = map(list, zip(*vocab, strict=True))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": False}
    found = load_tokenizer(write_gguf(tokens, types, model="llama", arch="gemma3", scores=scores, **ids))
    two, three = len(vocab) - 2, len(vocab) - 1
    encoded = found.encode("  a   b     c", add_special_tokens=False)
    assert [token for token in encoded if token >= two] == [two, three, three, two]
    assert found.decode(encoded) == "  a   b     c"


@pytest.mark.parametrize("prefix_space", [True, False])
def test_gguf_sentencepiece_round_trip(
    write_sentencepiece: Any, conversation_texts: list[str], prefix_space: bool
) -> None:
    found = load_tokenizer(write_sentencepiece(add_space_prefix=prefix_space))
    for text in [*TRICKY, *conversation_texts[:60]]:
        ids = found.encode(text, add_special_tokens=False)
        assert found.decode(ids, skip_special_tokens=False) == text
        assert b"".join(map(found.token_bytes, ids)).decode().removeprefix(" " if prefix_space else "") == text
    assert found.encode("a")[0] == found.bos_token_id == 1
    assert found.token_text(found.encode("\x00")[-1]) == "\x00"
    assert found.token_text(3 + 0xE4) == "\\xe4"


def test_ids_that_name_no_token_are_none(write_sentencepiece: Any) -> None:
    """Some files say so with -1, which was read as the last token of the vocabulary."""
    path = write_sentencepiece(bos_token_id=-1, unknown_token_id=-1, padding_token_id=-1, add_bos_token=True)
    found = load_tokenizer(path)
    assert found.bos_token_id is None
    assert found.decode(found.encode("ab"), skip_special_tokens=False) == "ab"
    assert -1 not in translate_generation_config(GGUFFile(path)).values()


def test_a_token_of_absurd_length_is_told(write_gguf: Any, sentencepiece_vocab: list[tuple[str, float, int]]) -> None:
    """All ways to cut it would take its length's square of memory."""
    tokens, scores, types = map(list, zip(*[*sentencepiece_vocab, ("ab" * 50_000, -5.0, 1)], strict=True))
    with pytest.raises(ModelError, match=r"the token 'abab.* has 100000 characters"):
        load_tokenizer(write_gguf(tokens, types, model="llama", scores=scores))
