"""reconcile on work that waits: suspended, queued, or for somebody to mend something."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from qlora_operator.observed import Complaint
from qlorajob.errors import Reason
from qlorajob.status import Phase
from tests.support.reports import train_report
from tests.unit.operator.world import World, qlorajob, trained, training

# Suspend


def test_suspend_deletes_the_live_job() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    assert world.live("train") == []
    assert world.status.phase is Phase.SUSPENDED
    assert "Suspended" in world.true()
    assert not {"Reconciling", "Stalled", "Failed"} & world.true()


def test_a_suspended_job_says_that_its_pod_is_still_stopping() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.look()
    assert "writing a checkpoint" in world.message()
    world.collect()
    world.look()
    assert "last checkpoint" in world.message()


def test_resume_is_the_next_attempt_of_the_same_run() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.collect()
    world.edit({"suspend": False})
    world.look()
    assert world.status.run is not None
    assert (world.status.run.id, world.status.run.attempt) == ("run1", 2)
    assert world.condition("Suspended").status == "False"  # type: ignore[union-attr]


def test_resume_waits_for_the_stopping_pod() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.edit({"suspend": False})
    world.look()
    assert world.live("train") == []


def test_a_job_created_suspended_does_nothing() -> None:
    world = World(qlorajob({"suspend": True}))
    assert world.look().actions == ()
    assert world.status.phase is Phase.SUSPENDED


def test_training_that_ends_while_it_is_being_suspended_counts() -> None:
    world = training()
    world.edit({"suspend": True})
    world.end("train", 0, train_report())
    world.look()
    assert world.status.phase is Phase.SUCCEEDED


def test_a_finished_job_stays_finished_when_suspended() -> None:
    world = trained()
    world.edit({"suspend": True})
    world.look()
    assert world.status.phase is Phase.SUCCEEDED


# Queue


def test_a_queued_job_waits_suspended_for_admission() -> None:
    world = World(qlorajob({"queueName": "team-a"}))
    world.prepare()
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert "queue team-a" in world.message()
    world.admit()
    world.run()
    world.look()
    assert world.status.phase is Phase.TRAINING


def test_preemption_is_a_requeue_not_a_failure() -> None:
    world = World(qlorajob({"queueName": "team-a"}))
    world.prepare()
    world.admit()
    world.run()
    world.look()
    name = world.live("train")[0].name
    world.jobs[name] = replace(world.jobs[name], state="suspended")
    world.end("train", 143)
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert "Failed" not in world.true()
    assert world.status.job == name


# Things that wait for somebody


@pytest.mark.parametrize(
    ("reason", "message", "expected", "says"),
    [
        (
            "CreateContainerConfigError",
            'secret "s3-credentials" not found',
            "SecretNotFound",
            "spec.output.credentialsSecretRef: there is no Secret s3-credentials in this namespace",
        ),
        (
            "CreateContainerConfigError",
            "couldn't find key AWS_ACCESS_KEY_ID in Secret team/s3-credentials",
            "SecretNotFound",
            "spec.output.credentialsSecretRef: Secret s3-credentials has no key AWS_ACCESS_KEY_ID",
        ),
        ("ErrImagePull", "no such host", "ImageUnavailable", "no such host"),
        ("ImagePullBackOff", "back-off", "ImageUnavailable", "back-off"),
        ("CreateContainerError", "unresolvable CDI devices", "PodCreationFailed", "unresolvable CDI devices"),
    ],
)
def test_a_container_that_cant_start_stalls_the_job_until_it_can(
    reason: str, message: str, expected: str, says: str
) -> None:
    world = World()
    world.look()
    world.wait_in("prepare", reason, message)
    world.look()
    assert world.reason() == expected
    assert says in world.message()
    assert "Stalled" in world.true()
    assert not {"Failed", "Finished", "Reconciling"} & world.true()
    world.change("prepare", waiting=None)
    world.run("prepare")
    world.look()
    assert "Stalled" not in world.true()


def test_a_missing_claim_names_its_field() -> None:
    world = World(qlorajob({"model": {"cacheClaim": "weights"}}))
    world.look()
    world.wait_in("prepare", "Unschedulable", 'persistentvolumeclaim "weights" not found', scheduled=False)
    world.look()
    assert world.reason() == Reason.CLAIM_NOT_FOUND
    assert world.message().startswith("spec.model.cacheClaim: ")


def test_a_missing_config_map_is_read_from_the_mounts_warning() -> None:
    world = World(qlorajob({"dataset": {"uri": "configmap://rows/train.jsonl"}}))
    world.look()
    warning = 'MountVolume.SetUp failed for volume "config-1" : configmap "rows" not found'
    world.change("prepare", scheduled=True, complaint=Complaint(warning))
    world.look()
    assert world.reason() == Reason.CONFIG_MAP_NOT_FOUND
    assert world.message() == "spec.dataset.uri: there is no ConfigMap rows in this namespace"


@pytest.mark.parametrize(("seconds", "stalled"), [(0, False), (2, False), (60, True)])
def test_a_volume_that_cant_be_mounted_stalls_the_job_when_trying_again_doesnt_help(
    seconds: int, stalled: bool
) -> None:
    world = World()
    world.look()
    said = "Unable to attach or mount volumes: no relationship found between node 'gpu-1' and this object"
    world.change("prepare", scheduled=True, complaint=Complaint(said, timedelta(seconds=seconds)))
    world.look()
    assert ("Stalled" in world.true()) is stalled
    assert (world.reason() == Reason.VOLUME_NOT_READY) is stalled


def test_a_pod_without_a_node_shows_the_schedulers_words() -> None:
    world = World()
    world.prepare()
    world.wait_in("train", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", scheduled=False)
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert world.reason() == Reason.UNSCHEDULABLE
    assert "Insufficient nvidia.com/gpu" in world.message()
    assert "Stalled" not in world.true()
