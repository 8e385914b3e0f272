"""The API server with the generated CRD and the Pydantic models accept the same objects, and understand them alike.

Every object is sent to the real API server as a strict server-side dry run, of a copy of the CRD under another group,
so no operator sees it. `make fuzz` tries thousands of specs, and others each time.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from kubernetes import client, config
from ruamel.yaml import YAML

from qlorajob.crd import crd
from qlorajob.resource import InvalidManifest, parse
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Condition, Display, HistoryEntry, Phase, QLoRAJobStatus, RunStatus
from tests.unit.contract.manifests import MINIMAL_SPEC as MINIMAL
from tests.unit.contract.manifests import manifest
from tests.unit.contract.test_examples import MANIFESTS
from tests.unit.contract.test_run import ARTIFACTS, MEMORY, NOW, PLAN, PREPARED, PROGRESS
from tests.unit.contract.wrong import CASES

GROUP = f"agreement-{uuid.uuid4().hex[:8]}.qlora.dev"
SPECS, MANY_SPECS = 300, 5000
SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

Json = Any
Create = Callable[[Json], Json]


class RefusedError(Exception):
    """The API server doesn't take the object."""


class Server:
    """The API server with the CRD's copy, over one connection."""

    def __init__(self, api: client.ApiClient) -> None:
        self._jobs = client.CustomObjectsApi(api)

    def create(self, obj: Json, *, dry_run: bool = True) -> Json:
        """The object as it would be stored (or is); RefusedError when it isn't valid."""
        options = {"dry_run": "All"} if dry_run else {}
        return self._send(self._jobs.create_namespaced_custom_object, obj, **options)

    def write_status(self, obj: Json) -> Json:
        """Replace the status of the stored object."""
        return self._send(self._jobs.replace_namespaced_custom_object_status, obj, name=obj["metadata"]["name"])

    def _send(self, call: Callable[..., Json], obj: Json, **options: Json) -> Json:
        place = {"group": GROUP, "version": "v1alpha1", "namespace": "default", "plural": "qlorajobs"}
        copied = obj | {"apiVersion": f"{GROUP}/v1alpha1"}
        try:
            return call(body=copied, field_validation="Strict", **place, **options) | {"apiVersion": obj["apiVersion"]}
        except client.ApiException as error:
            if error.status in (400, 422):
                raise RefusedError(json.loads(error.body)["message"]) from None
            raise


@pytest.fixture(scope="module")
def server(cluster: Any) -> Iterator[Server]:
    api = config.new_client_from_config(str(cluster.kubeconfig))
    definitions = client.ApiextensionsV1Api(api)
    definition = crd()
    definition["spec"]["group"], definition["metadata"]["name"] = GROUP, f"qlorajobs.{GROUP}"
    definition["spec"]["names"]["categories"] = []
    definitions.create_custom_resource_definition(definition)
    try:
        made = Server(api)
        _wait_until_served(made)
        yield made
    finally:
        definitions.delete_custom_resource_definition(definition["metadata"]["name"])


@pytest.fixture(scope="module")
def create(server: Server) -> Create:
    return server.create


