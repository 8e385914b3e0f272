"""The administrator's settings, rendered by the chart as one YAML file. Users' settings are in the QLoRAJob."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from ruamel.yaml import YAML

from qlora_vram.gpus import MINIMUM_CAPABILITY, GpuClass

ENV_CONFIG: Final = "QLORA_OPERATOR_CONFIG"
"""Path of the YAML file; without it the defaults below hold."""
DEFAULT_TRAINER_IMAGE: Final = "ghcr.io/qlora-operator/trainer:0.1.0"


class ConfigModel(BaseModel):
    """Frozen, camelCase, and strict about names: a typo in the chart's values must not pass silently."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True, use_attribute_docstrings=True
    )


class StepResources(ConfigModel):
    """Kubernetes quantities of a step whose needs don't follow from the model."""

    cpu: str = "250m"
    """CPU request; there is no CPU limit, so that idle cores help."""
    memory: str = "3Gi"
    """Memory request and limit."""
    ephemeral_storage: str = "8Gi"
    """Local disk request and limit."""


class OperatorConfig(ConfigModel):
    """Everything the chart's values can change about the trainer's pods and the operator's habits."""

    trainer_image: str = DEFAULT_TRAINER_IMAGE
    """Image of all three steps."""
    image_pull_policy: Annotated[str, Field(pattern="^(Always|IfNotPresent|Never)$")] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets, in each QLoRAJob's namespace."""
    extra_env: tuple[dict[str, Any], ...] = ()
    """core/v1 EnvVars added to every trainer container, for example a proxy or a hub mirror."""
    extra_volumes: tuple[dict[str, Any], ...] = ()
    """core/v1 Volumes added to every trainer pod."""
    extra_volume_mounts: tuple[dict[str, Any], ...] = ()
    """core/v1 VolumeMounts added to every trainer container."""
    runtime_class_name: str | None = None
    """RuntimeClass of GPU pods (nvidia, where it isn't the node's default)."""
    allow_remote_code: bool = False
    """Whether model.trustRemoteCode may be used at all."""
    gpu_classes: tuple[GpuClass, ...] = ()
    """Beside those that nodes tell of, such as autoscaled pools at zero. They win over others of their name."""
    minimum_compute_capability: Annotated[float, Field(ge=1)] = MINIMUM_CAPABILITY
    """Older GPUs aren't planned with: the trainer image's torch isn't compiled for them."""
    learning: bool = True
    """Whether what finished runs took is kept and corrects later plans."""
    progress_interval_seconds: Annotated[float, Field(ge=0.2)] = 5.0
    """Time between two looks at the progress of each training pod."""
    retry_backoff_seconds: Annotated[float, Field(gt=0)] = 1.0
    """First wait after a failed call to the API server; doubles up to retryBackoffMaxSeconds."""
    lease_duration_seconds: Annotated[int, Field(ge=3)] = 15
    """A leader that doesn't renew its Lease for so long is replaced, where several operators run."""
    retry_backoff_max_seconds: Annotated[float, Field(gt=0)] = 60.0
    termination_grace_period_seconds: Annotated[int, Field(ge=1)] = 120
    """Least time for a checkpoint and its upload when a pod is asked to stop; training pods that need more get it."""
    minimum_ttl_seconds: Annotated[int, Field(ge=0)] = 60
    """Finished Jobs live at least this long, so that the operator can read how they ended."""
    prepare: StepResources = StepResources()
    """Resources of the prepare step."""
    gpu_cpu_request: str = "1"
    """CPU request of a training pod with a GPU, where resources.cpu is auto."""
    cpu_cpu_request: str = "1"
    """CPU request of a training pod without a GPU, and of merge, where resources.cpu is auto."""
    cpu_memory_budget_bytes: Annotated[int, Field(ge=1024**3)] = 8 * 1024**3
    """On gpuClass cpu, micro batch and checkpointing are chosen to stay below this."""

    @classmethod
    def load(cls, path: Path | None = None) -> OperatorConfig:
        """The file at `path`, or at $QLORA_OPERATOR_CONFIG, or the defaults. Raises pydantic.ValidationError."""
        path = path or (Path(os.environ[ENV_CONFIG]) if os.environ.get(ENV_CONFIG) else None)
        if path is None:
            return cls()
        return cls.model_validate(YAML(typ="safe").load(path) or {})
