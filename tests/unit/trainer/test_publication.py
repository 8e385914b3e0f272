"""One run, one result: whatever two processes of the same run do at the same time, and wherever one of them dies."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer import publication
from qlora_trainer.artifacts import RunStore
from qlora_trainer.patience import PatientStorage
from qlora_trainer.publication import CLAIM, Publication, PublishedElsewhere
from qlora_trainer.signals import StopSignal
from qlora_trainer.storage import ABSENT, LocalStorage, Overtaken, StoredObject, open_storage
from qlorajob.errors import ExitCode, StepError
from qlorajob.manifest import MANIFEST
from tests.support.faulty_s3 import FaultyS3, lose_answer
from tests.unit.trainer.gateway import Gateway
from tests.unit.trainer.jobs import a_manifest

RUN = "run1"


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(LocalStorage(tmp_path / "output", "file:///output"), RUN)


@pytest.fixture
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "GRACE", 0.0)


class Writer:
    """A process at the end of its training, with an adapter of its own."""

    def __init__(self, store: RunStore, folder: Path, name: str) -> None:
        self.name, self._store, self._folder = name, store, folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "config").write_text("the same for all")
        (self._folder / "weights").write_text(f"weights of {name}")

    def claim(self) -> Writer:
        self._publication = Publication(self._store)
        return self

    def put(self) -> Writer:
        files = self._publication.tree(self._folder, "adapter")
        files += (self._publication.content("report.json", self.name.encode()),)
        self._manifest = a_manifest(RUN, files=files)
        return self

    def publish(self) -> Writer:
        self._publication.publish(self._manifest)
        return self


def _holds(store: RunStore) -> bool:
    """Whether the manifest is there and every file has the digest it lists."""
    manifest = store.manifest()
    return manifest is not None and all(
        hashlib.sha256(store.storage.read(file.path) or b"").hexdigest() == file.sha256 for file in manifest.files
    )


def _owner(store: RunStore) -> str:
    return (store.storage.read("report.json") or b"").decode()


def test_what_is_published_is_there(store: RunStore, tmp_path: Path) -> None:
    Writer(store, tmp_path, "a").claim().put().publish()
    assert _holds(store)
    stored = {item.key for item in store.storage.list()}
    assert stored == {"adapter/config", "adapter/weights", "report.json", MANIFEST, CLAIM}


def test_a_late_process_leaves_what_is_published_alone(store: RunStore, tmp_path: Path) -> None:
    Writer(store, tmp_path, "a").claim().put().publish()
    store.storage.delete([CLAIM])
    with pytest.raises(PublishedElsewhere) as elsewhere:
        Writer(store, tmp_path, "late").claim()
    assert elsewhere.value.manifest.run_id == RUN
    assert (_owner(store), _holds(store)) == ("a", True)


def test_a_process_that_lives_is_waited_for(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Writer(store, tmp_path, "first").claim().put()
    monkeypatch.setattr(publication, "LOOK", 0.02)
    threading.Timer(0.1, first.publish).start()
    with pytest.raises(PublishedElsewhere):
        Writer(store, tmp_path, "second").claim()
    assert (_owner(store), _holds(store)) == ("first", True)


@pytest.mark.usefixtures("_no_wait")
def test_what_a_process_that_died_left_is_replaced(store: RunStore, tmp_path: Path) -> None:
    Writer(store, tmp_path, "dead").claim().put()
    store.storage.write("adapter/left over", b"x")
    Writer(store, tmp_path, "alive").claim().put().publish()
    assert (_owner(store), _holds(store)) == ("alive", True)
    assert store.storage.read("adapter/left over") is None


@pytest.mark.usefixtures("_no_wait")
@pytest.mark.parametrize("moment", ["after its claim", "after its files"])
def test_a_process_that_was_taken_for_dead_gives_way(store: RunStore, tmp_path: Path, moment: str) -> None:
    stale = Writer(store, tmp_path, "stale").claim()
    if moment == "after its files":
        stale.put()
    current = Writer(store, tmp_path, "current").claim().put()
    with pytest.raises(StepError, match="another process publishes the same run") as refused:
        stale.publish() if moment == "after its files" else stale.put()
    assert refused.value.code is ExitCode.TRANSIENT
    current.publish()
    assert (_owner(store), _holds(store)) == ("current", True)


@pytest.mark.usefixtures("_no_wait")
def test_a_manifest_whose_files_are_gone_does_not_pass_for_that_of_new_ones(store: RunStore, tmp_path: Path) -> None:
    Writer(store, tmp_path, "a").claim().put().publish()
    store.storage.delete(["adapter/weights", CLAIM])  # by hand: the run counts as unfinished and is trained again
    again = Writer(store, tmp_path, "b").claim().put()
    assert store.manifest() is None
    again.publish()
    assert (_owner(store), _holds(store)) == ("b", True)


@pytest.mark.parametrize("lost", [CLAIM, "adapter/weights", "report.json", MANIFEST])
def test_an_answer_that_gets_lost_is_no_second_process(
    gateway: Gateway, faulty: FaultyS3, tmp_path: Path, lost: str
) -> None:
    bucket = gateway.bucket()
    output = gateway.output(bucket).model_copy(update={"endpoint": faulty.endpoint})
    store = RunStore(PatientStorage(open_storage(bucket, output, field="output.uri"), StopSignal()), RUN)
    faulty.inject(lose_answer, f"^PUT .*{lost}", times=1)
    Writer(store, tmp_path, "a").claim().put().publish()
    assert _holds(store)


# Every order of events


class Killed(BaseException):
    """SIGKILL."""


class World:
    """A storage and a clock for writers that run in threads, one operation at a time, in an order that is given.

    Time passes only while somebody sleeps. Tags follow from the content, as S3's do.
    """

    uri = "memory://"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._now = 0.0
        self._threads: dict[threading.Thread, Turn] = {}
        self._changed = threading.Condition()

    def run(self, writers: Iterable[Callable[[], object]], order: Iterator[tuple[int, bool]]) -> None:
        """Let whose turn it is do one operation, or die before it."""
        for writer in writers:
            thread = threading.Thread(target=self._live, args=(writer,))
            self._threads[thread] = Turn()
        for thread in list(self._threads):
            thread.start()
        while self._threads:
            with self._changed:
                self._changed.wait_for(lambda: all(turn.wanted for turn in self._threads.values()))
                if not self._threads:
                    break
                whose, dies = next(order)
                turn = list(self._threads.values())[whose % len(self._threads)]
                turn.wanted, turn.dies = False, dies
                turn.given.release()

    def _live(self, writer: Callable[[], object]) -> None:
        try:
            writer()
        except (Killed, PublishedElsewhere, StepError):
            pass
        finally:
            with self._changed:
                del self._threads[threading.current_thread()]
                self._changed.notify()

    def _wait(self) -> None:
        turn = self._threads.get(threading.current_thread())
        if turn is None:  # the test itself
            return
        with self._changed:
            turn.wanted = True
            self._changed.notify()
        turn.given.acquire()
        if turn.dies:
            raise Killed

    # What `publication` takes for the module time

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._wait()
        self._now += seconds

    # And for storage

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        self._wait()
        found = sorted(self.objects.items())
        return iter([StoredObject(key, len(text), _etag(text)) for key, text in found if key.startswith(prefix)])

    def read(self, key: str) -> bytes | None:
        self._wait()
        return self.objects.get(key)

    def write(self, key: str, content: bytes, *, over: str | None = None) -> str:
        self._wait()
        if over is not None and over != (_etag(self.objects[key]) if key in self.objects else ABSENT):
            raise Overtaken(key)
        self.objects[key] = content
        return _etag(content)

    def upload(self, path: Path, key: str, *, over: str | None = None) -> str:
        return self.write(key, path.read_bytes(), over=over)

    def delete(self, keys: Iterable[str]) -> None:
        self._wait()
        for key in keys:
            self.objects.pop(key, None)

    def within(self, prefix: str) -> World:
        return self


@dataclass
class Turn:
    """Whether a writer waits for its turn, and how it is given."""

    given: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    wanted: bool = False
    dies: bool = False


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


@settings(max_examples=200)
@given(
    order=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15).map(lambda number: number == 15)), max_size=80),
    writers=st.integers(2, 3),
)
def test_whatever_the_order_and_whoever_dies_the_manifest_lists_what_is_there(
    folder: Path, order: list[tuple[int, bool]], writers: int
) -> None:
    world = World()
    store = RunStore(world, RUN)  # type: ignore[arg-type]
    everybody = [Writer(store, folder, f"writer {index}") for index in range(writers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publication, "time", world)
        actions = [partial(_publish, writer) for writer in everybody]
        world.run(actions, itertools.chain(order, itertools.cycle((index, False) for index in range(writers))))
        if store.manifest() is None:  # everybody gave way or died: the Job starts another pod
            _publish(Writer(store, folder, "the next"))
    assert _holds(store)


def _publish(writer: Writer) -> None:
    writer.claim().put().publish()
