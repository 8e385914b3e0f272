"""Load what a run left in S3 in a fresh process, as a user would, and answer prompts with it. Prints JSON.

Run as a program: `python answers.py adapter|merged DIRECTORY BASE NEW_TOKENS < prompts.json`.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def _load(kind: str, directory: str, base: str) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(directory), tokenizer
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    return PeftModel.from_pretrained(model, directory), tokenizer


def main() -> None:
    """Answer every prompt greedily."""
    kind, directory, base, new_tokens = sys.argv[1:]
    model, tokenizer = _load(kind, directory, base)
    model.eval()
    answers = []
    for prompt in json.load(sys.stdin):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
        answers.append(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
