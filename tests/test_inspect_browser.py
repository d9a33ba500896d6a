"""The page of `flexprefill inspect` in a real, headless Chromium without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_pages import find_browser, opened, read_data, synthetic
from test_inspect import OPTIONS, inspect, prompt  # noqa: F401 (a fixture)

from flexprefill_fa import FlashPrefillConfig, PeakPrefillConfig
from flexprefill_fa.tools.inspection.collect import inspect_prefill
from flexprefill_fa.tools.inspection.page import render
from flexprefill_fa.tools.inspection.place import Place
from flexprefill_fa.tools.inspection.why import explain_place
from flexprefill_fa.tools.progress import WorkProgress

# The colours of a canvas that the page has drawn, white left out.
COLOURS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const found = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) found.add(data.slice(i, i + 3).join());
    return [...found];
}"""


def column(page: Any, number: int) -> list[str]:
    return page.eval_on_selector_all(f"#heads td:nth-child({number})", "cells => cells.map(cell => cell.textContent)")


def wait_for_count(page: Any, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count)


def test_the_needle_models_page(prompt: Path, tmp_path: Path) -> None:  # noqa: F811
    find_browser()
    out = tmp_path / "report.html"
    result = inspect(prompt, out, *OPTIONS)
    assert result.exit_code == 0, result.output
    heads = read_data(out.read_text(encoding="utf-8"))["heads"]
    worst = min(heads, key=lambda head: head["recall"])
    with opened(out) as page:
        assert page.locator("#heads tr").count() == 48
        assert str(prompt) in page.locator("#facts").inner_text(), "the name as it is, not as markup"

        # The head of the lowest recall is open, and first in the list of such heads.
        title = f"Layer {worst['layer']}, head {worst['head']}"
        assert page.locator("#detail-title").inner_text() == title
        assert page.locator("#worst-heads button").first.inner_text().startswith(title)

        # A click on a column sorts by it, a second click the other way.
        for key, number in (("recall", 6), ("density", 5), ("js_distance", 4)):
            ordered = sorted(f"{head[key]:.3f}" for head in heads)
            page.click(f"th[data-key={key}] button")
            assert column(page, number) == ordered != [f"{head[key]:.3f}" for head in heads]
            assert page.get_attribute(f"th[data-key={key}]", "aria-sort") == "ascending"
            page.click(f"th[data-key={key}] button")
            assert column(page, number) == ordered[::-1]
        page.click("th[data-key=pattern] button")
        assert column(page, 3) == sorted(column(page, 3))
        page.click("th[data-key=layer] button")

        # Opening a head draws its maps.
        page.click("#heads tr:nth-child(20)")
        assert page.locator("#detail-title").inner_text() == "Layer 2, head 3"
        for kind in ("kept", "attention", "missed"):
            canvas = page.wait_for_selector(f"#detail-maps canvas[data-drawn={kind}]")
            colours = canvas.evaluate(COLOURS)
            assert len(colours) == 2 if kind == "kept" else len(colours) > 10, (kind, colours)
        page.focus("#rows")
        page.keyboard.press("ArrowDown")
        assert page.locator("#detail-title").inner_text() == "Layer 2, head 4"

        # A layer's heads are drawn when it is opened, and gone when it is closed.
        assert page.locator(".thumb").count() == 0
        page.click("details[data-layer='3'] summary")
        wait_for_count(page, ".thumb canvas[data-drawn]", 16)
        assert len(page.locator(".thumb canvas").nth(1).evaluate(COLOURS)) > 10
        page.click("details[data-layer='3'] summary")
        wait_for_count(page, ".thumb", 0)

        # The pointer on a cell says what it is.
        page.locator("#detail-maps canvas").nth(1).hover(position={"x": 10, "y": 150})
        page.wait_for_selector("#tip:not([hidden])")
        assert page.locator("#tip").inner_text().startswith("queries 1,")
        assert page.locator("#tip").inner_text().splitlines()[1] in ("not kept", "kept: the rule", "kept: first block")
        page.click("#fields button[data-field=density]")
        assert len(page.locator("#heat").evaluate(COLOURS)) > 20


@pytest.mark.parametrize(
    "config", [PeakPrefillConfig(per_block=3), FlashPrefillConfig(sink_blocks=1, window_blocks=2, last_full_blocks=1)]
)
def test_the_pointer_and_the_text_say_the_same(config: Any, needle_model: Any, tmp_path: Path) -> None:
    find_browser()
    input_ids = torch.randint(1, 2000, (1, 1200), generator=torch.Generator().manual_seed(0))
    out = tmp_path / "report.html"
    out.write_text(render(inspect_prefill(needle_model, input_ids, config, WorkProgress()), {"model": "x"}), "utf-8")
    said: set[str] = set()
    with opened(out) as page:
        for head, row, column in ((6, 8, 0), (6, 8, 3), (6, 8, 6), (6, 8, 8), (1, 9, 4), (3, 7, 2), (3, 7, 5)):
            page.click(f"#heads tr:nth-child({8 * 3 + head + 1})")
            assert page.locator("#detail-title").inner_text() == f"Layer 3, head {head}"
            page.wait_for_selector("#detail-maps canvas[data-drawn=missed]")
            canvas = page.locator("#detail-maps canvas").first
            side = canvas.bounding_box()["width"] / 10
            page.mouse.move(0, 0)
            page.wait_for_selector("#tip", state="hidden")
            canvas.hover(position={"x": (column + 0.5) * side, "y": (row + 0.5) * side})
            page.wait_for_selector("#tip:not([hidden])")
            place = Place(3, head, row, column)
            (line,) = explain_place(needle_model, input_ids, config, WorkProgress(), False, place)
            words = line.partition("key block")[2].split(") ", 1)[1].split("; ")
            assert page.locator("#tip").inner_text().splitlines()[1:3] == words
            said |= {words[0], words[1].partition(": ")[2]}
    assert {"not kept", "kept: first block" if config.name == "peakprefill" else "kept: sink blocks"} <= said
    assert len({words for words in said if words.startswith(("at least", "below"))}) == 2


def test_eighty_layers_of_sixty_four_heads(tmp_path: Path) -> None:
    find_browser()
    out = tmp_path / "large.html"
    out.write_text(render(synthetic(80, 64, 1024), {"model": "noise"}), encoding="utf-8")
    start = time.perf_counter()
    with opened(out) as page:
        loaded = time.perf_counter()
        assert page.locator("#heads tr").count() == 5120
        sort = page.evaluate(
            "() => { const start = performance.now(); document.querySelector('th[data-key=recall] button').click();"
            " document.body.offsetHeight; return performance.now() - start; }"
        )
        assert column(page, 6) == sorted(column(page, 6))
        opening = time.perf_counter()
        page.click("details[data-layer='79'] summary")
        wait_for_count(page, ".thumb canvas[data-drawn]", 128)
        opened_layer = time.perf_counter() - opening
    size = out.stat().st_size / 2**20
    print(f"{size:.1f} MiB: load {loaded - start:.2f} s, sort {sort:.0f} ms, layer {opened_layer:.2f} s")
    assert loaded - start < 30 and sort < 5000 and opened_layer < 10, "on a slow machine; usually a tenth of it"
