"""Names that operator and trainer must agree on: labels, environment variables, mount points, ports."""

from typing import Final

GROUP: Final = "qlora.dev"
VERSION: Final = "v1alpha1"
KIND: Final = "QLoRAJob"
PLURAL: Final = "qlorajobs"

PART_OF: Final = "qlora-operator"
LABEL_JOB: Final = "qlora.dev/job"
"""Name of the QLoRAJob a Job or pod belongs to."""
LABEL_STEP: Final = "qlora.dev/step"
"""prepare, train or merge."""
LABEL_RUN: Final = "qlora.dev/run"
"""Run id of a train or merge Job."""
LABEL_ATTEMPT: Final = "qlora.dev/attempt"
"""Number of the Job among those of the same step."""
ANNOTATION_RETRY: Final = "qlora.dev/retry-at"
"""Set to any new value on a failed QLoRAJob to try it again."""
ANNOTATION_GPUS: Final = "qlora.dev/gpus"
"""How many GPUs (or slices of one) a training pod holds, however it asks for them."""

ENV_RUN_CONFIG: Final = "QLORA_RUN_CONFIG"
"""The RunConfig as JSON. It holds no secret."""
ENV_REPORT_PATH: Final = "QLORA_REPORT_PATH"
"""Where the RunReport goes; the termination message file in a pod."""
ENV_METRICS_PORT: Final = "QLORA_METRICS_PORT"
"""Port of /metrics and /progress; 0 picks a free one."""
ENV_MOUNT_ROOT: Final = "QLORA_MOUNT_ROOT"
ENV_WORK_DIR: Final = "QLORA_WORK_DIR"

METRICS_PORT: Final = 9400
REPORT_PATH: Final = "/dev/termination-log"
REPORT_MAX_BYTES: Final = 4096
"""What the kubelet keeps of a termination message."""
MOUNT_ROOT: Final = "/mnt/qlora"
"""pvc://claim/path is <root>/pvc/claim/path, configmap://name/key is <root>/configmap/name/key."""
WORK_DIR: Final = "/work"
"""Writable scratch space: downloads, Hugging Face cache, checkpoints before their upload."""
CREDENTIALS_DIR: Final = "/mnt/qlora/s3-credentials"
"""Where the Secret of spec.output.credentialsSecretRef is mounted, so that a change reaches a running pod."""
CACHE_DIR: Final = "/mnt/qlora/cache"
"""Where spec.model.cacheClaim is mounted."""
