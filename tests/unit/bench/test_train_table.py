"""The speed benchmark's cases and table."""

from __future__ import annotations

from typing import Any

import pytest

from bench.train.__main__ import _measurements
from bench.train.cases import CASES, baseline, corpus
from bench.train.table import medians, table


def _result(variant: str, case: str, speed: float, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant, "case": case, "tokens_per_second": speed, "allocated_gib": 7.0, "driver_gib": 8.0,
        "loss": 1.0, **more,
    }  # fmt: skip


def test_the_table_shows_medians_beside_the_setting_s_baselines() -> None:
    results = [_result("unsloth", "8b", 100), *(_result("ours", "8b-auto", speed) for speed in (140, 150, 900))]
    assert "| 8b-auto | – | 100 (7.0) | 150 (7.0) | – | 1.50 |" in table(results)


def test_a_failed_measurement_is_not_counted() -> None:
    results = [_result("ours", "8b", 10), {"variant": "ours", "case": "8b", "error": "out of memory"}]
    assert medians(results)["ours", "8b"]["tokens_per_second"] == 10


def test_cases_that_differ_in_our_plan_share_their_baselines() -> None:
    found = _measurements(["unsloth", "ours"], ["8b", "8b-auto", "8b-offload"])
    assert found == [("unsloth", "8b"), ("ours", "8b"), ("ours", "8b-auto"), ("ours", "8b-offload")]


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_a_baseline_with_the_same_data(case: str) -> None:
    one, other = CASES[case], baseline(CASES[case])
    assert one.lengths(50) == other.lengths(50)
    assert (one.shape, one.rank, one.targets, one.dropout) == (other.shape, other.rank, other.targets, other.dropout)


def test_realistic_lengths_have_about_the_mean_they_say() -> None:
    lengths = CASES["8b-real"].lengths(20_000)
    assert sum(lengths) / len(lengths) == pytest.approx(250, rel=0.05)
    assert max(lengths) <= 2048


def test_the_first_token_of_a_row_is_not_learnt() -> None:
    row = corpus(CASES["tiny"], 1, 1024)[0]
    assert row["labels"][0] == -100
    assert (row["labels"][1:] == row["input_ids"][1:]).all()
