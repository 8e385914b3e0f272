"""Daemons: started detached from the terminal, known by a pid file, ready when they say so."""

import os
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster import cgroups
from cluster.layout import Layout
from cluster.shell import ClusterError, tail, wait_until


def running(layout: Layout, name: str) -> int | None:
    """The pid of a daemon of ours that runs, or None. A pid that another program has taken over doesn't count."""
    try:
        pid = int(layout.pid_file(name).read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if state != "Z" and Path(command[0].decode()).name == name else None


def start(
    layout: Layout,
    name: str,
    command: Sequence[str | Path],
    *,
    ready: Callable[[], bool],
    env: Mapping[str, str] | None = None,
    seconds: float = 60,
) -> bool:
    """Start a daemon unless it runs, and wait until it is ready. Returns whether it had to be started.

    The executable's name has to be `name`: that is how its process is recognised later.
    """
    process = None
    if running(layout, name) is None:
        with layout.log_file(name).open("ab") as log:
            process = subprocess.Popen(
                [*layout.launcher, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                cwd=layout.state,
                start_new_session=True,
            )
        cgroups.join(process.pid)
        layout.pid_file(name).write_text(str(process.pid))

    def alive_and_ready() -> bool:
        # A process of ours is asked itself: while it starts, /proc doesn't show its name yet.
        ended = running(layout, name) is None if process is None else process.poll() is not None
        if ended:
            raise ClusterError(explain(layout, name, "ended right after its start"))
        return ready()

    wait_until(alive_and_ready, seconds, lambda: explain(layout, name, f"was not ready within {seconds:.0f} s"))
    return process is not None


def explain(layout: Layout, name: str, problem: str) -> str:
    """An error message with the end of the daemon's log."""
    log = layout.log_file(name)
    text = tail(log.read_text(errors="replace")) if log.exists() else "(no log)"
    return f"{name} {problem}. The end of {log}:\n{text}"


def stop(layout: Layout, name: str, seconds: float = 15) -> None:
    """End a daemon: politely first, so that it can write its state."""
    pid = running(layout, name)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        try:
            wait_until(lambda: running(layout, name) is None, seconds, lambda: "")
        except ClusterError:
            os.kill(pid, signal.SIGKILL)
    layout.pid_file(name).unlink(missing_ok=True)


def answers(url: str, tls: ssl.SSLContext | None = None) -> bool:
    """Whether an HTTP endpoint answers with success."""
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls or ssl.create_default_context())
    )
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
