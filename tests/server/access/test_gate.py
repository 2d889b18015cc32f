"""Who may come in, without a server: the layers around an application that says whom it sees."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.engine.errors import ConfigError
from slipstream.server.access.gate import guarded, key_ring
from slipstream.server.access.keys import KeyRing, Keys
from slipstream.server.access.principal import Principal, RequestLimits, principal_of
from slipstream.server.config import ServerConfig
from slipstream.server.http.headers import ONCE
from slipstream.server.telemetry.metrics import Metrics

LOCAL = ServerConfig()
CONTAINER = ServerConfig(host="0.0.0.0")
KEYED = ServerConfig(api_key=("a-key",))
METRICS = Metrics("tiny")
STATUS = "/admin/v1/status"
JSON = ("content-type", "application/json")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": principal_of(scope).tenant("bob").encode()})


class Reply:
    def __init__(self, messages: list[Any]) -> None:
        self.status = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message["body"] for message in messages[1:])

    @property
    def code(self) -> Any:
        return self.status if self.status == 200 else json.loads(self.body)["error"]["code"]


async def ask(
    config: ServerConfig,
    *headers: tuple[str, str],
    path: str = "/v1/completions",
    method: str = "POST",
    client: str = "127.0.0.1",
    application: ASGIApp = app,
) -> Reply:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("nobody reads the body here")

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": (client, 5)}
    await guarded(application, config, key_ring(config), METRICS)(scope, receive, send)
    return Reply(messages)


# Headers sent twice ---------------------------------------------------------------------------------------------------

text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)


@given(name=st.sampled_from(sorted(ONCE)), values=st.lists(text, min_size=2, max_size=3), config=st.just(KEYED))
async def test_no_header_is_read_in_one_of_its_copies(name: str, values: list[str], config: ServerConfig) -> None:
    """Whatever the copies say: which one counts must not depend on who reads it."""
    reply = await ask(config, *((name, value) for value in values))
    assert (reply.status, reply.code) == (400, "repeated_header")
    assert json.loads(reply.body)["error"]["param"] == name


async def test_a_key_sent_twice_opens_nothing() -> None:
    assert (await ask(KEYED, ("authorization", "Bearer a-key"))).status == 200
    two = (("authorization", "Bearer wrong"), ("authorization", "Bearer a-key"))
    assert (await ask(KEYED, *two)).status == (await ask(KEYED, *two[::-1])).status == 400


# Web pages ------------------------------------------------------------------------------------------------------------

labels = st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", fullmatch=True)
names = st.lists(labels, min_size=2, max_size=3).map(".".join).filter(lambda name: not name.endswith("localhost"))
ports = st.sampled_from(["", ":80", ":8000", ":443"])
schemes = st.sampled_from(["http", "https"])
LOOPBACK = ("localhost", "LOCALHOST", "localhost.", "x.localhost", "127.0.0.1", "127.8.9.1", "[::1]")


@given(name=names, port=ports, path=st.sampled_from(["/v1/models", "/v1/completions", "/dashboard", "/health"]))
async def test_a_local_server_answers_to_its_own_names_only(name: str, port: str, path: str) -> None:
    """DNS rebinding: a page's own name was made to lead to this machine."""
    for method in ("GET", "POST"):
        reply = await ask(LOCAL, ("host", name + port), path=path, method=method)
        assert (reply.status, reply.code) == (403, "host_not_allowed")
        page = ("origin", f"http://{name}{port}")
        assert (await ask(LOCAL, ("host", name + port), page, path=path, method=method)).status == 403
    allowed = ServerConfig(allowed_host=(name.upper(),))
    assert (await ask(allowed, ("host", name + port))).status == 200
    assert (await ask(allowed, ("host", f"{name}.example{port}"))).status == 403
    assert (await ask(ServerConfig(allowed_host=("*",)), ("host", name + port))).status == 200
    assert (await ask(CONTAINER, ("host", name + port))).status == 200, "a program that calls a server by a name"
    assert (await ask(KEYED, ("host", name + port), ("authorization", "Bearer a-key"))).status == 200


