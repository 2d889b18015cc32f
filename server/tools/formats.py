"""The formats in which models call tools. Each is data: how calls look, for the parser and for grammars alike.

A further one is a ``ToolFormat`` in ``FORMATS``; ``--tool-call-parser`` knows it by its name.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    name: str
    begin: str = ""
    """What begins calls in the midst of other text; empty where they are the whole answer."""
    before: str = ""
    """Between that and the first call."""
    after: str = ""
    """After a call, or after the last one where ``begin`` stands before the first only."""
    separator: str = "\n"
    begins_each: bool = False
    """Whether ``begin``, ``before`` and ``after`` stand around every call, and not around all of them."""
    call: tuple[str, str, str] = ('{"name": "', '", "arguments": ', "}")
    """Before the name, before the arguments, and after them."""
    is_bare: bool = False
    """Whether an answer that begins with an object calls a tool without ``begin``."""
    names_first: bool = False
    """Whether the name stands before its arguments, and not with them in an object."""
    parameter: tuple[str, str, str] | None = None
    """Before the name of an argument, before its value, and after it, where these are no JSON object."""
    tells: tuple[str, ...] = ()
    """Texts of which a chat template has one if its model calls tools like this."""
    id_chars: int = 24
    id_prefix: str = "call_"

    def new_id(self) -> str:
        """An id for a call, as the templates of these models want it."""
        letters = string.ascii_letters + string.digits
        return self.id_prefix + "".join(secrets.choice(letters) for _ in range(self.id_chars))


HERMES = ToolFormat(
    name="hermes",
    begin="<tool_call>",
    before="\n",
    after="\n</tool_call>",
    begins_each=True,
    tells=("<tool_call>",),
)
QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    begin="<tool_call>",
    before="\n",
    after="\n</tool_call>",
    begins_each=True,
    call=("<function=", ">\n", "</function>"),
    parameter=("<parameter=", ">\n", "\n</parameter>\n"),
    tells=("<parameter=",),
)
GLM45 = ToolFormat(
    name="glm45",
    begin="<tool_call>",
    begins_each=True,
    call=("", "\n", "</tool_call>"),
    parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    tells=("<arg_key>",),
)
LLAMA3 = ToolFormat(
    name="llama3_json",
    begin="<|python_tag|>",
    separator="; ",
    call=('{"name": "', '", "parameters": ', "}"),
    is_bare=True,
    tells=("<|python_tag|>", "Environment: ipython"),
)
MISTRAL = ToolFormat(
    name="mistral",
    begin="[TOOL_CALLS]",
    before="[",
    after="]",
    separator=", ",
    tells=("[TOOL_CALLS]",),
    id_prefix="",
    id_chars=9,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    begin="[TOOL_CALLS]",
    separator="",
    begins_each=True,
    call=("", "[ARGS]", ""),
    names_first=True,
    tells=("[ARGS]",),
    id_prefix="",
    id_chars=9,
)
NEMOTRON = ToolFormat(
    name="nemotron",
    begin="<TOOLCALL>",
    before="[",
    after="]</TOOLCALL>",
    separator=", ",
    tells=("<TOOLCALL>",),
)
JSON = ToolFormat(name="json", is_bare=True)

FORMATS = {each.name: each for each in (QWEN3_CODER, GLM45, HERMES, LLAMA3, MISTRAL_ARGS, MISTRAL, NEMOTRON, JSON)}
"""By name; the first that a template tells of is the one."""


def recognized(template: str) -> ToolFormat:
    """The format that a chat template tells of; plain JSON if it tells of none."""
    return next((each for each in FORMATS.values() if any(tell in template for tell in each.tells)), JSON)
