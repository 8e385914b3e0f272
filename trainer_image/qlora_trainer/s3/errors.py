"""botocore's errors in our words: reason, exit code, and the field that a user has to look at.

The messages are ours: botocore's may carry an access key's id.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.spec import OutputSpec

CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "XAdminUserNotFound",  # VersityGW's word for an unknown access key, with status 404
    }
)
"""The server doesn't know who is asking. All other refusals are about what was asked for."""
CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
MISSING_BUCKET = frozenset({"NoSuchBucket"})
MISSING_KEY = frozenset({"NoSuchKey", "NotFound", "404"})
OVERTAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
WITHOUT_CONDITIONS = frozenset({"NotImplemented"})
WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})

CREDENTIALS_FIELD = "output.credentialsSecretRef"


def code_of(error: ClientError) -> str:
    """S3's word for what is wrong."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The answer's HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@dataclass(slots=True)
class Blame:
    """Turns errors of one client into StepErrors. `field` named the URI that the client is for."""

    field: str
    output: OutputSpec
    accepted: bool = False
    """The server has accepted the credentials before, of this process or of the step before it. If it no longer does
    they were rotated or ran out, which another pod, or a moment, cures: transient. Else they are wrong."""

    def server(self, error: ClientError, bucket: str, action: str) -> NoReturn:
        """An answer of the server that isn't the wanted one."""
        code, status = code_of(error), status_of(error)
        if code in MISSING_BUCKET:
            message = f"{self.field}: there is no bucket {bucket} at {self._endpoint}; create it, or correct the name"
            raise StepError(Reason.BUCKET_NOT_FOUND, message, field=self.field) from None
        if code in WRONG_REGION or status == 301:
            message = f"output.region: bucket {bucket} isn't in region {self.output.region or '(the default)'}"
            raise StepError(Reason.INVALID_SPEC, message, field="output.region") from None
        if code in CLOCK:
            self._clock(error)
        if code in FULL or status == 507:
            message = f"{self.field}: bucket {bucket} at {self._endpoint} is full ({code}); make room"
            raise StepError(Reason.STORAGE_UNAVAILABLE, message, field=self.field, code=ExitCode.TRANSIENT) from None
        if code in CREDENTIALS or status in (401, 403):
            self._refused(code, bucket, action)
        message = f"{self._endpoint} answered {code or status} when asked to {action} in bucket {bucket}"
        raise StepError(Reason.STORAGE_UNAVAILABLE, message, field=self.field, code=ExitCode.TRANSIENT) from None

    def client(self, error: Exception) -> NoReturn:
        """No answer at all: no credentials to ask with, or nobody there."""
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            message = (
                f"{CREDENTIALS_FIELD}: there are no complete S3 credentials; name a Secret with "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the ServiceAccount an identity"
            )
            raise StepError(Reason.CREDENTIALS_MISSING, message, field=CREDENTIALS_FIELD) from None
        if isinstance(error, ParamValidationError):
            message = f"{self.field}: S3 doesn't allow this name"
            raise StepError(Reason.INVALID_SPEC, message, field=self.field) from None
        message = f"output.endpoint: {self._endpoint} can't be reached ({type(error).__name__}); check URL and network"
        raise StepError(
            Reason.ENDPOINT_UNREACHABLE, message, field="output.endpoint", code=ExitCode.TRANSIENT
        ) from None

    def _refused(self, code: str, bucket: str, action: str) -> NoReturn:
        secret = self.output.credentials_secret_ref
        whose = f"the credentials in Secret {secret.name}" if secret else "the pod's own identity"
        said = code or "access denied"
        if code in CREDENTIALS and self.accepted:
            message = f"{CREDENTIALS_FIELD}: {self._endpoint} no longer accepts {whose} ({said}); renew them"
            raise StepError(Reason.ACCESS_DENIED, message, field=CREDENTIALS_FIELD, code=ExitCode.TRANSIENT) from None
        message = f"{CREDENTIALS_FIELD}: {self._endpoint} refuses {whose} ({said}) when asked to {action}"
        raise StepError(Reason.ACCESS_DENIED, f"{message} in bucket {bucket}", field=CREDENTIALS_FIELD) from None

    def _clock(self, error: ClientError) -> NoReturn:
        skew = _skew(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
        message = f"this node's clock and that of {self._endpoint} are {skew} apart: set the one that is wrong"
        raise StepError(Reason.CLOCK_SKEWED, message, code=ExitCode.TRANSIENT) from None

    @property
    def _endpoint(self) -> str:
        return self.output.endpoint or "AWS S3"


def _now() -> datetime:
    return datetime.now(UTC)


def _skew(headers: Any) -> str:
    """How far the clocks are apart, by the server's Date."""
    try:
        seconds = abs((_now() - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, TypeError, ValueError):
        return "too far"
    return f"{seconds / 60:.0f} minutes"
