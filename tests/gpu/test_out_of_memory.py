"""A real out-of-memory error in mid-run: the job re-plans, goes on from its checkpoint, and ends as if nothing was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.folders import save_model, save_rows
from bench.jobs import Ran, run_step, spec_of
from bench.models import Shape
from qlora_vram.gpus import SHIPPED, GpuClass
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan as plan_for
from qlora_vram.replan import replan
from qlorajob.errors import ExitCode, Reason
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Prepared

MODEL = Shape("llama", 2048, 5632, 8, 16, 16, 32_000)
ROWS, LENGTH, STEPS = 16, 1024, 12
SAVED, SHORT_AFTER = 4, 6
"""A checkpoint every 4 steps; less memory after step 6."""
RUNGS = 5
"""More re-plans than that would be a ladder without an end."""
LIMITED = str(Path(__file__).with_name("short_of_memory.py"))
GPU = next(gpu for gpu in SHIPPED if gpu.name == "H100")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job, its first plan, and the memory that is left later."""

    spec: QLoRAJobSpec
    prepared: Prepared
    plan: Plan
    room: int
    """Bytes for torch."""
    environment: Mapping[str, str]

    def run(self, folder: Path, plan: Plan, *, short_after: int | None = None) -> Ran:
        """Train; with less memory after a step (0: from the start), or with all there is."""
        limits = {"QLORA_TEST_BYTES": str(self.room), "QLORA_TEST_ROWS": "4", "QLORA_TEST_AFTER": str(short_after)}
        return run_step(
            "train",
            self.spec,
            folder,
            plan=plan,
            prepared=self.prepared,
            launcher=("-m", "qlora_trainer") if short_after is None else (LIMITED,),
            environment={**self.environment, **limits},
        )


@dataclass(frozen=True, slots=True)
class Story:
    """What became of the job."""

    plans: list[Plan]
    runs: list[Ran]

    @property
    def losses(self) -> dict[int, float]:
        """By step; of a step that was repeated, the later one."""
        return {step: loss for ran in self.runs for step, loss in ran.losses.items()}


def scenario(
    tmp_path: Path, shape: Shape, length: int, environment: Mapping[str, str], gpu: GpuClass = GPU
) -> Scenario:
    model = save_model(shape, tmp_path / "model", max_length=length)
    rows = save_rows(tmp_path / "rows.jsonl", ROWS * STEPS, length)
    spec = spec_of(
        {
            "model": {"uri": f"file://{model}"},
            "dataset": {"uri": f"file://{rows}", "format": "text"},
            "lora": {"dropout": 0.0},
            "training": {
                "maxSteps": STEPS, "globalBatchSize": ROWS, "maxSequenceLength": length, "packing": False,
                "loggingSteps": 1, "saveSteps": SAVED, "learningRate": 1e-3,
            },
            "output": {"uri": f"file://{tmp_path / 'output'}"},
        }
    )  # fmt: skip
    prepared = run_step("prepare", spec, tmp_path / "prepare", environment=environment).report.prepared
    assert prepared is not None
    planned = plan_for(spec, prepared.facts, (gpu,))
    assert isinstance(planned, Plan), planned
    whole = planned.model_copy(
        update={"micro_batch_size": ROWS, "gradient_accumulation": 1, "checkpointing": "none", "checkpointed_layers": 0}
    )
    smaller = replan(replan_or_fail(whole, spec, prepared), spec, prepared.facts, (gpu,))
    assert isinstance(smaller, Plan), smaller
    # Room for the ladder's second rung, and not for the first plan. The CUDA context, which isn't torch's, is spare.
    return Scenario(spec, prepared, whole, smaller.predicted_peak_bytes, environment)


def replan_or_fail(plan: Plan, spec: QLoRAJobSpec, prepared: Prepared) -> Plan:
    found = replan(plan, spec, prepared.facts, (GPU,))
    assert not isinstance(found, DoesNotFit), found.message
    return found


def tell(case: Scenario, folder: Path) -> Story:
    """Run until it is done, as the operator would."""
    plans, runs = [case.plan], [case.run(folder, case.plan, short_after=SHORT_AFTER)]
    while runs[-1].report.exit_code is ExitCode.OUT_OF_MEMORY and len(plans) <= RUNGS:
        plans.append(replan_or_fail(plans[-1], case.spec, case.prepared))
        runs.append(case.run(folder, plans[-1], short_after=0))
    return Story(plans, runs)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return scenario(tmp_path_factory.mktemp("memory"), MODEL, LENGTH, {})


@pytest.fixture(scope="module")
def story(case: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(case, tmp_path_factory.mktemp("short"))


def test_the_first_plan_ends_out_of_memory(story: Story) -> None:
    report = story.runs[0].report
    assert (report.exit_code, report.reason) == (ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY)
    assert story.runs[0].losses.keys() == set(range(1, SHORT_AFTER + 1))


def test_a_later_plan_goes_on_from_the_checkpoint_and_ends(story: Story) -> None:
    last = story.runs[-1]
    assert last.report.exit_code is ExitCode.DONE, [plan.reason for plan in story.plans]
    assert min(last.losses) == SAVED + 1
    assert max(last.losses) == STEPS
    assert all(plan.micro_batch_size * plan.gradient_accumulation == ROWS for plan in story.plans)


def test_the_losses_are_those_of_a_run_that_had_enough(
    story: Story, case: Scenario, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = Path(case.spec.output.uri.removeprefix("file://"))
    output.rename(output.with_name("output-of-the-short-run"))  # else it is found there, already trained
    whole = case.run(tmp_path_factory.mktemp("whole"), case.plan)
    assert whole.report.exit_code is ExitCode.DONE
    print("with enough ", [round(loss, 3) for loss in whole.losses.values()])
    print("short of it ", [round(loss, 3) for loss in story.losses.values()])
    for step, loss in whole.losses.items():
        assert story.losses[step] == pytest.approx(loss, rel=0.01), f"step {step}"
