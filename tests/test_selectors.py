"""Every selector but FlexPrefill, which has tests of its own: settings, errors, operators, one graph, attention."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled_attention, graphs
from oracle import causal_oracle, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from workloads import blocky_qk, structured_qk

import flexprefill_fa
from flexprefill_fa import (
    FlashPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    get_selector,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.masks import SelectorConfig
from flexprefill_fa.masks.density import fixed_density

EXAMPLES: list[Any] = [
    FlashPrefillConfig(0.6, 1, 1, 0, 64),
    StreamingLLMConfig(64, 100, 64),
    VerticalSlashConfig(64, 130, 64),
]
NAMES = ["flashprefill", "streaming_llm", "vertical_slash"]
every_selector = pytest.mark.parametrize("config", EXAMPLES, ids=NAMES)


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


@every_selector
def test_settings_round_trip(config: Any) -> None:
    settings = config.settings()
    assert settings.dtype == torch.float64 and settings.device.type == "cpu"
    assert type(config).from_settings(settings, config.block_size) == config
    assert hash(config) == hash(type(config).from_settings(settings, config.block_size))


@pytest.mark.parametrize("name", [*NAMES, "flexprefill"])
def test_registry_and_mask_functions(name: str) -> None:
    kind = get_selector(name)
    assert kind.name == name  # pyright: ignore[reportAttributeAccessIssue]
    create = getattr(flexprefill_fa, f"create_{name}_block_mask")
    query, key = structured_qk(1, 2, 1, 300, 300, 16)
    by_fields, by_config = create(query, key, block_size=64), create(query, key, config=kind(block_size=64))
    assert by_fields.BLOCK_SIZE == (64, 64)
    assert torch.equal(by_fields.kv_num_blocks, by_config.kv_num_blocks)
    with pytest.raises(TypeError, match=f"unexpected argument beta; {kind.__name__} has "):
        create(query, key, beta=1)
    with pytest.raises(TypeError, match=f"config must be a {kind.__name__}, got dict"):
        create(query, key, config={})
    with pytest.raises(TypeError, match="give either config or its fields, got both: config and block_size"):
        create(query, key, config=kind(), block_size=64)
    with pytest.raises(ValueError, match="starts must be in"):
        create(query, key, starts=[300])


@every_selector
def test_unknown_names_are_told(config: Any) -> None:
    with pytest.raises(ValueError, match=f"unknown selector 'none', expected one of .*{config.name}"):
        get_selector("none")


def operator_arguments(config: SelectorConfig, q_len: int, *, padded: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    query, key = blocky_qk(2, 4, 2, q_len, 413, 16)
    place = (torch.tensor([0, 77]).int(), torch.tensor([363, 313]).int()) if padded else (None, None)
    return (query.to(dtype), key.to(dtype), *place, config.settings(), None, config.block_size, padded, True)


@every_selector
@pytest.mark.parametrize("q_len", [413, 130, 1])
def test_operator(config: Any, q_len: int) -> None:
    """opcheck, and a fake kernel that agrees with the real one."""
    operator = config.operator()
    for padded, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        arguments = operator_arguments(config, q_len, padded=padded, dtype=dtype)
        torch.library.opcheck(operator, arguments)
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(item) if isinstance(item, Tensor) else item for item in arguments))
        for expected, traced in zip(real, fake, strict=True):
            assert (traced.shape, traced.dtype, traced.stride()) == (expected.shape, expected.dtype, expected.stride())
        storages = {tensor.untyped_storage().data_ptr() for tensor in real}
        assert len(storages) == 5


@pytest.mark.parametrize("tokens", [1, 200, 5000, 40000, 300000])
@every_selector
def test_expected_density(config: Any, tokens: int) -> None:
    density = config.expected_density(tokens)
    assert 0 < density <= 1
    if tokens <= config.dense_tokens:
        assert density == 1


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


GRAPHS = [  # (settings of each call, length)
    ([FlashPrefillConfig(a, 1, w, 0, 64) for a, w in ((0.6, 1), (0.9, 2), (0.3, 1))], (700, 641, 1000)),
    ([StreamingLLMConfig(s, w, 64) for s, w in ((64, 100), (0, 1), (10, 300))], (700, 641, 1000)),
    ([VerticalSlashConfig(v, s, 64) for v, s in ((64, 130), (1, 1), (200, 64))], (700, 641, 1000)),
]


@pytest.mark.parametrize(("configs", "lengths"), GRAPHS, ids=NAMES)
def test_one_graph_serves_every_setting_and_length(configs: list[Any], lengths: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    compiled = []
    for config, n in zip(configs, lengths, strict=True):
        query, key = blocky_qk(2, 4, 2, n, n, 32, seed=n)
        value = torch.randn_like(key)
        before = graphs()
        with torch.no_grad():
            out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True)
        compiled.append(graphs() - before)
        assert torch.equal(selection.to_dense(), select_blocks(query, key, config).to_dense())
        assert selection.density().max() < 0.95
        expected, _, real = causal_oracle(query, key, value, selection)
        assert relative_error(out, expected, real) < 1e-5
        dense, _, _ = causal_oracle(query, key, value, None, ranges=selection.ranges)
        assert relative_error(dense, expected, real) > 0.01, "dense attention would pass too"
    assert compiled == [1, 0, 0]


@every_selector
def test_attention_with_padding_and_a_cached_prefix(config: Any) -> None:
    """Through the one call and through a BlockMask; and a dropped block changes the output."""
    query, key = blocky_qk(2, 4, 2, 333, 500, 32)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [0, 130], "lengths": [470, 370]}
    with torch.no_grad():
        out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True, **place)
    expected, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, expected, real) < 1e-5
    assert selection.density().max() < 0.95
    create = getattr(flexprefill_fa, f"create_{config.name}_block_mask")
    block_mask = create(query, key, config=config, **place)
    by_mask = compiled_attention(query, key, value, block_mask)
    assert relative_error(by_mask, expected, real) < 1e-5

    plain = create(query, key, config=config, eager_safe=False, **place)
    assert plain.full_kv_num_blocks is not None and (plain.full_kv_num_blocks[0, :, 3] > 0).all()
    plain.full_kv_num_blocks = plain.full_kv_num_blocks.clone()
    plain.full_kv_num_blocks[0, :, 3] -= 1  # the last full block of row 3 in every head
    dropped = compiled_attention(query, key, value, plain)
    changed = ((dropped - by_mask) * real).abs().amax((1, 3)) > 1e-5  # [B, Lq]
    assert changed[0, 192:256].all() and changed.sum() == 64


PACKAGE = Path(flexprefill_fa.__file__).parent
SELECTORS = {get_selector(name).__module__.split(".")[2] for name in (*NAMES, "flexprefill")}


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
    assert {"flexprefill", *NAMES} == SELECTORS
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
    assert len(references) == 3
    for path in sources:
        tree = ast.parse(path.read_text())
        for name in imported(path, ast.walk(tree) if path in references else tree.body):
            assert not {"triton", "kernels"} & set(name.split(".")), f"{path} imports {name}"
