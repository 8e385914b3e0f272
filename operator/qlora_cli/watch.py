"""Follow one QLoRAJob on a cluster through the API server's watch: nothing is polled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kubernetes import client, config, watch
from qlora_cli.display import ProgressDisplay
from qlorajob.names import GROUP, PLURAL, VERSION
from qlorajob.status import Condition, QLoRAJobStatus


def current_namespace() -> str:
    """The namespace of the current kubeconfig context."""
    _, active = config.list_kube_config_contexts()
    return str(active["context"].get("namespace") or "default")


def _statuses(api: client.CustomObjectsApi, namespace: str, name: str, deadline: float | None) -> Iterator[Any]:
    """Every new state of the object, from now on. Ends when the deadline has passed."""
    while deadline is None or time.monotonic() < deadline:
        left = 3600 if deadline is None else max(1, int(deadline - time.monotonic()))
        stream = watch.Watch().stream(
            api.list_namespaced_custom_object,
            GROUP,
            VERSION,
            namespace,
            PLURAL,
            field_selector=f"metadata.name={name}",
            timeout_seconds=left,
        )
        for event in stream:
            if event["type"] == "DELETED":
                raise LookupError(f"qlorajob {namespace}/{name} was deleted")
            yield event["object"]


def _condition(status: QLoRAJobStatus, kind: str) -> Condition | None:
    """The condition of that type when it is True."""
    return next((item for item in status.conditions if item.type == kind and item.status == "True"), None)


def watch_job(name: str, *, namespace: str | None = None, timeout: float | None = None) -> bool:
    """Show the job's progress until it has ended. True when it is Complete.

    Raises:
        LookupError: there is no such job, or it was deleted meanwhile.
        TimeoutError: it had not ended after `timeout` seconds.
    """
    config.load_kube_config()
    namespace = namespace or current_namespace()
    api = client.CustomObjectsApi()
    try:
        api.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
    except client.ApiException as error:
        if error.status == 404:
            raise LookupError(f"there is no qlorajob {name} in namespace {namespace}") from None
        raise
    deadline = None if timeout is None else time.monotonic() + timeout
    with ProgressDisplay() as display:
        said: str | None = None
        for item in _statuses(api, namespace, name, deadline):
            status = QLoRAJobStatus.model_validate(item.get("status") or {})
            if status.observed_generation != item["metadata"]["generation"]:
                continue
            message = _headline(status)
            if message != said:
                display.say(message)
                said = message
            display.update(status.phase or "Pending", status.progress)
            if _condition(status, "Finished"):
                return _condition(status, "Complete") is not None
    raise TimeoutError(f"qlorajob {namespace}/{name} had not ended after {timeout:.0f} s")


def _headline(status: QLoRAJobStatus) -> str:
    """The phase and, where the operator gives one, the sentence that explains it."""
    telling = _condition(status, "Stalled") or next((item for item in status.conditions if item.type == "Ready"), None)
    return f"{status.phase or 'Pending'}: {telling.message}" if telling and telling.message else str(status.phase)
