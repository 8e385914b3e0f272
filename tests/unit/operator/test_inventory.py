"""What the operator does about an event of a node: nothing, unless its GPUs or who may use them have changed."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_operator.config import OperatorConfig
from qlora_operator.dra_gpus import SliceFacts, slice_facts
from qlora_operator.handlers import is_stalled_without_job
from qlora_operator.inventory import Inventory
from qlora_operator.node_gpus import NodeFacts, node_facts
from tests.support import gpus

Json = dict[str, Any]

DEDICATED: Json = {"key": "dedicated", "value": "training", "effect": "NoSchedule"}
H100_DEVICE = gpus.device("gpu-0", "NVIDIA H100 80GB HBM3", 81559, "9.0")


class Cluster:
    """kopf's indexes of nodes and slices, and the inventory on them."""

    def __init__(self) -> None:
        self.nodes: dict[str, list[NodeFacts]] = {}
        self.slices: dict[str, list[SliceFacts]] = {}
        self.inventory = Inventory(self.nodes, self.slices, OperatorConfig())

    def see(self, raw: Json) -> bool:
        """An event of a Node: whether it is news for jobs that wait for a GPU."""
        facts = node_facts(raw)
        self.nodes[facts.name] = [facts]
        return self.inventory.node_changed(facts.name)

    def see_slice(self, raw: Json) -> bool:
        facts = slice_facts(raw)
        assert facts
        self.slices[facts.name] = [facts]
        return self.inventory.slice_changed(facts.name)

    def lose(self, name: str) -> bool:
        del self.nodes[name]
        return self.inventory.node_changed(name)

    @property
    def classes(self) -> list[str]:
        return [gpu.name for gpu in self.inventory.fleet().classes()]


def test_a_heartbeat_is_no_news_and_a_new_gpu_is() -> None:
    cluster = Cluster()
    assert cluster.see(gpus.whole("a", "NVIDIA-L4"))
    assert cluster.classes == ["L4"]
    assert not cluster.see(gpus.whole("a", "NVIDIA-L4"))
    assert cluster.see(gpus.whole("b", "NVIDIA-A10"))
    assert cluster.classes == ["L4", "A10"]


def test_a_gpu_that_goes_is_news() -> None:
    cluster = Cluster()
    cluster.see(gpus.whole("a", "NVIDIA-L4"))
    cluster.see(gpus.whole("b", "NVIDIA-A10"))
    assert cluster.lose("a")
    assert cluster.classes == ["A10"]
    assert not cluster.inventory.node_changed("a")


def test_a_taint_that_goes_is_news() -> None:
    cluster = Cluster()
    cluster.see(gpus.whole("a", "NVIDIA-L4", 1, DEDICATED))
    assert cluster.see(gpus.whole("a", "NVIDIA-L4"))


def test_nodes_without_gpus_are_no_news_unless_their_gpus_are_claimed() -> None:
    cluster = Cluster()
    assert not cluster.see(gpus.node("a", {}, {}))
    assert cluster.see_slice(gpus.resource_slice("a", H100_DEVICE))
    assert cluster.classes == ["H100"]
    assert not cluster.see_slice(gpus.resource_slice("a", H100_DEVICE))
    assert cluster.see(gpus.node("a", {}, {}, DEDICATED))


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({}, False),
        ({"prepared": {"key": "x"}, "conditions": [{"type": "Stalled", "status": "True"}]}, True),
        ({"prepared": {"key": "x"}, "conditions": [{"type": "Reconciling", "status": "True"}]}, False),
        ({"conditions": [{"type": "Stalled", "status": "True"}]}, False),
        ({"prepared": {"key": "x"}, "plan": {"gpus": 1}, "conditions": [{"type": "Stalled", "status": "True"}]}, True),
        ({"prepared": {"key": "x"}, "job": "x", "conditions": [{"type": "Stalled", "status": "True"}]}, False),
    ],
)
def test_only_prepared_jobs_that_have_not_started_are_looked_at_again(status: Json, waits: bool) -> None:
    assert is_stalled_without_job({"status": status}) is waits
