"""A full disk, in the words of the libraries that met it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlorajob import names
from qlorajob.errors import ExitCode, Reason, StepError

TORCH_WRITER = ("inline_container.cc", "iostream error")
"""torch.save's words for a write that failed. It doesn't say why."""
NO_ROOM = 16 << 20
"""Bytes that are free on a disk on which a write has just failed for want of room, at most."""


def full(error: BaseException, env: Mapping[str, str]) -> StepError | None:
    """What to tell when `error` comes from a full disk; else None.

    Transient: a pod that uses more than its own share is evicted, so here others have filled the node, or a volume.
    Another node has room, or somebody makes some.
    """
    mounts = Path(env.get(names.ENV_MOUNT_ROOT, names.MOUNT_ROOT))
    cache = mounts / Path(names.CACHE_DIR).relative_to(names.MOUNT_ROOT)
    work = Path(env.get(names.ENV_WORK_DIR, names.WORK_DIR))
    cause = next((cause for cause in _chain(error) if _is_full(cause, work)), None)
    if cause is None:
        return None
    if isinstance(cause, OSError) and cause.filename and Path(str(cause.filename)).is_relative_to(cache):
        message = "the volume of model.cacheClaim is full: make room on it, or enlarge the claim"
        return StepError(Reason.DISK_FULL, message, field="model.cacheClaim", code=ExitCode.TRANSIENT)
    message = (
        "the node's disk is full: set resources.ephemeralStorage to what the job needs, so that it lands on another"
    )
    return StepError(Reason.DISK_FULL, message, field="resources.ephemeralStorage", code=ExitCode.TRANSIENT)


def _is_full(error: BaseException, work: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text:
        return True
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH_WRITER):
        return shutil.disk_usage(work).free < NO_ROOM if work.is_dir() else False
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
