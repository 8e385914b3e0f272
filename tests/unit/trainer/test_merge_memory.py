"""Merging takes the memory of the largest tensor, not of the model: measured in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from qlora_trainer.checkpoint_files import SAFETENSORS, TensorInfo, plan_shards, write_shard
from qlora_trainer.libraries import import_bitsandbytes, importing_much

MOST_BYTES = 190 << 20
"""On top of Python with torch, transformers and PEFT. The largest tensor takes 50 MB, the largest update 17."""


def make(folder: Path) -> int:
    """A model of 0.3 billion parameters in one file, and an adapter; its size in bytes."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=24000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = [TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in model.named_parameters()]
    (shard,) = plan_shards(weights)
    write_shard(folder / SAFETENSORS, shard, lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype))
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora, low_cpu_mem_usage=True)
    lora.save_pretrained(folder)
    names = {name.replace(".default", ""): value.shape for name, value in tuned.named_parameters() if "lora_" in name}
    save_file({name: torch.full(shape, 0.1) for name, shape in names.items()}, folder / "adapter_model.safetensors")
    return shard.bytes


def merge(folder: Path) -> None:
    """Merge file by file, as the command does, and print by how many bytes the peak of this process's memory rises."""
    with importing_much():
        import_bitsandbytes()
        from qlora_trainer.merging import plan_merge
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which imports made, is forgotten
    before = peak()
    plan = plan_merge(folder, folder, torch.bfloat16, trust_remote_code=False)
    for shard in plan_shards(plan.tensors):
        path = folder / f"merged-{shard.file}"
        write_shard(path, shard, plan.compute)
        path.unlink()
    print(peak() - before)


def peak() -> int:
    """Peak of this process's memory in bytes, mapped files included. getrusage's may be that of the parent process."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def test_a_merge_takes_far_less_memory_than_the_model_has(tmp_path: Path) -> None:
    size = make(tmp_path)
    done = subprocess.run([sys.executable, "-m", __name__, tmp_path], capture_output=True, text=True, check=True)
    assert size > 2.8 * MOST_BYTES
    assert int(done.stdout) < MOST_BYTES, done.stdout


if __name__ == "__main__":
    merge(Path(sys.argv[1]))
