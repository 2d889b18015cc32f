"""A conversation in the terminal, which shows how fast the server writes and what drafting brings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from slipstream.clients.errors import APIError, ClientError
from slipstream.clients.sync import Client

HELP = (
    "/new begins anew, /system TEXT sets the system message, /undo takes the last turn back, /quit ends; "
    "Ctrl-C stops an answer."
)


@dataclass
class Conversation:
    """What has been said. A turn that fails or has no answer leaves no trace."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def asking(self, question: str) -> list[dict[str, str]]:
        return [*self.messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass
class Speed:
    """How fast an answer comes, from its chunks; at its end, from what the server says of it."""

    tokens: int = 0
    chunks: int = 0
    first: float = 0.0
    last: float = 0.0
    per_step: float | None = None
    finish_reason: str | None = None

    def see(self, chunk: dict[str, Any], now: float) -> tuple[str, str]:
        """What a chunk has of the model's thoughts and of its answer."""
        choice = (chunk.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        thought: str = delta.get("reasoning_content") or delta.get("reasoning") or ""
        text: str = delta.get("content") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        counted = (chunk.get("usage") or {}).get("completion_tokens")
        if (counted is not None and counted > self.tokens) or thought or text:
            self.tokens = counted if counted is not None else self.tokens + 1
            self.chunks += 1
            self.first, self.last = self.first or now, now
        if drafting := (chunk.get("metrics") or {}).get("speculative_decoding"):
            steps = self.tokens - drafting["num_accepted_draft_tokens"]
            self.per_step = self.tokens / steps if steps > 0 else None
        return thought, text

    def __str__(self) -> str:
        said = f"{self.tokens} tokens"
        if self.last > self.first and self.chunks > 1:
            said += f", {(self.tokens - self.tokens / self.chunks) / (self.last - self.first):.1f} per second"
        per_step = self.per_step or (self.tokens / self.chunks if self.chunks else None)
        if per_step is not None:
            said += f", {per_step:.2f} per step"
        return said + (", cut off by max_tokens" if self.finish_reason == "length" else "")


class Terminal:
    """One conversation with one server."""

    def __init__(self, client: Client, fields: dict[str, Any], conversation: Conversation, console: Console) -> None:
        """``fields`` go with every request."""
        self._client = client
        self._fields = fields
        self._conversation = conversation
        self._console = console
        self._knows_metrics = True

    def run(self, lines: Iterator[str]) -> int:
        """Answers lines until they end. Exit status 1 if a question got no answer."""
        status = 0
        for line in lines:
            question = line.strip()
            if question in ("/quit", "/exit"):
                break
            if question.startswith("/"):
                self._command(question)
            elif question:
                status |= not self._answer(question)
        return status

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/new":
            self._conversation.turns.clear()
        elif name == "/system":
            self._conversation.system = rest.strip()
        elif name == "/undo":
            del self._conversation.turns[-2:]
        else:
            self._note(HELP)

    def _answer(self, question: str) -> bool:
        speed, text = Speed(), ""
        try:
            with Shown(self._console) as shown:
                for chunk in self._chunks(question):
                    thought, piece = speed.see(chunk, perf_counter())
                    text += piece
                    shown.add(thought, piece, str(speed))
        except KeyboardInterrupt:
            self._note("stopped")
        except ClientError as error:
            self._note(f"error: {error}")
            return False
        self._conversation.add(question, text)
        self._note(str(speed))
        return True

    def _chunks(self, question: str) -> Iterator[dict[str, Any]]:
        body = {"messages": self._conversation.asking(question), **self._fields}
        options = {"include_usage": True, "continuous_usage_stats": True}
        if self._knows_metrics:
            try:
                yield from self._client.chat_stream({**body, "stream_options": options, "return_metrics": True})
                return
            except APIError as error:
                # Another server, which does not know these fields; what else is wrong it says again.
                if error.status not in (400, 422):
                    raise
                self._knows_metrics = False
        yield from self._client.chat_stream(body)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)


class Shown:
    """An answer on a terminal, after what the model thought, with the speed below it; elsewhere the text alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = Text()
        self._live = Live(console=console, transient=True, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Shown:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._end_line()

    def add(self, thought: str, text: str, status: str) -> None:
        """Lines that are whole stay where they are; only the last one is drawn again."""
        if self._live and thought:
            self._write(thought, "dim")
        if text:
            self._write(text, "")
        if self._live:
            self._live.update(Group(self._line, Text(status, style="dim")))

    def _write(self, piece: str, style: str) -> None:
        if style != self._line.style:
            self._end_line()
        *whole, last = (self._line.plain + piece).split("\n")
        for line in whole:
            self._console.print(Text(line, style))
        self._line = Text(last, style)

    def _end_line(self) -> None:
        if self._line:
            self._console.print(self._line)
        self._line = Text()


def lines_of(console: Console) -> Iterator[str]:
    """What a person types, or what stands in a file or a pipe."""
    while True:
        try:
            yield console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
            return


def talk(url: str, api_key: str | None, model: str | None, system: str, fields: dict[str, Any]) -> int:
    """Talks until the lines end; the exit status. Raises ClientError if there is no server to talk to."""
    console = Console(highlight=False)
    with Client(url, api_key) as client:
        asked = {"model": model or client.models()[0], **fields}
        if console.is_terminal and sys.stdin.isatty():
            console.print(f"{asked['model']} at {client.base_url}. {HELP}", style="dim", markup=False)
        return Terminal(client, asked, Conversation(system), console).run(lines_of(console))
