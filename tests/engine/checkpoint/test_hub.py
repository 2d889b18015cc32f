"""Models by their name on the hub: against a server that speaks its protocol, with the real client library."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.checkpoint import hub

COMMIT = "c0ffee" * 6 + "c0ff"
TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Has one public model, one that is gated, and one that needs a token."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo == "acme/gated":
            return self._send(403, b"{}", **{"X-Error-Code": "GatedRepo"})
        private = repo == "acme/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if private or repo not in ("acme/tiny", "acme/private"):
            return self._send(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in ("main", "v2", COMMIT):
            return self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            files = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in self.server.files.items()]
            if rest and rest[0] == "tree":
                return self._send(200, json.dumps(files).encode())
            siblings = [{"rfilename": name} for name in self.server.files]
            return self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        content = self.server.files.get("/".join(rest[2:]))
        if content is None:
            return self._send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._send(200, content, **{"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    files |= {"model-Q4.gguf": b"GGUF", "pytorch_model.bin": b"old", "original/params.json": b"{}", "README.md": b"hi"}
    files |= {"additional_chat_templates/rag.jinja": b"rag", "assets/params.json": b"{}", "onnx/config.json": b"{}"}
    files |= {"Q8/big-00001-of-00002.gguf": b"one", "Q8/big-00002-of-00002.gguf": b"two"}
    hub_server = Hub(files)
    threading.Thread(target=hub_server.serve_forever, daemon=True).start()
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


Run = Callable[..., str]


@pytest.fixture
def run(server: Hub, tmp_path: Path) -> Run:
    """Runs a program that uses the hub; what it prints, or the error it ends with."""

    def run(program: str, **environment: str) -> str:
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        code = (
            "from slipstream.engine.checkpoint import hub\nfrom slipstream.engine.checkpoint.checkpoint import locate\n"
        )
        code += f"from slipstream.engine.errors import ModelError\ntry: {program}\nexcept ModelError as e: print(e)"
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=keep | own | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_model_is_fetched_once_and_then_found_without_asking(run: Run, server: Hub) -> None:
    folder = Path(run("print(hub.fetch('acme/tiny'))"))
    expected = ["additional_chat_templates/rag.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == expected
    server.asked.clear()
    assert run("print(locate('acme/tiny'))") == str(folder)
    assert not server.asked
    assert run("print(hub.fetch('acme/tiny'))", HF_HUB_OFFLINE="1") == str(folder)
    assert run("print(hub.fetch('acme/tiny'))", HF_ENDPOINT="http://127.0.0.1:9") == str(folder)
    file = Path(run("print(hub.fetch('acme/tiny/model-Q4.gguf', 'v2'))"))
    assert file.read_bytes() == b"GGUF"
    part = Path(run("print(hub.fetch('acme/tiny/Q8/big-00001-of-00002.gguf'))"))
    assert [path.read_bytes() for path in sorted(part.parent.iterdir())] == [b"one", b"two"]
    assert run("print(locate('acme/tiny/Q8/big-00001-of-00002.gguf'))") == str(part)


@pytest.mark.parametrize(
    ("program", "environment", "words"),
    [
        ("hub.fetch('acme/gated')", {}, ["'acme/gated' is gated", "HF_TOKEN"]),
        ("hub.fetch('acme/private')", {}, ["no model at 'acme/private' here", "without an HF_TOKEN"]),
        ("hub.fetch('acme/private')", {"HF_TOKEN": "hf_wrong"}, ["none of that name", "the HF_TOKEN may read"]),
        ("hub.fetch('acme/tiny', 'v9')", {}, ["no revision 'v9'"]),
        ("hub.fetch('acme/tiny/other.gguf')", {}, ["not this file of it"]),
        ("hub.fetch('acme/tiny')", {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "nor in the cache"]),
        ("hub.fetch('acme/tiny')", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be fetched", "127.0.0.1:9"]),
        ("locate('acme/tiny')", {}, ["there is no model at 'acme/tiny'", "has fetched"]),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_what_to_do(
    run: Run, program: str, environment: dict[str, str], words: list[str]
) -> None:
    said = run(program, **environment)
    assert all(word in said for word in words) and "\n" not in said, said


def test_a_token_opens_what_it_may(run: Run) -> None:
    assert (Path(run("print(hub.fetch('acme/private'))", HF_TOKEN=TOKEN)) / "config.json").exists()


@pytest.mark.parametrize("name", ["acme/tiny", "Qwen/Qwen3-0.6B", "a/b/c.gguf", "a/b/sub/c-00001-of-2.gguf"])
def test_names_of_the_hub(name: str) -> None:
    assert hub.is_name(name)


@given(
    st.one_of(
        st.text(max_size=12), st.sampled_from(["default", "/a/b", "./a", "../a", "a/../b", "~/a", "a/b/c", "a//b"])
    )
)
def test_other_texts_are_paths(text: str) -> None:
    if hub.is_name(text):
        owner, _, rest = text.partition("/")
        assert owner and rest and not text.startswith((".", "/", "~")) and ".." not in text
