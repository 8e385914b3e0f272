"""What a user writes under `spec:`. Each field's docstring is what `kubectl explain` prints; each default lives here.

The CRD (`qlorajob.crd`), the reference table in docs/ and the trainer's run config are all made from these models.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qlorajob.base import Rule, SpecModel
from qlorajob.fields import (
    Auto,
    Between,
    BetweenOrAuto,
    BoolOrAuto,
    ColumnFilter,
    DatasetUri,
    Endpoint,
    LabelKey,
    LabelMap,
    LabelValue,
    Line,
    ModelUri,
    ObjectName,
    OutputUri,
    QuantityOrAuto,
    SecretKey,
    TargetModules,
    Text,
)

Backend = Literal["hf", "unsloth"]
"""Whose code runs the model's layers in training."""


class SecretKeyRef(SpecModel):
    """One key of a Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: SecretKey = "token"
    """Key inside the Secret."""


class SecretRef(SpecModel):
    """A whole Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""


class ModelSpec(SpecModel):
    """The base model. Its weights stay frozen and are held in 4 bit."""

    uri: ModelUri
    """Where the weights are: hf://organisation/name[@revision], s3://bucket/path or pvc://claim/path."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model (ChatGLM needs it). The operator's policy must allow it too."""
    token_secret_ref: SecretKeyRef | None = None
    """Access token for a gated or private Hugging Face repository."""
    cache_claim: ObjectName | None = None
    """PersistentVolumeClaim that keeps downloaded weights and compiled kernels, so that no GPU waits for them."""


class ColumnsSpec(SpecModel):
    """Which column of the dataset plays which part. Unset parts are looked up by their usual names."""

    instruction: Line | None = None
    """Column with the instruction (format instruction)."""
    input: Line | None = None
    """Column with the optional input; rows where it is empty use the template without its Input section."""
    output: Line | None = None
    """Column with the answer (format instruction)."""
    text: Line | None = None
    """Column with plain text (format text)."""
    prompt: Line | None = None
    """Column with the prompt (format prompt-completion)."""
    completion: Line | None = None
    """Column with the completion (format prompt-completion)."""
    messages: Line | None = None
    """Column with the list of messages (format chat)."""
    tools: Line | None = None
    """Column with the optional list of tools that the assistant may call (format chat), for the chat template."""


class ValidationSpec(SpecModel):
    """Held-out rows that give the validation loss: a fraction of the training data, or data of their own."""

    RULES: ClassVar = (
        Rule(
            cel="has(self.fraction) != (has(self.uri) || has(self.split))",
            message="set either fraction, or uri and/or split",
            holds=lambda v: (v.fraction is not None) != (v.uri is not None or v.split is not None),
        ),
    )

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the rows that is held out, chosen by training.seed. Equal rows stay on one side."""
    uri: DatasetUri | None = None
    """Dataset with the validation rows, in the training data's format."""
    split: Line | None = None
    """Split with the validation rows: of uri when that is set, else of the training dataset."""


class DatasetSpec(SpecModel):
    """The training data."""

    RULES: ClassVar = (
        Rule(
            cel="!has(self.subset) || self.uri.startsWith('hf://')",
            message="dataset.subset is for hf:// datasets: choose files by uri and split elsewhere",
            holds=lambda d: d.subset is None or d.uri.startswith("hf://"),
        ),
    )

    uri: DatasetUri
    """Where the data is: hf://organisation/name[@revision], s3://bucket/path, pvc://claim/path or configmap://name/key."""
    split: Line = "train"
    """Split to train on, where the dataset has splits."""
    subset: Line | None = None
    """Subset (configuration) of an hf:// dataset that has several."""
    format: Literal["auto", "text", "instruction", "prompt-completion", "chat"] = "auto"
    """How a row becomes text. `auto` decides by the columns that are there."""
    columns: ColumnsSpec = ColumnsSpec()
    """Names of the columns, where they aren't the usual ones."""
    template: Text = "alpaca"
    """Prompt of instruction rows: alpaca, alpaca-zh, or a Jinja template over instruction, input and output."""
    filter: ColumnFilter = Field(default={})
    """Keep only the rows whose column has this value, for example {gold_label: contradiction}."""
    deduplicate: bool = False
    """Use equal rows once. Rows are compared as they are learnt, so columns that aren't read play no part."""
    validation: ValidationSpec | None = None
    """Held-out rows. Without them there is no validation loss."""


