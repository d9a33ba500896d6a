"""Pages of `flexprefill inspect` as tests need them: read back, made by hand, opened in a browser."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import LayerDescription
from flexprefill_fa.tools.inspection.collect import HeadReport, Inspection
from flexprefill_fa.tools.inspection.maps import KINDS, MAP_BYTES, LayerMaps, blocks_per_cell

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def read_data(page: str) -> dict[str, Any]:
    """The page's JSON."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def read_maps(page: str, layer: int, heads: int) -> Tensor:
    """uint8 [heads, 3, cells, cells] of one layer, zeros above the diagonal."""
    (found,) = re.findall(rf'<script type="text/plain" id="maps-{layer}">(.*?)</script>', page)
    values = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(found))), dtype=torch.uint8)
    (cells,) = [entry["cells"] for entry in read_data(page)["layers"] if entry["layer"] == layer]
    maps = torch.zeros(heads, len(KINDS), cells, cells, dtype=torch.uint8)
    row, column = torch.tril_indices(cells, cells)
    maps[:, :, row, column] = values.view(heads, len(KINDS), -1)
    return maps


def synthetic(layers: int, heads: int, blocks: int) -> Inspection:
    """Random numbers and maps of noise, which no compression makes smaller."""
    rng = random.Random(0)
    group = blocks_per_cell(blocks, heads * len(KINDS), MAP_BYTES / layers)
    cells = -(-blocks // group)
    size = heads * len(KINDS) * cells * (cells + 1) // 2
    return Inspection(
        tokens=blocks * 128,
        config=FlexPrefillConfig(),
        layers=tuple(LayerDescription(layer, "sparse", "it attends to the whole prompt") for layer in range(layers)),
        heads=tuple(
            HeadReport(layer, head, rng.choice(("query_aware", "vertical_slash")), *(rng.random() for _ in range(3)))
            for layer in range(layers)
            for head in range(heads)
        ),
        maps={layer: LayerMaps(group, cells, rng.randbytes(size)) for layer in range(layers)},
    )


def find_browser() -> str:
    """The path of a Chromium, from $CHROMIUM or PATH; skips the test where there is none."""
    pytest.importorskip("playwright", reason="needs playwright, which the extra dev brings")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a Chromium: set CHROMIUM, or have one of {', '.join(BROWSERS)} on PATH")
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The page in headless Chromium without a network; fails if anything is logged or asked for."""
    browser_path = find_browser()
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}).new_page()
        page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:"))
                else problems.append(f"request: {request.url}"))  # fmt: skip
        page.goto(path.as_uri())
        page.wait_for_selector("canvas[data-drawn=missed]")
        yield page
        browser.close()
    assert problems == []
