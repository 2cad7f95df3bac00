"""The real command on a directory: started, asked, stopped in good order."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.process import PATIENCE_S

_RUN = "from retrofill.cli.main import app; app()"


class Live:
    """`retrofill serve` on a free port, project `one` with keys KEY and SECRET."""

    def __init__(self, data: Path, *options: str) -> None:
        command = [sys.executable, "-c", _RUN, "serve", "--data", str(data / "data"), "--port", "0"]
        self._log = (data / "server.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--project", "one:KEY:SECRET", *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.address = ""

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Retrofill listens on "):
                self.address = line.split()[-1]
                return self
        raise AssertionError("The server ended before it listened")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        assert kind is not None or code == 0
