"""reconcile under any history of edits, crashes, losses and ends: what must never happen, and that it gets there."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlora_operator.decision import DeleteJob
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import plan_key
from qlorajob.plan import Plan
from qlorajob.run import RunConfig
from qlorajob.status import Phase
from tests.support import gpus
from tests.support.reports import adapter, failure, merge_report, prepare_report, train_report
from tests.unit.operator.world import World, qlorajob

SEEDS = st.integers(0, 3)
STEPS = ("prepare", "train", "merge")
GPU_JOB = {"resources": {"gpuClass": "auto"}, "training": {"seed": 0, "globalBatchSize": 4}}
NODES = {"a": gpus.whole("a", "NVIDIA-L4"), "b": gpus.whole("b", "NVIDIA-A100-SXM4-40GB")}


class Histories(RuleBasedStateMachine):
    """The cluster, users and accidents in any order. `finished` plays S3: what has a manifest there."""

    restarts: ClassVar[int] = 0
    """Of the operator, in all histories so far. It keeps nothing, so each look is a new operator's first."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(qlorajob({"training": {"seed": 0}}))
        self.finished: set[str] = set()
        self.trained: list[str] = []

    # The operator

    @rule()
    def look(self) -> None:
        self.world.look()

    @rule()
    def die_before_the_status_is_written(self) -> None:
        type(self).restarts += 1
        self.world.look(record=False)

    # Users

    @rule(seed=SEEDS)
    def edit_the_seed(self, seed: int) -> None:
        self.world.edit({"training": {"seed": seed}})

    @rule(enabled=st.booleans())
    def edit_merge(self, enabled: bool) -> None:
        self.world.edit({"merge": {"enabled": enabled}})

    @rule(suspend=st.booleans())
    def edit_suspend(self, suspend: bool) -> None:
        self.world.edit({"suspend": suspend})

    @rule(value=st.sampled_from("ab"))
    def ask_for_a_retry(self, value: str) -> None:
        self.world.edit(annotations={"qlora.dev/retry-at": value})

    # The cluster

    @rule()
    def collect_pods(self) -> None:
        self.world.collect()

    # Jobs are lost only once the status names them. One that the operator made in its last breath and that ends and
    # expires before another operator starts is unknown to reconcile: there the trainer's own look into S3 has to do.

    @rule()
    def expire_finished_jobs(self) -> None:
        gone = {name for name, job in self.world.jobs.items() if not job.live} & self.world.recorded
        self.world.jobs = {name: job for name, job in self.world.jobs.items() if name not in gone}
        self.world.collect()

    @precondition(lambda self: self.world.jobs.keys() & self.world.recorded)
    @rule(data=st.data())
    def lose_a_job(self, data: st.DataObject) -> None:
        del self.world.jobs[data.draw(st.sampled_from(sorted(self.world.jobs.keys() & self.world.recorded)))]

    # The trainer

    def _only_live_pod(self, step: str) -> bool:
        jobs = {job.uid for job in self.world.jobs.values() if job.live}
        live = [pod for pod in self.world.pods.values() if pod.step == step and pod.live]
        return len(live) == 1 and live[0].job_uid in jobs

    @precondition(lambda self: self._only_live_pod("train"))
    @rule()
    def start_training(self) -> None:
        self.world.run()

    @precondition(lambda self: self._only_live_pod("prepare"))
    @rule()
    def end_prepare(self) -> None:
        pod = self.world.pod("prepare")
        key = _key_of(self.world, pod.job_name)
        run_id = f"run-{key}"
        done = adapter(run_id) if run_id in self.finished else None
        self.world.end("prepare", 0, prepare_report(key, run_id, artifacts=done))

    @precondition(lambda self: self._only_live_pod("train"))
    @rule()
    def end_training(self) -> None:
        pod = self.world.pod("train")
        run_id = self.world.manifests[pod.job_name]["metadata"]["labels"]["qlora.dev/run"]
        self.trained.append(run_id)
        self.finished.add(run_id)
        self.world.end("train", 0, train_report(run_id))

    @precondition(lambda self: self._only_live_pod("merge"))
    @rule()
    def end_merge(self) -> None:
        pod = self.world.pod("merge")
        run_id = self.world.manifests[pod.job_name]["metadata"]["labels"]["qlora.dev/run"]
        self.world.end("merge", 0, merge_report(run_id))

    @rule(step=st.sampled_from(STEPS), code=st.sampled_from([ExitCode.INVALID, ExitCode.OUT_OF_MEMORY]))
    def fail(self, step: str, code: ExitCode) -> None:
        if self._only_live_pod(step):
            self.world.end(step, code, failure(step, code, Reason.DATASET_INVALID, "no"))

    # What must hold

    @invariant()
    def at_most_one_live_training_job(self) -> None:
        assert len(self.world.live("train")) <= 1

    @invariant()
    def at_most_one_pod_writes_to_s3(self) -> None:
        writers = [pod for pod in self.world.pods.values() if pod.live and pod.step != "prepare"]
        assert len(writers) <= 1

    @invariant()
    def no_run_is_trained_twice(self) -> None:
        assert len(self.trained) == len(set(self.trained))

    @invariant()
    def complete_and_failed_exclude_each_other(self) -> None:
        assert not {"Complete", "Failed"} <= self.world.true()

    @invariant()
    def ready_means_complete(self) -> None:
        true = self.world.true()
        assert ("Ready" in true) == ("Complete" in true)

    def teardown(self) -> None:
        """With a cluster that works and a user who asks again, every history ends well, and rests."""
        self.world.edit({"suspend": False})
        for number in range(25):
            if self.world.status.phase is Phase.FAILED:
                self.world.edit({"backoffLimit": number})
            self.world.collect()
            self.world.look()
            for step, end in (("prepare", self.end_prepare), ("train", self.end_training), ("merge", self.end_merge)):
                if self._only_live_pod(step):
                    end()
            self.world.now = self.world.now.replace(year=self.world.now.year + 1)
        assert self.world.status.phase is Phase.SUCCEEDED
        decision = self.world.look()
        assert not [action for action in decision.actions if not isinstance(action, DeleteJob)]
        self.no_run_is_trained_twice()