def _wait_until_served(server: Server) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            server.create(job(MINIMAL))
        except client.ApiException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def job(spec: Json, name: str = "agreement") -> dict[str, Json]:
    return {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": name}, "spec": spec}


def assert_agreement(create: Create, obj: dict[str, Json]) -> bool:
    """Both accept it with the same meaning, or both refuse it. Returns whether they accept it."""
    try:
        ours: Any = parse(obj)
    except InvalidManifest as error:
        ours = error
    try:
        theirs: Any = create(obj)
    except RefusedError as error:
        theirs = error
    refused = isinstance(ours, InvalidManifest)
    assert refused == isinstance(theirs, RefusedError), f"models: {ours}\nAPI server: {theirs}"
    if refused:
        return False
    assert parse(theirs).spec == ours.spec
    return True


def test_defaults_of_the_api_server_are_those_of_the_models(create: Create) -> None:
    expected = QLoRAJobSpec.model_validate(MINIMAL).to_wire()

    assert create(job(MINIMAL))["spec"] == expected


def test_defaults_inside_optional_sections_agree(create: Create) -> None:
    spec = MINIMAL | {
        "model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "hub"}},
        "dataset": {"uri": "hf://c/d", "validation": {"fraction": 0.1}},
        "evaluation": {"gate": {}},
        "merge": {"enabled": True, "gguf": {}},
    }

    assert create(job(spec))["spec"] == QLoRAJobSpec.model_validate(spec).to_wire()


def test_an_unseen_job_has_observed_generation_minus_one(create: Create) -> None:
    assert create(job(MINIMAL))["status"] == {"observedGeneration": -1}


def test_the_largest_status_is_stored_as_the_operator_writes_it(server: Server) -> None:
    status = QLoRAJobStatus(
        observed_generation=1,
        phase=Phase.TRAINING,
        conditions=(
            Condition(type="Ready", status="False", reason="Training", last_transition_time=NOW, observed_generation=1),
            Condition(type="Suspended", status="Unknown", reason="Training", last_transition_time=NOW),
        ),
        run=RunStatus(id="r" * 16, attempt=2, started_at=NOW, finished_at=NOW),
        prepared=PREPARED,
        plan=PLAN,
        progress=PROGRESS,
        display=Display.of(PROGRESS, PLAN),
        memory=MEMORY,
        artifacts=ARTIFACTS,
        history=(
            HistoryEntry(id="r0", outcome="Replaced", finished_at=NOW, loss=1.5, eval_loss=2.0, adapter="s3://b/a"),
        ),
        failed_generation=1,
        attempts={"prepare": 1, "train": 2},
    ).to_wire()
    stored = server.create(job(MINIMAL, "status"), dry_run=False)

    stored = server.write_status(stored | {"status": status})

    assert stored["status"] == status
    assert parse(stored).status.to_wire() == status


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("a" * 63, True), ("a" * 64, False), ("a.b", True)],
    ids=["63 characters", "64 characters", "with a dot"],
)
def test_names_are_bounded_as_label_values_are(create: Create, name: str, accepted: bool) -> None:
    assert assert_agreement(create, job(MINIMAL, name)) == accepted
    if not accepted:
        with pytest.raises(RefusedError, match="at most 63 characters"):
            create(job(MINIMAL, name))


SPEC_CASES = [(changes, message) for changes, message in CASES if message.startswith("spec")]


