"""Text to tokens and back. Nothing here imports torch or transformers."""

from slipstream.server.text.chat_template import ChatTemplate, TemplateError
from slipstream.server.text.detokenize import IncrementalDetokenizer, StopChecker
from slipstream.server.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopChecker", "TemplateError", "Tokenizer", "load_tokenizer"]
