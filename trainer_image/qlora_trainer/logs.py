"""Logs: one JSON object a line on standard output, with the job's key on each. Never a secret."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
"""Environment variables whose values must not appear in a log or a report, whatever a library puts into a message."""

_hidden: set[str] = set()
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def hide(secret: str) -> None:
    """Blank this value out too: a secret that came in another way than by the environment."""
    _hidden.add(secret)


def redact(text: str, env: Mapping[str, str] = os.environ) -> str:
    """The text with the values of the secret variables, and those that were hidden, blanked out.

    Half a character, as file names and data may hold, becomes a question mark: neither log nor report could be written.
    """
    # Libraries use a value without the line's end that `echo` put into the Secret.
    for value in {env.get(name, "").strip() for name in SECRET_VARIABLES} | _hidden:
        if len(value) >= 4:
            text = text.replace(value, "***")
    return text.encode("utf-8", "replace").decode("utf-8")


class JsonFormatter(logging.Formatter):
    """Formats a record with the job's key; `extra=` fields become fields of the line."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **self._fields,
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


def configure(*, step: str, job: str, run: str | None) -> None:
    """Send everything, warnings and the libraries' own logs included, through the JSON formatter."""
    fields = {"step": step, "job": job} | ({"run": run} if run else {})
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(fields))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3", "httpx", "httpcore", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def tame_libraries() -> None:
    """Hugging Face's libraries bring handlers and progress bars of their own: send their warnings through ours.

    To be called once they are imported, since that is when they put their handlers up.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("transformers", "datasets", "huggingface_hub", "trl", "peft", "accelerate"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