@pytest.mark.parametrize(("changes", "message"), SPEC_CASES, ids=[message[:60] for _, message in SPEC_CASES])
def test_the_api_server_refuses_what_the_models_refuse(create: Create, changes: Json, message: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        create(manifest(changes))

    field = message.partition(":")[0].partition("[")[0]
    assert field.rpartition(".")[2] in str(refusal.value)


# What the fuzzer writes. Values come from the schema itself, so a new field is fuzzed from its first day.

STRINGS = [
    "hf://org/name", "hf://name@main", "hf://org/name@refs/pr/1", "s3://bucket/path/to/it", "s3://bucket", "s3://ab",
    "pvc://claim/path", "pvc://claim", "configmap://name/key.jsonl", "file:///tmp/x", "s3://bucket/a/../b",
    "s3://bucket/..", "hf://a/b/c", "https://s3.example.com:9000", "http://user:password@host", "auto", "cpu",
    "train", "name", "a.b-c", "Name", "a_b", "-a", "a-", "a..b", "nvidia.com/gpu", "q_proj", "all-linear", "default",
    "4", "500m", "16Gi", "16GB", "1.5", "-1", "1e3", "", " ", "a b", "a\nb", "name\n", "\t", "\x0b", "\x00", "\x7f",
    "\x85", "\u2028", "é", "名前", "😀", "a" * 63, "a" * 64, "a" * 128, "a" * 129, "a" * 253, "a" * 254, "名" * 4096,
    "a" * 4097, "s3://bucket/" + "a" * 500, "s3://bucket/" + "a" * 501, "s3://bucket/" + "a" * 1013,
    "s3://bucket/é", "s3://bucket/a b",
]  # fmt: skip
NUMBERS: list[Json] = [
    0, 1, -1, 2, 3, 16, 17, 63, 64, 65, 1.0, 16.0, 0.5, 1.5, -0.0, 0.1, 0.99, 1e-300, 1e30, 1000, 1001, 65536, 65537,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 10**12,
]  # fmt: skip
KEYS = [*STRINGS[:5], "gold_label", "nvidia.com/gpu.product", "a/b/c", "", "a\n", "é", "a" * 128, "a" * 129, "x" * 318]

strings = st.sampled_from(STRINGS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.sampled_from(NUMBERS) | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | strings
mappings = st.dictionaries(st.sampled_from(KEYS), scalars, max_size=3)
anything = scalars | mappings | st.lists(scalars | mappings, max_size=3) | st.integers(15, 70).map(["q_proj"].__mul__)
LIKELY: dict[str, Json] = {
    "uri": ["hf://org/name", "s3://bucket/path", "pvc://claim/path"],
    "endpoint": ["https://s3.example.com"],
    "targetModules": ["all-linear", "default", ["q_proj", "model.layers.0.mlp"]],
    "key": ["nvidia.com/gpu", "token"],
}


def values(schema: dict[str, Json], name: str = "") -> st.SearchStrategy[Json]:
    """Values for a node of the schema that are often valid."""
    if "properties" in schema:
        required = set(schema.get("required", ()))
        fields = {key: values(below, key) for key, below in schema["properties"].items()}
        return st.fixed_dictionaries(
            {key: fields[key] for key in fields if key in required},
            optional={key: fields[key] for key in fields if key not in required},
        )
    if name in LIKELY:
        return st.sampled_from(LIKELY[name])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "items" in schema:
        return st.lists(values(schema["items"]), max_size=3)
    if "additionalProperties" in schema:
        return st.dictionaries(st.sampled_from(["gold_label", "nvidia.com/gpu.product"]), st.sampled_from(["a", "b-c"]))
    if schema.get("x-kubernetes-int-or-string"):
        return st.sampled_from(["auto", 1, 4, 16])
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "string":
        return st.sampled_from(["name", "a-b", "train"])
    return _in_range(schema)


def _in_range(schema: dict[str, Json]) -> st.SearchStrategy[Json]:
    low, high = schema["minimum"], schema["maximum"]
    if schema["type"] == "integer":
        return st.sampled_from([low, high, float(high)]) | st.integers(low, high)
    return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema)


def slots(node: Json) -> Iterator[tuple[Json, Json]]:
    """Every (container, key) below a JSON value."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from slots(value)


@st.composite
def specs(draw: st.DrawFn) -> Json:
    """A spec that is often valid, then up to two changes that often make it invalid."""
    chosen = draw(st.sets(st.sampled_from(sorted(SPEC["properties"].keys() - MINIMAL.keys())), max_size=3))
    spec = copy.deepcopy(MINIMAL)
    for section in draw(st.sets(st.sampled_from(sorted(MINIMAL)), max_size=2)) | chosen:
        spec[section] = draw(values(SPEC["properties"][section], section))
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(list(slots({"spec": spec}))))
        match draw(st.sampled_from(["replace", "replace", "null", "remove", "add"])):
            case "replace":
                container[key] = draw(anything)
            case "null":
                container[key] = None
            case "remove":
                del container[key]
            case "add" if isinstance(container[key], dict):
                container[key][draw(st.sampled_from(["unknown", *KEYS]))] = draw(anything)
            case "add" if isinstance(container[key], list):
                container[key].append(draw(anything))
    return spec


FUZZING = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@settings(FUZZING, max_examples=SPECS, derandomize=True)
@given(spec=specs())
def test_models_and_api_server_agree_on_any_spec(create: Create, spec: Json) -> None:
    event("accepted" if assert_agreement(create, job(spec)) else "refused")


@pytest.mark.long
@settings(FUZZING, max_examples=MANY_SPECS)
@given(spec=specs())
def test_models_and_api_server_agree_on_thousands_of_specs(create: Create, spec: Json) -> None:
    event("accepted" if assert_agreement(create, job(spec)) else "refused")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_models_and_api_server_accept_the_examples(create: Create, path: Path) -> None:
    (example,) = YAML(typ="safe", pure=True).load_all(path)
    assert assert_agreement(create, example)


# Found by longer runs; kept as they are cheap.
FOUND = [
    {"spec.training": {"globalBatchSize": 65536.0, "microBatchSize": 1}},
    {"spec.unknown": None},
    {"spec.lora.targetModules": [None]},
    {"spec.lora.rank": 16.0},
    {"spec.training.seed": 1e6},
]


@pytest.mark.parametrize("changes", FOUND, ids=str)
def test_models_and_api_server_agree_on_what_was_found(create: Create, changes: Json) -> None:
    assert_agreement(create, manifest(changes))
