"""The chart knows every option of `slipstream serve`; needs no helm."""

from __future__ import annotations

import json

import chart_options


def test_the_chart_knows_the_options_of_today() -> None:
    assert chart_options.SCHEMA.read_text() == chart_options.schema(), "run docker/helm/render.py"


def test_options_that_the_chart_sets_are_no_values() -> None:
    known = json.loads(chart_options.schema())["properties"]["options"]["properties"]
    assert "max-loras" in known
    assert not {name.replace("_", "-") for name in chart_options.SET_BY_CHART} & set(known)