class QuantizationSpec(SpecModel):
    """How the frozen base model is held in 4 bit."""

    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type. nf4 fits normally distributed weights and is what QLoRA uses."""
    double_quant: bool = True
    """Quantize the quantization constants too: saves 0.37 bits a weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the matrix products. `auto` is that of training.precision; where that is auto too, bfloat16 where the
    GPU has it, else float16 (float32 on CPU)."""


class LoraSpec(SpecModel):
    """The adapter."""

    rank: Annotated[int, Between(1, 1024)] = 16
    """Rank of the update: more can learn more, and costs memory in proportion."""
    alpha: Annotated[int, Between(1, 65536)] = 32
    """Scale of the update, which is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's inputs that is dropped while training."""
    target_modules: Annotated[str | tuple[str, ...], TargetModules()] = "all-linear"
    """Layers that get an adapter: all-linear, default (PEFT's choice for the family), or a list of module names."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""


class TrainingSpec(SpecModel):
    """The training run. Names are those of Hugging Face's TrainingArguments, in camelCase."""

    RULES: ClassVar = (
        Rule(
            cel="!(has(self.epochs) && has(self.maxSteps))",
            message="set training.epochs or training.maxSteps, not both",
            holds=lambda t: t.epochs is None or t.max_steps is None,
        ),
        Rule(
            cel="type(self.microBatchSize) != int || int(self.microBatchSize) < 1"
            " || self.globalBatchSize % int(self.microBatchSize) == 0",
            message="training.globalBatchSize must be a multiple of training.microBatchSize",
            holds=lambda t: t.micro_batch_size == "auto" or t.global_batch_size % t.micro_batch_size == 0,
        ),
        Rule(
            cel="!(self.packing && self.groupByLength)",
            message="training.groupByLength does nothing when rows are packed: set training.packing: false",
            holds=lambda t: not (t.packing and t.group_by_length),
        ),
    )

    backend: Backend = "hf"
    """Training code: hf (transformers, peft, bitsandbytes, trl) or unsloth (where the trainer image has it)."""
    epochs: Annotated[float, Field(gt=0, le=10000)] | None = None
    """Passes over the data. 3 when neither epochs nor maxSteps is set."""
    max_steps: Annotated[int, Between(1, 100_000_000)] | None = None
    """Optimizer steps, instead of epochs."""
    global_batch_size: Annotated[int, Between(1, 65536, exact=True)] = 16
    """Rows (packed sequences with packing) that make one optimizer step, over all GPUs and accumulation."""
    micro_batch_size: Annotated[int | Auto, BetweenOrAuto(1, 65536)] = "auto"
    """Rows that go through one GPU at once. `auto` takes what the plan says is fastest; the result is the same."""
    max_sequence_length: Annotated[int, Between(8, 1_048_576)] = 2048
    """Tokens a row is cut at, and the length that rows are packed to."""
    packing: bool = True
    """Put several short rows into one sequence; no row sees another."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""
    scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps that raise the learning rate from 0. Unused when warmupSteps is set."""
    warmup_steps: Annotated[int, Between(0, 100_000_000)] | None = None
    """Steps that raise the learning rate from 0, instead of warmupRatio."""
    optimizer: Literal[
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adamw_8bit",
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
    ] = "paged_adamw_8bit"
    """Optimizer. The bitsandbytes ones run as adamw_torch where there is no GPU."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay of the adapter."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 0.3
    """Gradients are scaled down to this norm; 0 turns that off."""
    gradient_checkpointing: Annotated[bool | Auto, BoolOrAuto()] = "auto"
    """Recompute activations instead of keeping them. `auto` does so only for what doesn't fit."""
    group_by_length: bool = False
    """Batch rows of similar length, to pad less. For runs without packing."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Mixed precision. `auto` is that of quantization.computeDtype; where that is auto too, bf16 where the GPU has it,
    else fp16 (fp32 on CPU). Two different types cost memory and time: every product's operands are rounded."""
    logging_steps: Annotated[int, Between(1, 1_000_000)] = 10
    """Steps between two values of the loss in logs, metrics and status."""
    save_steps: Annotated[int, Between(0, 100_000_000)] = 100
    """Steps between two checkpoints in S3; 0 saves only after the last one, and when the pod is asked to stop."""
    eval_steps: Annotated[int, Between(1, 100_000_000)] | None = None
    """Steps between two validation losses. Unset: one with each checkpoint, unless the validation data are too many."""
    save_total_limit: Annotated[int, Between(1, 1000)] = 3
    """Checkpoints that are kept."""
    seed: Annotated[int, Between(0, 4_294_967_295)] = 42
    """Seed of everything random."""