@given(name=st.sampled_from(LOOPBACK), port=ports)
async def test_names_of_the_machine_itself_need_no_option(name: str, port: str) -> None:
    assert (await ask(LOCAL, ("host", name + port))).status == 200
    assert (await ask(LOCAL, ("host", name + port), ("origin", f"http://{name}{port}"), JSON)).status == 200
    assert (await ask(ServerConfig(host="localhost"))).status == 200, "an old program without Host"


ORIGINS = st.one_of(
    st.just("null"),
    st.builds(lambda scheme, name, port: f"{scheme}://{name}{port}", schemes, names, ports),
    st.sampled_from(["http://localhost:3000", "http://127.0.0.1", "https://127.0.0.1:8000.evil.example", "file://"]),
    st.sampled_from(["vscode-webview://abc", "chrome-extension://abc", "", "http://", "127.0.0.1:8000"]),
)


@given(origin=ORIGINS, config=st.sampled_from([LOCAL, CONTAINER, KEYED]))
async def test_pages_of_others_are_refused_unless_an_option_lets_them(origin: str, config: ServerConfig) -> None:
    key = ("authorization", "Bearer a-key")
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/completions")):
        reply = await ask(config, ("host", "127.0.0.1:8000"), ("origin", origin), key, method=method, path=path)
        assert (reply.status, reply.code) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers


@given(scheme=schemes, name=names, port=ports, keyed=st.booleans())
async def test_allowed_pages_get_what_browsers_ask_for(scheme: str, name: str, port: str, keyed: bool) -> None:
    origin = f"{scheme}://{name}{port}"
    config = ServerConfig(allowed_origin=("https://other.example", origin + "/"), api_key=("a-key",) if keyed else ())
    page = (("host", "localhost:8000"), ("origin", origin))
    asked = ("access-control-request-headers", "authorization,content-type,x-stainless-os")
    reply = await ask(config, *page, ("access-control-request-method", "POST"), asked, method="OPTIONS")
    assert reply.status == 200, "a preflight carries no key"
    assert reply.headers["access-control-allow-origin"] == origin
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == asked[1]
    for sent, status in (("Bearer a-key", 200), ("Bearer wrong", 401 if keyed else 200)):
        reply = await ask(config, *page, JSON, ("authorization", sent))
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == origin and "Origin" in reply.headers["vary"]
        exposed = reply.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "request-id"} <= set(exposed), "clients in a page show them with errors"
    assert (await ask(config, page[0], ("origin", f"{scheme}://not-{name}{port}"))).status == 403


async def test_an_allowed_origin_may_be_written_in_capitals() -> None:
    config = ServerConfig(allowed_origin=("https://Chat.Example/",))
    reply = await ask(config, ("host", "localhost:8000"), ("origin", "https://chat.example"), JSON)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://chat.example")


async def test_pages_may_use_the_methods_of_routes_and_are_told_so() -> None:
    page = (("host", "localhost:8000"), ("origin", "https://chat.example"))
    config = ServerConfig(allowed_origin=("https://chat.example",))
    for method in ("DELETE", "GET", "POST"):
        reply = await ask(config, *page, ("access-control-request-method", method), method="OPTIONS")
        assert reply.status == 200 and method in reply.headers["access-control-allow-methods"].split(", ")
    reply = await ask(config, *page, ("access-control-request-method", "PUT"), method="OPTIONS")
    assert (reply.status, reply.code, reply.headers["content-type"]) == (400, "invalid_value", "application/json")


