"""What finished runs took, kept in a ConfigMap: it outlives the operator, and may have several writers.

Each observation is a key of its own and is written by a patch of that key alone, so writers don't overwrite each other.
It is read when it is needed first, then every few minutes; each write's answer is as good as a read. Nothing here ever
fails a job: without the ConfigMap, or the right to it, plans are what the memory model alone says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from qlora_operator.api import ApiError
from qlora_vram.observations import Observation, Observations

CONFIG_MAP: Final = "qlora-observations"
REREAD_SECONDS: Final = 300.0
"""Another operator's observations are seen within this time."""
logger = logging.getLogger(__name__)


class ConfigMaps(Protocol):
    """What of the API is used here."""

    async def config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        """Its data."""

    async def patch_config_map(self, namespace: str, name: str, data: Mapping[str, str | None]) -> Mapping[str, str]:
        """Set and remove (None) keys; all its data afterwards."""


class Experience:
    """The observations as they were read or written last. `clock` is monotonic; without a namespace nothing is kept."""

    def __init__(
        self, config_maps: ConfigMaps, namespace: str | None, trainer_image: str, clock: Callable[[], float]
    ) -> None:
        self._config_maps = config_maps
        self._trainer = trainer_image
        self._clock = clock
        self._namespace = namespace
        self._known = Observations(trainer=trainer_image)
        self._stale_at = clock()
        self._turn = asyncio.Lock()

    async def known(self) -> Observations:
        """What there is to plan with."""
        async with self._turn:
            if self._namespace and self._clock() >= self._stale_at:
                self._stale_at = self._clock() + REREAD_SECONDS
                try:
                    self._take(await self._config_maps.config_map(self._namespace, CONFIG_MAP))
                except ApiError as error:
                    self._lost("read", error)
        return self._known

    async def add(self, observation: Observation) -> None:
        """Keep one more, and drop the oldest beyond the limit."""
        if not self._namespace or self._known.entries.get(observation.key) == observation:
            return
        async with self._turn:
            before, self._known = self._known, self._known.including(observation)
            changes: dict[str, str | None] = {key: None for key in before.entries if key not in self._known.entries}
            changes[observation.key] = observation.to_json()
            try:
                self._take(await self._config_maps.patch_config_map(self._namespace, CONFIG_MAP, changes))
            except ApiError as error:
                self._lost("written", error)

    def _take(self, data: Mapping[str, str]) -> None:
        self._known = Observations.read(data, self._trainer)

    def _lost(self, what: str, error: ApiError) -> None:
        where = f"{self._namespace}/{CONFIG_MAP}"
        logger.warning("ConfigMap %s can't be %s, plans don't learn from it: %s", where, what, error)
