"""A training that ends in NaN: nobody may take its adapter for a good one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from qlora_trainer.callbacks import ProgressCallback
from qlorajob.errors import ExitCode, Reason, StepError
from tests.unit.trainer.jobs import Job

SPOILT_AT = 2


@pytest.fixture
def spoilt(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job of four steps whose adapter is spoilt before the third."""
    before = ProgressCallback.on_step_begin

    def spoil(self: Any, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if state.global_step == SPOILT_AT:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = math.nan
        before(self, args, state, control, **more)

    monkeypatch.setattr(ProgressCallback, "on_step_begin", spoil)
    return job


@pytest.mark.parametrize(("save_steps", "noticed_at"), [(0, 4), (1, 3)])
def test_a_run_that_diverges_fails_for_good_and_publishes_nothing(
    spoilt: Job, save_steps: int, noticed_at: int
) -> None:
    prepared = spoilt.change(training={"saveSteps": save_steps}).prepare()
    with pytest.raises(StepError, match=rf"the training diverged: .* by step {noticed_at}; lower") as refused:
        spoilt.train(prepared)
    assert (refused.value.reason, refused.value.field) == (Reason.DIVERGED, "training.learningRate")
    assert refused.value.code is ExitCode.INVALID
    assert not (spoilt.output / "latest.json").exists()
    assert not (spoilt.output / prepared.run_id / "manifest.json").exists()


def test_with_a_gate_a_run_that_diverges_is_no_better_than_the_base(spoilt: Job) -> None:
    prepared = spoilt.change(evaluation={"gate": {"mustBeatBase": True}}, training={"saveSteps": 1}).prepare()
    assert spoilt.train(prepared).promoted is False
    assert not (spoilt.output / "latest.json").exists()
    text = (spoilt.output / prepared.run_id / "report.json").read_text(encoding="utf-8")

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    loss = json.loads(text, parse_constant=refuse)["loss"]
    assert loss["evalBase"] is not None
    assert (loss["evalTuned"], loss["last"]) == (None, None)
