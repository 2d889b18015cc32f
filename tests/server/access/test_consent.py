"""What a request says about itself, in headers and in metadata: the strictest of it counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from slipstream.engine.messages import TrafficLevel
from slipstream.server.access.consent import LEVELS, Consent, Statement, read_statement
from slipstream.server.errors import InvalidRequestError


def said(
    headers: list[tuple[str, str]] | None = None,
    metadata: dict[str, Any] | None = None,
    user: str | None = None,
    silence: Consent = "opt-out",
) -> Statement:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers or []]
    return read_statement(Request({"type": "http", "headers": raw}), metadata, user, silence)


def refused(*arguments: Any, **fields: Any) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        said(*arguments, **fields)
    assert caught.value.param is not None and caught.value.param.split(".")[0] in caught.value.message
    return caught.value.param


levels = st.sampled_from(LEVELS)
spelled = st.tuples(levels, st.sampled_from([str.lower, str.upper, str.title]), st.sampled_from(["", " ", "\t"])).map(
    lambda parts: (parts[0], parts[2] + parts[1](parts[0]) + parts[2])
)


@given(
    headers=st.lists(st.lists(spelled, min_size=1, max_size=3), max_size=3),
    metadata=st.none() | spelled,
    most=levels,
    silence=st.sampled_from(["opt-in", "opt-out"]),
)
def test_the_strictest_word_counts(headers: list, metadata: Any, most: TrafficLevel, silence: Consent) -> None:
    sent = [("X-Slipstream-Traffic", ",".join(text for _, text in parts)) for parts in headers]
    meta = {"slipstream_traffic": metadata[1], "mine": 1} if metadata else None
    statement = said(sent, meta, silence=silence)
    words = [level for parts in headers for level, _ in parts] + ([metadata[0]] if metadata else [])
    if words:
        strictest = min(words, key=LEVELS.index)
        assert statement.level == strictest
        assert statement.kept(most) == min(strictest, most, key=LEVELS.index)
    else:
        assert statement.kept(most) == ("off" if silence == "opt-in" else most)
        assert statement.level == ("off" if silence == "opt-in" else None)


@given(st.lists(spelled, max_size=2), st.text(st.characters(max_codepoint=0xFF), max_size=8), st.randoms())
def test_a_word_that_means_nothing_is_refused_beside_others(good: list, bad: str, random: Any) -> None:
    values = [text for _, text in good] + [bad]
    random.shuffle(values)
    if all(part.strip().lower() in LEVELS for part in bad.strip(" \t").split(",")):
        return
    assert refused([("X-Slipstream-Traffic", value) for value in values]) == "X-Slipstream-Traffic"
    assert refused([], {"slipstream_traffic": bad + "?"}) == "metadata.slipstream_traffic"


@pytest.mark.parametrize(
    "name",
    ["Slipstream_Traffic", "slipstream-traffic", "X-Slipstream-Traffic", "slipstream_trafic", "x_slipstream_domain"],
)
def test_what_was_meant_for_us_is_not_lost_by_its_spelling(name: str) -> None:
    assert refused([], {name: "off"}) == "metadata"


def test_metadata_of_the_client_is_its_own() -> None:
    assert said([], {"traffic": "off", "my_slipstream": 5, "": None, "slipstream_domain": None}) == said()


@pytest.mark.parametrize("value", [5, True, [], {}, "x" * 513])
@pytest.mark.parametrize("key", ["slipstream_traffic", "slipstream_domain", "slipstream_tenant"])
def test_metadata_of_a_wrong_kind(key: str, value: Any) -> None:
    assert refused([], {key: value}) == f"metadata.{key}"


def test_domain_and_tenant() -> None:
    domain = ("X-Slipstream-Domain", "code/python")
    assert said([domain]).domain == said([], {"slipstream_domain": "code/python"}).domain == "code/python"
    assert said([domain], {"slipstream_domain": "code/python"}).domain == "code/python"
    assert refused([domain], {"slipstream_domain": "code"}) == "metadata.slipstream_domain"
    assert refused([], {"slipstream_domain": "a b"}) == "metadata.slipstream_domain"
    assert said([], {"slipstream_tenant": "bob"}).user == said([], {"slipstream_tenant": "bob"}, "bob").user == "bob"
    assert refused([], {"slipstream_tenant": "bob"}, "eve") == "metadata.slipstream_tenant"
