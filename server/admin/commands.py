"""Commands of ``slipstream drafter`` in a process of their own, since they read all weights of a head, or two.

What they do is bounded, somebody waits for it, and none of it needs torch: so they get their share of the processor.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from slipstream.engine import child
from slipstream.server.errors import ApiError, InvalidRequestError, TimedOutError

TIMEOUT_S = 300.0
USER_ERROR = 2


class DrafterCommands:
    """One at a time: each holds heads in memory."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, registry: Path, command: str, *arguments: str, **options: str) -> Any:
        """What the command prints as JSON.

        Raises:
            InvalidRequestError: with what it says is wrong.
            TimedOutError: it took longer than TIMEOUT_S.
            ApiError: it failed in another way.
        """
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        line = ["drafter", command, f"--registry={registry}", "--json", *flags, "--", *arguments]
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                *child.command("slipstream.server", *line),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    out, said = await process.communicate()
            except TimeoutError:
                raise TimedOutError(f"the command took longer than {TIMEOUT_S:g} s") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode == 0:
            return msgspec.json.decode(out)
        last = (said.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        message = f"{command}: {last.removeprefix('slipstream: ')}"
        raise InvalidRequestError(message) if process.returncode == USER_ERROR else ApiError(message)
