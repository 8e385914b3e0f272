"""Daemons of the local cluster are known to run, or to have ended, whatever moment one looks at."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cgroups, processes
from cluster.layout import Layout
from cluster.shell import ClusterError, wait_until

_SLEEP = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    """An empty clone's layout; its daemon stays out of the real cluster's control group and ends with the test."""
    monkeypatch.setattr(cgroups, "join", lambda pid: None)
    made = Layout(tmp_path)
    for directory in (made.logs, made.pids):
        directory.mkdir(parents=True)
    yield made
    for record in made.pids.iterdir():
        processes.stop(made, record.stem)


@pytest.fixture
def renamed(layout: Layout) -> list[str]:
    """A daemon that has another name until somebody writes to `go`: as a large executable has while it is loaded."""
    os.mkfifo(layout.state / "go")
    sleep = shlex.join([sys.executable, "-c", _SLEEP])
    return ["/bin/bash", "-c", f"read < go; exec -a daemon {sleep}"]


def test_a_daemon_whose_name_does_not_show_yet_has_not_ended(layout: Layout, renamed: list[str]) -> None:
    names_seen = []

    def ready() -> bool:
        names_seen.append(processes.running(layout, "daemon"))
        if len(names_seen) == 2:
            (layout.state / "go").write_text("\n")
        return (layout.state / "ready").exists()

    assert processes.start(layout, "daemon", renamed, ready=ready)
    assert names_seen[:2] == [None, None]
    assert processes.running(layout, "daemon") is not None


def test_a_daemon_that_runs_is_not_started_twice(layout: Layout) -> None:
    command = ["/bin/bash", "-c", f"exec -a daemon {shlex.join([sys.executable, '-c', _SLEEP])}"]
    assert processes.start(layout, "daemon", command, ready=(layout.state / "ready").exists)
    first = processes.running(layout, "daemon")
    assert not processes.start(layout, "daemon", command, ready=lambda: True)
    assert processes.running(layout, "daemon") == first


def test_a_daemon_that_is_bound_to_the_process_that_started_it_ends_with_it(layout: Layout) -> None:
    """As a test's own control plane is: pytest may be killed."""
    program = f"""if True:
        import os, pathlib, signal
        from cluster import cgroups, processes
        from cluster.layout import Layout
        cgroups.join = lambda pid: None
        bound = Layout(pathlib.Path({str(layout.repository)!r}), launcher=("setpriv", "--pdeathsig", "KILL", "--"))
        processes.start(bound, "sleep", ["sleep", "600"], ready=lambda: processes.running(bound, "sleep") is not None)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "dev"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert layout.pid_file("sleep").exists()
    wait_until(lambda: processes.running(layout, "sleep") is None, 10, lambda: "it goes on")


def test_a_daemon_that_ends_at_once_is_reported_with_the_end_of_its_log(layout: Layout) -> None:
    command = ["/bin/sh", "-c", "echo the port is taken >&2; exit 1"]
    with pytest.raises(ClusterError, match=r"daemon ended right after its start[^\0]*the port is taken"):
        processes.start(layout, "daemon", command, ready=lambda: False)


def test_a_pid_that_another_program_has_taken_over_is_not_the_daemon(layout: Layout) -> None:
    layout.pid_file("daemon").write_text(str(os.getpid()))
    assert processes.running(layout, "daemon") is None
    layout.pid_file("daemon").unlink()
