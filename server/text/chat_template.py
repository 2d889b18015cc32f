"""Renders a conversation with a model's chat template, as transformers' apply_chat_template does.

Differences from it, all for requests in OpenAI's form:

- ``content`` may be a text or a list of text parts, whatever the template was written for. A template is tried with
  both once: parts are joined with newlines for one that takes texts only, a text becomes a list of one part for one
  that takes lists only, and everything else is passed through.
- ``tool_calls[].function.arguments`` is a JSON text in that API where templates expect an object, so it is parsed. Some
  clients leave it empty, or out, where a call has none; that is an empty object. What else templates want of calls is
  tried once (call_forms.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.defaults
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from slipstream.engine.errors import SlipstreamError
from slipstream.server.text.call_forms import CallForms, find_call_forms, with_objects

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients pass the reasoning of a message; templates read the first or the second."""
PROBE = "slipstream-probe"
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": "None.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "None."}}},
    },
}
MAY_BE_MISSING = ("tools", "documents")
CONTINUE_TAG = "slipstream-continue-here "
"""Marks where a message is to be continued. Ends in a space to tell whether the template strips contents."""


RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"raise_exception", "strftime_now", "namespace", *jinja2.defaults.DEFAULT_NAMESPACE}
    | {"self", "super", "loop", "caller", "varargs", "kwargs"}
)
"""What a request's variables must not hide: its own fields, the functions of templates, and Jinja's own names."""


class TemplateError(SlipstreamError):
    """A conversation cannot be rendered: the template refuses it or is wrong. The message is for the caller."""


