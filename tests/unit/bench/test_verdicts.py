"""Verdicts that benchmarks reach by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.curves.text import rows
from bench.curves.verdict import distance
from bench.curves.verdict import verdict as judge
from bench.quality.data import from_alpaca
from bench.quality.report import page
from bench.quality.report import verdict as level
from bench.recipes.cases import RECIPES

STEPS = 30


def _curve(variant: str, seed: int, shift: float = 0.0, order: int = 1) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "losses": [3 + shift] * STEPS, "order": [order] * STEPS}


def test_a_curve_as_near_as_another_seed_is_within_the_noise() -> None:
    found = judge([_curve("reference", 0), _curve("reference", 1, 0.02), _curve("ours", 0, 0.01)])
    assert found["within"]
    assert (found["distance"], found["noise"]) == (pytest.approx(0.01), pytest.approx(0.02))


def test_a_curve_that_is_further_away_than_another_seed_is_not() -> None:
    assert not judge([_curve("reference", 0), _curve("reference", 1, 0.02), _curve("ours", 0, 0.03)])["within"]


def test_curves_over_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="another order"):
        judge([_curve("reference", 0), _curve("reference", 1), _curve("ours", 0, order=2)])


def test_without_a_second_seed_there_is_no_noise_to_compare_with() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        judge([_curve("reference", 0), _curve("ours", 0)])


def test_both_are_also_held_against_the_recipe_without_rounding() -> None:
    exact = [_curve("float32", seed, 0.02) for seed in (0, 1)]
    found = judge([_curve("reference", 0), _curve("reference", 1, 0.02), _curve("ours", 0, 0.03), *exact])
    assert found["fromFloat32"] == {"reference": pytest.approx(0.02), "ours": pytest.approx(0.01)}


def test_one_bad_batch_is_not_a_distance_but_a_lasting_one_is() -> None:
    base = [3.0] * STEPS
    once, lasting = list(base), [3.0] * (STEPS - 10) + [3.1] * 10
    once[5] = 3.1
    assert distance(base, once) == pytest.approx(0.01)
    assert distance(base, lasting) == pytest.approx(0.1)


def _quality(kind: str, seed: int, loss: float, rank: int = 16, data: str = "languages.jsonl") -> dict[str, Any]:
    setting = {
        "model": "m", "data": data, "rank": rank, "steps": 2, "rows": 4, "length": 64, "looks": 1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    untrained = {"lora": 3.0, "qlora": 3.3}[kind]
    return {
        "kind": kind, "seed": seed, "setting": setting, "validation": [(0, untrained), (2, loss)], "rows": [10, 2],
        "validationTokens": 50, "device": "CPU",
    }  # fmt: skip


@pytest.mark.parametrize(("loss", "word"), [(2.015, "met"), (2.03, "missed"), (1.97, "missed")])
def test_qlora_is_level_when_the_means_differ_by_one_per_cent_at_most(loss: float, word: str) -> None:
    results = [_quality(kind, seed, 2.0 if kind == "lora" else loss) for kind in ("lora", "qlora") for seed in (1, 2)]
    assert level(results) == pytest.approx(loss / 2 - 1)
    assert f"+10.00% | {word} |" in page(results)


def test_every_setting_has_a_verdict_of_its_own_whatever_came_first() -> None:
    losses = {(64, "gsm8k.jsonl"): 2.03, (16, "languages.jsonl"): 2.01, (64, "languages.jsonl"): 2.04}
    results = [
        _quality(kind, seed, 2.0 if kind == "lora" else loss, *setting)
        for setting, loss in losses.items() for kind in ("lora", "qlora") for seed in (2, 1)
    ]  # fmt: skip
    lines = [line for line in page(results).splitlines() if line.endswith(("| met |", "| missed |"))]
    assert [line.split(" | ")[0:3] for line in lines] == [
        ["| languages", "2", "16"], ["| languages", "2", "64"], ["| gsm8k", "2", "64"],
    ]  # fmt: skip
    assert [line.split(" | ")[6] for line in lines] == ["**+0.50%**", "**+2.00%**", "**+1.50%**"]
    assert [line.rsplit(" | ")[-1] for line in lines] == ["met |", "missed |", "missed |"]


def test_a_run_that_overfits_is_also_compared_at_its_lowest_loss() -> None:
    results = [_quality(kind, 1, 2.0) for kind in ("lora", "qlora")]
    for result, lowest in zip(results, (1.0, 1.05), strict=True):
        result["validation"].insert(1, (1, lowest))
    assert "| **+0.00%** | +5.00% |" in page(results)


def test_what_training_makes_up_for_is_told_of_the_least_and_the_most() -> None:
    losses = {16: 2.03, 64: 2.06}
    results = [
        _quality(kind, 1, 2.0 if kind == "lora" else losses[rank], rank)
        for kind in ("lora", "qlora")
        for rank in losses
    ]
    assert "makes up for 80% to 90% of the loss" in page(results)


def test_a_setting_of_which_runs_are_missing_has_no_verdict_yet() -> None:
    whole = [_quality(kind, 1, 2.0) for kind in ("lora", "qlora")]
    begun = [_quality("lora", 1, 2.0, rank=64), _quality("lora", 2, 2.0, rank=64), _quality("qlora", 1, 2.0, rank=64)]
    assert "rank 64" not in page([*begun, *whole])


def test_text_is_cut_into_rows_of_one_length_whose_first_token_is_not_learnt() -> None:
    found = rows(3, 50, None)
    assert [len(row["input_ids"]) for row in found] == [50] * 3
    assert found[0]["labels"][0] == -100
    assert (found[0]["labels"][1:] == found[0]["input_ids"][1:]).all()


def test_rows_in_alpaca_s_form_keep_their_input(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]), encoding="utf-8")
    assert from_alpaca(path) == [{"instruction": "Add.\n1 2", "output": "3"}]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_keeps_its_manifest_s_settings_but_for_the_number_of_steps(recipe: Any) -> None:
    training = recipe.spec(30).training
    assert (training.max_steps, training.epochs, training.save_steps) == (30, None, 0)
    assert recipe.spec(30).lora.rank == {"r0": 8, "r1": 64, "r2": 16, "r3": 64, "r4": 8}[recipe.name]
    lengths = recipe.lengths(5000, training.max_sequence_length, full=False)
    assert max(lengths) <= training.max_sequence_length
    assert sum(lengths) / len(lengths) == pytest.approx(recipe.mean_length, rel=0.15)
