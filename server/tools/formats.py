"""The formats in which models call tools. Each is data: how calls look, for the parser and for grammars alike.

A further one is a ``ToolFormat`` in ``FORMATS``; ``--tool-call-parser`` knows it by its name.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

IN_TAGS = "{is_text}"
"""Where a tag of an argument says whether its value is a text: "true" or "false"."""


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    name: str
    begin: str = ""
    """What begins calls in the midst of other text; empty where they are the whole answer."""
    others: tuple[str, ...] = ()
    """What models write instead of ``begin``, too."""
    before: str = ""
    """Between that and the first call."""
    after: str = ""
    """After a call, or after the last one where ``begin`` stands before the first only."""
    separator: str = "\n"
    begins_each: bool = False
    """Whether ``begin``, ``before`` and ``after`` stand around every call, and not around all of them."""
    call: tuple[str, str, str] = ('{"name": "', '", "arguments": ', "}")
    """Before the name, before the arguments, and after them."""
    loose: tuple[str, ...] = ()
    """What may stand between calls besides, and means nothing."""
    alone: str = ""
    """What a call begins with that tells it also where its model has forgotten ``begin``, as some do now and then."""
    is_bare: bool = False
    """Whether an answer that begins with a call calls a tool without ``begin``."""
    header: str = ""
    """A regular expression with a group ``name`` for what stands before the arguments, a JSON object, where the name is
    not with them in an object."""
    parameter: tuple[str, str, str] | None = None
    """Before the name of an argument, before its value, and after it, where these are no JSON object."""
    literal: tuple[str, str] | None = None
    """Between an argument and its value, and around texts, where these are written as in a programming language."""
    tells: tuple[str | tuple[str, ...], ...] = ()
    """Texts of which a chat template has one, or all of several, if its model calls tools like this."""
    id_chars: int = 24
    id_prefix: str = "call_"
    id_layout: str = ""
    """With ``{name}`` and ``{index}``, where the model is told which calls it has made by ids like this."""

    @property
    def begins(self) -> tuple[str, ...]:
        return tuple(each for each in (self.begin, *self.others) if each)

    @property
    def is_object(self) -> bool:
        """Whether a call is a JSON object, with the name in it."""
        return not self.header and self.parameter is None and self.literal is None

    def new_id(self, name: str, index: int) -> str:
        """An id for a call of a tool, the ``index``-th of its conversation, as these models' templates want it."""
        if self.id_layout:
            return self.id_layout.format(name=name, index=index)
        letters = string.ascii_letters + string.digits
        return self.id_prefix + "".join(secrets.choice(letters) for _ in range(self.id_chars))


