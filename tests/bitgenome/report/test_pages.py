"""Pages as a reader has them: a headless Chromium opens the report, the watched run and the leaderboard."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bitgenome.common import layout
from bitgenome.report.leaderboard import leaderboard, standing_of
from bitgenome.report.run_page import write_report
from bitgenome.report.source import RunSource
from bitgenome.report.watch import server_of
from bitgenome.storage.lease import Lease
from tests.bitgenome.conftest import Finished, Runs, call_here

sync_api = pytest.importorskip("playwright.sync_api", reason="pages are opened where playwright is installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="pages are opened where Chromium is installed"),
]
READY = "html[data-drawn]"
SECTIONS = {
    "front", "mixes", "names", "types", "sensitivity", "kinds", "convergence", "agreement", "healing", "figures",
    "cost", "provenance",
}  # fmt: skip
DRAWN = """() => [...document.querySelectorAll('[data-figure]')].filter(one =>
    one.querySelectorAll('.trace, .point, .hm image, .points path').length && one.getBoundingClientRect().height > 100)
    .map(one => one.dataset.figure)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def run(finished: Finished, runs: Runs) -> Path:
    """A finished run."""
    return runs.storage / "base"


@contextmanager
def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """Open a page, and see that it says nothing on the console, loads nothing else and draws every figure."""
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector(READY, timeout=60_000)
    assert all_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    yield page
    assert said == []
    assert {url.split("#")[0] for url in asked} <= {address, f"{address}fresh"}
    context.close()


def all_drawn(page: Any) -> bool:
    figures = page.evaluate("[...document.querySelectorAll('[data-figure]')].map(one => one.dataset.figure)")
    return bool(figures) and page.evaluate(DRAWN) == figures


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_report_of_a_run_draws_every_figure_and_its_headline_is_that_of_best_json(
    browser: Any, run: Path, width: int, scheme: str
) -> None:
    proof = json.loads((run / layout.BEST).read_text())["proof"]
    with opened(browser, (run / layout.REPORT).as_uri(), width, scheme) as page:
        told = page.eval_on_selector_all(".tiles data", "all => all.map(one => Number(one.value))")
        assert told == [
            proof["file_bytes"],
            *(proof["figures"][name]["value"] for name in ("mean_kl", "perplexity", "same_top")),
            proof["generated_tokens_per_second"],
        ]  # fmt: skip
        assert set(page.eval_on_selector_all("section", "all => all.map(one => one.id)")) == SECTIONS
        figures = page.locator("[data-figure]").count()
        assert page.locator("[data-figure] ~ details table").count() == figures  # of each also the numbers
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the button between light and dark
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.locator("#front summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("#front details table").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_watched_run_renews_its_page_and_leaves_the_reader_at_his_place(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    watched = tmp_path / "base"
    shutil.copytree(run, watched)
    (watched / layout.BEST).rename(tmp_path / layout.BEST)  # as the run was during its search
    lines = (watched / layout.EVALUATIONS).read_text().splitlines(keepends=True)
    (watched / layout.EVALUATIONS).write_text("".join(lines[:12]))
    with Lease(watched, "the run"), server_of(str(watched), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, f"http://127.0.0.1:{server.server_port}/") as page:
            assert "Running" in page.inner_text(".state")
            assert page.locator(".tiles").count() == 0
            page.locator("#cost summary").click()
            page.locator("#cost").scroll_into_view_if_needed()
            before = page.evaluate("document.querySelector('#cost').getBoundingClientRect().top")
            (watched / layout.EVALUATIONS).write_text("".join(lines))
            shutil.copy(tmp_path / layout.BEST, watched / layout.BEST)
            page.wait_for_selector(".tiles", timeout=30_000)
            page.wait_for_selector("#front .main-svg")
            assert page.locator("#cost details[open]").count() == 1
            assert abs(page.evaluate("document.querySelector('#cost').getBoundingClientRect().top") - before) < 3
            assert all_drawn(page)
        server.shutdown()


def test_a_leaderboard_shows_ties_as_ties_and_leads_to_the_runs_pages(browser: Any, run: Path, tmp_path: Path) -> None:
    proof = json.loads((run / layout.BEST).read_text())["proof"]
    names, rows, standings = ("one", "twin"), [], {}
    for name in names:
        shutil.copytree(run, tmp_path / name)
        write_report(tmp_path / name)
        standings[name] = standing_of(RunSource(tmp_path / name).read(), report=True)
        figures = {key: proof[key] for key in ("file_bytes", "simulated_kl")} | {"bits_per_weight": 3.5}
        figures |= {key: proof["figures"][key]["value"] for key in ("mean_kl", "perplexity", "base_perplexity")}
        place = {
            "name": name,
            "stage": "finished",
            "model": "m",
            "budget_bytes": proof["file_bytes"],
            "run": f"../{name}",
        }
        rows.append(
            {**place, **figures, "strategy": "genetic", "seed": 0, "evaluations": 9, "seconds": 1.0, "sentence": None}
        )
    rows.append({**rows[0], "name": "bad", "stage": "failed", "sentence": "expected <b>room</b>"})
    (tmp_path / "batch").mkdir()
    (tmp_path / "batch" / layout.LEADERBOARD).write_text(leaderboard(pd.DataFrame(rows), "two & one", standings))
    with opened(browser, (tmp_path / "batch" / layout.LEADERBOARD).as_uri(), 390) as page:
        ranks = page.eval_on_selector_all("#table-0-0 tbody tr", "all => all.map(one => one.cells[1].innerText)")
        assert ranks == ["1=", "1="] and page.locator("#table-0-0 tr.marked").count() == 2
        assert "expected <b>room</b>" in page.inner_text("#rest")
        href = page.locator("#table-0-0 a").first.get_attribute("href")
    assert (tmp_path / "batch" / href).resolve() == tmp_path / "one" / layout.REPORT


def test_a_report_is_written_again_on_demand_and_of_a_run_that_is_none_a_sentence_is_said(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "base")
    (tmp_path / "base" / layout.REPORT).unlink()
    done = call_here("report", "base", "--storage", tmp_path)
    assert done.returncode == 0 and "wrote" in done.stdout
    assert (tmp_path / "base" / layout.REPORT).stat().st_size > 1_000_000
    for command in ("report", "watch"):
        refused = call_here(command, tmp_path / "none")
        assert refused.returncode == 2 and "expected a run directory" in refused.stderr
