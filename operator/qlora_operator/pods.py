"""The trainer's pod, piece by piece: security, environment, volumes, resources. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qlora_operator.config import OperatorConfig
from qlora_operator.placement import GpuRequest, Manifest, placement
from qlorajob import names
from qlorajob.identity import digest
from qlorajob.plan import Plan, Requests
from qlorajob.run import RunConfig, Step
from qlorajob.spec import QLoRAJobSpec

CONTAINER: Final = "trainer"
USER: Final = 65532
CREDENTIALS_VOLUME: Final = "s3-credentials"
CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def pod_spec(
    step: Step, run: RunConfig, requests: Requests, config: OperatorConfig, gpus: GpuRequest | None = None
) -> Manifest:
    """The pod template's spec of one step. Passes the `restricted` Pod Security Standard."""
    spec, plan = run.spec, run.plan
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": run.grace_seconds or config.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(step, run, requests, config, gpus)],
        "volumes": [*_scratch_volumes(plan, requests), *_input_volumes(spec), *config.extra_volumes],
    }
    if config.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    if spec.service_account_name:
        pod["serviceAccountName"] = spec.service_account_name
    if step == "train":
        pod |= placement(spec, config, gpus)
    return pod


def _container(
    step: Step, run: RunConfig, requests: Requests, config: OperatorConfig, gpus: GpuRequest | None
) -> Manifest:
    limits = {"memory": requests.memory, "ephemeral-storage": requests.ephemeral_storage}
    container: Manifest = {
        "name": CONTAINER,
        "image": config.trainer_image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["python3", "-m", "qlora_trainer"],
        "args": [step],
        "env": [*_environment(run), *config.extra_env],
        "resources": {
            "requests": {"cpu": requests.cpu} | limits,
            "limits": limits | (gpus.limits if gpus else {}),
        }
        | (gpus.claims if gpus else {}),
        # A crash that writes no report leaves the last lines of its log as the message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [*_scratch_mounts(run.plan), *_input_mounts(run.spec), *config.extra_volume_mounts],
    }
    if step == "train":
        container["ports"] = [{"name": "metrics", "containerPort": names.METRICS_PORT}]
    return container


def _environment(run: RunConfig) -> Iterator[Manifest]:
    yield {"name": names.ENV_RUN_CONFIG, "value": run.to_json().replace("$", "$$")}  # $(X) would be expanded
    yield {"name": names.ENV_REPORT_PATH, "value": names.REPORT_PATH}
    yield {"name": names.ENV_METRICS_PORT, "value": str(names.METRICS_PORT)}
    yield {"name": names.ENV_MOUNT_ROOT, "value": names.MOUNT_ROOT}
    yield {"name": names.ENV_WORK_DIR, "value": names.WORK_DIR}
    yield {"name": "HOME", "value": names.WORK_DIR}
    credentials = run.spec.output.credentials_secret_ref
    if credentials:
        for key in CREDENTIALS:
            yield _from_secret(key, credentials.name, key, optional=key == "AWS_SESSION_TOKEN")
    token = run.spec.model.token_secret_ref
    if token:
        yield _from_secret("HF_TOKEN", token.name, token.key)


def _from_secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Manifest:
    reference: Manifest = {"name": secret, "key": key} | ({"optional": True} if optional else {})
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _scratch_volumes(plan: Plan | None, requests: Requests) -> Iterator[Manifest]:
    yield {"name": "work", "emptyDir": {"sizeLimit": requests.ephemeral_storage}}
    yield {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}
    if plan and plan.gpus:
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}


def _scratch_mounts(plan: Plan | None) -> Iterator[Manifest]:
    yield {"name": "work", "mountPath": names.WORK_DIR}
    yield {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108 (a mount of our own)
    if plan and plan.gpus:
        yield {"name": "shm", "mountPath": "/dev/shm"}  # noqa: S108


def claims(spec: QLoRAJobSpec) -> dict[str, str]:
    """PersistentVolumeClaims that the pods mount, each with the field that names it."""
    found = {name: field for kind, name, field in _references(spec) if kind == "pvc"}
    if spec.model.cache_claim:
        found.setdefault(spec.model.cache_claim, "model.cacheClaim")
    return found


def config_maps(spec: QLoRAJobSpec) -> dict[str, str]:
    """ConfigMaps that the pods mount, each with the field that names it."""
    return {name: field for kind, name, field in _references(spec) if kind == "configmap"}


def secrets(spec: QLoRAJobSpec) -> dict[str, str]:
    """Secrets that the pods refer to, each with the field that names it."""
    found: dict[str, str] = {}
    if spec.model.token_secret_ref:
        found[spec.model.token_secret_ref.name] = "model.tokenSecretRef"
    if spec.output.credentials_secret_ref:
        found[spec.output.credentials_secret_ref.name] = "output.credentialsSecretRef"
    return found


def _references(spec: QLoRAJobSpec) -> Iterator[tuple[str, str, str]]:
    """(pvc or configmap, object name, field) of every URI that is a mount."""
    validation = spec.dataset.validation
    uris = {
        "model.uri": spec.model.uri,
        "dataset.uri": spec.dataset.uri,
        "dataset.validation.uri": validation.uri if validation else None,
    }
    for field, uri in uris.items():
        scheme, _, rest = (uri or "").partition("://")
        if scheme in ("pvc", "configmap"):
            yield scheme, rest.split("/")[0], field


def _volume_name(kind: str, name: str) -> str:
    """Object names may be longer than volume names, and hold dots."""
    return f"{kind}-{digest(name)[:8]}"


def _input_volumes(spec: QLoRAJobSpec) -> Iterator[Manifest]:
    for claim in claims(spec):
        yield {"name": _volume_name("claim", claim), "persistentVolumeClaim": {"claimName": claim}}
    for config_map in config_maps(spec):
        yield {"name": _volume_name("config", config_map), "configMap": {"name": config_map}}
    credentials = spec.output.credentials_secret_ref
    if credentials:
        # The variables say what is missing, but stay as they were; the kubelet swaps files when the Secret changes.
        items = [{"key": key, "path": key} for key in CREDENTIALS]
        secret = {"secretName": credentials.name, "optional": True, "defaultMode": 0o440, "items": items}
        yield {"name": CREDENTIALS_VOLUME, "secret": secret}


def _input_mounts(spec: QLoRAJobSpec) -> Iterator[Manifest]:
    mounted = {name for kind, name, _ in _references(spec) if kind == "pvc"}
    for claim in claims(spec):
        volume = _volume_name("claim", claim)
        if claim in mounted:
            yield {"name": volume, "mountPath": f"{names.MOUNT_ROOT}/pvc/{claim}", "readOnly": True}
        if claim == spec.model.cache_claim:
            yield {"name": volume, "mountPath": names.CACHE_DIR}
    for config_map in config_maps(spec):
        volume = _volume_name("config", config_map)
        yield {"name": volume, "mountPath": f"{names.MOUNT_ROOT}/configmap/{config_map}", "readOnly": True}
    if spec.output.credentials_secret_ref:
        yield {"name": CREDENTIALS_VOLUME, "mountPath": names.CREDENTIALS_DIR, "readOnly": True}
