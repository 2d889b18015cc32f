"""What keeps the rooms apart and readable: the import contract, light modules, short files, the words of the map."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("server", "engine", "kernels", "drafter", "clients", "loadtest")
MOST_LINES = 400


def sources() -> list[Path]:
    return [path for room in (*ROOMS, "tests") for path in sorted((ROOT / room).rglob("*.py"))]


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines for path in sources() if (lines := path.read_text().count("\n")) > MOST_LINES
    }
    assert not long, "split these by what they are about"


@pytest.mark.parametrize(
    ("instead", "word"),
    [
        ("a draft token, which is proposed, or the draft vocabulary", re.compile(r"\bguess(es|ed|ing|able)?\b", re.I)),
        ("a docstring that can be read without the line before it", re.compile(r'^\s*"{3}Of ', re.M)),
    ],
)
def test_words_are_those_of_the_map(instead: str, word: re.Pattern[str]) -> None:
    """See *Words* in docs/architecture.md."""
    here = Path(__file__)
    found = [str(path.relative_to(ROOT)) for path in sources() if path != here and word.search(path.read_text())]
    assert not found, f"write {instead}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("slipstream.kernels", {"torch", "numpy"}),
        ("slipstream.engine.client", {"torch", "numpy", "transformers"}),
        ("slipstream.drafter.registry.registry", {"torch", "numpy", "transformers"}),
        ("slipstream.drafter.registry.manifest", {"torch", "numpy", "transformers"}),
        ("slipstream.drafter.names", {"torch", "numpy", "transformers"}),
        ("slipstream.server.commands.cli", {"torch", "numpy", "transformers", "slipstream.loadtest"}),
        ("slipstream.server.__main__", {"typer", "msgspec", "asyncio", "psutil", "slipstream.server.commands.cli"}),
        ("slipstream.server.engine_process", {"llguidance", "gguf", "transformers"}),
        ("slipstream.server.commands.training", {"torch", "numpy", "transformers"}),
        ("slipstream.server.app", {"torch", "numpy", "transformers"}),
        ("slipstream.clients.aio", {"torch", "numpy", "transformers", "slipstream.engine"}),
        ("slipstream.clients.admin", {"torch", "numpy", "transformers", "slipstream.engine"}),
        ("slipstream.loadtest.cli", {"torch", "numpy", "aiohttp", "slipstream.engine"}),
    ],
)
def test_light_modules_stay_light(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())


def test_the_map_names_modules_that_exist() -> None:
    """docs/architecture.md and docs/decisions.md: every `room/…` path in them is there."""
    text = "".join((ROOT / "docs" / name).read_text() for name in ("architecture.md", "decisions.md"))
    named = {part for part in text.split("`")[1::2] if part.startswith(tuple(f"{room}/" for room in ROOMS))}
    assert len(named) > 20
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
