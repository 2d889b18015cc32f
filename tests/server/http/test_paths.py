"""Whatever path an option names, what the operating system says of it is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream.server.commands import cli


def too_long(folder: Path) -> str:
    return str(folder / ("a" * 256))


def far_too_long(folder: Path) -> str:
    return str(folder) + "/a" * 3000


def loop(folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop" / "x")


def in_a_file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file" / "x")


def no_text(folder: Path) -> str:
    return os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")


def with_line_breaks(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file" / "a\nslipstream: b\r\x85c")


def nobody_s(folder: Path) -> str:
    return "/proc/1/map_files/x" if os.getuid() else "/proc/self/nothing/x"


Make = Callable[[Path], str]
MAKERS: list[Make] = [too_long, far_too_long, loop, in_a_file, no_text, with_line_breaks, nobody_s]
COMMANDS = [
    ["serve", "--port", "0", "--model", "PATH"],
    ["serve", "--port", "0", "--registry", "PATH"],
    ["drafter", "list", "--registry", "PATH"],
    ["drafter", "import", "--registry", "PATH", "."],
    ["drafter", "import", "--registry", "REGISTRY", "PATH"],
    ["drafter", "import", "--registry", "REGISTRY", "--target", "PATH", "."],
    ["drafter", "export", "--registry", "PATH", "1", "x"],
    ["drafter", "prune", "--keep", "0", "--registry", "PATH"],
    ["drafter", "train", "--minutes", "0.01", "--registry", "REGISTRY", "--traffic-folder", "PATH"],
    ["drafter", "eval", "--registry", "REGISTRY", "--traffic-folder", "PATH", "PATH"],
    ["traffic", "stats", "--folder", "PATH"],
    ["traffic", "purge", "--all", "--folder", "PATH"],
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_paths_of_options(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], make: Make
) -> None:
    names = {"PATH": make(tmp_path), "REGISTRY": str(tmp_path / "registry")}
    monkeypatch.setattr(sys, "argv", ["slipstream", *(names.get(word, word) for word in command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = [line for line in capfd.readouterr().err.splitlines() if "INFO" not in line]
    assert ended.value.code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("slipstream: ")


def test_environment_that_is_no_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["slipstream", "version"])
    monkeypatch.setenv("SLIPSTREAM_MODEL", os.fsdecode(b"\xff"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "SLIPSTREAM_MODEL" in capsys.readouterr().err