@given(name=names, port=ports, scheme=schemes)
async def test_pages_of_a_server_for_others(name: str, port: str, scheme: str) -> None:
    """Its own pages under an address, or a name it was told; under any other name they may be of a rebound one."""
    page = (("host", name + port), ("origin", f"{scheme}://{name}{port}"), JSON)
    assert (await ask(CONTAINER, *page)).status == 403
    assert (await ask(ServerConfig(host="0.0.0.0", allowed_host=(name,)), *page)).status == 200
    assert (await ask(KEYED, *page, ("authorization", "Bearer a-key"))).status == 200
    for address in ("192.0.2.7", "[2001:db8::1]"):
        page = (("host", address + port), ("origin", f"{scheme}://{address}{port}"), JSON)
        assert (await ask(CONTAINER, *page)).status == 200
        named = ServerConfig(host="0.0.0.0", allowed_host=("gpu.lan",))
        assert (await ask(named, page[0])).status == 200, "probes use addresses"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_browser_without_an_origin(site: str) -> None:
    assert (await ask(LOCAL, ("sec-fetch-site", site), JSON)).code == "origin_not_allowed"
    assert (await ask(LOCAL, ("sec-fetch-site", site), method="GET", path="/dashboard")).status == 200, "a link"
    assert (await ask(LOCAL, ("sec-fetch-site", site), method="GET", path=STATUS)).code == "admin_key_required"


async def test_browsers_declare_their_bodies_and_programs_need_not() -> None:
    body, here = ("content-length", "9"), ("origin", "http://localhost")
    host = ("host", "localhost")
    assert (await ask(LOCAL, host, body)).status == 200
    assert (await ask(LOCAL, host, here, body)).status == 415
    assert (await ask(LOCAL, host, ("sec-fetch-site", "same-origin"), ("transfer-encoding", "chunked"))).status == 415
    assert (await ask(LOCAL, host, here, body, JSON)).status == 200


# The admin API --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "trusted"),
    [
        (LOCAL, True),
        (ServerConfig(host="::1"), True),
        (ServerConfig(host="localhost"), True),
        (CONTAINER, False),
        (ServerConfig(host="192.0.2.1"), False),
        (ServerConfig(behind_proxy=True), False),
        (KEYED, False),
    ],
)
async def test_loopback_is_trusted_where_only_its_owner_can_come_from_it(config: ServerConfig, trusted: bool) -> None:
    """A router on the same machine adds no header by which it is known."""
    reply = await ask(config, ("host", "127.0.0.1:8000"), path=STATUS, method="GET")
    assert reply.code == (200 if trusted else "admin_key_required")


@given(
    name=st.sampled_from(["forwarded", "via", "x-real-ip", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"])
    | st.from_regex(r"x-forwarded-[a-z]{1,8}", fullmatch=True),
    value=text,
)
async def test_a_proxy_that_says_so_is_not_trusted(name: str, value: str) -> None:
    reply = await ask(LOCAL, ("host", "127.0.0.1"), (name, value), path=STATUS, method="GET")
    assert reply.code == "admin_key_required"


# Tenants --------------------------------------------------------------------------------------------------------------

secrets = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="="), min_size=1, max_size=9)
key_names = st.from_regex(r"[A-Za-z0-9._-]{1,6}", fullmatch=True)
users = st.text(max_size=8) | st.sampled_from(["", "/", "a/b", "\0"])


@given(
    keys=st.lists(st.tuples(st.none() | key_names, secrets), min_size=2, max_size=4, unique_by=lambda key: key[1]),
    said=st.lists(st.tuples(st.integers(0, 3), users), min_size=2, max_size=6),
)
def test_no_key_can_name_the_tenant_of_another(keys: list[Any], said: list[tuple[int, str]]) -> None:
    found = ring(*(secret if name is None else f"{name}={secret}" for name, secret in keys))
    tenants: dict[str, tuple[Any, str]] = {}
    for number, user in said:
        name, secret = keys[number % len(keys)]
        holder = found.holder(secret.encode())
        assert holder is not None
        who = (name or secret, user)
        assert tenants.setdefault(holder.tenant(user), who) == who


