"""The text side of the loaded model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import read_option_file
from slipstream.engine.errors import ConfigError
from slipstream.engine.validation import RANGES
from slipstream.server.config import ServerConfig
from slipstream.server.text import ChatTemplate, TemplateError, Tokenizer, TurnEnds, load_tokenizer

logger = logging.getLogger(__name__)

NAMED_TOKENS = 3
"""How many of the tokens that a model lacks the log names."""
SHORT_CHARS = 2048
"""A text up to this long is encoded alone: that takes half a millisecond with the interpreter lock, which only the call
for a batch gives up."""


@dataclass(frozen=True)
class TextModel:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: Mapping[str, float]
    """Sampling parameters of generation_config.json, if the server is told to use them."""
    turn_ends: TurnEnds
    """What the template puts after an answer."""
    longest_token: int
    """Bytes of the longest token: a lower bound for the length of a prompt before it is encoded."""

    def fit(self, vocab_size: int) -> None:
        """Leaves out what a model with so many tokens does not have, and says so in the log."""
        tokenizer = self.tokenizer
        if dropped := tokenizer.drop_boundaries(vocab_size):
            logger.warning("the tokenizer puts %s around texts, which the model does not have: left out", dropped)
        ends = dict.fromkeys([*tokenizer.eos_token_ids, *self.turn_ends.token_ids])
        if lacking := [str(end) for end in ends if not 0 <= end < vocab_size]:
            logger.warning(
                "the model's files end a text with %s, but it has the tokens 0 to %d only: ignored",
                ", ".join(lacking),
                vocab_size - 1,
            )
        if tokenizer.vocab_size > vocab_size:
            first = range(vocab_size, min(vocab_size + NAMED_TOKENS, tokenizer.vocab_size))
            logger.warning(
                "the tokenizer has %d tokens more than the model (%s …): prompts that have them are refused",
                tokenizer.vocab_size - vocab_size,
                ", ".join(repr(tokenizer.token_name(token)) for token in first),
            )

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if sum(map(len, texts)) <= SHORT_CHARS:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        return self.tokenizer.encode_batch(texts, add_special_tokens)


def load_text_model(model: str, config: ServerConfig) -> TextModel:
    """Raises ModelError or ConfigError."""
    tokenizer = load_tokenizer(model)
    template = load_template(tokenizer, config.chat_template)
    return TextModel(
        tokenizer,
        template,
        sampling_defaults(model) if config.generation_config == "auto" else {},
        tokenizer.turn_ends(template) if template is not None else TurnEnds(),
        max(map(len, tokenizer.all_bytes())),
    )


def load_template(tokenizer: Tokenizer, path: str | None) -> ChatTemplate | None:
    """The template in the file, or else the model's own if it has one: of those a broken one harms nobody who does not
    need it. Raises ConfigError for the file.
    """
    if path is None:
        own = tokenizer.own_template()
        for error in own.broken.values() if own is not None else ():
            logger.warning("requests that need it will be refused: %s", error)
        return own
    try:
        source = read_option_file(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template: cannot read {path!r}: {error}") from error
    try:
        return ChatTemplate(source, tokenizer.special_tokens, path).check() if source else None
    except TemplateError as error:
        raise ConfigError(f"--chat-template: {error}") from error


def sampling_defaults(model: str) -> dict[str, float]:
    """What the generation configuration recommends, as far as it could also be asked for."""
    found = open_checkpoint(model).generation_config
    defaults: dict[str, float] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = found.get(name)
        low, high = RANGES[name]
        if name == "top_k" and value == -1:
            value = 0  # another way to say that all tokens stay
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            defaults[name] = value
        elif value is not None:
            logger.warning(
                "the model's generation configuration has %s %.40r, which is not from %g to %g: ignored",
                name,
                value,
                low,
                high,
            )
    return defaults
