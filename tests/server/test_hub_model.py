"""A model that is named as the hub names it: fetched before anything else, and called so."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.engine.checkpoint import hub
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.server.config import ServerConfig
from slipstream.server.launch import with_local_model


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """What was asked of the hub (test_hub.py asks a real one)."""
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return tmp_path / name.replace("/", "--")

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked


def test_models_of_the_hub_become_folders_and_keep_their_names(fetched: list[tuple[str, str | None]]) -> None:
    engine = EngineConfig(model="acme/tiny", revision="v2", draft_model="acme/tinier", speculation="draft")
    server, local = with_local_model(ServerConfig(), engine)
    assert fetched == [("acme/tiny", "v2"), ("acme/tinier", None)]
    assert server.served_model_name == ("acme/tiny",)
    assert Path(local.model).name == "acme--tiny" and Path(str(local.draft_model)).name == "acme--tinier"
    named, _ = with_local_model(ServerConfig(served_model_name=("mine",)), engine)
    assert named.served_model_name == ("mine",)


def test_what_is_here_is_not_asked_for(
    fetched: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("default", "acme/tiny", "/no/such/folder", "~/models/x", "model.gguf"):
        engine = EngineConfig(model=model)
        assert with_local_model(ServerConfig(), engine) == (ServerConfig(), engine)
    assert not fetched
    with pytest.raises(ConfigError, match="--revision v2: --model acme/tiny is no model of the hub"):
        with_local_model(ServerConfig(), EngineConfig(model="acme/tiny", revision="v2"))
