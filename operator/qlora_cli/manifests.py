"""Read a QLoRAJob from a YAML file, with the API server's rules plus `file://` URIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qlorajob.errors import ExitCode
from qlorajob.names import KIND
from qlorajob.resource import InvalidManifest, QLoRAJob, parse


class ManifestError(Exception):
    """The manifest can't be run as it is; the message says why, line by line."""

    exit_code = int(ExitCode.INVALID)


def load_manifest(path: Path) -> QLoRAJob:
    """The one QLoRAJob in `path`.

    Raises:
        ManifestError: not YAML, no or several QLoRAJobs, or fields that are wrong.
    """
    return parse_document(read_document(path), path)


def read_document(path: Path) -> dict[str, Any]:
    """The one QLoRAJob in `path`, as it is written.

    Raises:
        ManifestError: not YAML, no or several QLoRAJobs.
    """
    try:
        with path.open("rb") as file:  # bytes, since YAML may be UTF-16 too, and says so itself
            documents: list[Any] = [doc for doc in YAML(typ="safe", pure=True).load_all(file) if doc is not None]
    except YAMLError as error:
        raise ManifestError(f"{path} is not valid YAML: {_words(error)}") from None
    except RecursionError:
        raise ManifestError(f"{path} is not a manifest: its lists and mappings are nested too deeply") from None
    jobs = [doc for doc in documents if isinstance(doc, dict) and doc.get("kind") == KIND]
    if len(jobs) != 1:
        others = sorted({str(doc["kind"]) for doc in documents if isinstance(doc, dict) and doc.get("kind")} - {KIND})
        there = f", but {', '.join(others)}" if others and not jobs else ""
        raise ManifestError(f"{path} holds {len(jobs)} {KIND} manifests{there}; it must hold exactly one")
    found: dict[str, Any] = jobs[0]
    return found


def parse_document(document: dict[str, Any], path: Path) -> QLoRAJob:
    """The QLoRAJob of a document that came from `path`.

    Raises:
        ManifestError: fields that are wrong.
    """
    try:
        return parse(document, local=True)
    except InvalidManifest as error:
        raise ManifestError(f"{path} is not a valid {KIND}:\n{error}") from None


def _words(error: YAMLError) -> str:
    """What is wrong and where, without the advice to programmers that comes with some of it."""
    if isinstance(error, MarkedYAMLError):
        error.note = None
    return str(error).strip()
