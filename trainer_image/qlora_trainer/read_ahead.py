"""Weights on a local disk, read into the page cache while Python imports: nobody waits for the disk twice."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.settings import usable_memory

logger = logging.getLogger(__name__)

READERS = 4
"""Files that are read at once: one reader alone doesn't keep an NVMe disk busy."""
CHUNK_BYTES = 8 << 20


def read_ahead(paths: Sequence[Path]) -> tuple[threading.Thread, ...]:
    """Start to read these files to their ends, and return who does. What can't be read is left to whoever needs it.

    Nobody, where memory can't hold them: the first would be gone when they are wanted. The kernel's own read-ahead
    (posix_fadvise) would take no more than a few hundred KB of each request.
    """
    if sum(path.stat().st_size for path in paths) > usable_memory() * 3 // 4:
        return ()
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for path in paths:
        waiting.put(path)
    readers = tuple(threading.Thread(target=_read, args=(waiting,), daemon=True) for _ in paths[:READERS])
    for reader in readers:
        reader.start()
    return readers


def _read(waiting: queue.SimpleQueue[Path]) -> None:
    buffer = bytearray(CHUNK_BYTES)
    while True:
        try:
            path = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        except OSError as error:
            logger.info("%s isn't read ahead: %s", path.name, error.strerror)
