"""A child process that does tasks for the server, one line of JSON each way.

What holds the interpreter for seconds would stop the commit loop, so a child does it. A child owns nothing: kill it
anywhere, and what it leaves are files that nobody names. It dies with its parent: its standard input ends, and on Linux
the kernel sees to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import retrofill
from retrofill.limits import CHILD_ANSWER_BYTES_MAX

_PR_SET_PDEATHSIG = 1


class Child:
    """One child process, started when first needed and again when it has died. One task at a time.

    code: Python that ends up in `serve`. nice: how much it gives way to others.
    """

    def __init__(self, code: str, nice: int, settings: Mapping[str, str]) -> None:
        self._code = code
        self._nice = nice
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None

    async def exchange(self, task: bytes) -> bytes:
        """Send a task and return the answer's line, empty if the child died."""
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(task + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except ConnectionError:
            line = b""
        except asyncio.CancelledError:
            # The answer would be taken for that of the next task.
            await self.stop()
            raise
        if not line:
            await self.stop()
        return line

    async def _start(self) -> asyncio.subprocess.Process:
        home = str(Path(retrofill.__file__).parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            self._code,
            str(os.getpid()),
            str(self._nice),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **self._settings},
            limit=CHILD_ANSWER_BYTES_MAX,
        )

    async def stop(self) -> None:
        """End the child, at once: it owns nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


def serve(answer: Callable[[bytes], bytes]) -> None:
    """In the child: do tasks from standard input until it ends. Arguments: the parent's process id, how nice to be."""
    parent, nice = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(nice)
    gc.disable()  # rows make no circles, and looking for them takes a fifth of the time
    # What a library prints (DuckDB shows progress) must not be taken for an answer.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            answers.write(answer(line) + b"\n")
            answers.flush()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
