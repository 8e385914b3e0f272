"""The trainer's plain step without a GPU and without memory: real modules, real autograd, fake tensors, counted bytes.

torch's FakeTensorMode runs every operation on shapes alone, so that models of any size go through transformers, PEFT,
bitsandbytes and TRL in a second, and a dispatch mode sees each storage come and go. CPU tensors play the GPU's part
(torch can't run a backward pass on fake CUDA tensors without a driver), and where CUDA would do something else than a
CPU, it is done as CUDA does it: autocast's float32 list, native dropout, the attention kernels. Kernels that write into
buffers are left out. What a kernel allocates inside is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import bitsandbytes
import torch
import transformers.masking_utils
import trl.kernels.chunked_logprob
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_trainer.quirks import tell_output_head

aten = torch.ops.aten
ALLOCATION = 512
"""CUDA's caching allocator rounds up to this."""


@dataclass(frozen=True)
class Run:
    """A micro batch as the trainer would run it."""

    config: Any
    rows: int = 2
    length: int = 1024
    dropout: float = 0.0
    masked: bool = False
    """With an explicit attention mask, as packed rows have."""
    checkpointing: bool = False
    rank: int = 16
    targets: str | list[str] = "all-linear"
    fused_head: bool = True
    """The loss by TRL's fused head; else from all logits, by the model itself."""
    precision: torch.dtype = torch.bfloat16
    """What autocast computes in. Weights are dequantized to bfloat16."""


@dataclass
class Counted:
    """Bytes beside the weights, the adapter and its gradients."""

    kept: int
    """Behind the forward pass."""
    peak: int
    """The most of the forward and backward pass."""


def count(run: Run) -> Counted:
    """Count a micro batch that finds the gradients of one before it."""
    with _loaded(run) as (model, ledger):
        base = ledger.live
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        gradients = ledger.live - base
        kept = _micro_batch(model, run, ledger)
        return Counted(kept - base - gradients, ledger.peak - base - gradients)


def count_kept(run: Run) -> int:
    """The same `kept` as count's, without a backward pass."""
    with _loaded(run) as (model, ledger):
        base = ledger.live
        _, kept = _forward(model, _inputs(run), run, ledger)
        return kept - base


class Ledger(TorchDispatchMode):
    """Adds up the storages of all fake tensors that live."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self._precision = precision
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = self._with_positions(func, args)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._see(leaf)
        return self._product(args, out) if func is torch.ops.bitsandbytes.gemm_4bit.default else out

    def _product(self, args: Any, out: Any) -> Any:
        """What bitsandbytes allocates inside. Autocast sees the product of the dequantized weight, as any other."""
        outputs, inputs = args[2]
        weight = outputs * inputs * out.element_size()
        constants = 4 * (outputs * inputs // 64)
        self.peak = max(self.peak, self.live + weight + 2 * constants)  # dequantized, and again with their offset
        if out.dtype is self._precision:
            return out
        result = out.to(self._precision)
        self._see(result)
        rounded = self._precision.itemsize * (outputs * inputs + args[0].numel())
        self.peak = max(self.peak, self.live + weight + constants + rounded)
        return result

    def _see(self, leaf: Any) -> None:
        if not isinstance(leaf, FakeTensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _with_positions(self, func: Any, args: Any) -> Any:
        """Selecting by a mask depends on values, which aren't there: every token counts."""
        if func not in (aten.index.Tensor, aten._index_put_impl_.default):
            return args
        indices = args[1]
        if len(indices) != 1 or indices[0].dtype is not torch.bool:
            return args
        positions = [torch.zeros(indices[0].numel(), dtype=torch.long) for _ in range(indices[0].dim())]
        for position in positions:
            self._see(position)
        return (args[0], positions, *args[2:])


@contextmanager
def _loaded(run: Run) -> Iterator[tuple[Any, Ledger]]:
    """The model on the simulated GPU, and nothing beside it."""
    gc.freeze()  # so that only what is made here is looked at for garbage, not all of the tests' process
    try:
        with _simulated(run), Ledger(run.precision) as ledger:
            model = _model(run)
            gc.collect()
            yield model, ledger
    finally:
        gc.unfreeze()


def _micro_batch(model: Any, run: Run, ledger: Ledger) -> int:
    """Forward and backward; returns what lived in between."""
    inputs = _inputs(run)
    loss, kept = _forward(model, inputs, run, ledger)
    loss.backward()
    return kept


def _inputs(run: Run) -> dict[str, Any]:
    ids = torch.zeros(run.rows, run.length, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if run.masked:
        inputs["attention_mask"] = torch.ones(run.rows, 1, run.length, run.length, dtype=torch.bool)
    return inputs


def _forward(model: Any, inputs: dict[str, Any], run: Run, ledger: Ledger) -> tuple[Any, int]:
    """The loss, and what lives then beside the inputs."""
    ledger.peak = ledger.live
    with torch.autocast("cpu", dtype=run.precision):
        if run.fused_head:
            loss = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum()
        else:
            loss = model(**inputs, use_cache=False).loss
    return loss, ledger.live - sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())


def _model(run: Run) -> Any:
    model = AutoModelForCausalLM.from_config(run.config, dtype=torch.bfloat16)
    tell_output_head(model)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                setattr(parent, name, FakeLinear4bit(child))
    model.is_loaded_in_4bit = True
    lora = LoraConfig(
        r=run.rank, lora_alpha=16, lora_dropout=run.dropout, target_modules=run.targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # else the first layer keeps less than the others
    return model.train()


class FakeLinear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer around fake tensors, of which Params4bit can't be made."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numbers = linear.in_features * linear.out_features
        self.weight = torch.nn.Parameter(torch.empty(numbers // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = self.quant_state = _quant_state(linear)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.data, requires_grad=False)
        self.compute_dtype, self.compute_type_is_set = torch.bfloat16, True
        self.support_avx512bf16_for_cpu = False


def _quant_state(linear: torch.nn.Linear) -> QuantState:
    shape = torch.Size((linear.out_features, linear.in_features))
    blocks = shape.numel() // 64
    nested = QuantState(
        absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
    )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8), offset=torch.empty(()), state2=nested, shape=shape,
        code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
    )  # fmt: skip


# A CPU that does as CUDA does


@contextmanager
def _simulated(run: Run) -> Iterator[None]:
    asks = torch.is_autocast_enabled
    replaced: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", _attention),
        (functional, "layer_norm", _in_float32(functional.layer_norm)),
        (functional, "softmax", _in_float32(functional.softmax)),
        (functional, "dropout", _dropout),
        (torch, "is_autocast_enabled", lambda device="cpu": asks(device)),
        (torch.nn.Module, "to", lambda module, *args, **kwargs: module),  # all is where it should be
        (trl.kernels.chunked_logprob, "_forward_kernel", _NoKernel()),
        (trl.kernels.chunked_logprob, "_backward_kernel", _NoKernel()),
        (trl.kernels.chunked_logprob, "_addmm_fp32", lambda *args: None),
        (transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of autocast's float32 list on CUDA."""

    def wide(x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            args = tuple(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
            x = x.float()
        return function(x, *args, **kwargs)

    return wide


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """As CUDA dispatches it: FlashAttention, or with a mask the memory-efficient kernel and the mask in q's type."""
    q, k, v = (part.to(torch.get_autocast_dtype("cpu")) for part in (q, k, v))  # by autocast
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    blocked = torch.full((), float("-inf"), dtype=q.dtype)
    mask = torch.where(attn_mask, 0.0, blocked).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]


class _NoKernel:
    """A Triton kernel that isn't launched; its results are in buffers that exist already."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None
