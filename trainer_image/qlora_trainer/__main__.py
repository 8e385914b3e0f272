"""`python -m qlora_trainer prepare|train|merge`: run one command and say how it ended.

The only place that turns exceptions into exit codes and the RunReport.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from qlora_trainer import disk, logs, unsloth_backend
from qlora_trainer.context import Context, Outcome
from qlora_trainer.libraries import NOT_USED, as_if_absent
from qlora_trainer.settings import Settings, arrange_environment
from qlora_trainer.signals import Stopped, StopSignal
from qlora_trainer.tokenizer import trusts_remote_code
from qlorajob import names
from qlorajob.errors import ExitCode, Reason, StepError, first_line
from qlorajob.run import WARNING_LENGTH, WARNINGS, RunReport, Step

logger = logging.getLogger("qlora_trainer")

STEPS: tuple[str, ...] = get_args(Step)
NETWORK_LIBRARIES = frozenset(
    {"botocore", "boto3", "s3transfer", "huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp"}
)


def main(arguments: Sequence[str]) -> int:
    """Run the command that is named, write its report, return the exit code."""
    if len(arguments) != 1 or arguments[0] not in STEPS:
        print(f"usage: python -m qlora_trainer {'|'.join(STEPS)}", file=sys.stderr)
        return ExitCode.INVALID
    step = cast("Step", arguments[0])
    report = run_step(step)
    write_report(report, Path(os.environ.get(names.ENV_REPORT_PATH, names.REPORT_PATH)))
    return report.exit_code


def run_step(step: Step) -> RunReport:
    """Run a command to its end, whatever that is."""
    outcome = Outcome()
    logs.configure(step=step, job="", run=None)
    try:
        stop = StopSignal()
        stop.install()
        settings = Settings.from_env(os.environ)
        config = settings.config
        stop.grace_seconds = config.grace_seconds or stop.grace_seconds
        run = config.prepared.run_id if config.prepared else None
        logs.configure(step=step, job=f"{config.namespace}/{config.name}".lstrip("/"), run=run)
        arrange_environment(os.environ, settings)
        # Code that comes with a model may want any package that is there; Unsloth wants many.
        wants_any = trusts_remote_code(settings) or unsloth_backend.wanted(settings.spec)
        with as_if_absent(() if wants_any else NOT_USED):
            command = importlib.import_module(f"qlora_trainer.{step}")
            command.run(Context(settings, stop, outcome))
    except (Exception, Stopped) as error:
        end = diagnose(error, step)
        level = logging.ERROR if end.code is not ExitCode.INTERRUPTED else logging.WARNING
        unexpected = end.reason is Reason.INTERNAL_ERROR
        logger.log(level, end.message, extra={"reason": end.reason, "field": end.field}, exc_info=unexpected)
        return _report(step, outcome, end.code, end.reason, end.message, end.field)
    logger.info(outcome.message or "done", extra={"reason": outcome.reason})
    return _report(step, outcome, ExitCode.DONE, outcome.reason, outcome.message, None)


def diagnose(error: BaseException, step: Step) -> StepError:
    """The reason, exit code and words for an exception that ended a command."""
    if isinstance(error, StepError):
        return error
    if isinstance(error, Stopped):
        return StepError(Reason.INTERRUPTED, f"{step} was asked to stop", code=ExitCode.INTERRUPTED)
    if _is_out_of_memory(error):
        message = f"{step} ran out of memory: {first_line(error)}"
        return StepError(Reason.OUT_OF_MEMORY, message, code=ExitCode.OUT_OF_MEMORY)
    if full := disk.full(error, os.environ):
        return full
    if isinstance(error, ConnectionError | TimeoutError) or _package(error) in NETWORK_LIBRARIES:
        # Not the text: requests and responses in it may carry an access key's id or a signed URL.
        message = f"{step} lost its connection ({type(error).__name__}); it is tried again"
        return StepError(Reason.STORAGE_UNAVAILABLE, message, code=ExitCode.TRANSIENT)
    message = f"{step} failed unexpectedly: {type(error).__name__}: {first_line(error)}"
    return StepError(Reason.INTERNAL_ERROR, message, code=ExitCode.TRANSIENT)


def write_report(report: RunReport, path: Path) -> None:
    """Write the termination message. A report that can't be written is logged: the exit code still tells the most."""
    try:
        path.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        logger.warning("can't write the report to %s: %s", path, error.strerror)


def _report(step: Step, outcome: Outcome, code: ExitCode, reason: Reason, message: str, field: str | None) -> RunReport:
    return RunReport(
        step=step,
        exit_code=code,
        reason=reason,
        message=logs.redact(message),
        field=field,
        prepared=outcome.prepared,
        progress=outcome.progress,
        memory=outcome.memory,
        artifacts=outcome.artifacts,
        promoted=outcome.promoted,
        warnings=tuple(logs.redact(text)[:WARNING_LENGTH] for text in outcome.warnings[-WARNINGS:]),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """torch.cuda.OutOfMemoryError, an allocator of bitsandbytes or torch on the CPU, or Python's own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
