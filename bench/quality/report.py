"""From the runs' results to the verdicts, a page and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
ALLOWED = 0.01
"""Relative difference of the mean validation losses up to which QLoRA counts as level with LoRA."""
DATA = {
    "languages": "ISO 639-3 as an instruction set: the demo's question about every language",
    "gsm8k": "GSM8K: questions of grade-school mathematics, with worked answers",
}


def final(result: Result) -> float:
    """Validation loss after the last step."""
    return float(result["validation"][-1][1])


def untrained(result: Result) -> float:
    """Validation loss before the first step."""
    return float(result["validation"][0][1])


def best(result: Result) -> float:
    """The lowest validation loss on the way: what is reached before a run of many steps learns its rows by heart."""
    return min(float(loss) for _, loss in result["validation"][1:])


def by_setting(results: Sequence[Result]) -> list[list[Result]]:
    """Results that may be compared: of one data set, rank, number of steps … that has both kinds for every seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=_order):
        found.setdefault(json.dumps(result["setting"], sort_keys=True), []).append(result)
    return [group for group in found.values() if _is_whole(group)]


def _order(result: Result) -> tuple[Any, ...]:
    setting = result["setting"]
    return setting["data"] != "languages.jsonl", setting["data"], setting["steps"], setting["rank"], result["seed"]


def _is_whole(results: Sequence[Result]) -> bool:
    seeds = {kind: [each["seed"] for each in found] for kind, found in by_kind(results).items()}
    return bool(seeds["lora"]) and seeds["lora"] == seeds["qlora"]


def by_kind(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by kind, in the order of their seeds."""
    found: dict[str, list[Result]] = {"lora": [], "qlora": []}
    for result in sorted(results, key=lambda each: each["seed"]):
        found[result["kind"]].append(result)
    return found


def means(results: Sequence[Result], loss: Callable[[Result], float] = final) -> dict[str, float]:
    """Mean of the seeds' last validation losses, by kind; or of others."""
    return {kind: statistics.mean(map(loss, found)) for kind, found in by_kind(results).items()}


def verdict(results: Sequence[Result], loss: Callable[[Result], float] = final) -> float:
    """QLoRA's mean validation loss relative to LoRA's, minus one."""
    found = means(results, loss)
    return found["qlora"] / found["lora"] - 1


def made_up(results: Sequence[Result]) -> float:
    """How much of the untrained bases' difference is gone after the last step."""
    before, after = means(results, untrained), means(results)
    return 1 - (after["qlora"] - after["lora"]) / (before["qlora"] - before["lora"])


def page(results: Sequence[Result]) -> str:
    """docs/results/quality.md: every setting in a line, then its seeds."""
    groups = by_setting(results)
    one = groups[0][0]
    lines = [
        "# QLoRA beside 16-bit LoRA",
        "",
        f"{one['setting']['model']}, real weights, on {one['device']}. For each seed both kinds begin with the same "
        "adapter and see the same rows in the same order, so a difference is the base's 4 bit (NF4). Validation loss "
        f"on rows held out, mean of the seeds; the target is {ALLOWED:.0%}. Every setting that both kinds have "
        "ended is here. Where the lowest loss comes long before the last, the run overfits, and the difference at the "
        "lowest says more.",
        "",
        "| data | steps | rank | seeds | 16-bit LoRA | QLoRA | difference | at lowest | before training | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, groups),
        "",
        f"Training makes up for {min(map(made_up, groups)):.0%} to {max(map(made_up, groups)):.0%} of the loss that "
        "the base's 4 bit cost before it.",
        "",
        "![validation loss](quality/curves.svg)",
    ]
    for group in groups:
        lines += ["", *_section(group)]
    lines += ["", "One JSON file for each run is in `quality/`; a run whose file is there isn't run again."]
    return "\n".join(lines) + "\n"


def _line(results: Sequence[Result]) -> str:
    setting, loss, difference = results[0]["setting"], means(results), verdict(results)
    level = "met" if abs(difference) <= ALLOWED else "missed"
    return (
        f"| {_name(setting)} | {setting['steps']} | {setting['rank']} | {len(results) // 2} | {loss['lora']:.4f} "
        f"| {loss['qlora']:.4f} | **{difference:+.2%}** | {verdict(results, best):+.2%} "
        f"| {verdict(results, untrained):+.2%} | {level} |"
    )


def _name(setting: dict[str, Any]) -> str:
    return Path(setting["data"]).stem


def _section(results: Sequence[Result]) -> list[str]:
    """What was run, by which command, and every seed's losses."""
    one, kinds = results[0], by_kind(results)
    setting, name = one["setting"], _name(one["setting"])
    seeds = [str(result["seed"]) for result in kinds["lora"]]
    data = "" if setting["data"] == "languages.jsonl" else f" --data .bench/data/{setting['data']}"  # bench/README.md
    command = (
        f"python -m bench.quality{data} --steps {setting['steps']} --rank {setting['rank']} "
        f"--rows {setting['rows']} --length {setting['length']} --looks {setting['looks']} "
        f"--learning-rate {setting['learning_rate']:g} --seeds {' '.join(seeds)}"
    )
    lines = [
        f"## {name}, {setting['steps']} steps, rank {setting['rank']}",
        "",
        f"{DATA.get(name, name)} ({one['rows'][0]:,} rows to train, {one['rows'][1]} held out, "
        f"{one['validationTokens']:,} validation tokens); steps of {setting['rows']} × {setting['length']} tokens, "
        f"learning rate {setting['learning_rate']:g}.",
        "",
        "```sh",
        command,
        "```",
        "",
        "| seed | 16-bit LoRA | QLoRA | difference |",
        "|---|---|---|---|",
    ]
    for lora, qlora in zip(kinds["lora"], kinds["qlora"], strict=True):
        lines.append(
            f"| {lora['seed']} | {final(lora):.4f} | {final(qlora):.4f} | {final(qlora) / final(lora) - 1:+.2%} |"
        )
    if len(seeds) == 1:
        return lines
    spread = {kind: f"{_spread(found):.2%}" for kind, found in kinds.items()}
    return [*lines, "", f"Seeds differ among themselves by up to {spread['lora']} (LoRA), {spread['qlora']} (QLoRA)."]


def _spread(results: Sequence[Result]) -> float:
    losses = [final(result) for result in results]
    return max(losses) / min(losses) - 1


def picture(results: Sequence[Result], path: Path) -> None:
    """Validation loss over steps: a panel for each setting, a line for each run."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same results make the same file
    groups = by_setting(results)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(groups) :]:
        panel.remove()
    for panel, group in zip(panels, groups, strict=False):
        setting = group[0]["setting"]
        for kind, colour, name in (("lora", "tab:blue", "16-bit LoRA"), ("qlora", "tab:orange", "QLoRA (NF4)")):
            for number, result in enumerate(by_kind(group)[kind]):
                steps, losses = zip(*result["validation"][1:], strict=True)  # the untrained base's would hide the rest
                panel.plot(steps, losses, color=colour, marker="o", markersize=3, label=None if number else name)
        panel.set_title(f"{_name(setting)}, {setting['steps']} steps, rank {setting['rank']}", fontsize="medium")
        panel.set_xlabel("optimizer step")
    panels[0].set_ylabel("validation loss (nats a token)")
    panels[0].legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
