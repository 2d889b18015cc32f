"""The fields about tools, and what they mean for an answer: what to look for in it, and a grammar for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai.fields import Arguments
from slipstream.server.preparing.prepared import Limits, Structure
from slipstream.server.schema_form import require_well_formed
from slipstream.server.structured import after_reasoning
from slipstream.server.text import Tokenizer
from slipstream.server.tools import reasoning
from slipstream.server.tools.answer import Speech
from slipstream.server.tools.formats import FORMATS, ToolFormat, recognized
from slipstream.server.tools.grammar import Tool, calls_grammar
from slipstream.server.tools.tagged import kinds_of_arguments

NAME = re.compile(r"[\w.:-]{1,128}", re.ASCII)
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
ALLOWED_TOOLS = "allowed_tools"
SAME_CHOICES = {"any": "required"}
"""What Mistral's clients call a choice."""
FIELDS = {False: ("tools", "tool_choice"), True: ("functions", "function_call")}
"""The names of the fields of tools and of the choice among them, by whether these are called functions."""
Mode = Literal["none", "auto", "required"]


class CalledFunction(Body):
    name: str
    arguments: Arguments | None = None
    parsed_arguments: Any = None
    """What the OpenAI client has made of them; it sends it back with the message."""


class ToolCall(Body):
    """A call in the history."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = None


class ToolFields(Body):
    tools: list[dict[str, Any]] | None = Field(None, max_length=256, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = Field(None, max_length=256, fail_fast=True)
    """Tools as chats had them first: each alone, without a type, and an answer calls one of them at most."""
    function_call: str | dict[str, Any] | None = None
    """Which of them is to be called."""

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools, by whichever name they came."""
        return self.tools or [{"type": "function", "function": function} for function in self.functions or ()]

    @property
    def choice(self) -> str | dict[str, Any] | None:
        return self.function_call if self.functions else self.tool_choice

    @model_validator(mode="after")
    def _check_functions(self) -> ToolFields:
        if self.functions and (self.tools or self.tool_choice is not None):
            raise InvalidRequestError(
                "functions and function_call are older names of tools and tool_choice; send only one kind",
                param="functions",
            )
        if self.function_call not in (None, "none") and not self.functions:
            raise wrong("function_call", "it needs functions")
        return self


@dataclass(frozen=True)
class ToolUse:
    mode: Mode
    tools: list[Tool]
    """Those that may be called."""
    parallel: bool = True
    """Whether an answer may have several calls; not where the client has named the function that is to be called."""
    as_functions: bool = False
    """Whether the request calls them functions, and wants to be told of a call in that form."""

    @property
    def fields(self) -> tuple[str, str]:
        """The names of the fields of the tools, and of the choice among them."""
        return FIELDS[self.as_functions]


def tool_use(body: ToolFields) -> ToolUse:
    """Raises InvalidRequestError."""
    as_functions, choice = bool(body.functions), body.choice
    field, param = FIELDS[as_functions]
    read = read_function if as_functions else read_tool
    tools = [read(tool, f"{field}.{index}") for index, tool in enumerate(body.functions or body.tools or ())]
    parallel = body.parallel_tool_calls is not False and not as_functions
    if isinstance(choice, str):
        choice = SAME_CHOICES.get(choice, choice)
        if choice not in ("none", "auto", "required"):
            raise wrong(param, f"none, auto, required, or a function, not {choice!r}")
        mode: Mode = choice  # type: ignore[assignment]  # it is one of them
    elif choice is None:
        mode = "auto" if tools else "none"
    else:
        mode, tools = read_choice(choice, tools, param)
        parallel = parallel and choice.get("type") == ALLOWED_TOOLS
    if mode == "required" and not tools:
        raise wrong(param, "it needs tools")
    return ToolUse(mode if tools else "none", tools, parallel, as_functions)


