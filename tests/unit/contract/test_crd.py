"""The generated CRD is structural, complete and up to date."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from ruamel.yaml import YAML

from qlorajob import crd as generator
from qlorajob.base import SpecModel, models_in
from qlorajob.crd import crd, generated, main
from qlorajob.spec import QLoRAJobSpec
from tests.unit.contract.manifests import MINIMAL_SPEC

Schema = dict[str, Any]
GENERATED = generated()
REPOSITORY = Path(__file__).parents[3]
ROOT: Schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
UNTYPED = {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"}


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for below in ("items", "additionalProperties"):
        if below in schema:
            yield from nodes(schema[below], f"{path}[]")


ALL = dict(nodes(ROOT))
SPEC = {path: node for path, node in ALL.items() if path.startswith(".spec")}


def spec_models(model: type[Any] = QLoRAJobSpec) -> Iterator[type[SpecModel]]:
    yield model
    for field in model.model_fields.values():
        for nested in models_in(field.annotation):
            yield from spec_models(nested)


def test_every_node_has_one_type_and_no_keyword_outside_structural_schemas() -> None:
    for path, node in ALL.items():
        assert ("type" in node) != bool(UNTYPED & node.keys()), path
        assert not [key for key in node if key not in generator.KEYWORDS and not key.startswith("x-kubernetes-")], path


def test_every_field_is_described() -> None:
    described = {path for path, node in ALL.items() if node.get("description")}
    own = {path for path in ALL if not path.endswith("[]")} - {".metadata"}

    assert own <= described


def test_every_string_list_and_map_of_the_spec_is_bounded() -> None:
    for path, node in SPEC.items():
        bounds = {"string": {"maxLength", "enum", "pattern"}, "array": {"maxItems"}}.get(node.get("type", ""), set())
        if "additionalProperties" in node:
            bounds = {"maxProperties"}
        assert not bounds or bounds & node.keys(), path


def test_every_rule_of_the_models_is_in_the_crd() -> None:
    in_crd = {rule["rule"] for node in SPEC.values() for rule in node.get("x-kubernetes-validations", ())}

    assert {rule.cel for model in spec_models() for rule in model.RULES} <= in_crd


def test_defaults_are_those_of_the_models_at_every_level() -> None:
    def check(path: str, value: Any) -> None:
        node = SPEC[path]
        for name, field in value.items() if "properties" in node else ():
            below = f"{path}.{name}"
            if name not in node.get("required", ()):
                assert SPEC[below]["default"] == field, below
            if isinstance(field, dict):
                check(below, field)

    check(".spec", QLoRAJobSpec.model_validate(MINIMAL_SPEC).to_wire())


def test_optional_fields_without_default_have_none_in_the_schema() -> None:
    unset = QLoRAJobSpec.model_validate(MINIMAL_SPEC).training.model_dump(by_alias=True)

    without = {name for name, value in unset.items() if value is None}

    assert without == {"epochs", "maxSteps", "warmupSteps", "evalSteps"}
    assert not [name for name in without if "default" in SPEC[f".spec.training.{name}"]]


def test_status_has_no_default_but_an_unseen_generation() -> None:
    status = {path: node["default"] for path, node in ALL.items() if path.startswith(".status") and "default" in node}

    assert status == {".status": {"observedGeneration": -1}}


def test_conditions_are_a_map_by_type() -> None:
    conditions = ALL[".status.conditions"]

    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_kubectl_prints_the_promised_columns() -> None:
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]

    assert " ".join(column["name"].upper() for column in columns) == "MODEL PHASE STEP LOSS TOK/S ETA GPU AGE"
    assert {column["jsonPath"] for column in columns} - {".metadata.creationTimestamp"} <= ALL.keys()


def test_kubectl_finds_it_by_short_name_and_category() -> None:
    names = crd()["spec"]["names"]

    assert names["shortNames"] == ["qlj"]
    assert "all" in names["categories"]


def test_defaults_are_in_the_words_of_kubectl_explain() -> None:
    assert SPEC[".spec.lora.rank"]["description"].endswith("Default: 16.")
    assert SPEC[".spec.quantization.type"]["description"].endswith("Default: nf4.")


def test_yaml_readers_of_both_versions_read_the_same() -> None:
    text = GENERATED["crds/qlorajobs.qlora.dev.yaml"]

    assert YAML(typ="safe").load(io.StringIO(text)) == yaml.safe_load(text) == crd()


@pytest.mark.parametrize("path", sorted(GENERATED))
def test_generated_files_are_up_to_date(path: str) -> None:
    assert (REPOSITORY / path).read_text() == GENERATED[path], "make generate"


def test_check_reports_a_stale_file_with_a_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 0
    (tmp_path / "crds/qlorajobs.qlora.dev.yaml").write_text("stale\n")
    capsys.readouterr()

    assert main(["--root", str(tmp_path), "--check"]) == 1
    assert "-stale" in capsys.readouterr().out
    assert (tmp_path / "crds/qlorajobs.qlora.dev.yaml").read_text() == "stale\n"


def test_the_reference_page_names_every_field_of_the_spec() -> None:
    page = GENERATED["docs/reference/qlorajob.md"]

    for path in SPEC:
        name = path.rpartition(".")[2].removesuffix("[]")
        assert f"| {name} |" in page or f"**{name}**" in page or f"## {name}" in page, path
