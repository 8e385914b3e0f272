"""What a running training answers on its port."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qlora_trainer.metrics import Telemetry
from qlorajob.status import Progress

GPU_GAUGES = {f"qlora_gpu_memory_{kind}_bytes" for kind in ("allocated", "reserved", "peak", "predicted")}


@pytest.fixture
def telemetry() -> Telemetry:
    telemetry = Telemetry()
    telemetry.advance(step=3, total_steps=60, loss=2.5, tokens_per_second=301.5, eta_seconds=90)
    return telemetry


@pytest.fixture
def url(telemetry: Telemetry) -> str:
    return f"http://127.0.0.1:{telemetry.serve(0)}"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()  # type: ignore[no-any-return]


def _gauges(text: str) -> dict[str, float]:
    return {family.name: family.samples[0].value for family in text_string_to_metric_families(text)}


def test_progress_is_what_the_contract_says(url: str) -> None:
    progress = Progress.model_validate_json(_get(f"{url}/progress"))
    assert (progress.step, progress.total_steps, progress.loss, progress.eta_seconds) == (3, 60, 2.5, 90)


def test_progress_says_when(url: str) -> None:
    assert "updatedAt" in json.loads(_get(f"{url}/progress"))


def test_a_loss_that_is_no_number_any_more_is_left_out_of_the_progress(telemetry: Telemetry, url: str) -> None:
    """The API server would refuse the status that it is copied into, and so everything else in it."""
    telemetry.advance(loss=float("nan"), eval_loss=float("inf"))
    progress = Progress.model_validate_json(_get(f"{url}/progress"))
    assert (progress.step, progress.loss, progress.eval_loss) == (3, None, None)


def test_the_gauges_follow_the_progress(url: str) -> None:
    gauges = _gauges(_get(f"{url}/metrics"))
    assert gauges == {
        "qlora_train_step": 3,
        "qlora_train_steps": 60,
        "qlora_train_epoch": 0,
        "qlora_train_loss": 2.5,
        "qlora_train_tokens_per_second": 301.5,
    }


def test_what_is_not_known_yet_is_absent_instead_of_zero() -> None:
    url = f"http://127.0.0.1:{Telemetry().serve(0)}"
    assert _gauges(_get(f"{url}/metrics")) == {}


def test_gpu_memory_is_absent_on_cpu(telemetry: Telemetry, url: str) -> None:
    telemetry.speed(step_seconds=1.5, samples_per_second=20)
    assert not GPU_GAUGES & _gauges(_get(f"{url}/metrics")).keys()


def test_gpu_memory_is_there_on_a_gpu(telemetry: Telemetry, url: str) -> None:
    telemetry.gpu_memory(allocated=1, reserved=2, peak=3, predicted=4)
    assert _gauges(_get(f"{url}/metrics")).keys() >= GPU_GAUGES


def test_metrics_have_no_labels(url: str) -> None:
    families = text_string_to_metric_families(_get(f"{url}/metrics"))
    assert [sample.labels for family in families for sample in family.samples] == [{}] * 5


def test_another_path_is_not_found(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(f"{url}/secrets")


def test_a_port_that_is_taken_does_not_stop_the_training(telemetry: Telemetry) -> None:
    with socket.create_server(("", 0)) as taken:
        assert telemetry.serve(taken.getsockname()[1]) is None