async def test_the_gate_says_who_asks_and_what_he_may() -> None:
    seen: list[Principal] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(principal_of(scope))
        await app(scope, receive, send)

    limits = {"max_n": 3, "max_logprobs": -1, "most_urgent_priority": -7}
    config = ServerConfig(api_key=("acme=one", "globex=two"), admin_key=("root=three",), **limits)  # type: ignore[arg-type]
    for path, key in (("/v1/completions", "one"), ("/v1/completions", "two"), (STATUS, "three")):
        assert (await ask(config, ("authorization", f"Bearer {key}"), path=path, application=look)).status == 200
    assert [(found.key, found.role) for found in seen] == [("acme", "user"), ("globex", "user"), ("root", "admin")]
    assert {found.limits for found in seen} == {RequestLimits(**limits)}
    for path, key in (("/v1/completions", "three"), (STATUS, "one")):
        refused = await ask(config, ("authorization", f"Bearer {key}"), path=path, application=look)
        assert (refused.status, refused.code) == (403, "wrong_key")


def ring(*keys: str) -> KeyRing:
    return KeyRing(Keys(keys, "--api-key"), Keys([], "--admin-key", "admin"))


async def holder_of(config: ServerConfig, *headers: tuple[str, str]) -> str | int:
    """The tenant of a request with these headers, or the status of its refusal."""
    reply = await ask(config, *headers)
    return reply.body.decode() if reply.status == 200 else reply.status


async def test_names_of_tenants() -> None:
    assert await holder_of(ServerConfig(api_key=("sk-1",)), ("authorization", "Bearer sk-1")) == "bob"
    config = ServerConfig(api_key=("acme=new", "acme=old", "globex=third=x", "c2VjcmV0=="))
    for header in (("authorization", "Bearer new"), ("authorization", "bearer  old"), ("x-api-key", "new")):
        assert await holder_of(config, header) == "acme/bob"
    assert await holder_of(config, ("authorization", "Bearer third=x")) == "globex/bob"
    unnamed = await holder_of(config, ("authorization", "Bearer c2VjcmV0=="))
    assert str(unnamed).startswith("key-") and "c2VjcmV0" not in str(unnamed)
    for wrong in ("", "new", "Bearer", "Bearer ", "Bearer acme=new", "Basic new", "Bearer new, Bearer old"):
        assert await holder_of(config, ("authorization", wrong), ("x-api-key", "new")) == 401, wrong
    assert await holder_of(config) == 401
    alone = ring("acme=new", "acme=old").holder(b"old")
    assert alone == Principal(""), "keys of one name are one principal"
    third = ring("acme=new", "globex=third").holder(b"third")
    assert third is not None and (third.tenant("a/b"), third.tenant("")) == ("globex/a/b", "globex")
    assert ring().holder(b"x") is None


@given(secrets)
async def test_a_key_can_be_of_any_characters(secret: str) -> None:
    assume(secret.strip())
    config = ServerConfig(api_key=(secret, "näher à"))
    assert (await ask(config, ("authorization", f"Bearer {secret}"))).status == 200
    sent = "Bearer " + "näher à".encode().decode("latin-1")
    assert (await ask(config, ("authorization", sent))).status == 200


@given(secrets)
async def test_a_digest_stands_for_a_key_and_opens_nothing_itself(secret: str) -> None:
    hashed = f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    for config in (ServerConfig(api_key=(hashed,)), ServerConfig(api_key=(f"acme={hashed}", "other"))):
        assert (await ask(config, ("authorization", f"Bearer {secret}"))).status == 200
        assert (await ask(config, ("authorization", f"Bearer {hashed}"))).status == 401


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": ("a=secret", "b=secret")},
        {"api_key": ("a=secret",), "admin_key": ("secret",)},
        {"api_key": (" ",)},
        {"allowed_origin": ("chat.example",)},
        {"allowed_origin": ("https://chat.example/page",)},
        {"allowed_host": ("",)},
        {"most_urgent_priority": 1},
        {"most_urgent_priority": -1001},
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(options)).replace("_", "-") + "|--admin-key"):
        ServerConfig(**options)
