"""Every way to write a wrong manifest, and the words that its author reads."""

from __future__ import annotations

from typing import Any

from tests.unit.contract.manifests import REMOVE

SPEC_FIELDS = (
    "model, dataset, quantization, lora, training, evaluation, resources, output, merge, queueName, priorityClassName, "
    "serviceAccountName, suspend, backoffLimit, activeDeadlineSeconds, ttlSecondsAfterFinished"
)
MODULES = "must be all-linear, default, or a list of module names such as [q_proj, v_proj]"
LABEL = "must start and end with a letter or digit and hold only letters, digits, '-', '_' and '.'"
MODEL_URI = "must be hf://organisation/name[@revision], s3://bucket/path or pvc://claim/path; a space is %20"
DATASET_URI = (
    "must be hf://organisation/name[@revision], s3://bucket/path, pvc://claim/path or configmap://name/key; a "
    "space is %20"
)
OUTPUT_URI = "must be s3://bucket/prefix, in ASCII letters, digits and !&()*+,./:;=@_~-"
ENDPOINT = "must be http://host[:port] or https://host[:port], without credentials"

CASES: list[tuple[dict[str, Any], str]] = [
    ({"spec.lora.rnak": 8}, "spec.lora.rnak: unknown field; did you mean rank?"),
    ({"spec.lora.r": 8}, "spec.lora.r: unknown field; known fields: rank, alpha, dropout, targetModules, bias"),
    ({"spec.training.batchSize": 8}, "spec.training.batchSize: unknown field; did you mean globalBatchSize?"),
    ({"spec.foo": 1}, f"spec.foo: unknown field; known fields: {SPEC_FIELDS}"),
    ({"spec.foo": None}, f"spec.foo: unknown field; known fields: {SPEC_FIELDS}"),
    ({"foo": 1}, "foo: unknown field; known fields: apiVersion, kind, metadata, spec, status"),
    (
        {"spec.model.tokenSecretRef": {"name": "a", "secret": "b"}},
        "spec.model.tokenSecretRef.secret: unknown field; known fields: name, key",
    ),
    (
        {"spec.resources.tolerations": [{"kye": "a", "operator": "Exists"}]},
        "spec.resources.tolerations[0].kye: unknown field; did you mean key?",
    ),
    ({"spec.training.learning_rate": 0.0001}, "spec.training.learning_rate: unknown field; did you mean learningRate?"),
    ({"spec": REMOVE}, "spec: is required"),
    ({"spec.model": REMOVE}, "spec.model: is required"),
    ({"spec.model.uri": REMOVE}, "spec.model.uri: is required"),
    ({"spec.dataset.uri": None}, "spec.dataset.uri: is required"),
    ({"spec.output": REMOVE}, "spec.output: is required"),
    ({"spec.model.tokenSecretRef": {}}, "spec.model.tokenSecretRef.name: is required"),
    ({"spec.output.credentialsSecretRef": {}}, "spec.output.credentialsSecretRef.name: is required"),
    ({"metadata.name": REMOVE}, "metadata.name: is required"),
    ({"metadata.name": "a" * 64}, "metadata.name: must have at most 63 characters"),
    ({"apiVersion": "qlora.dev/v1"}, "apiVersion: must be 'qlora.dev/v1alpha1', not 'qlora.dev/v1'"),
    ({"kind": "Job"}, "kind: must be 'QLoRAJob', not 'Job'"),
    ({"spec": []}, "spec: must hold fields, not a list"),
    ({"spec.lora": []}, "spec.lora: must hold fields, not a list"),
    ({"spec.lora.rank": "8"}, "spec.lora.rank: must be an integer from 1 to 1024"),
    ({"spec.lora.rank": 8.5}, "spec.lora.rank: must be an integer from 1 to 1024, not 8.5"),
    ({"spec.lora.rank": True}, "spec.lora.rank: must be an integer from 1 to 1024, not true"),
    ({"spec.lora.dropout": "0.1"}, "spec.lora.dropout: must be a number, not '0.1'"),
    ({"spec.lora.dropout": True}, "spec.lora.dropout: must be a number, not true"),
    ({"spec.training.learningRate": "2e-4"}, "spec.training.learningRate: must be a number, not '2e-4'"),
    ({"spec.training.packing": "yes"}, "spec.training.packing: must be true or false, not 'yes'"),
    ({"spec.training.packing": 1}, "spec.training.packing: must be true or false, not 1"),
    ({"spec.dataset.split": 1}, "spec.dataset.split: must be a string, not 1: put it in quotes"),
    ({"spec.evaluation.prompts": "hello"}, "spec.evaluation.prompts: must be a list, not 'hello'"),
    ({"spec.evaluation.prompts": ["hello", None]}, "spec.evaluation.prompts[1]: must be a string, not null"),
    ({"spec.dataset.filter": ["a"]}, "spec.dataset.filter: must hold names and values, not a list"),
    ({"spec.dataset.filter": {"label": 1}}, "spec.dataset.filter.label: must be a string, not 1: put it in quotes"),
    ({"spec.resources.tolerations": {}}, "spec.resources.tolerations: must be a list, not fields"),
    ({"spec.resources.tolerations": ["gpu"]}, "spec.resources.tolerations[0]: must hold fields, not 'gpu'"),
    ({"spec.suspend": "true"}, "spec.suspend: must be true or false, not 'true'"),
    ({"spec.lora.rank": -1}, "spec.lora.rank: must be an integer from 1 to 1024, not -1"),
    ({"spec.lora.rank": 0}, "spec.lora.rank: must be an integer from 1 to 1024, not 0"),
    ({"spec.lora.rank": 1025}, "spec.lora.rank: must be an integer from 1 to 1024, not 1025"),
    ({"spec.lora.dropout": 1}, "spec.lora.dropout: must be less than 1, not 1"),
    ({"spec.lora.dropout": -0.1}, "spec.lora.dropout: must be at least 0, not -0.1"),
    ({"spec.training.epochs": 0}, "spec.training.epochs: must be greater than 0, not 0"),
    ({"spec.training.epochs": 10001}, "spec.training.epochs: must be at most 10000, not 10001"),
    ({"spec.training.maxSteps": 0}, "spec.training.maxSteps: must be an integer from 1 to 100000000, not 0"),
    ({"spec.training.learningRate": 0}, "spec.training.learningRate: must be greater than 0, not 0"),
    ({"spec.training.learningRate": 2}, "spec.training.learningRate: must be at most 1, not 2"),
    ({"spec.training.warmupRatio": 1}, "spec.training.warmupRatio: must be less than 1, not 1"),
    ({"spec.training.seed": -1}, "spec.training.seed: must be an integer from 0 to 4294967295, not -1"),
    ({"spec.training.globalBatchSize": 0}, "spec.training.globalBatchSize: must be an integer from 1 to 65536, not 0"),
    (
        {"spec.training.globalBatchSize": 8.0},
        "spec.training.globalBatchSize: must be an integer from 1 to 65536, not 8.0",
    ),
    (
        {"spec.training.microBatchSize": 0},
        "spec.training.microBatchSize: must be auto or an integer from 1 to 65536, not 0",
    ),
    (
        {"spec.training.microBatchSize": "all"},
        "spec.training.microBatchSize: must be auto or an integer from 1 to 65536",
    ),
    (
        {"spec.training.microBatchSize": 2.0},
        "spec.training.microBatchSize: must be auto or an integer from 1 to 65536, not 2.0",
    ),
    ({"spec.training.gradientCheckpointing": "on"}, "spec.training.gradientCheckpointing: must be auto, true or false"),
    ({"spec.resources.gpus": 65}, "spec.resources.gpus: must be auto or an integer from 1 to 64, not 65"),
    ({"spec.backoffLimit": -1}, "spec.backoffLimit: must be an integer from 0 to 1000, not -1"),
    ({"spec.evaluation.prompts": ["a"] * 17}, "spec.evaluation.prompts: must have at most 16 entries"),
    ({"spec.evaluation.prompts": [""]}, "spec.evaluation.prompts[0]: must not be empty"),
    ({"spec.evaluation.prompts": ["a" * 4097]}, "spec.evaluation.prompts[0]: must have at most 4096 characters"),
    ({"spec.dataset.validation": {"fraction": 1}}, "spec.dataset.validation.fraction: must be less than 1, not 1"),
    ({"spec.quantization.type": "int8"}, "spec.quantization.type: must be 'nf4' or 'fp4', not 'int8'"),
    (
        {"spec.training.scheduler": "exponential"},
        "spec.training.scheduler: must be 'linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant', "
        "'constant_with_warmup' or 'inverse_sqrt', not 'exponential'",
    ),
    (
        {"spec.training.optimizer": "adam"},
        "spec.training.optimizer: must be 'paged_adamw_8bit', 'paged_adamw_32bit', 'adamw_8bit', 'adamw_torch', "
        "'adamw_torch_fused', 'adafactor' or 'sgd', not 'adam'",
    ),
    (
        {"spec.dataset.format": "json"},
        "spec.dataset.format: must be 'auto', 'text', 'instruction', 'prompt-completion' or 'chat', not 'json'",
    ),
    (
        {"spec.merge": {"enabled": True, "gguf": {"quantization": "q4"}}},
        "spec.merge.gguf.quantization: must be 'f16', 'q8_0' or 'q4_k_m', not 'q4'",
    ),
    (
        {"spec.evaluation.gate": {"metric": "bleu"}, "spec.dataset.validation": {"fraction": 0.1}},
        "spec.evaluation.gate.metric: must be 'eval_loss', not 'bleu'",
    ),
    ({"spec.model.uri": "org/model"}, f"spec.model.uri: {MODEL_URI}"),
    ({"spec.model.uri": ""}, "spec.model.uri: must not be empty"),
    ({"spec.model.uri": "hf://a/b/c"}, f"spec.model.uri: {MODEL_URI}"),
    ({"spec.model.uri": "file:///models/x"}, f"spec.model.uri: {MODEL_URI}"),
    ({"spec.model.uri": "pvc://models/../secret"}, "spec.model.uri: must not hold . or .. as a part of the path"),
    ({"spec.dataset.uri": "http://example.com/data.json"}, f"spec.dataset.uri: {DATASET_URI}"),
    ({"spec.dataset.uri": "configmap://name"}, f"spec.dataset.uri: {DATASET_URI}"),
    ({"spec.dataset.uri": "s3://bucket/My Data/rows.jsonl"}, f"spec.dataset.uri: {DATASET_URI}"),
    ({"spec.output.uri": "/tmp/out"}, f"spec.output.uri: {OUTPUT_URI}"),
    ({"spec.output.uri": "s3://Bucket/x"}, f"spec.output.uri: {OUTPUT_URI}"),
    ({"spec.output.uri": "s3://bucket/" + "a" * 512}, "spec.output.uri: must have at most 512 characters"),
    ({"spec.output.endpoint": "minio:9000"}, f"spec.output.endpoint: {ENDPOINT}"),
    ({"spec.output.endpoint": "http://user:secret@minio:9000"}, f"spec.output.endpoint: {ENDPOINT}"),
    (
        {"spec.resources.memory": "16GB"},
        "spec.resources.memory: must be auto or a Kubernetes quantity such as 500m, 4 or 16Gi",
    ),
    (
        {"spec.resources.cpu": -1},
        "spec.resources.cpu: must be auto or a Kubernetes quantity such as 500m, 4 or 16Gi, not -1",
    ),
    ({"spec.resources.gpuClass": "A100 80GB"}, f"spec.resources.gpuClass: {LABEL}"),
    (
        {"spec.resources.nodeSelector": {"a b": "c"}},
        "spec.resources.nodeSelector: each key must be a label key such as nvidia.com/gpu.product",
    ),
    (
        {"spec.resources.nodeSelector": {"a": "b c"}},
        "spec.resources.nodeSelector.a: must be a label value: letters, digits, '-', '_', '.'",
    ),
    ({"spec.queueName": "a/b"}, f"spec.queueName: {LABEL}"),
    (
        {"spec.serviceAccountName": "Trainer"},
        "spec.serviceAccountName: must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    ),
    (
        {"spec.model.tokenSecretRef": {"name": "hub", "key": "a b"}},
        "spec.model.tokenSecretRef.key: must be a key of a Secret: letters, digits, '-', '_' and '.'",
    ),
    ({"spec.dataset.split": "train\n"}, "spec.dataset.split: must not hold control characters"),
    (
        {"spec.dataset.template": "\x00"},
        "spec.dataset.template: must not hold control characters other than tab and newline",
    ),
    (
        {"spec.dataset.filter": {"": "a"}},
        "spec.dataset.filter: each key must be the name of a column: 1 to 128 characters, none a control character",
    ),
    ({"spec.lora.targetModules": "q_proj,v_proj"}, f"spec.lora.targetModules: {MODULES}"),
    ({"spec.lora.targetModules": []}, f"spec.lora.targetModules: {MODULES}"),
    ({"spec.lora.targetModules": [1]}, f"spec.lora.targetModules: {MODULES}"),
    ({"spec.lora.targetModules": True}, f"spec.lora.targetModules: {MODULES}, not true"),
    (
        {"spec.training": {"epochs": 1, "maxSteps": 5}},
        "spec.training: set training.epochs or training.maxSteps, not both",
    ),
    (
        {"spec.training": {"globalBatchSize": 16, "microBatchSize": 3}},
        "spec.training: training.globalBatchSize must be a multiple of training.microBatchSize",
    ),
    (
        {"spec.training": {"packing": True, "groupByLength": True}},
        "spec.training: training.groupByLength does nothing when rows are packed: set training.packing: false",
    ),
    ({"spec.dataset.validation": {}}, "spec.dataset.validation: set either fraction, or uri and/or split"),
    (
        {"spec.dataset.validation": {"fraction": 0.1, "split": "test"}},
        "spec.dataset.validation: set either fraction, or uri and/or split",
    ),
    (
        {"spec.dataset.uri": "s3://bucket/rows", "spec.dataset.subset": "main"},
        "spec.dataset: dataset.subset is for hf:// datasets: choose files by uri and split elsewhere",
    ),
    (
        {"spec.evaluation.gate": {}},
        "spec: evaluation.gate.mustBeatBase compares validation losses: set dataset.validation",
    ),
    (
        {"spec.training.evalSteps": 10},
        "spec: training.evalSteps needs rows to evaluate on: set dataset.validation",
    ),
    (
        {"spec.evaluation.prompts": ["a" * 4096, "a" * 4096, "a"]},
        "spec.evaluation: evaluation.prompts may hold 8192 characters in all",
    ),
    ({"spec.merge": {"gguf": {}}}, "spec.merge: merge.gguf needs merge.enabled: true"),
    (
        {"spec.resources": {"gpuClass": "cpu", "gpus": 1}},
        "spec: resources.gpuClass cpu takes no GPU: leave resources.gpus at auto",
    ),
    (
        {"spec.resources.tolerations": [{}]},
        "spec.resources.tolerations[0]: a toleration needs a key, or operator: Exists to match every taint",
    ),
    (
        {"spec.resources.tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        "spec.resources.tolerations[0]: a toleration with operator Exists takes no value",
    ),
    (
        {"spec.resources.tolerations": [{"key": "a", "tolerationSeconds": 5}]},
        "spec.resources.tolerations[0]: tolerationSeconds needs effect: NoExecute",
    ),
]
