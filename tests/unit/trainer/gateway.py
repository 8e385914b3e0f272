"""A real S3 server (VersityGW, as in the local cluster) on a free port, with a folder as its disk."""

from __future__ import annotations

import itertools
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.binaries import VERSITYGW, build
from qlorajob.spec import OutputSpec

ACCESS_KEY, SECRET_KEY = "unit-test-access", "unit-test-secret-key"


class Gateway:
    """A running server. Each bucket it gives out is new."""

    def __init__(self, endpoint: str, disk: Path) -> None:
        self.endpoint = endpoint
        self.disk = disk
        self._numbers = itertools.count()

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"bucket-{next(self._numbers)}"
        (self.disk / name).mkdir()  # a folder is a bucket to the POSIX backend
        return f"s3://{name}"

    def output(self, uri: str) -> OutputSpec:
        """spec.output for this server."""
        return OutputSpec.model_validate({"uri": uri, "endpoint": self.endpoint})


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Gateway]:
    """Start the server, built once per machine, and stop it afterwards. Its disk may be that of another one."""
    if not VERSITYGW.cached.exists():
        build(VERSITYGW)
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [VERSITYGW.cached, "--port", f"127.0.0.1:{port}", "--access", ACCESS_KEY, "--secret", SECRET_KEY]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([*command, *options, "--quiet", "posix", disk], stdout=log, stderr=log)
    try:
        _wait(port, process, folder / "log")
        yield Gateway(f"http://127.0.0.1:{port}", disk)
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server doesn't answer: {log.read_text(errors='replace')[-2000:]}")
