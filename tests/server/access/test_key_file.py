"""Keys in a file: what stands there, what a broken one does, and that changes count without a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slipstream.engine.errors import ConfigError
from slipstream.server.access.account import UsageLimits
from slipstream.server.access.gate import key_ring
from slipstream.server.access.keys import KeyRing, digest
from slipstream.server.access.principal import Principal, RequestLimits
from slipstream.server.commands.cli import app
from slipstream.server.config import ServerConfig


def entry(name: str, secret: str, *more: str) -> str:
    return "\n".join(["[[key]]", f'name = "{name}"', f'hash = "sha256:{digest(secret.encode()).hex()}"', *more, ""])


def ring_of(path: Path, *texts: str, **options: Any) -> KeyRing:
    path.write_text("\n".join(texts))
    return key_ring(ServerConfig(keys_file=str(path), **options))


def holder(ring: KeyRing, secret: str) -> Principal:
    found = ring.holder(secret.encode())
    assert found is not None
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_what_a_key_may(file: Path) -> None:
    limits = "requests_per_minute = 60", "max_n = 3", "most_urgent_priority = -5", "weight = 2.5"
    ring = ring_of(
        file,
        "[defaults]\nmax_concurrent = 7\nmax_n = 2\n",
        entry("acme", "one", *limits),
        entry("acme", "two", *limits),
        entry("globex", "three"),
        entry("root", "four", 'role = "admin"'),
        max_n=9,
        max_logprobs=4,
    )
    acme, globex, root = (holder(ring, secret) for secret in ("one", "three", "four"))
    assert (acme.key, acme.role, acme.tenant("bob")) == ("acme", "user", "acme/bob")
    assert acme.limits == RequestLimits(max_n=3, max_logprobs=4, most_urgent_priority=-5)
    assert acme.account.limits == UsageLimits(requests_per_minute=60, max_concurrent=7, weight=2.5)
    assert holder(ring, "two").account is acme.account
    assert globex.limits.max_n == 2 and globex.account.limits == UsageLimits(max_concurrent=7)
    assert root.role == "admin" and ring.asks and ring.has_admins
    assert ring.holder(b"five") is None


def test_one_key_alone_in_a_file_has_a_name(file: Path) -> None:
    """Else tenants would be called otherwise once there is a second one."""
    assert holder(ring_of(file, entry("acme", "one")), "one").tenant("bob") == "acme/bob"
    ring = ring_of(file, entry("acme", "one"), api_key=("other=two",))
    assert (holder(ring, "one").key, holder(ring, "two").key) == ("acme", "other")


def test_an_empty_file_lets_nobody_in(file: Path) -> None:
    assert ring_of(file).asks


SECRET = "sk-very-secret"
BROKEN = {
    "no TOML": f'[[key]]\nname = "acme"\nhash = {SECRET}',
    "no hash": f'[[key]]\nname = "acme"\nhash = "{SECRET}"',
    "no name": '[[key]]\nhash = "sha256:' + "0" * 64 + '"',
    "a name with a slash": entry("a/b", "one"),
    "a role that there is not": entry("acme", "one", 'role = "owner"'),
    "a limit that there is not": entry("acme", "one", "request_per_minute = 5"),
    "a limit that is no number": entry("acme", "one", f'max_n = "{SECRET}"'),
    "a limit that is none": entry("acme", "one", "max_n = 0"),
    "a boolean": entry("acme", "one", "max_concurrent = true"),
    "a key of two": entry("acme", "one") + entry("globex", "one"),
    "a key of both doors": entry("acme", "one") + entry("acme", "one", 'role = "admin"'),
    "one name with two limits": entry("acme", "one") + entry("acme", "two", "max_n = 5"),
    "something else": entry("acme", "one") + "[[keys]]\n",
    "a number without end": entry("acme", "one", "max_n = " + "1" * 5000),
    "brackets without end": "key = " + "[" * 5000,
    "a table": '[key]\nname = "acme"\n',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_starts_no_server_and_changes_nothing(
    file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="--keys-file") as caught:
        ring_of(file, text)
    assert SECRET not in str(caught.value)
    ring = ring_of(file, entry("acme", "one"))
    file.write_text(text)
    assert not ring.refresh(anyway=True)
    assert holder(ring, "one").key == "acme"
    assert SECRET not in caplog.text and "go on to count" in caplog.text


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        key_ring(ServerConfig(keys_file=str(file)))
    ring = ring_of(file, entry("acme", "one"))
    file.unlink()
    assert not ring.refresh() and holder(ring, "one").key == "acme"


def test_a_file_that_could_not_be_read_for_a_while_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a key that was taken away would be good until the next change."""
    ring = ring_of(file, entry("acme", "one"))
    file.write_text(entry("acme", "other"))

    def fails(path: Path, mode: str) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "open", fails)
        assert not ring.refresh() and not ring.refresh()
    assert caplog.text.count("go on to count") == 1
    assert ring.refresh() and ring.holder(b"one") is None


def test_changes_count_at_once_and_accounts_live_on(file: Path) -> None:
    ring = ring_of(file, entry("acme", "one", "requests_per_minute = 2"), entry("globex", "two"))
    account = holder(ring, "one").account
    account.begin_request()
    assert not ring.refresh()
    fresh = file.with_suffix(".new")
    fresh.write_text(entry("acme", "fresh", "requests_per_minute = 3"))
    fresh.replace(file)
    assert ring.refresh() and not ring.refresh()
    assert ring.holder(b"one") is None and ring.holder(b"two") is None
    assert holder(ring, "fresh").account is account and account.limits.requests_per_minute == 3
    assert dict(account.headers())[b"x-ratelimit-remaining-requests"] == b"2"


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,10}", fullmatch=True)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(st.tuples(NAMES, st.sampled_from(["user", "admin"])), min_size=1, max_size=5, unique=True))
def test_keys_that_the_command_makes_open_what_they_should(file: Path, keys: list[tuple[str, str]]) -> None:
    file.unlink(missing_ok=True)
    made = []
    for name, role in keys:
        done = CliRunner().invoke(
            app, ["keys", "new", "--file", str(file), "--role", role, "--weight", "2", "--", name]
        )
        assert done.exit_code == 0, done.output
        made.append(done.output.strip())
    assert file.stat().st_mode & 0o777 == 0o600
    ring = key_ring(ServerConfig(keys_file=str(file)))
    for secret, (name, role) in zip(made, keys, strict=True):
        assert secret not in file.read_text()
        found = holder(ring, secret)
        assert (found.key, found.role, found.account.limits.weight) == (name, role, 2.0)


def test_what_the_commands_refuse_changes_no_file(file: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["keys", "new", "acme", "--file", str(file)]).exit_code == 0
    before = file.read_text()
    for wrong in (["a/b"], ["acme", "--role", "owner"], ["acme", "--max-n", "0"], ["acme", "--weight", "2"]):
        done = run(app, ["keys", "new", *wrong, "--file", str(file)])
        assert isinstance(done.exception, ConfigError), wrong
    assert file.read_text() == before and [found.name for found in file.parent.iterdir()] == [file.name]
    assert run(app, ["keys", "hash"], input="one\n").output.strip() == f"sha256:{digest(b'one').hex()}"
    assert isinstance(run(app, ["keys", "hash"], input="\n").exception, ConfigError)
