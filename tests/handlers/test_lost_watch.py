"""What is deleted while the operator hears nothing: its watches are too old to go on when it hears again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import controlplane, processes
from qlorajob.identity import prepare_key
from qlorajob.resource import parse
from tests.handlers.stage import Stage
from tests.support.reports import prepare_report


@contextmanager
def cut_off(stage: Stage) -> Iterator[None]:
    """The operator stands still meanwhile, and the API server that it comes back to remembers no older watch."""
    assert stage.operator.process
    stage.operator.process.send_signal(signal.SIGSTOP)
    try:
        yield
        paths = stage.cluster.target.layout
        processes.stop(paths, "kube-apiserver")
        controlplane.start(paths)
    finally:
        stage.operator.process.send_signal(signal.SIGCONT)


def prepare(stage: Stage) -> None:
    key = prepare_key(parse(stage.get("qlj", "ghost")).spec)
    stage.finish(stage.pod("ghost", "prepare"), prepare_report(key, "ghost"))


@pytest.mark.long
def test_a_training_job_that_is_deleted_unnoticed_is_made_again(stage: Stage) -> None:
    stage.apply("ghost")
    prepare(stage)
    stage.run(stage.pod("ghost", "train"))
    stage.phase("ghost", "Training")
    (lost,) = stage.jobs("ghost", "train")

    with cut_off(stage):
        stage.kubectl("delete", "job", lost["metadata"]["name"], "--cascade=foreground", "--wait")

    stage.until(lambda: "JobLost" in stage.events("ghost"), "the loss is noticed")
    prepare(stage)  # perhaps the run ended before its Job went
    stage.pod("ghost", "train")
