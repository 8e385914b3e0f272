"""report.html, looked at in a real browser: a run's own page, and one with everything that a report can hold."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from qlora_trainer.report_page import duration, render, report_files, short, size
from qlorajob.manifest import REPORT, REPORT_PAGE
from tests.unit.trainer.jobs import Job

SECTIONS = ("curves", "answers", "data", "memory", "run", "provenance")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "<script>document.title = 'taken over'</script><img src=https://example.invalid/x.png>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; `make test` installs it on Debian."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed: make browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root in CI
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what the browser had to say about it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def open_page(browser: Browser, path: Path, width: int, height: int = 900, scheme: Any = "light") -> Opened:
    """Open a file, and note every console message, error and request."""
    opened = Opened(browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme))
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(path.as_uri(), wait_until="networkidle")
    return opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> Path:
    """The folder of a finished and merged run."""
    job = Job(tmp_path_factory.mktemp("run"), model_folder, instructions)
    job.change(
        training={"maxSteps": 12, "saveSteps": 5},
        evaluation={"prompts": ["code of zulu =", "code of hausa ="], "maxNewTokens": 4},
        merge={"enabled": True},
    )
    prepared = job.prepare()
    job.train(prepared)
    job.run("merge", job.config(prepared))
    return job.output / prepared.run_id


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    """The run's report.json."""
    return json.loads((run / REPORT).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def opened(browser: Browser, run: Path) -> Opened:
    """The run's page on a laptop."""
    return open_page(browser, run / REPORT_PAGE, 1280)


def full(report: dict[str, Any]) -> dict[str, Any]:
    """A report with everything in it, as a long run on a GPU leaves it: the real one, grown and made hostile."""
    steps = range(10, 5001, 10)
    curve = [
        {
            "step": step,
            "loss": 1 + math.exp(-step / 600),
            "learningRate": 2e-4 * (1 - step / 5000),
            "gradNorm": math.nan if step == 500 else 0.3,
            "tokensPerSecond": 9600.0 + step % 70,
        }
        for step in steps
    ]
    evaluations = [{"step": step, "evalLoss": 1.1 + math.exp(-step / 700)} for step in range(500, 5001, 500)]
    parts = ("quantizedWeights", "embeddingsAndHead", "adapter", "optimizerStates", "activations", "logits", "context")
    prompts = [{"prompt": HOSTILE, "text": "", "before": "", "after": "word " * 200, "merged": "x" * 600}]
    return report | {
        "promoted": False,
        "loss": report["loss"] | {"curve": curve, "evaluations": evaluations},
        "prompts": prompts,
        "memory": {
            "peakBytes": 17_200_000_000,
            "predictedBytes": 17_800_000_000,
            "gpuMemoryBytes": 24_000_000_000,
            "breakdown": {name: 10**9 * number for number, name in enumerate(parts, 1)},
        },
        "data": report["data"]
        | {"dropped": {"duplicate": 2710, "empty": 188}, "lengths": {str(16 << n): 2**n for n in range(17)}},
        "provenance": report["provenance"] | {"datasetUri": f"s3://bucket/{'long-' * 40}{HOSTILE}"},
    }


@pytest.fixture(scope="module")
def everything(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such a report."""
    path = tmp_path_factory.mktemp("page") / REPORT_PAGE
    path.write_text(render(full(report)), encoding="utf-8")
    return path


def test_the_page_asks_for_nothing_else_and_the_browser_has_no_complaint(opened: Opened, run: Path) -> None:
    assert opened.requests == [(run / REPORT_PAGE).as_uri()]
    assert opened.complaints == []


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_visible(opened: Opened, section: str) -> None:
    assert opened.page.locator(f"#{section}").is_visible()
    assert opened.page.locator(f"#{section} h2").inner_text()


def test_the_loss_curve_has_a_point_for_each_of_the_journal_s(opened: Opened, report: dict[str, Any]) -> None:
    points = opened.page.locator("polyline[data-name=training]").get_attribute("points") or ""
    assert len(points.split()) == len(report["loss"]["curve"]) == 12


def test_the_validation_losses_are_marked(opened: Opened, report: dict[str, Any]) -> None:
    assert opened.page.locator(".dot.second").count() == len(report["loss"]["evaluations"]) == 3


@pytest.mark.parametrize("title", ["Learning rate", "Throughput", "Gradient norm"])
def test_there_is_a_curve_of_what_the_journal_logs_beside_the_loss(opened: Opened, title: str) -> None:
    chart = opened.page.locator("figure.small", has_text=title)
    points = chart.locator("polyline").get_attribute("points") or ""
    assert len(points.split()) == 12


def test_the_answers_of_base_tuned_and_merged_model_stand_side_by_side(opened: Opened, report: dict[str, Any]) -> None:
    articles = opened.page.locator("#answers article")
    assert articles.count() == len(report["prompts"])
    for number, entry in enumerate(report["prompts"]):
        article = articles.nth(number)
        assert article.locator(".prompt").inner_text() == entry["prompt"]
        assert article.locator("h3").all_inner_texts() == ["Base model", "Tuned model", "Merged model"]
        boxes = [box for box in (answer.bounding_box() for answer in article.locator(".said > div").all()) if box]
        assert len({round(box["y"]) for box in boxes}) == 1


def test_the_numbers_at_the_top_are_the_report_s(opened: Opened, report: dict[str, Any]) -> None:
    figures = opened.page.locator("#figures").inner_text()
    for value in (report["loss"]["last"], report["loss"]["first"], report["loss"]["evalTuned"]):
        assert f"{value:.4g}" in figures


def test_the_provenance_is_complete(opened: Opened, report: dict[str, Any]) -> None:
    text = opened.page.locator("#provenance").inner_text()
    source = report["provenance"]
    for part in (report["runId"], source["modelRevision"], source["datasetDigest"], *source["versions"].values()):
        assert part in text


def test_the_pointer_reads_a_value_off_the_curve(opened: Opened, report: dict[str, Any]) -> None:
    plot = opened.page.locator(".large .plot")
    plot.hover(position={"x": 1, "y": 50})
    first = report["loss"]["curve"][0]
    assert opened.page.locator(".large .readout").inner_text() == f"step {first['step']}\ntraining {first['loss']:.6g}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_makes_the_page_scroll_sideways(browser: Browser, everything: Path, width: int, scheme: str) -> None:
    opened = open_page(browser, everything, width, scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert opened.page.evaluate(f"{outside}.filter(e => !e.closest('pre')).map(e => e.outerHTML)") == []


def test_text_from_outside_is_only_text(browser: Browser, everything: Path) -> None:
    opened = open_page(browser, everything, 1280)
    assert opened.requests == [everything.as_uri()]
    assert "taken over" not in opened.page.title().replace(HOSTILE, "")
    assert opened.page.locator(".prompt").inner_text() == HOSTILE
    assert opened.page.locator("img").count() == 0


def test_dark_and_light_have_the_contrast_that_text_needs(browser: Browser, everything: Path) -> None:
    for scheme in ("light", "dark"):
        page = open_page(browser, everything, 1280, scheme=scheme).page
        colours = page.evaluate(
            "() => { const s = getComputedStyle(document.documentElement);"
            " return ['--page', '--card', '--ink', '--soft', '--accent-ink', '--warn', '--warn-wash', '--wash']"
            ".map(name => [name, s.getPropertyValue(name).trim()]) }"
        )
        colour = {name: luminance(value) for name, value in colours}
        pairs = [("--ink", "--page"), ("--ink", "--card"), ("--ink", "--wash"), ("--soft", "--page")]
        pairs += [
            ("--soft", "--wash"),
            ("--accent-ink", "--page"),
            ("--accent-ink", "--wash"),
            ("--warn", "--warn-wash"),
        ]
        for text, ground in pairs:
            assert contrast(colour[text], colour[ground]) >= 4.5, (scheme, text, ground)  # WCAG AA


def test_the_page_prints_with_the_spec_unfolded(browser: Browser, everything: Path) -> None:
    page = open_page(browser, everything, 1280, scheme="dark").page
    page.emulate_media(media="print")
    assert page.locator("details pre").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_report_of_a_run_that_diverged_or_measured_little_still_makes_a_page(report: dict[str, Any]) -> None:
    nothing = dict.fromkeys(report["loss"], None) | {"curve": [], "evaluations": []}
    diverged = report["loss"] | {"last": math.nan, "curve": [{"step": 1, "loss": math.nan, "learningRate": None}]}
    for loss in (nothing, diverged):
        page = render(
            report | {"loss": loss, "memory": {}, "prompts": [], "throughput": dict.fromkeys(report["throughput"], 0)}
        )
        assert "<h2>How it learnt</h2>" in page


def test_a_loss_that_is_no_number_is_null_in_the_report_which_a_merge_can_read(report: dict[str, Any]) -> None:
    curve = [{"step": 1, "loss": math.nan, "learningRate": 0.1, "gradNorm": math.inf}]
    diverged = report | {"loss": report["loss"] | {"last": math.nan, "evalTuned": math.nan, "curve": curve}}
    written = json.loads(report_files(diverged)[REPORT], parse_constant=pytest.fail)
    assert (written["loss"]["last"], written["loss"]["curve"][0]["gradNorm"]) == (None, None)
    assert report_files(written)[REPORT] == report_files(diverged)[REPORT]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (59, "59 s"), (61, "1 min 1 s"), (3599, "59 min 59 s"), (12744, "3 h 32 min"), (90000, "1 d 1 h")],
)
def test_time_spans_are_in_their_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_and_lengths_are_short() -> None:
    assert [size(count) for count in (0, 999, 1500, 168e6, 17.2e9)] == ["0 B", "999 B", "1.5 kB", "168 MB", "17.2 GB"]
    assert [short(count) for count in (16, 512, 1024, 4096)] == ["16", "512", "1k", "4k"]


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    """Contrast ratio of two luminances, from 1 to 21."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