class GateSpec(SpecModel):
    """Publish the adapter only if it is good enough."""

    metric: Literal["eval_loss"] = "eval_loss"
    """What is compared."""
    must_beat_base: bool = True
    """The tuned model must be better than the base model, else latest.json doesn't move and nothing is merged."""


class EvaluationSpec(SpecModel):
    """What is asked of the base model and of the tuned model."""

    RULES: ClassVar = (
        Rule(
            cel="self.prompts.map(prompt, size(prompt)).sum() <= 8192",
            message="evaluation.prompts may hold 8192 characters in all",
            holds=lambda e: sum(map(len, e.prompts)) <= 8192,
        ),
    )

    prompts: Annotated[tuple[Text, ...], Field(max_length=16, strict=False)] = ()
    """Prompts that both models answer, side by side in the report."""
    max_new_tokens: Annotated[int, Between(1, 4096)] = 64
    """Longest answer, in tokens."""
    gate: GateSpec | None = None
    """Condition for publishing the adapter."""


class Toleration(SpecModel):
    """A toleration of the training pod, as in core/v1."""

    RULES: ClassVar = (
        Rule(
            cel="has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            message="a toleration needs a key, or operator: Exists to match every taint",
            holds=lambda t: t.key is not None or t.operator == "Exists",
        ),
        Rule(
            cel="!has(self.value) || !has(self.operator) || self.operator != 'Exists'",
            message="a toleration with operator Exists takes no value",
            holds=lambda t: t.value is None or t.operator != "Exists",
        ),
        Rule(
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            message="tolerationSeconds needs effect: NoExecute",
            holds=lambda t: t.toleration_seconds is None or t.effect == "NoExecute",
        ),
    )

    key: LabelKey | None = None
    """Taint key; unset matches every key (with operator Exists)."""
    operator: Literal["Exists", "Equal"] | None = None
    """How value is compared; Equal when unset."""
    value: LabelValue | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; unset matches all."""
    toleration_seconds: Annotated[int, Between(0, 2_147_483_647)] | None = None
    """How long a NoExecute taint is tolerated; for ever when unset."""


class ResourcesSpec(SpecModel):
    """What the training pod asks for. Everything `auto` follows from the VRAM plan."""

    gpus: Annotated[int | Auto, BetweenOrAuto(1, 64)] = "auto"
    """GPUs of the training pod."""
    gpu_class: LabelValue = "auto"
    """GPU class by name (see the operator's table), cpu for none, or auto for the smallest that fits."""
    node_selector: LabelMap = Field(default={})
    """Labels that the training pod's node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16, strict=False)] = ()
    """Taints that the training pod tolerates."""
    cpu: Annotated[str, QuantityOrAuto()] = "auto"
    """CPU request."""
    memory: Annotated[str, QuantityOrAuto()] = "auto"
    """Memory request and limit."""
    ephemeral_storage: Annotated[str, QuantityOrAuto()] = "auto"
    """Local disk request and limit."""


class OutputSpec(SpecModel):
    """Results: <uri>/<run id>/{adapter, merged, gguf, tensorboard, report.html, report.json, manifest.json}."""

    uri: OutputUri
    """s3://bucket/prefix. The bucket must exist."""
    endpoint: Endpoint | None = None
    """URL of an S3 server that isn't AWS."""
    region: LabelValue | None = None
    """Region of the bucket."""
    credentials_secret_ref: SecretRef | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Without it the pod's own identity is used."""


class GgufSpec(SpecModel):
    """Export for llama.cpp, which must know the model's architecture and tokenizer."""

    quantization: Literal["f16", "q8_0", "q4_k_m"] = "q4_k_m"
    """16, 8.5 or about 4.8 bits a weight. q4_k_m is what most people run; q8_0 is hardly told from f16."""


class MergeSpec(SpecModel):
    """Merge the adapter into the original 16-bit weights once it is trained. Needs no GPU."""

    RULES: ClassVar = (
        Rule(
            cel="!has(self.gguf) || self.enabled",
            message="merge.gguf needs merge.enabled: true",
            holds=lambda m: m.gguf is None or m.enabled,
        ),
    )

    enabled: bool = False
    """Write a merged model beside the adapter."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the merged weights."""
    gguf: GgufSpec | None = None
    """Write a GGUF file of the merged model too."""


class QLoRAJobSpec(SpecModel):
    """Fine-tune a language model in 4 bit and put a LoRA adapter into S3. model, dataset and output are enough."""

    RULES: ClassVar = (
        Rule(
            cel="!has(self.evaluation.gate) || !self.evaluation.gate.mustBeatBase || has(self.dataset.validation)",
            message="evaluation.gate.mustBeatBase compares validation losses: set dataset.validation",
            holds=lambda s: (
                s.evaluation.gate is None or not s.evaluation.gate.must_beat_base or s.dataset.validation is not None
            ),
        ),
        Rule(
            cel="!has(self.training.evalSteps) || has(self.dataset.validation)",
            message="training.evalSteps needs rows to evaluate on: set dataset.validation",
            holds=lambda s: s.training.eval_steps is None or s.dataset.validation is not None,
        ),
        Rule(
            cel="self.resources.gpuClass != 'cpu' || type(self.resources.gpus) != int",
            message="resources.gpuClass cpu takes no GPU: leave resources.gpus at auto",
            holds=lambda s: s.resources.gpu_class != "cpu" or s.resources.gpus == "auto",
        ),
    )

    model: ModelSpec
    """The base model."""
    dataset: DatasetSpec
    """The training data."""
    quantization: QuantizationSpec = QuantizationSpec()
    """How the base model is held in 4 bit."""
    lora: LoraSpec = LoraSpec()
    """The adapter."""
    training: TrainingSpec = TrainingSpec()
    """The training run."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Prompts and the promotion gate."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the training pod asks for."""
    output: OutputSpec
    """Where the results go."""
    merge: MergeSpec = MergeSpec()
    """Merge the adapter into the base model."""
    queue_name: LabelValue | None = None
    """Kueue LocalQueue that admits the training Job."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the training pod."""
    service_account_name: ObjectName | None = None
    """ServiceAccount of the pods, for example one with an IAM role for S3."""
    suspend: bool = False
    """Stop (after a checkpoint) and wait until this is false again."""
    backoff_limit: Annotated[int, Between(0, 1000)] = 3
    """Retries of a step that failed for a transient reason."""
    active_deadline_seconds: Annotated[int, Between(1, 2_147_483_647)] | None = None
    """Longest time the training Job may be active."""
    ttl_seconds_after_finished: Annotated[int, Between(0, 2_147_483_647)] | None = None
    """Delete finished Jobs and pods after this time. The QLoRAJob itself stays, so that GitOps doesn't retrain."""
