"""The run's curves for TensorBoard, made from the journal alone: so those of a run that was resumed are whole.

One event file, under the names that transformers gives its scalars. It is put beside the run with every checkpoint, and
a last time with the results.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from qlora_trainer.artifacts import RunStore
from qlora_trainer.journal import Journal
from qlora_trainer.storage import ABSENT, Overtaken
from qlorajob.errors import StepError
from qlorajob.manifest import EVENTS

logger = logging.getLogger(__name__)

FORMAT = "brain.Event:2"
TRAINING: Final = {
    "loss": "train/loss",
    "learningRate": "train/learning_rate",
    "gradNorm": "train/grad_norm",
    "tokensPerSecond": "train/tokens_per_second",
}
"""Tag of each value in the journal's curve."""
VALIDATION = "eval/loss"


class LiveCurves:
    """The event file in storage while the run goes on."""

    def __init__(self, store: RunStore, journal: Journal) -> None:
        self._storage, self._journal = store.storage, journal
        self._tag: str | None = next((item.tag for item in self._storage.list(EVENTS) if item.key == EVENTS), ABSENT)

    def upload(self) -> None:
        """Replace the file by one of all that is known now, if that works; the run doesn't depend on it.

        Another process's file is never replaced: it may belong to results that are published already.
        """
        if self._tag is None:
            return
        try:
            self._tag = self._storage.write(EVENTS, events(self._journal), over=self._tag)
        except Overtaken:
            self._tag = None
            logger.warning("%s isn't this process's any more: its next version comes with the results", EVENTS)
        except StepError as error:
            logger.warning("%s: %s", EVENTS, error.message)


def events(journal: Journal) -> bytes:
    """The event file's content. The same journal gives the same bytes, and a longer one the same beginning."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        writer = RecordWriter(str(path))
        writer.write(Event(file_version=FORMAT).SerializeToString())
        for event in _scalars(journal):
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def _scalars(journal: Journal) -> Iterator[Event]:
    """In order of steps. Times are 0 in what a checkpoint of an older version knows."""
    if journal.base_eval_loss is not None:
        began = journal.curve[0].get("time", 0.0) if journal.curve else 0.0
        yield _scalar(VALIDATION, journal.base_eval_loss, 0, began)
    points = [
        *((entry, TRAINING) for entry in journal.curve),
        *((entry, {"evalLoss": VALIDATION}) for entry in journal.evaluations),
    ]
    for entry, tags in sorted(points, key=lambda point: point[0]["step"]):
        for key, tag in tags.items():
            if entry.get(key) is not None:
                yield _scalar(tag, entry[key], entry["step"], entry.get("time", 0.0))


def _scalar(tag: str, value: float, step: int, time: float) -> Event:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return Event(wall_time=time, step=step, summary=summary)
