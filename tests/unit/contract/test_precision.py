"""In which number types a run computes, by what the manifest says and the machine has."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from qlorajob.precision import PRECISION, NumberTypes, number_types
from qlorajob.spec import QLoRAJobSpec


def spec(compute: str = "auto", precision: str = "auto") -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(
        {
            "model": {"uri": "hf://a/b"},
            "dataset": {"uri": "hf://a/b"},
            "output": {"uri": "s3://bucket/prefix"},
            "quantization": {"computeDtype": compute},
            "training": {"precision": precision},
        }
    )


@pytest.mark.parametrize("best", ["bfloat16", "float16", "float32"])
def test_without_a_wish_everything_is_in_the_machine_s_best_type(best: Any) -> None:
    assert number_types(spec(), best) == NumberTypes(best, PRECISION[best])


@pytest.mark.parametrize(
    ("compute", "precision", "found"),
    [
        ("float16", "auto", NumberTypes("float16", "fp16")),
        ("bfloat16", "auto", NumberTypes("bfloat16", "bf16")),
        ("float32", "auto", NumberTypes("float32", "fp32")),
        ("auto", "fp16", NumberTypes("float16", "fp16")),
        ("auto", "bf16", NumberTypes("bfloat16", "bf16")),
        ("auto", "fp32", NumberTypes("bfloat16", "fp32")),
        ("bfloat16", "fp16", NumberTypes("bfloat16", "fp16")),
    ],
)
def test_one_wish_decides_for_both_and_two_are_honoured(compute: str, precision: str, found: NumberTypes) -> None:
    assert number_types(spec(compute, precision), "bfloat16") == found


@pytest.mark.parametrize(
    ("compute", "precision", "found", "field"),
    [
        ("bfloat16", "auto", ("float16", "fp16"), "quantization.computeDtype bfloat16"),
        ("auto", "bf16", ("float16", "fp16"), "training.precision bf16"),
    ],
)
def test_a_gpu_without_bfloat16_takes_float16_and_says_so_once(
    compute: str, precision: str, found: tuple[str, str], field: str
) -> None:
    types = number_types(spec(compute, precision), "float16")
    assert (types.compute, types.precision) == found
    assert [reason.startswith(field) for reason in types.degradations] == [True]


@pytest.mark.parametrize(
    ("compute", "precision"),
    list(product(["auto", "bfloat16", "float16", "float32"], ["auto", "bf16", "fp16", "fp32"])),
)
def test_types_differ_only_where_both_are_asked_for(compute: str, precision: str) -> None:
    if "auto" in (compute, precision):
        assert not number_types(spec(compute, precision), "bfloat16").differ


@pytest.mark.parametrize(
    ("compute", "precision", "found"),
    [
        ("auto", "bf16", ("float32", "bf16")),
        ("bfloat16", "auto", ("bfloat16", "fp32")),
        ("auto", "fp16", ("float32", "fp32")),
    ],
)
def test_on_a_cpu_what_is_not_asked_for_stays_float32(compute: str, precision: str, found: tuple[str, str]) -> None:
    types = number_types(spec(compute, precision), "float32")
    assert (types.compute, types.precision) == found


def test_one_16_bit_type_is_what_the_fast_path_wants() -> None:
    narrow = {"float16/fp16", "bfloat16/bf16"}
    for compute, precision in product(PRECISION, PRECISION.values()):
        assert NumberTypes(compute, precision).narrow == (f"{compute}/{precision}" in narrow)
