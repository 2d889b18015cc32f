"""Files of checkpoints: whole whoever writes them, for routes of any name, and nothing stays of those that ended."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path

import pytest
import torch

from slipstream.drafter.training.checkpoint import Checkpoint


class FullDisk(io.FileIO):
    """A file on a disk with room for little."""

    def write(self, data: object) -> int:
        if self.tell() > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["shared", "tenant:a/../../b", "domain:support/de.v1", "tenant:" + "ü" * 200, "tenant:."]
)
def test_a_name_may_be_any_text(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, name)
    checkpoint.save({"step": 3}, wait=True)
    assert checkpoint.error is None
    assert Checkpoint(tmp_path, name).load() == {"step": 3}
    assert Checkpoint(tmp_path, name + "x").load() is None
    assert len(list(tmp_path.iterdir())) == 1


def test_two_that_write_at_once_write_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that trains, and ``slipstream drafter train`` beside it."""
    both = threading.Barrier(2)
    save = torch.save

    def save_both(state: object, file: object) -> None:
        both.wait()
        save(state, file)  # type: ignore[arg-type]
        both.wait()

    monkeypatch.setattr(torch, "save", save_both)
    checkpoints = [Checkpoint(tmp_path, "shared") for _ in range(2)]
    states = [{"weights": torch.full((1000, number), float(number))} for number in (1, 200)]
    for checkpoint, state in zip(checkpoints, states, strict=True):
        checkpoint.save(state)
    for checkpoint in checkpoints:
        checkpoint.finish()
    assert [checkpoint.error for checkpoint in checkpoints] == [None, None]
    found = Checkpoint(tmp_path, "shared").load()
    assert found is not None and any(torch.equal(found["weights"], state["weights"]) for state in states)
    assert [path.name for path in tmp_path.iterdir()] == ["shared.pt"]


def test_a_full_disk_is_told_once_and_costs_only_what_was_learned_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    checkpoint, opened = Checkpoint(tmp_path, "shared"), Path.open
    checkpoint.save({"step": 1}, wait=True)
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda path, mode: FullDisk(path, mode) if mode == "wb" else opened(path, mode))
        for step in (2, 3):
            checkpoint.save({"step": step, "weights": torch.ones(10_000)}, wait=True)
            assert isinstance(checkpoint.error, OSError) and checkpoint.error.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["shared.pt"] and checkpoint.load() == {"step": 1}
    [told] = caplog.messages
    assert str(tmp_path / "shared.pt") in told and "No space left on device" in told
    checkpoint.save({"step": 4}, wait=True)
    assert checkpoint.error is None and "again" in caplog.messages[1] and checkpoint.load() == {"step": 4}


def test_what_was_left_half_written_goes(tmp_path: Path) -> None:
    for name in ("shared.tmp", "shared.0123abcd.tmp", "tenant%3Ashared.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path, "shared")
    checkpoint.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["tenant%3Ashared.0123abcd.tmp"]
