"""What setup.py compiles where the compiler, or its assembler, is older than some instructions."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

ROOT = Path(__file__).parents[2]


class Compiler:
    """One that does not know an option."""

    def __init__(self, unknown: str) -> None:
        self.unknown = unknown
        self.linked: list[str] = []

    def compile(self, sources: list[str], extra_postargs: list[str], **options: Any) -> list[str]:
        if self.unknown in extra_postargs:
            raise CompileError(f"unrecognized option {self.unknown}")
        return [f"{Path(source).stem}.o" for source in sources]

    def link_shared_object(self, objects: list[str], output: str, **options: Any) -> None:
        self.linked = objects


@pytest.fixture
def linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is linked by a compiler that does not know an option."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-x86_64")
    command = runpy.run_path("setup.py", run_name="tests")["BuildNative"](Distribution())
    command.build_lib = command.build_temp = str(tmp_path)
    command.inplace = False

    def linked(unknown: str) -> list[str]:
        command.compiler = Compiler(unknown)
        command.build_extension(Extension("slipstream.kernels._native", []))
        objects: list[str] = command.compiler.linked
        return objects

    return linked


@pytest.mark.parametrize(("option", "left_out"), [("-mavxvnni", "isa_avx2vnni.o"), ("-mamx-int8", "isa_avx512amx.o")])
def test_the_newest_instructions_are_left_out_where_they_are_not_known(linked: Any, option: str, left_out: str) -> None:
    everything = linked("none")
    assert left_out in everything
    assert linked(option) == [name for name in everything if name != left_out]


def test_what_every_variant_rests_on_must_compile(linked: Any) -> None:
    with pytest.raises(CompileError):
        linked("-mavx2")