class ChatTemplate:
    """A compiled chat template with the special tokens it may refer to (``bos_token``, ``eos_token``, …).

    ``source`` is one template or several by name, of which ``tool_use`` is taken for requests with tools and
    ``default`` otherwise. A broken one raises TemplateError only when it is to be rendered, or in ``check``.
    """

    def __init__(
        self,
        source: str | Mapping[str, str | TemplateError],
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "",
    ) -> None:
        """``origin`` says in messages where the templates come from; a TemplateError stands for one that is broken."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self.text = "\n".join(text for text in sources.values() if isinstance(text, str))
        """The sources of all of them, to see what they know."""
        default = sources.get("default")
        self.default = default if isinstance(default, str) else None
        """The source of that for conversations without tools."""
        self._templates = {name: _compile(text, name, origin) for name, text in sources.items()}
        self._special_tokens = dict(special_tokens or {})

    @property
    def broken(self) -> dict[str, TemplateError]:
        """What is wrong with templates that can never be rendered, by name."""
        return {name: each for name, each in self._templates.items() if isinstance(each, TemplateError)}

    def check(self) -> ChatTemplate:
        """Itself; raises TemplateError if one of the templates is broken."""
        for error in self.broken.values():
            raise error
        return self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, special tokens included: encode it with ``add_special_tokens=False``.

        ``variables`` are visible to the template and override the special tokens. A mapping and not keywords, because
        their names come from outside. Raises TemplateError.
        """
        if not messages:
            raise TemplateError("messages is empty; a conversation needs at least one message")
        if continue_final_message and add_generation_prompt:
            raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        chat = [self._message(message, index) for index, message in enumerate(messages)]
        if any(message.get("tool_calls") for message in chat):
            chat = self._call_forms.shown(chat)
        final_text = self._mark_end(chat[-1]) if continue_final_message else ""
        request = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        rendered = self._render_calls(name, chat, dict(variables or {}) | request)
        return _cut_at_tag(rendered, final_text) if continue_final_message else rendered

    def texts_after_answer(self) -> list[str]:
        """What the templates write right after the content of an assistant message, as far as they tell."""
        return list(dict.fromkeys(filter(None, map(self._text_after_answer, self._templates))))

    def _text_after_answer(self, name: str) -> str:
        chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": CONTINUE_TAG.strip()}]
        variables = {"tools": None, "documents": None, "add_generation_prompt": False}
        try:
            rendered = self._render(name, [self._message(message, 0) for message in chat], variables)
        except TemplateError:
            return ""
        return rendered.rpartition(CONTINUE_TAG.strip())[2]

    def _render_calls(self, name: str, chat: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """As ``_render``; a call whose arguments are no object refuses no conversation: a model has written them."""
        try:
            return self._render(name, chat, variables)
        except TemplateError:
            if self._call_forms.has_text_arguments or (whole := with_objects(chat)) == chat:
                raise
            return self._render(name, whole, variables)

    @cached_property
    def _call_forms(self) -> CallForms:
        name = "tool_use" if "tool_use" in self._templates else "default"

        def render(chat: list[dict[str, Any]]) -> str | None:
            variables = {"tools": [PROBE_TOOL], "documents": None, "add_generation_prompt": True}
            try:
                return self._render(name, chat, variables)
            except TemplateError:
                return None

        return find_call_forms(render)

    def _render(self, name: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        template = self._templates.get(name)
        if template is None:
            raise TemplateError(f"the model has the chat templates {sorted(self._templates)} but none called {name!r}")
        if isinstance(template, TemplateError):
            raise template
        given = self._special_tokens | variables | {"messages": messages}
        try:
            return template.render(given)
        except TemplateError:
            raise
        except Exception as error:  # whatever a template does wrong
            # Some ask whether there are tools by "is defined", and go through them.
            without = {key: value for key, value in given.items() if value is not None or key not in MAY_BE_MISSING}
            if len(without) < len(given):
                with suppress(Exception):
                    return template.render(without)
            raise TemplateError(f"the chat template cannot render this conversation: {error}") from error

    def _message(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A copy in the form the template expects. Templates test for missing keys, so those without value go."""
        copy = {key: value for key, value in message.items() if value is not None}
        if "content" in copy:
            copy["content"] = self._content(copy["content"], index)
        if "tool_calls" in copy:
            copy["tool_calls"] = [_parse_arguments(call) for call in copy["tool_calls"]]
        reasoning = next((copy[field] for field in REASONING_FIELDS if field in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning} | copy | {"reasoning_content": reasoning}
        return copy

    def _content(self, content: Any, index: int) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._content_forms == {"list"} else content
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise TemplateError(
                    f"messages[{index}].content has a part of type {kind!r}; only text parts can be used"
                )
            texts.append(part["text"])
        return list(content) if "list" in self._content_forms else "\n".join(texts)

    @cached_property
    def _content_forms(self) -> set[str]:
        """Which forms of ``content`` come out readable: "string", "list"."""
        forms: dict[str, Any] = {"string": PROBE, "list": [{"type": "text", "text": PROBE}]}
        return {form for form, content in forms.items() if self._shows(content)}

    def _shows(self, content: Any) -> bool:
        name = "default" if "default" in self._templates else next(iter(self._templates), "")
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            rendered = self._render(name, [{"role": "user", "content": content}], variables)
        except TemplateError:
            return False
        printed = any(
            f"{quote}text{quote}: {quote}{PROBE}" in rendered for quote in "'\""
        )  # the list as Python or JSON
        return PROBE in rendered and not printed

    @cached_property
    def shows_tools(self) -> bool:
        """Whether tools come out readable; also where that cannot be seen, because they need more than these have."""
        name = "tool_use" if "tool_use" in self._templates else "default"
        variables = {"tools": [PROBE_TOOL], "documents": None, "add_generation_prompt": True}
        try:
            return PROBE in self._render(name, [self._message({"role": "user", "content": "a"}, 0)], variables)
        except TemplateError:
            return "tools" in self.text

    @cached_property
    def shows_system(self) -> bool:
        """Whether the system's message comes out readable: some templates refuse it."""
        return self._shows_role("system", before=(), after=("user",))

    @cached_property
    def shows_results(self) -> bool:
        """Whether messages of the role ``tool`` come out readable: templates may refuse them, or leave them out."""
        return self._shows_role("tool", before=("user", "assistant"), after=())

    def _shows_role(self, role: str, before: Sequence[str], after: Sequence[str]) -> bool:
        chat = [{"role": each, "content": PROBE if each == role else "a"} for each in (*before, role, *after)]
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return PROBE in self._render("default", [self._message(message, 0) for message in chat], variables)
        except TemplateError:
            return False

    def _mark_end(self, message: dict[str, Any]) -> str:
        """Appends the tag to the text of the message and returns the text as it was."""
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = content + CONTINUE_TAG
            return content
        if content:
            *before, last = content
            message["content"] = [*before, {**last, "text": last["text"] + CONTINUE_TAG}]
            return str(last["text"])
        raise TemplateError("continue_final_message is set, but the final message has no text to continue")


def _cut_at_tag(rendered: str, final_text: str) -> str:
    before, tag, after = rendered.rpartition(CONTINUE_TAG.strip())
    if not tag or final_text.strip() not in before:
        raise TemplateError(
            "continue_final_message is set, but the chat template does not show the final message as it is"
        )
    return before if after.startswith(" ") else before.rstrip()


def _parse_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(written := function.get("arguments") or "{}", str):
        return call
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        return call  # what a model once wrote may not be JSON; the template gets it as it is
    return {**call, "function": {**function, "arguments": arguments}}


def _compile(source: str | TemplateError, name: str, origin: str) -> jinja2.Template | TemplateError:
    if isinstance(source, TemplateError):
        return source
    what = f"the chat template {name!r}" + (f" of {origin}" if origin else "")
    try:
        return _environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        return TemplateError(f"{what} is not valid Jinja: {error.message} (line {error.lineno})")
    except RecursionError:
        return TemplateError(f"{what} is nested too deeply")
    except Exception as error:  # Jinja lets some of Python's through: numbers with too many digits, say
        return TemplateError(f"{what} is not valid Jinja: {error}")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's text for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, through which a template could reach the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        _refuse_private(dict(*args[1:], **kwargs))
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private([name])
        super().__setitem__(name, value)


def _refuse_private(names: Any) -> None:
    for name in names:
        if str(name).startswith("_"):
            raise TemplateError(f"a chat template cannot set the attribute {name!r} of a namespace")


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's filter this does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment


_environment = _make_environment()
