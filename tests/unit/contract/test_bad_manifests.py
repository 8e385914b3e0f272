"""A wrong manifest is refused, in words that say where and what to do.

The API server refuses the same objects (tests/handlers/test_schema_agreement.py); these words are those of `qlora run`
and of the operator.
"""

from __future__ import annotations

from typing import Any

import pytest

from qlorajob.resource import InvalidManifest, parse
from tests.unit.contract.manifests import REMOVE, manifest
from tests.unit.contract.wrong import CASES


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[message[:60] for _, message in CASES])
def test_a_wrong_manifest_is_refused_with_words_that_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidManifest) as refusal:
        parse(manifest(changes))

    assert refusal.value.problems == (message,)


def test_every_problem_is_reported_at_once() -> None:
    wrong = {"metadata.name": "a" * 64, "spec.lora.rank": -1, "spec.lora.rnak": 8, "spec.output.uri": REMOVE}

    with pytest.raises(InvalidManifest) as refusal:
        parse(manifest(wrong))

    assert str(refusal.value).splitlines() == [
        "metadata.name: must have at most 63 characters",
        "spec.lora.rank: must be an integer from 1 to 1024, not -1",
        "spec.lora.rnak: unknown field; did you mean rank?",
        "spec.output.uri: is required",
    ]


def test_a_credential_in_a_wrong_endpoint_is_not_repeated() -> None:
    with pytest.raises(InvalidManifest) as refusal:
        parse(manifest({"spec.output.endpoint": "https://key:secret@s3.example.com"}))

    assert "secret" not in str(refusal.value)


def test_a_file_is_offered_in_a_local_run_only() -> None:
    wrong = manifest({"spec.model.uri": "models/mine"})

    with pytest.raises(InvalidManifest, match=r"or file:///path, in a local run"):
        parse(wrong, local=True)
    with pytest.raises(InvalidManifest, match=r"pvc://claim/path; a space is %20$"):
        parse(wrong)