class HistoriesOnGpus(Histories):
    """The same on a cluster whose GPUs run out of memory, come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(qlorajob(GPU_JOB), fleet=gpus.fleet(*NODES.values()))
        self.nodes = set(NODES)
        self.planned_for: object = None
        self.rungs: dict[int, Plan] = {}
        """Plans of the current ladder, by how often the run was out of memory."""

    @rule(name=st.sampled_from(sorted(NODES)))
    def a_node_comes_or_goes(self, name: str) -> None:
        self.nodes ^= {name}
        self.world.fleet = gpus.fleet(*(NODES[node] for node in sorted(self.nodes)))
        self.rungs = {}

    @rule(rows=st.sampled_from(["auto", 1, 2]))
    def edit_the_micro_batch(self, rows: int | str) -> None:
        self.world.edit({"training": {"microBatchSize": rows}})

    @precondition(lambda self: self._only_live_pod("train"))
    @rule()
    def run_out_of_memory(self) -> None:
        self.world.end("train", ExitCode.OUT_OF_MEMORY)

    @invariant()
    def each_rung_takes_less_and_stays_what_it_is(self) -> None:
        """Until the spec is edited, or a node comes or goes."""
        run, plan, key = self.world.status.run, self.world.status.plan, plan_key(self.world.job.spec)
        if run is None or plan is None or run.plan_key != key:
            return
        if self.planned_for != (run.id, key):
            self.planned_for, self.rungs = (run.id, key), {}
        before = self.rungs.get(run.replans - 1)
        assert before is None or _size(plan) > _size(before)
        assert not run.replans or self.rungs.setdefault(run.replans, plan) == plan
        self.rungs[run.replans] = plan

    def teardown(self) -> None:
        self.world.fleet = gpus.fleet(*NODES.values())
        super().teardown()


def _size(plan: Plan) -> tuple[int, bool, int, int, bool]:
    """How far down the ladder a plan stands."""
    again = plan.checkpointed_layers, plan.offload_checkpoints
    return plan.gpu_memory_mib, not plan.cache_weights, -plan.micro_batch_size, *again


def _key_of(world: World, job_name: str) -> str:
    """The key that this Job's RunConfig holds."""
    return _config_of(world, job_name).key


def _config_of(world: World, job_name: str) -> RunConfig:
    """What this Job's pods are given."""
    container = world.manifests[job_name]["spec"]["template"]["spec"]["containers"][0]
    return RunConfig.from_json(next(item["value"] for item in container["env"] if item["name"] == "QLORA_RUN_CONFIG"))


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40)
TestHistoriesOnGpus = HistoriesOnGpus.TestCase
TestHistoriesOnGpus.settings = settings(TestHistories.settings, max_examples=50)


class ManyHistories(HistoriesOnGpus):
    """The same, for longer."""

    restarts: ClassVar[int] = 0


@pytest.mark.long
class TestThousandRestarts(ManyHistories.TestCase):  # type: ignore[name-defined,misc]
    """At least a thousand deaths of the operator between its actions and its status."""

    settings = settings(TestHistories.settings, max_examples=1000, stateful_step_count=60)

    def runTest(self) -> None:  # noqa: N802 - unittest's name
        super().runTest()
        assert ManyHistories.restarts >= 1000
