"""How a step of the trainer ends, in numbers that a Job's podFailurePolicy reads and in words that a user reads."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Exit codes of the trainer image; what each means for the Job is in docs/architecture.md."""

    DONE = 0
    INVALID = 64
    """The input is wrong and stays wrong: don't retry."""
    OUT_OF_MEMORY = 65
    """Out of GPU memory: plan again."""
    TRANSIENT = 66
    """Network or storage: retry with back-off."""
    INTERRUPTED = 143
    """Asked to stop; a checkpoint is in S3. Resume; not a failure."""


class Reason(StrEnum):
    """Reasons in conditions, events and reports. CamelCase, as the Kubernetes API conventions ask."""

    # Work in progress
    PREPARING = "Preparing"
    QUEUED = "Queued"
    TRAINING = "Training"
    MERGING = "Merging"
    SUSPENDED = "Suspended"
    # Good ends
    SUCCEEDED = "Succeeded"
    INTERRUPTED = "Interrupted"
    ALREADY_TRAINED = "AlreadyTrained"
    NOT_BETTER_THAN_BASE = "NotBetterThanBase"
    # The manifest asks for what can't be
    INVALID_SPEC = "InvalidSpec"
    UNSUPPORTED = "Unsupported"
    DOES_NOT_FIT = "DoesNotFit"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_INVALID = "ModelInvalid"
    REMOTE_CODE_REFUSED = "RemoteCodeRefused"
    TARGET_MODULES_NOT_FOUND = "TargetModulesNotFound"
    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_EMPTY = "DatasetEmpty"
    DATASET_INVALID = "DatasetInvalid"
    COLUMN_MISSING = "ColumnMissing"
    TEMPLATE_INVALID = "TemplateInvalid"
    BUCKET_NOT_FOUND = "BucketNotFound"
    ACCESS_DENIED = "AccessDenied"
    CREDENTIALS_MISSING = "CredentialsMissing"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 (a reason)
    CLAIM_NOT_FOUND = "ClaimNotFound"
    CONFIG_MAP_NOT_FOUND = "ConfigMapNotFound"
    # The world is in the way
    ENDPOINT_UNREACHABLE = "EndpointUnreachable"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    CLOCK_SKEWED = "ClockSkewed"
    DISK_FULL = "DiskFull"
    OUT_OF_MEMORY = "OutOfMemory"
    DIVERGED = "Diverged"
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    UNSCHEDULABLE = "Unschedulable"
    POD_CREATION_FAILED = "PodCreationFailed"
    VOLUME_NOT_READY = "VolumeNotReady"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    INTERNAL_ERROR = "InternalError"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, cut to 500 characters; its name when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


class StepError(Exception):
    """A step can't go on. Carries what the RunReport and then the Stalled condition say.

    `field` is the manifest's path without `spec.` (output.uri), when one field is to blame.
    """

    def __init__(self, reason: Reason, message: str, *, field: str | None = None, code: ExitCode = ExitCode.INVALID):
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.code = code
