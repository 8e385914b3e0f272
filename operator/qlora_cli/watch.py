"""Follow one QLoRAJob on a cluster through the API server's watch: nothing is polled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http import HTTPStatus
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
    """The object as it is, then every new state of it. Ends when the deadline has passed."""
    kind = (GROUP, VERSION, namespace, PLURAL)
    only = f"metadata.name={name}"
    while deadline is None or time.monotonic() < deadline:
        # A watch continues a list: without the list's version it would wait for the API server's cache to catch up.
        listed = api.list_namespaced_custom_object(*kind, field_selector=only)
        if not listed["items"]:
            raise LookupError(f"there is no qlorajob {name} in namespace {namespace}")
        yield from listed["items"]
        left = 3600 if deadline is None else max(1, int(deadline - time.monotonic()))
        version = listed["metadata"]["resourceVersion"]
        watching = watch.Watch()
        try:
            for event in watching.stream(
                api.list_namespaced_custom_object,
                *kind,
                field_selector=only,
                resource_version=version,
                timeout_seconds=left,
            ):
                if event["type"] == "DELETED":
                    raise LookupError(f"qlorajob {namespace}/{name} was deleted")
                yield event["object"]
        except client.ApiException as error:
            if error.status != HTTPStatus.GONE:  # the version is too old: list again
                raise


def _condition(status: QLoRAJobStatus, kind: str) -> Condition | None:
    """The condition of that type when it is True."""
    return next((item for item in status.conditions if item.type == kind and item.status == "True"), None)


def watch_job(name: str, *, namespace: str | None = None, timeout: float | None = None) -> bool:
    """Show the job's progress until it has ended. True when it is Complete.

    Raises:
        LookupError: there is no cluster or no such job, or it was deleted meanwhile.
        TimeoutError: it had not ended after `timeout` seconds.
    """
    try:
        config.load_kube_config()
    except config.ConfigException:
        raise LookupError("there is no kubeconfig: set KUBECONFIG, or use `qlora run` without a cluster") from None
    namespace = namespace or current_namespace()
    api = client.CustomObjectsApi()
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
