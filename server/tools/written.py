"""Calls of tools as text, as the models of a format write them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.literal import literal_call
from slipstream.server.tools.tagged import tagged_call


def written(form: ToolFormat, name: str, arguments: str) -> str:
    """One call, whose ``arguments`` are the text of a JSON object, without what stands around calls."""
    head, middle, tail = form.call
    if form.is_object or form.header:
        return head + name + middle + arguments + tail
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    values = found if isinstance(found, dict) else {}
    return tagged_call(form, name, values) if form.parameter else literal_call(form, name, values)


def all_written(form: ToolFormat, calls: Sequence[tuple[str, str]]) -> str:
    """The calls of an answer by name and arguments."""
    each = [written(form, name, arguments) for name, arguments in calls]
    if form.begins_each:
        return form.separator.join(form.begin + form.before + call + form.after for call in each)
    return form.begin + form.before + form.separator.join(each) + form.after
