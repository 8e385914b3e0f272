"""What the indexes still hold although it is gone from the cluster.

A watch that was cut may be too old to go on ("410 Gone": an API server that was started again, a long partition). kopf
lists everything anew then, but says nothing of what was deleted meanwhile: a Job would be waited for, and a GPU held
back for a pod that doesn't exist, until the operator itself is started again. So what is in the indexes is held against
lists of the cluster's own: after each listing of kopf's, and now and then, since an empty one can't be noticed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

from qlora_operator.store import Key, Kind, Present, Raw, Store

SETTLE_SECONDS: Final = 2.0
"""From an object of a listing to the next look: a listing has many."""
INTERVAL_SECONDS: Final = 300.0
logger = logging.getLogger(__name__)


class Absence:
    """Has the store forget what is gone. `present` lists a kind in a namespace, `changed` is told whose it was."""

    def __init__(
        self, store: Store, present: Callable[[Kind, str], Awaitable[Present]], changed: Callable[[Key], None]
    ) -> None:
        self._store, self._present, self._changed = store, present, changed
        self._listed = asyncio.Event()

    def listed(self) -> None:
        """kopf has listed something, perhaps not for the first time."""
        self._listed.set()

    async def run(self) -> None:
        """Look now, after each listing, and every few minutes, until cancelled."""
        while True:
            self._listed.clear()
            await self.look()
            try:
                await asyncio.wait_for(self._listed.wait(), INTERVAL_SECONDS)
            except TimeoutError:
                continue
            await asyncio.sleep(SETTLE_SECONDS)

    async def look(self) -> None:
        """Compare once. What can't be listed now is looked at the next time."""
        held: dict[tuple[Kind, str], list[tuple[Key, Raw]]] = defaultdict(list)
        for kind, key, raw in self._store.held():
            held[kind, key.namespace].append((key, raw))
        for (kind, namespace), objects in held.items():
            try:
                present = await self._present(kind, namespace)
            except Exception as error:  # whatever it is, the work goes on
                logger.warning("can't list %s of namespace %s: %s", kind, namespace, error)
                continue
            for key, raw in objects:
                if present.lacks(raw):
                    logger.warning("%s %s is gone, unnoticed", kind, raw["metadata"]["name"], extra={"key": str(key)})
                    self._store.forget(raw["metadata"]["uid"])
                    self._changed(key)
