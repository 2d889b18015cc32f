"""The server's side of the text workers: started when they are needed, ended when they are not, or at a limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
from pathlib import Path
from typing import Any

from slipstream.engine import child
from slipstream.server.errors import ApiError, InvalidRequestError, UnavailableError
from slipstream.server.preparing.text_worker import LENGTH_BYTES, OUT_OF_MEMORY

RETRY_S = 5
IDLE_S = 30.0
"""How long a worker is kept without work: it takes a second to start, and has 80 MB."""
STREAM_BYTES = 2**20
PIECE_BYTES = 256 * 2**10
NICE = 10
"""The event loop and the steps of the engine go first."""
WALL_S = 60.0
"""How long a job may take on a machine that is busy with other things, the start of its worker included."""


def give_way(pid: int) -> None:
    """Linux divides the processor between sessions first, and then between the threads of each."""
    os.setpriority(os.PRIO_PROCESS, pid, NICE)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


class WorkerEndedError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"a text worker ended with status {status}")
        self.status = status


class Worker:
    """One process, which does one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: Any) -> None:
        self.process = process
        self.retiring: asyncio.TimerHandle | None = None
        self._reader = reader
        self._writer: asyncio.StreamWriter = writer

    @classmethod
    async def start(cls, settings: bytes) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *child.command("slipstream.server.preparing.text_worker", str(theirs.fileno())),
                # Writing a backtrace takes memory; without any, libraries in Rust wait for themselves for ever.
                env=os.environ | {"RUST_BACKTRACE": "0"},
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the whole process group
            )
        give_way(process.pid)
        reader, writer = await asyncio.open_connection(sock=ours, limit=STREAM_BYTES)
        worker = cls(process, reader, writer)
        await worker._send(settings)
        return worker

    async def ask(self, job: str, raw: bytes) -> bytes:
        """Raises WorkerEndedError."""
        try:
            await self._send(job.encode())
            await self._send(raw)
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._writer.close()
            raise WorkerEndedError(await self.process.wait()) from None

    def end(self) -> None:
        if self.retiring is not None:
            self.retiring.cancel()
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def _send(self, message: bytes) -> None:
        """Sends a message in pieces: to copy a large message at once would take milliseconds."""
        self._writer.write(len(message).to_bytes(LENGTH_BYTES, "little"))
        view = memoryview(message)
        for begin in range(0, len(message), PIECE_BYTES):
            self._writer.write(view[begin : begin + PIECE_BYTES])
            await self._writer.drain()


class Workers:
    """A pool of at most ``size`` text workers. A job that is cancelled ends its worker."""

    def __init__(self, size: int, cpu_s: float, settings: tuple[Any, ...]) -> None:
        """``cpu_s``: processor time of a job; ``settings``: model, ServerConfig and Limits."""
        self._cpu_s = cpu_s
        self._settings = pickle.dumps((*settings, cpu_s))
        self._places = asyncio.Semaphore(size)
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        self._ended: list[Worker] = []
        """Killed, but perhaps not gone yet."""

    async def run(self, job: str, raw: bytes) -> Any:
        """What the job gives; raises what it raises, InvalidRequestError if it took more than it may."""
        async with self._places:
            worker = await self._take()
            try:
                async with asyncio.timeout(WALL_S) as limit:
                    reply = await worker.ask(job, raw)
            except TimeoutError:
                self._end(worker)
                if not limit.expired():
                    raise
                raise UnavailableError(
                    "the machine is too busy to read so large a request", code="overloaded", retry_after_s=RETRY_S
                ) from None
            except WorkerEndedError as error:
                self._workers.discard(worker)
                raise self._reason(error.status) from None
            except BaseException:
                self._end(worker)
                raise
            self._idle.append(worker)
            worker.retiring = asyncio.get_running_loop().call_later(IDLE_S, self._retire, worker)
        result = pickle.loads(reply)
        if isinstance(result, Exception):
            raise result
        return result

    async def close(self) -> None:
        """Ends them, whatever they do, and waits until they are gone."""
        workers = list(self._workers)
        for worker in workers:
            self._end(worker)
        await asyncio.gather(*(worker.process.wait() for worker in [*workers, *self._ended]))

    async def _take(self) -> Worker:
        if self._idle:
            worker = self._idle.pop()
            if worker.retiring is not None:
                worker.retiring.cancel()
            return worker
        worker = await Worker.start(self._settings)
        self._workers.add(worker)
        return worker

    def _retire(self, worker: Worker) -> None:
        self._idle.remove(worker)
        self._end(worker)

    def _end(self, worker: Worker) -> None:
        self._workers.discard(worker)
        worker.end()
        self._ended = [ended for ended in self._ended if ended.process.returncode is None]
        self._ended.append(worker)

    def _reason(self, status: int) -> ApiError:
        if status == -signal.SIGXCPU:
            return InvalidRequestError(
                f"the request takes more than {self._cpu_s:g} s of processor time to read, render and tokenize, or to "
                "try its grammar",
                code="too_complex",
            )
        if status in (OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGSEGV):
            return InvalidRequestError(
                "the request takes too much memory to read, render and tokenize, or to try its grammar",
                code="too_complex",
            )
        return ApiError(f"the process that read the request ended with status {status}; see the server's log")
