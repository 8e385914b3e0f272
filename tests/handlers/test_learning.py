"""What a finished run took is in the real ConfigMap, with the chart's rights, and in the next job's plan."""

from __future__ import annotations

import json
from typing import Any

from qlora_operator.experience import CONFIG_MAP
from qlorajob.identity import prepare_key
from qlorajob.resource import parse
from tests.handlers.stage import Stage
from tests.support import gpus
from tests.support.nodes import Simulation
from tests.support.reports import LLAMA_7B, prepare_report, train_report

RESOURCES = {"gpuClass": "L4", "tolerations": [gpus.TOLERATION]}
TRAINING = {"microBatchSize": 1, "gradientCheckpointing": True, "maxSequenceLength": 512}


def plan(stage: Stage, name: str) -> dict[str, Any]:
    """A prepared job's plan."""
    stage.apply(name, resources=RESOURCES, training=TRAINING)
    key = prepare_key(parse(stage.get("qlj", name)).spec)
    stage.finish(stage.pod(name, "prepare"), prepare_report(key, name, facts=LLAMA_7B))
    found: dict[str, Any] = stage.phase(name, "Queued")["plan"]
    return found


def data(stage: Stage) -> dict[str, str]:
    found: dict[str, str] = stage.get("configmap", CONFIG_MAP).get("data") or {}
    return found


def test_a_restarted_operator_plans_with_what_a_run_took_and_leaves_what_others_wrote(stage: Stage) -> None:
    with Simulation(stage.cluster) as simulated:
        simulated.add(gpus.whole("sim-l4", "NVIDIA-L4", 1, gpus.SIMULATED))
        stage.kubectl(
            "patch", "configmap", CONFIG_MAP, "--type=merge", "-p", json.dumps({"data": {"note": "hands off"}})
        )
        took = int(plan(stage, "first")["predictedPeakBytes"] * 1.1)
        pod = stage.pod("first", "train")
        stage.run(pod)
        stage.phase("first", "Training")
        stage.finish(pod, train_report("first", peak_bytes=took))
        assert stage.phase("first", "Succeeded")["memory"]["peakBytes"] == took
        kept = data(stage)
        assert len(kept) == 2
        assert kept.pop("note") == "hands off"
        (text,) = kept.values()
        assert json.loads(text)["peakBytes"] == took
        stage.operator.kill()
        stage.operator.start()
        assert abs(plan(stage, "second")["predictedPeakBytes"] / took - 1) < 0.02
