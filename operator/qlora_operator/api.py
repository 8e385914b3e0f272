"""The only module that talks to the API server (kopf has its own client, for watching).

Every call raises TemporaryApiError (try again later) or PermanentApiError (trying again won't help), nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from qlora_operator.decision import Event
from qlora_operator.election import Lease
from qlora_operator.placement import Manifest
from qlora_operator.store import Kind, Present
from qlorajob import names
from qlorajob.resource import Metadata

MERGE_PATCH: Final = "application/merge-patch+json"
TIMEOUT: Final = 30.0
LEASE_TIMEOUT: Final = 5.0
"""A leader has to learn in time that it can't renew."""
METADATA_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PATHS: Final[dict[Kind, str]] = {
    "qlorajobs": f"/apis/{names.GROUP}/{names.VERSION}",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
}
PERMANENT: Final = frozenset({400, 403, 405, 413, 415, 422})
COMPONENT: Final = "qlora-operator"


class ApiError(Exception):
    """A call to the API server failed. The message is what it said."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class TemporaryApiError(ApiError):
    """Unreachable, overloaded, or a conflict: the same call may succeed later."""


class PermanentApiError(ApiError):
    """Forbidden or invalid: somebody has to change something."""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The one place where client errors become ours."""
    try:
        yield
    except ApiException as error:
        kind = PermanentApiError if error.status in PERMANENT else TemporaryApiError
        raise kind(_message(error), int(error.status or 0)) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise TemporaryApiError(f"{type(error).__name__}: {error}") from error


