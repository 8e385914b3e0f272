"""`qlora render`: the Jobs that the operator would create, from its own functions and without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from qlora_cli.manifests import ManifestError, load_manifest
from qlora_cli.questions import facts_of
from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Fleet
from qlora_operator.manifests import claim_template, merge_job, prepare_job, train_job
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlorajob.identity import prepare_key, run_id
from qlorajob.resource import QLoRAJob
from qlorajob.status import Prepared

UNKNOWN = "known-after-prepare"
"""Stands for what only the prepare step can tell: the model's revision and the data's digest."""


def render(manifest: Path, out: TextIO, *, config: Path | None = None) -> None:
    """Write the manifests of all steps as YAML documents.

    Raises:
        ManifestError: the manifest is wrong, nothing is known of its model, or no GPU holds it.
    """
    job = load_manifest(manifest)
    yaml = YAML()
    yaml.width = 120
    yaml.explicit_start = True
    # Through JSON, since YAML would name Python's own types.
    yaml.dump_all([json.loads(json.dumps(document)) for document in _documents(job, config)], out)


def _documents(job: QLoRAJob, config: Path | None) -> list[dict[str, Any]]:
    settings = OperatorConfig()
    prepared = _prepared(job, config)
    planned = plan(job.spec, prepared.facts, Fleet().classes(job.spec.resources), settings)
    if isinstance(planned, DoesNotFit):
        raise ManifestError(f"{planned.reason}: spec.{planned.field}: {planned.message}")
    slot = Fleet().slot(planned.gpu_class, planned.gpus, job.spec.resources)
    documents = [
        prepare_job(job, 1, settings),
        claim_template(job, slot),
        train_job(job, prepared, planned, 1, settings, slot),
        merge_job(job, prepared, 1, settings) if job.spec.merge.enabled else None,
    ]
    return [document for document in documents if document]


def _prepared(job: QLoRAJob, config: Path | None) -> Prepared:
    """What prepare would find, as far as it is known before."""
    return Prepared(
        key=prepare_key(job.spec),
        run_id=run_id(job.spec, model_revision=UNKNOWN, dataset_digest=UNKNOWN),
        model_revision=UNKNOWN,
        dataset_digest=UNKNOWN,
        train_rows=0,
        train_tokens=0,
        total_steps=0,
        facts=facts_of(job.spec, config),
    )
