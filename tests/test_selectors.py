"""Settings of the selectors but FlexPrefill's, expected densities, and what may import what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from workloads import structured_qk

import flexprefill_fa
from flexprefill_fa import (
    FlashPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    get_selector,
    select_blocks,
    selector_names,
)
from flexprefill_fa.masks.density import fixed_density


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FlashPrefillConfig, {"alpha": 0}, "alpha must be in (0, 1], got 0"),
        (FlashPrefillConfig, {"alpha": 1.01}, "alpha must be in (0, 1], got 1.01"),
        (FlashPrefillConfig, {"alpha": float("nan")}, "alpha must be in (0, 1], got nan"),
        (FlashPrefillConfig, {"alpha": "0.1"}, "alpha must be a number, got str '0.1'"),
        (FlashPrefillConfig, {"sink_blocks": -1}, "sink_blocks must be at least 0, got -1"),
        (FlashPrefillConfig, {"sink_blocks": 1.0}, "sink_blocks must be an integer, got float 1.0"),
        (FlashPrefillConfig, {"window_blocks": 0}, "window_blocks must be at least 1, got 0"),
        (FlashPrefillConfig, {"last_full_blocks": -2}, "last_full_blocks must be at least 0, got -2"),
        (FlashPrefillConfig, {"last_full_blocks": True}, "last_full_blocks must be an integer, got bool True"),
        (FlashPrefillConfig, {"block_size": 32}, "block_size must be one of (64, 128), got 32"),
        (StreamingLLMConfig, {"sink": -1}, "sink must be at least 0, got -1"),
        (StreamingLLMConfig, {"window": 0}, "window must be at least 1, got 0"),
        (StreamingLLMConfig, {"window": 0.5}, "window must be an integer, got float 0.5"),
        (StreamingLLMConfig, {"block_size": 100}, "block_size must be one of (64, 128), got 100"),
        (VerticalSlashConfig, {"vertical_size": 0}, "vertical_size must be at least 1, got 0"),
        (VerticalSlashConfig, {"slash_size": 0}, "slash_size must be at least 1, got 0"),
        (VerticalSlashConfig, {"slash_size": None}, "slash_size must be an integer, got NoneType None"),
        (VerticalSlashConfig, {"block_size": 256}, "block_size must be one of (64, 128), got 256"),
    ],
)
def test_settings_out_of_range(kind: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        kind(**arguments)


def test_limits_and_defaults() -> None:
    FlashPrefillConfig(alpha=1, sink_blocks=0, window_blocks=1, last_full_blocks=0)
    StreamingLLMConfig(0, 1)
    VerticalSlashConfig(1, 1)
    assert FlashPrefillConfig() == FlashPrefillConfig(0.1, 2, 4, 2, 128)
    assert StreamingLLMConfig() == StreamingLLMConfig(128, 2048, 128)
    assert VerticalSlashConfig() == VerticalSlashConfig(8192, 8192, 128)


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match=f"^unknown selector 'none', expected one of {', '.join(selector_names())}$"):
        get_selector("none")


@pytest.mark.parametrize("tokens", [640, 1000, 1024])
def test_expected_density_against_what_is_kept(tokens: int) -> None:
    """StreamingLLM keeps exactly that, vertical-slash at most."""
    query, key = structured_qk(1, 2, 1, tokens, tokens, 16)
    for window in (1, 64, 65, 130, 2000):
        streaming = StreamingLLMConfig(64, window, 64)
        kept = select_blocks(query, key, streaming).density()
        torch.testing.assert_close(kept, torch.full_like(kept, streaming.expected_density(tokens)))
    vertical_slash = VerticalSlashConfig(130, 64, 64)
    assert (select_blocks(query, key, vertical_slash).density() <= vertical_slash.expected_density(tokens) + 1e-6).all()


@pytest.mark.parametrize("full_rows", [0, 1, 5, 30])
@pytest.mark.parametrize("per_row", [1, 3, 10, 30])
def test_fixed_density(per_row: int, full_rows: int) -> None:
    for blocks in (1, 2, 7, 20):
        kept = sum(row + 1 if row >= blocks - full_rows else min(row + 1, per_row) for row in range(blocks))
        assert fixed_density(blocks, per_row, full_rows) == pytest.approx(2 * kept / (blocks * (blocks + 1)))


def test_flashprefill_expects_the_reported_densities() -> None:
    config = FlashPrefillConfig()
    assert config.expected_density(65536) == pytest.approx(0.09)
    assert config.expected_density(2**20) == pytest.approx(0.025)
    wide = FlashPrefillConfig(window_blocks=400)
    assert wide.expected_density(65536) == fixed_density(512, 402, 2) > 0.9


PACKAGE = Path(flexprefill_fa.__file__).parent
MODULES = [get_selector(name).__module__.split(".") for name in selector_names()]
SELECTORS = {parts[2] for parts in MODULES if parts[0] == "flexprefill_fa"}


def imported(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """What the import statements among some nodes of a source name: `from a import b` names a.b, `import a.b` too."""
    names = set()
    package = ("flexprefill_fa", *path.relative_to(PACKAGE).parts[:-1])
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = list(package[: len(package) - node.level + 1]) if node.level else []
            parent += [node.module] if node.module else []
            names |= {".".join([*parent, alias.name]) for alias in node.names}
    return names


def test_selectors_do_not_import_each_other() -> None:
    """Nor does what they share import one of them, nor any the packages that hold them all."""
    assert {
        "cosa",
        "flexprefill",
        "flashprefill",
        "peakprefill",
        "streaming_llm",
        "vertical_slash",
        "xattention",
    } <= SELECTORS
    masks, kernels = PACKAGE / "masks", PACKAGE / "kernels"
    modules = {path.stem for path in PACKAGE.iterdir()}
    shared = {path.stem for path in masks.glob("*.py")} - SELECTORS - {"__init__"}
    sources = [path for folder in (masks, kernels) for path in folder.rglob("*.py") if path != masks / "__init__.py"]
    assert len(sources) > 20
    for path in sources:
        own = path.relative_to(masks).parts[0].removesuffix(".py") if masks in path.parents else None
        for name in imported(path, ast.walk(ast.parse(path.read_text()))):
            root, module, part = [*name.split("."), "", ""][:3]
            if root == "flexprefill_fa":
                assert module in modules, f"{path} imports {name}"
                assert module != "masks" or part in shared | {own}, f"{path} imports {name}"


def test_references_import_no_triton() -> None:
    """Not even in a function; what holds a reference beside other things may import kernels where they run."""
    sources = {path for path in (PACKAGE / "masks").rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts}
    references = {path for path in sources if path.name in ("reference.py", "last_queries.py")}
    assert len(references) == 4
    for path in sources:
        tree = ast.parse(path.read_text())
        for name in imported(path, ast.walk(tree) if path in references else tree.body):
            assert not {"triton", "kernels"} & set(name.split(".")), f"{path} imports {name}"