def read_tool(tool: dict[str, Any], param: str) -> Tool:
    if tool.get("type", "function") != "function":
        raise InvalidRequestError(
            f"{param}.type: only functions are supported", param=f"{param}.type", code="unsupported_parameter"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{param}.function", "an object with a name is needed")
    return read_function(function, f"{param}.function")


def read_function(function: dict[str, Any], param: str) -> Tool:
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong(f"{param}.name", "1 to 128 letters, digits and ._:-")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{param}.parameters", "a JSON schema is needed")
    require_well_formed(parameters or NO_PARAMETERS, f"{param}.parameters", f"the tool {name}")
    return Tool(name, parameters or NO_PARAMETERS, function.get("strict") is True)


def read_choice(choice: dict[str, Any], tools: list[Tool], param: str) -> tuple[Mode, list[Tool]]:
    """A choice that names tools."""
    mode: Any = "required"
    named: Any = [choice]
    if choice.get("type") == ALLOWED_TOOLS:
        allowed = choice.get("allowed_tools", choice)
        mode, named = (allowed.get("mode", "auto"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
    names = [_name(each) for each in named] if isinstance(named, list) else []
    known = [tool.name for tool in tools]
    if mode not in ("auto", "required") or not names or not all(name in known for name in names):
        raise wrong(param, f"it has to name some of the tools: {', '.join(sorted(known)) or 'there are none'}")
    return mode, [tool for tool in tools if tool.name in names]


def _name(choice: Any) -> Any:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def wrong(param: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {message}", param=param)


def tool_format(limits: Limits, template: str) -> ToolFormat | None:
    """How the model calls tools; None if nobody is to look for calls."""
    if limits.tool_call_parser == "none":
        return None
    return recognized(template) if limits.tool_call_parser == "auto" else FORMATS[limits.tool_call_parser]


def plan_answer(
    limits: Limits,
    tokenizer: Tokenizer,
    template: str,
    prompt: str,
    use: ToolUse,
    structure: Structure | None,
    said: str = "",
    calls_before: int = 0,
) -> tuple[Speech | None, Structure | None]:
    """What is to be looked for in the answer to a prompt, and what it is to look like.

    ``template`` is the text of the chat template; ``structure`` what the request asks of the answer itself,
    ``said`` what the assistant has said already where the answer goes on from there, ``calls_before`` how many calls
    the conversation has.
    """
    tools_field, choice_field = use.fields
    form = tool_format(limits, template) if use.mode != "none" else None
    if form is None and use.mode != "none":
        raise InvalidRequestError(
            "tools are not supported by this server (--tool-call-parser none)",
            param=tools_field,
            code="unsupported_parameter",
        )
    tags_name = reasoning.recognized(template) if limits.reasoning_parser == "auto" else limits.reasoning_parser
    tags = reasoning.TAGS.get(tags_name or "")
    is_open = reasoning.is_open(tags, prompt, said) if tags else None
    if form is None and tags is None:
        return None, structure

    by_grammar = form is not None and bool(
        use.mode == "required" or structure or not use.parallel or any(t.strict for t in use.tools)
    )
    if form is not None and by_grammar:
        param = choice_field if use.mode == "required" else tools_field
        grammar = calls_grammar(
            form,
            use.tools,
            tokenizer.symbols,
            answer=None if use.mode == "required" else structure.grammar if structure else "",
            parallel=use.parallel,
            param=param,
        )
        # A call whose arguments were shortened would be carried out: it is cut off, so that none is found.
        structure = Structure(grammar, param, ends_in_time=False)
    if tags is not None and structure is not None and is_open is not False:
        begin, end = tokenizer.symbols(tags.begin), tokenizer.symbols(tags.end)
        structure = replace(structure, grammar=after_reasoning(structure.grammar, begin, end, bool(is_open)))
    markers = [tags.begin, tags.end, *tags.around_answers] if tags else []
    markers += [*form.begins, form.after.strip(), *form.call, *form.loose, *(form.literal or ())] if form else []
    return (
        Speech(
            tool_format=form.name if form else None,
            tool_names=tuple(tool.name for tool in use.tools) if form else (),
            kinds={each.name: kinds_of_arguments(each.parameters) for each in use.tools}
            if form and form.parameter
            else {},
            most_calls=None if use.parallel else 1,
            reasoning=tags_name if tags else None,
            is_open=is_open,
            by_grammar=by_grammar,
            calls_before=calls_before,
            as_functions=use.as_functions,
            keeps_special=any("<[" in tokenizer.symbols(marker) for marker in markers if marker),
        ),
        structure,
    )
