"""What is read from the cluster's own words."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.observed import Complaint, complaint, pod_view
from qlorajob import names


def event(reason: str, message: str, first: str, last: str) -> dict[str, Any]:
    """As the kubelet counts what it says again."""
    return {
        "metadata": {"creationTimestamp": _at(first)},
        "reason": reason,
        "message": message,
        "firstTimestamp": _at(first),
        "lastTimestamp": _at(last),
    }


def _at(time: str) -> str:
    return f"2026-11-23T{time}Z"


def test_no_event_is_no_complaint() -> None:
    assert complaint([]) == Complaint()


def test_a_complaint_is_the_last_event_s_and_as_old_as_the_first() -> None:
    events = [
        event("FailedMount", "no such volume", "10:00:05", "10:00:37"),
        event("FailedMount", "not allowed", "10:00:00", "10:00:01"),
    ]
    assert complaint(events) == Complaint("no such volume", timedelta(seconds=37))


def test_what_is_said_once_doesnt_last() -> None:
    assert complaint([event("FailedMount", "not allowed", "10:00:00", "10:00:00")]).lasting == timedelta()


def test_events_of_the_newer_kind_are_read_too() -> None:
    newer = {
        "metadata": {"creationTimestamp": _at("10:00:00")},
        "reason": "FailedCreate",
        "message": "exceeded quota",
        "eventTime": "2026-11-23T10:00:00.000000Z",
        "firstTimestamp": None,
        "lastTimestamp": None,
    }
    assert complaint([newer]) == Complaint("exceeded quota")


def test_what_was_said_before_the_last_pod_is_no_complaint_about_the_next() -> None:
    events = [
        event("FailedCreate", "webhook is down", "10:00:00", "10:00:05"),
        event("FailedCreate", "exceeded quota", "10:20:00", "10:20:00"),
    ]
    ended = datetime.fromisoformat(_at("10:10:00"))
    assert complaint(events, ended).message == "exceeded quota"
    assert complaint(events[:1], ended) == Complaint()


def test_warnings_that_arent_about_a_start_are_none_of_it() -> None:
    assert complaint([event("Unhealthy", "probe failed", "10:00:00", "10:01:00")]) == Complaint()


@pytest.mark.parametrize(("text", "gpus"), [("2", 2), ("", 0), ("two", 0), ("-2", 0), ("1e9", 0), ("9" * 5000, 0)])
def test_a_number_of_gpus_that_somebody_edited_harms_nobody(text: str, gpus: int) -> None:
    metadata = {"name": "x", "uid": "u", "annotations": {names.ANNOTATION_GPUS: text}}
    assert pod_view({"metadata": metadata, "spec": {}}).gpus == gpus


def test_what_the_kubelet_says_of_a_pod_that_it_evicted_is_read() -> None:
    said = "The node was low on resource: memory. "
    status = {"phase": "Failed", "reason": "Evicted", "message": said}
    assert pod_view({"metadata": {"name": "x", "uid": "u"}, "spec": {}, "status": status}).verdict == f"Evicted: {said}"