def _message(error: ApiException) -> str:
    """The Status object's message; a quota denial, for example, says there what is exhausted."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


class Api:
    """Reads and writes of the operator: each needs one verb of the chart's roles.

    `may_write` is asked before each write: an operator that doesn't lead any more must not finish what it began.
    """

    def __init__(self, api_client: client.ApiClient) -> None:
        self.may_write: Callable[[], bool] = lambda: True
        self._client = api_client
        self._batch = client.BatchV1Api(api_client)
        self._core = client.CoreV1Api(api_client)
        self._custom = client.CustomObjectsApi(api_client)
        self._resource = client.ResourceV1Api(api_client)

    @classmethod
    async def connect(cls) -> Api:
        """With the pod's service account, or with $KUBECONFIG."""
        settings = client.Configuration()
        try:
            config.load_incluster_config(settings)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=settings)
        return cls(client.ApiClient(settings))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if not self.may_write():
            raise TemporaryApiError("this operator isn't the leader")
        with _translated():
            yield

    def leases(self, namespace: str, name: str) -> ApiLeases:
        """The Lease that decides which operator leads."""
        return ApiLeases(client.CoordinationV1Api(self._client), namespace, name)

    async def close(self) -> None:
        """Close connections."""
        await self._client.close()

    async def check_crd(self) -> None:
        """Raise where there is no CRD: kopf would wait for it for ever, in silence."""
        try:
            with _translated():
                await self._custom.list_cluster_custom_object(
                    names.GROUP, names.VERSION, names.PLURAL, limit=1, _request_timeout=TIMEOUT
                )
        except ApiError as error:
            if error.status == 403:  # an operator of some namespaces may not look at all of them
                return
            if error.status == 404:
                raise PermanentApiError("the CRD qlorajobs.qlora.dev isn't installed") from error
            raise

    async def present(self, kind: Kind, namespace: str) -> Present:
        """Which objects of ours there are in a namespace. From the API server's cache, and without their content."""
        query = [("resourceVersion", "0")]
        if kind != "qlorajobs":
            query.append(("labelSelector", names.LABEL_JOB))
        with _translated():
            request = await self._client.param_serialize(
                "GET",
                f"{PATHS[kind]}/namespaces/{namespace}/{kind}",
                query_params=query,
                header_params={"Accept": METADATA_ONLY},
                auth_settings=["BearerToken"],
            )
            answer = await self._client.call_api(*request, _request_timeout=TIMEOUT)
            content = await answer.read()
        if answer.status != 200:
            raise TemporaryApiError(f"{answer.status} {answer.reason}", int(answer.status))
        found = json.loads(content)
        uids = frozenset(item["metadata"]["uid"] for item in found["items"])
        return Present(int(found["metadata"]["resourceVersion"]), uids)

    async def create_job(self, manifest: Manifest) -> Manifest | None:
        """The new Job; None when it is there already, which is as good: its name holds the owner's uid."""
        namespace = manifest["metadata"]["namespace"]
        try:
            with self._writing():
                job = await self._batch.create_namespaced_job(namespace, manifest, _request_timeout=TIMEOUT)
        except TemporaryApiError as error:
            if error.status == 409:
                return None
            raise
        created: Manifest = self._client.sanitize_for_serialization(job)
        return created

    async def create_claim_template(self, manifest: Manifest) -> None:
        """Create a ResourceClaimTemplate; done when it is there already: its name is a digest of its content."""
        namespace = manifest["metadata"]["namespace"]
        try:
            with self._writing():
                await self._resource.create_namespaced_resource_claim_template(
                    namespace, manifest, _request_timeout=TIMEOUT
                )
        except TemporaryApiError as error:
            if error.status != 409:
                raise

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete that very Job; its pods get SIGTERM and follow. Done when it is gone already."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            with self._writing():
                await self._batch.delete_namespaced_job(name, namespace, body=body, _request_timeout=TIMEOUT)
        except TemporaryApiError as error:
            if error.status not in (404, 409):
                raise

    async def patch_status(self, metadata: Metadata, patch: Mapping[str, Any]) -> Manifest | None:
        """The QLoRAJob with its new status; None when that very object is gone."""
        body = {"metadata": {"uid": metadata.uid}, "status": patch}
        try:
            with self._writing():
                patched: Manifest = await self._custom.patch_namespaced_custom_object_status(
                    names.GROUP,
                    names.VERSION,
                    metadata.namespace,
                    names.PLURAL,
                    metadata.name,
                    body,
                    _content_type=MERGE_PATCH,
                    _request_timeout=TIMEOUT,
                )
        except TemporaryApiError as error:
            if error.status == 404:
                return None
            raise
        return patched

    async def config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        """Data of a ConfigMap."""
        with _translated():
            found = await self._core.read_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT)
        return found.data or {}

    async def patch_config_map(self, namespace: str, name: str, data: Mapping[str, str | None]) -> Mapping[str, str]:
        """Set keys of a ConfigMap, and remove those that are None; all its data afterwards."""
        with self._writing():
            patched = await self._core.patch_namespaced_config_map(
                name, namespace, {"data": data}, _content_type=MERGE_PATCH, _request_timeout=TIMEOUT
            )
        return patched.data or {}

    async def create_event(self, metadata: Metadata, event: Event) -> None:
        """Attach an event to the QLoRAJob."""
        now = datetime.now(UTC)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            # As client-go names them: events of one second are listed in the order in which they happened.
            "metadata": {"name": f"{metadata.name}.{time.time_ns():x}", "namespace": metadata.namespace},
            "involvedObject": {
                "apiVersion": f"{names.GROUP}/{names.VERSION}",
                "kind": names.KIND,
                "name": metadata.name,
                "namespace": metadata.namespace,
                "uid": metadata.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        with self._writing():
            await self._core.create_namespaced_event(metadata.namespace, body, _request_timeout=TIMEOUT)

    async def warnings(self, namespace: str, uid: str) -> list[Manifest]:
        """Warning events about one object."""
        with _translated():
            found = await self._core.list_namespaced_event(
                namespace, field_selector=f"involvedObject.uid={uid},type=Warning", _request_timeout=TIMEOUT
            )
        return [self._client.sanitize_for_serialization(event) for event in found.items]


class ApiLeases:
    """One Lease, read and written with a short time-out."""

    def __init__(self, coordination: client.CoordinationV1Api, namespace: str, name: str) -> None:
        self._coordination, self._namespace, self._name = coordination, namespace, name

    async def read(self) -> Lease | None:
        """None where there is none."""
        try:
            with _translated():
                return _lease(
                    await self._coordination.read_namespaced_lease(
                        self._name, self._namespace, _request_timeout=LEASE_TIMEOUT
                    )
                )
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def write(self, lease: Lease) -> Lease:
        """Create it, or change it if nobody else did since; what is there then. Raises TemporaryApiError otherwise."""
        body: Manifest = {
            "metadata": {"name": self._name},
            "spec": {
                "holderIdentity": lease.holder,
                "leaseDurationSeconds": lease.seconds,
                "leaseTransitions": lease.transitions,
                "acquireTime": _micro_time(lease.acquired_at),
                "renewTime": _micro_time(lease.renewed_at),
            },
        }
        with _translated():
            if not lease.version:
                return _lease(
                    await self._coordination.create_namespaced_lease(
                        self._namespace, body, _request_timeout=LEASE_TIMEOUT
                    )
                )
            body["metadata"]["resourceVersion"] = lease.version
            return _lease(
                await self._coordination.patch_namespaced_lease(
                    self._name, self._namespace, body, _content_type=MERGE_PATCH, _request_timeout=LEASE_TIMEOUT
                )
            )


def _lease(found: client.V1Lease) -> Lease:
    spec = found.spec or client.V1LeaseSpec()
    return Lease(
        holder=spec.holder_identity or "",
        seconds=spec.lease_duration_seconds or 1,
        transitions=spec.lease_transitions or 0,
        acquired_at=spec.acquire_time,
        renewed_at=spec.renew_time,
        version=found.metadata.resource_version,
    )


def _micro_time(value: datetime | None) -> str | None:
    """metav1.MicroTime needs all six digits, which the client leaves out where all are zero."""
    return value.astimezone(UTC).replace(microsecond=value.microsecond or 1).isoformat() if value else None
