"""Calls of tools in the history, in the form in which a chat template takes them, which is found out by trying.

Templates differ: most join members of an object of arguments, DeepSeek's joins a text; some write a turn of its own for
the content that stands beside calls unless it is null, others fail on null; Mistral's take ids of nine characters only;
Llama's refuse a message with several calls, and that of gpt-oss leaves all but the first out.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from typing import Any

ID_CHARS = 9
SEEN = ("slipstream-first", "slipstream-second")
Message = dict[str, Any]


@dataclass(frozen=True)
class CallForms:
    has_short_ids: bool = False
    """Ids are of nine letters and digits."""
    has_text_arguments: bool = False
    """Arguments are JSON text, not an object."""
    silence: str | None = ""
    """The content of a message that has calls and says nothing besides."""
    has_one_call: bool = False
    """A message has one call at most, and its result follows."""

    def shown(self, chat: Sequence[Message]) -> list[Message]:
        """The messages in these forms; arguments are what JSON text was parsed to, where it is JSON."""
        chat = _one_by_one(chat) if self.has_one_call else chat
        found = [self._calling(message) if message.get("tool_calls") else message for message in chat]
        return _with_short_ids(found) if self.has_short_ids else found

    def _calling(self, message: Message) -> Message:
        calls = message["tool_calls"]
        if self.has_text_arguments:
            calls = [_with_arguments(call, _as_text) for call in calls]
        found = {**message, "tool_calls": calls}
        return found | {"content": self.silence} if message.get("content") == "" else found


def find_call_forms(render: Callable[[list[Message]], str | None]) -> CallForms:
    """The first forms in which a call and its result are rendered; ``render`` gives None for what is refused."""
    for short, text in product((False, True), (False, True)):
        rendered: dict[str | None, str] = {}
        for silence in ("", None):
            forms = CallForms(short, text, silence)
            found = render(forms.shown(_example(1)))
            if found is not None and found.count("None") <= rendered.get("", found).count("None"):  # else it is shown
                rendered[silence] = found
        if rendered:  # the shorter, if there are two: what is longer has a turn in which nothing is said
            forms = CallForms(short, text, min(rendered, key=lambda silence: len(rendered[silence])))
            single = replace(forms, has_one_call=True)
            return next((each for each in (forms, single) if _shows_both(render(each.shown(_example(2))))), forms)
    return CallForms()


def _shows_both(rendered: str | None) -> bool:
    return rendered is not None and all(text in rendered for text in SEEN)


def with_objects(chat: Sequence[Message]) -> list[Message]:
    """The messages with arguments that are objects, also of calls that a model has not finished."""
    return [
        {**message, "tool_calls": [_with_arguments(call, _as_object) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in chat
    ]


def _example(count: int) -> list[Message]:
    """A conversation with so many calls at once, one or two, and their results."""
    ids = [f"call_0123456789abcdefghijklm{number}" for number in range(count)]
    calls = [
        {"id": name, "type": "function", "function": {"name": "f", "arguments": {"x": said}}}
        for name, said in zip(ids, SEEN, strict=False)
    ]
    results = [{"role": "tool", "tool_call_id": name, "name": "f", "content": "z"} for name in ids]
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _one_by_one(chat: Sequence[Message]) -> list[Message]:
    """Several calls of a message become messages, each with its result behind it; the first says what was said."""
    found: list[Message] = []
    left = deque(chat)
    while left:
        message = left.popleft()
        calls = message.get("tool_calls") or []
        results: list[Message] = []
        while len(calls) > 1 and left and left[0]["role"] == "tool":
            results.append(left.popleft())
        for call in calls if len(calls) > 1 else ():
            found.append({**message, "tool_calls": [call]})
            message = {"role": "assistant", "content": ""}
            places = [at for at, each in enumerate(results) if each.get("tool_call_id") in (None, call.get("id"))]
            found += [results.pop(at) for at in places[:1]]
        found += results if len(calls) > 1 else [message]
    return found


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _with_short_ids(chat: Sequence[Message]) -> list[Message]:
    """Results without the id of a call are those of the calls before them, in their order."""
    found: list[Message] = []
    waiting: deque[str] = deque()
    for index, message in enumerate(chat):
        if calls := message.get("tool_calls"):
            named = [{**call, "id": _short(call.get("id") or f"{index}.{place}")} for place, call in enumerate(calls)]
            waiting = deque(call["id"] for call in named)
            found.append({**message, "tool_calls": named})
        elif message["role"] == "tool":
            said = message.get("tool_call_id")
            name = _short(said) if said or not waiting else waiting.popleft()
            if name in waiting:
                waiting.remove(name)
            found.append({**message, "tool_call_id": name})
        else:
            found.append(message)
    return found


def _short(name: Any) -> str:
    text = str(name)
    if len(text) == ID_CHARS and text.isascii() and text.isalnum():
        return text
    return blake2b(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_CHARS]