HERMES = ToolFormat(
    name="hermes",
    begin="<tool_call>",
    before="\n",
    after="\n</tool_call>",
    begins_each=True,
    loose=("}",),  # a bracket too many
    tells=("<tool_call>",),
)
QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    begin="<tool_call>",
    before="\n",
    after="\n</tool_call>",
    begins_each=True,
    call=("<function=", ">\n", "</function>"),
    alone="<function=",
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
    header=r"(?P<name>[^\[]+?)\s*(\[CALL_ID\]\s*\w*\s*)?(\[ARGS\])?",
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
DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    begin="<｜tool▁calls▁begin｜>",
    after="<｜tool▁calls▁end｜>",
    call=("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
    loose=("```", "<｜tool▁call▁end｜>"),
    alone="<｜tool▁call▁begin｜>",
    header=r"(<｜tool▁call▁begin｜>)?\s*(\w*\s*<｜tool▁sep｜>)?\s*(?P<name>[^\s<]+)\s*(```(json)?)?",
    tells=(("<｜tool▁calls▁begin｜>", "```json"),),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    begin="<｜tool▁calls▁begin｜>",
    after="<｜tool▁calls▁end｜>",
    separator="",
    call=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    loose=("<｜tool▁call▁end｜>",),
    alone="<｜tool▁call▁begin｜>",
    header=r"(<｜tool▁call▁begin｜>)?\s*(?P<name>[^\s<]+)\s*(<｜tool▁sep｜>)?",
    tells=("<｜tool▁calls▁begin｜>",),
)
DEEPSEEK_V32 = ToolFormat(
    name="deepseek_v32",
    begin="<｜DSML｜function_calls>",
    others=("<｜DSML｜tool_calls>",),
    before="\n",
    after="</｜DSML｜function_calls>",
    separator="",
    loose=("</｜DSML｜tool_calls>",),
    call=('<｜DSML｜invoke name="', '">\n', "</｜DSML｜invoke>\n"),
    alone='<｜DSML｜invoke name="',
    parameter=('<｜DSML｜parameter name="', f'" string="{IN_TAGS}">', "</｜DSML｜parameter>\n"),
    tells=("｜DSML｜",),
)
KIMI_K2 = ToolFormat(
    name="kimi_k2",
    begin="<|tool_calls_section_begin|>",
    after="<|tool_calls_section_end|>",
    separator="",
    call=("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    loose=("<|tool_call_end|>",),
    alone="<|tool_call_begin|>",
    header=r"(<\|tool_call_begin\|>)?\s*(functions\.)?(?P<name>[^\s<]+?)(:\d+)?\s*(<\|tool_call_argument_begin\|>)?",
    tells=("<|tool_calls_section_begin|>", ("tool_declare", "<|im_middle|>")),
    id_layout="functions.{name}:{index}",
)
COMMAND_A = ToolFormat(
    name="command_a",
    begin="<|START_ACTION|>",
    before="[\n    ",
    after="\n]<|END_ACTION|>",
    separator=",\n    ",
    call=('{"tool_name": "', '", "parameters": ', "}"),
    tells=("<|START_ACTION|>",),
)
COMMAND_R = ToolFormat(
    name="command_r",
    begin="Action: ```json",
    others=("Action:```json",),
    before="\n[\n    ",
    after="\n]```",
    separator=",\n    ",
    call=('{"tool_name": "', '", "parameters": ', "}"),
    tells=(("Action:", "tool_name"),),
)
GLM4 = ToolFormat(
    name="glm4",
    call=("", "\n", ""),
    header=r"(?P<name>\S+)[ \t]*\n",
    is_bare=True,
    loose=("<|assistant|>", "<|observation|>"),
    tells=("<|observation|>",),
)
OLMO3 = ToolFormat(
    name="olmo3",
    begin="<function_calls>",
    before="\n",
    after="\n</function_calls>",
    call=("", "(", ")"),
    literal=("=", '"'),
    tells=("<function_calls>",),
)
LFM2 = ToolFormat(
    name="lfm2",
    begin="<|tool_call_start|>",
    before="[",
    after="]<|tool_call_end|>",
    separator=", ",
    call=("", "(", ")"),
    literal=("=", '"'),
    tells=("<|tool_call_start|>", "<|tool_list_start|>"),
)
PYTHONIC = ToolFormat(
    name="pythonic",
    others=("<|python_start|>", "<|python_tag|>"),
    before="[",
    after="]",
    separator=", ",
    call=("", "(", ")"),
    literal=("=", '"'),
    is_bare=True,
    loose=("<|python_end|>",),
    tells=("func_name1(params_name1",),
)
LLAMA4 = ToolFormat(
    name="llama4_json",
    begin="<|python_start|>",
    after="<|python_end|>",
    separator="; ",
    call=('{"name": "', '", "parameters": ', "}"),
    is_bare=True,
    tells=("<|python_start|>",),
)
PHI4_MINI = ToolFormat(
    name="phi4_mini",
    begin="<|tool_call|>",
    others=("functools",),
    before="[",
    after="]<|/tool_call|>",
    separator=", ",
    tells=("<|tool|>",),
)
GRANITE = ToolFormat(
    name="granite",
    begin="<|tool_call|>",
    others=("<tool_call>", "<function_call>"),
    before="[",
    after="]",
    separator=", ",
    tells=("<|tool_call|>", "<function_call>"),
)
JAMBA = ToolFormat(
    name="jamba",
    begin="<tool_calls>",
    others=("<tool_call>",),
    loose=("</tool_call>",),
    before="[\n    ",
    after="\n]</tool_calls>",
    separator=",\n    ",
    tells=("<tool_calls>",),
)
INTERNLM = ToolFormat(
    name="internlm",
    begin="<|action_start|><|plugin|>",
    before="\n",
    after="<|action_end|>",
    begins_each=True,
    call=('{"name": "', '", "parameters": ', "}"),
    tells=("<|action_start|>",),
)
MINIMAX_M2 = ToolFormat(
    name="minimax_m2",
    begin="<minimax:tool_call>",
    before="\n",
    after="</minimax:tool_call>",
    separator="",
    call=('<invoke name="', '">\n', "</invoke>\n"),
    alone='<invoke name="',
    parameter=('<parameter name="', '">', "</parameter>\n"),
    tells=("<minimax:tool_call>",),
)
SEED_OSS = ToolFormat(
    name="seed_oss",
    begin="<seed:tool_call>",
    before="\n",
    after="\n</seed:tool_call>",
    begins_each=True,
    call=("<function=", ">\n", "</function>"),
    alone="<function=",
    parameter=("<parameter=", ">", "</parameter>\n"),
    tells=("<seed:tool_call>",),
)
FUNCTION_GEMMA = ToolFormat(
    name="functiongemma",
    begin="<start_function_call>",
    after="<end_function_call>",
    separator="",
    begins_each=True,
    call=("call:", "{", "}"),
    literal=(":", "<escape>"),
    tells=("<start_function_call>",),
)
GEMMA4 = ToolFormat(
    name="gemma4",
    begin="<|tool_call>",
    after="<tool_call|>",
    separator="",
    begins_each=True,
    call=("call:", "{", "}"),
    literal=(":", '<|"|>'),
    tells=("<|tool_call>",),
)
APERTUS = ToolFormat(
    name="apertus",
    begin="<|tools_prefix|>",
    before="[",
    after="]<|tools_suffix|>",
    separator=", ",
    call=('{"', '": ', "}"),
    loose=("}",),
    header=r'"(?P<name>[^"]+)"\s*:',
    tells=("<|tools_prefix|>",),
)
LONGCAT = ToolFormat(
    name="longcat",
    begin="<longcat_tool_call>",
    before="\n",
    after="\n</longcat_tool_call>",
    begins_each=True,
    tells=("<longcat_tool_call>",),
)
JSON = ToolFormat(name="json", is_bare=True)

ALL = (
    *(SEED_OSS, MINIMAX_M2, DEEPSEEK_V32, QWEN3_CODER, GLM45, LONGCAT, APERTUS, GEMMA4, FUNCTION_GEMMA, LFM2, OLMO3),
    *(COMMAND_A, KIMI_K2, DEEPSEEK_V3, DEEPSEEK_V31, INTERNLM, JAMBA, HERMES, PHI4_MINI, GRANITE, GLM4, PYTHONIC),
    *(LLAMA4, LLAMA3, MISTRAL_ARGS, MISTRAL, NEMOTRON, COMMAND_R, JSON),
)
"""In the order in which they are looked for: those first whose texts templates of others do not have."""
FORMATS = {each.name: each for each in ALL}


def recognized(template: str) -> ToolFormat:
    """The first format that a chat template tells of; plain JSON if it tells of none."""

    def tells(tell: str | tuple[str, ...]) -> bool:
        return all(text in template for text in ((tell,) if isinstance(tell, str) else tell))

    return next((each for each in ALL if any(map(tells, each.tells))), JSON)
