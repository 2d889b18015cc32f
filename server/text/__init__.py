"""Text to tokens and back. Nothing here imports torch or transformers."""

from slipstream.server.text.chat_template import RESERVED_VARIABLES, ChatTemplate, TemplateError
from slipstream.server.text.detokenize import IncrementalDetokenizer, StopChecker
from slipstream.server.text.offsets import OffsetDetokenizer, prompt_offsets
from slipstream.server.text.tokenizer import Tokenizer, TurnEnds, load_tokenizer

__all__ = [
    "RESERVED_VARIABLES",
    "ChatTemplate",
    "IncrementalDetokenizer",
    "OffsetDetokenizer",
    "StopChecker",
    "TemplateError",
    "Tokenizer",
    "TurnEnds",
    "load_tokenizer",
    "prompt_offsets",
]
