"""Running commands, and telling the user what is being done and how long it took."""

import fcntl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

Command = list[str | Path]
_output = threading.Lock()


class ClusterError(Exception):
    """Something that the user can read and act on; the command line prints it without a traceback."""


def say(message: str) -> None:
    """Print one whole line, also when two steps run at the same time."""
    with _output:
        print(message, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done now, and when it is done, how long it took."""
    started = time.monotonic()
    say(f"  … {title}")
    yield
    say(f"  ✓ {title} ({time.monotonic() - started:.1f} s)")


def run(
    command: Sequence[str | Path],
    *,
    input_text: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> str:
    """Run a command and return what it printed; say what it said if it fails. `log` also keeps its output."""
    arguments = [str(part) for part in command]
    try:
        done = subprocess.run(
            arguments, input=input_text, env=env, cwd=cwd, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ClusterError(f"{arguments[0]} is not installed") from None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        output = tail((done.stdout + done.stderr).strip())
        raise ClusterError(f"`{' '.join(arguments)}` failed with exit code {done.returncode}:\n{output}")
    return done.stdout


def succeeds(command: Sequence[str | Path]) -> bool:
    """Whether a command is there and exits with 0; its output doesn't matter."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def tail(text: str, lines: int = 20) -> str:
    """The last lines of a text: where a program says why it stopped."""
    return "\n".join(text.splitlines()[-lines:])


def wait_until(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Ask again and again until a condition holds; when the time is over, fail with an explanation."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(failure())
        time.sleep(0.1)


@contextmanager
def locked(lock: Path, holder: str) -> Iterator[None]:
    """Keep two processes from doing the same thing at the same time, and say so when that means waiting."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  … waiting for {holder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
