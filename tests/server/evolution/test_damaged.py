"""A damaged drafter version or registry: the server starts, serves and says so; the registry claims nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter import warm
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import DATABASE_FILE, Registry
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.launch import with_live_drafter


def test_a_damaged_live_version_is_passed_over(tmp_path: Path, start_server: Callable[..., Any]) -> None:
    registry = Registry(tmp_path / "registry")
    head, fingerprint = warm.read(EngineConfig()), served_fingerprint(EngineConfig())
    for target in (fingerprint, "of another model", fingerprint):
        registry.promote(registry.add(*head, target=target, origin="trained").version)
    good, foreign, damaged = 1, 2, 3
    manifest = registry.path(damaged) / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])

    server = start_server("--registry", str(registry.folder), "--speculation", "head").wait_until_ready()
    try:
        assert server.chat(max_tokens=5)["choices"][0]["message"]["content"]
        server.wait_until(lambda: registry.get(damaged).state == "rolled-back")
        assert "is no drafter manifest" in registry.history(damaged)[-1].reason
        # The one before it is sound: another server may be right for it.
        status = server.wait_until(
            lambda: (
                (found := server.get("/admin/v1/status")[1]["evolution"])["failed_swaps"] >= 2
                and found["routes"] == {"": good}  # a trial of what drafts for nobody is not begun, or given up
                and found
            )
        )
        assert registry.get(foreign).state == "live"
        assert status["registry"]["error"] is None
        server.wait_until_logged("version 2 does not fit the model", "drafter version 3 cannot serve")

        # While it runs, too: nothing is left that could serve.
        broken = registry.folder / DATABASE_FILE
        whole = broken.read_bytes()
        broken.write_bytes(b"rubbish" * 1000)
        server.wait_until(lambda: server.get("/admin/v1/status")[1]["evolution"]["registry"]["error"])
        server.wait_until(lambda: server.metric("drafter_registry_up") == 0)
        for method, path in (("GET", "/drafters"), ("GET", "/drafters/1"), ("POST", "/drafters/1/promote")):
            code, _, reply = server.request(method, f"/admin/v1{path}", b"{}", {"content-type": "application/json"})
            assert code == 503 and b'"code":"registry_unusable"' in reply and b"not a database" in reply, reply
        body = b'{"folder": "/nowhere"}'
        code, _, reply = server.request("POST", "/admin/v1/drafters/import", body, {"content-type": "application/json"})
        assert code == 503 and b"not a database" in reply
        assert server.chat(max_tokens=5)["choices"][0]["message"]["content"]
        broken.write_bytes(whole)
        server.wait_until(lambda: server.metric("drafter_registry_up") == 1)
        free, size = (server.metric(f"disk_{name}_bytes", store="registry") for name in ("free", "size"))
        assert 0 < free < size
        assert server.metric("disk_size_bytes", store="traffic") == 0  # none is kept
        assert "Traceback" not in "".join(server.log)
    finally:
        server.stop()


def test_a_damaged_registry_keeps_no_server_from_starting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for damage in ("rubbish", "a folder", "newer", "a file for the versions"):
        folder = tmp_path / damage
        registry = Registry(folder)
        database = folder / DATABASE_FILE
        if damage == "rubbish":
            database.write_bytes(b"rubbish" * 1000)
        elif damage == "a folder":
            database.unlink()
            database.mkdir()
        elif damage == "newer":
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA user_version = 99")
        else:
            (folder / "versions").rmdir()
            (folder / "versions").touch()
        for drafter, expected in ((None, "cold"), ("warm", "warm")):
            caplog.clear()
            started = with_live_drafter(EngineConfig(drafter=drafter), EvolutionConfig(registry=str(registry.folder)))
            assert started.drafter == expected
            assert "serving without it until it is mended" in caplog.text and str(folder) in caplog.text
    (tmp_path / "a file").touch()
    with pytest.raises(ModelError, match="cannot create a drafter registry"):  # nothing is damaged: the option is wrong
        with_live_drafter(EngineConfig(), EvolutionConfig(registry=str(tmp_path / "a file")))
