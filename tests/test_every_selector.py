"""What every selector must do, whatever its rule: run over the registry and the selector of the documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled_attention, graphs
from every_selector import check_laws, define_documented, documented, example, names
from hf_models import oracle_layers, prompt, tiny_model
from oracle import causal_oracle, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from workloads import blocky_qk, needle_qk

import flexprefill_fa
from bench.spec import parse_selector
from flexprefill_fa import get_selector, select_blocks, sparse_prefill_attention
from flexprefill_fa.choice import parse_choice
from flexprefill_fa.integrations.engine_settings import make_settings
from flexprefill_fa.integrations.transformers import enable_sparse_prefill

every = pytest.mark.parametrize("name", names())


@pytest.fixture(autouse=True, scope="module")
def selectors(tmp_path_factory: pytest.TempPathFactory) -> None:
    define_documented(tmp_path_factory.mktemp("documented"))


SHAPES = [  # batch, heads, kv heads, queries, keys, head dim, block size, dtype, starts, lengths
    (1, 1, 1, 1, 1, 16, 64, torch.float32, None, None),
    (1, 4, 2, 127, 127, 16, 64, torch.bfloat16, None, None),
    (2, 4, 1, 129, 129, 32, 64, torch.float16, None, [129, 65]),
    (2, 6, 2, 640, 640, 80, 128, torch.bfloat16, [0, 130], None),
    (2, 2, 2, 300, 777, 24, 64, torch.float32, [70, 0], [700, 600]),
    (1, 8, 2, 1, 500, 64, 128, torch.float32, None, None),
    (3, 4, 4, 600, 600, 16, 64, torch.float32, [0, 64, 599], [600, 536, 1]),
    (1, 2, 1, 513, 1000, 128, 128, torch.float16, None, None),
    (2, 2, 1, 200, 500, 16, 64, torch.float32, None, [400, 250]),  # the second's queries are all padding
]


@every
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:7])))
def test_selections_obey_the_laws(name: str, shape: tuple) -> None:
    batch, heads, kv_heads, q_len, kv_len, dim, size, dtype, starts, lengths = shape
    query, key = (x.to(dtype) for x in blocky_qk(batch, heads, kv_heads, q_len, kv_len, dim))
    config = example(name, size)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
    check_laws(selection, config)
    assert set(selection.diagnostics) == set(config.diagnostics)
    assert all(x.shape == (batch, heads) and x.dtype == torch.float32 for x in selection.diagnostics.values())
    again = select_blocks(query, key, config, starts=starts, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(selection.lists, again.lists, strict=True))
    partial = select_blocks(query, key, config, starts=starts, lengths=lengths, all_partial=True)
    assert torch.equal(partial.to_dense(), selection.to_dense()) and partial.full_kv_num_blocks.sum() == 0
    for b in range(batch):  # as the element alone
        place: dict[str, Any] = {
            key: None if x is None else [x[b]] for key, x in (("starts", starts), ("lengths", lengths))
        }
        alone = select_blocks(query[b : b + 1], key[b : b + 1], config, **place)
        assert torch.equal(alone.to_dense()[0], selection.to_dense()[b])


@every
def test_blocks_are_left_out_of_every_kind_of_heads(name: str) -> None:
    for make in (blocky_qk, needle_qk):
        query, key = make(1, 4, 2, 1500, 1500, 32)
        assert select_blocks(query, key, example(name)).density().max() < 0.97


@every
def test_padding_by_whole_blocks_changes_nothing(name: str) -> None:
    """And what stands in the padding may be anything."""
    query, key = blocky_qk(1, 4, 2, 600, 600, 16)
    config = example(name)
    expected = select_blocks(query, key, config).to_dense()
    long_query, long_key = (torch.cat((x.new_full((*x.shape[:2], 128, 16), torch.nan), x), 2) for x in (query, key))
    padded = select_blocks(long_query, long_key, config, starts=[128]).to_dense()
    assert torch.equal(padded[:, :, 2:, 2:], expected) and padded[:, :, :, :2].sum() == 0
    long_query, long_key = (torch.cat((x, x.new_full((*x.shape[:2], 100, 16), torch.inf)), 2) for x in (query, key))
    padded = select_blocks(long_query, long_key, config, lengths=[600]).to_dense()
    assert torch.equal(padded[:, :, :10, :10], expected)


@every
def test_query_heads_choose_alone(name: str) -> None:
    """But that PeakPrefill's variances weigh by the queries of all heads of a key head."""
    query, key = blocky_qk(1, 4, 2, 600, 600, 16)
    cases = [(example(name), 1)]
    if name == "peakprefill":
        cases = [(example(name), 2), (example(name, variance=False), 1)]
    for config, heads in cases:
        together = select_blocks(query, key, config).to_dense()
        for head in range(0, 4, heads):
            own = query[:, head : head + heads], key[:, head // 2 : head // 2 + 1]
            assert torch.equal(select_blocks(*own, config).to_dense(), together[:, head : head + heads])


@every
@pytest.mark.parametrize("q_len", [413, 130, 1])
def test_operator(name: str, q_len: int) -> None:
    """opcheck, and a fake kernel that agrees with the real one."""
    config = example(name)
    operator: Any = config.operator()
    for padded, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        query, key = (x.to(dtype) for x in blocky_qk(2, 4, 2, q_len, 413, 16))
        place = (torch.tensor([0, 77]).int(), torch.tensor([363, 313]).int()) if padded else (None, None)
        arguments = (query, key, *place, config.settings(), None, config.block_size, padded, True)
        torch.library.opcheck(operator, arguments)
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(item) if isinstance(item, Tensor) else item for item in arguments))
        for expected, traced in zip(real, fake, strict=True):
            assert (traced.shape, traced.dtype, traced.stride()) == (expected.shape, expected.dtype, expected.stride())
        storages = {tensor.untyped_storage().data_ptr() for tensor in real}
        assert len(storages) == len(real) == 3 + len(config.diagnostics)


@every
def test_one_graph_serves_every_setting_and_length(name: str) -> None:
    torch._dynamo.reset()
    sweep = get_selector(name).sweep
    compiled = []
    for place, n in enumerate((700, 641, 1000)):
        config = example(name, **{field: values[place] for field, values in sweep.items()} if place else {})
        query, key = blocky_qk(2, 4, 2, n, n, 32, seed=n)
        value = torch.randn_like(key)
        before = graphs()
        with torch.no_grad():
            out, selection = sparse_prefill_attention(query, key, value, config, dense="never", return_selection=True)
        compiled.append(graphs() - before)
        assert torch.equal(selection.to_dense(), select_blocks(query, key, config).to_dense())
        expected, _, real = causal_oracle(query, key, value, selection)
        assert relative_error(out, expected, real) < 1e-5
        if place == 0:
            dense, _, _ = causal_oracle(query, key, value, None, ranges=selection.ranges)
            assert relative_error(dense, expected, real) > 0.01, "dense attention would pass too"
    assert compiled == [1, 0, 0]


@every
def test_attention_with_padding_and_a_cached_prefix(name: str) -> None:
    """Through the one call and through a BlockMask; and a dropped block changes the output."""
    config = example(name)
    query, key = blocky_qk(2, 4, 2, 333, 500, 32)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [0, 130], "lengths": [470, 370]}
    with torch.no_grad():
        out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True, **place)
    expected, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, expected, real) < 1e-5
    assert selection.density().max() < 0.97
    block_mask = flexprefill_fa.create_block_mask(query, key, config, **place)
    by_mask = compiled_attention(query, key, value, block_mask)
    assert relative_error(by_mask, expected, real) < 1e-5

    plain = flexprefill_fa.create_block_mask(query, key, config, eager_safe=False, **place)
    assert plain.full_kv_num_blocks is not None and (plain.full_kv_num_blocks[0, :, 3] > 0).all()
    plain.full_kv_num_blocks = plain.full_kv_num_blocks.clone()
    plain.full_kv_num_blocks[0, :, 3] -= 1  # the last full block of row 3 in every head
    dropped = compiled_attention(query, key, value, plain)
    changed = ((dropped - by_mask) * real).abs().amax((1, 3)) > 1e-5  # [B, Lq]
    assert changed[0, 192:256].all() and changed.sum() == 64


@every
def test_a_transformers_model(name: str) -> None:
    model, ids, config = tiny_model("llama"), prompt(1, 900), example(name)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with oracle_layers(model, config):
            expected = model(ids, use_cache=False).logits
        with enable_sparse_prefill(model, config):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (dense - expected).abs().max() > 0.01, "dense attention would pass too"


@every
def test_settings_from_text(name: str) -> None:
    """The command line's and the benchmarks' specs, and vLLM's settings."""
    config = example(name)
    changed = {field: getattr(config, field) for field in (*config.sweep, "block_size")}
    expected = get_selector(name)(**changed)
    spec = f"{name}:" + "+".join(f"{field}={value}" for field, value in changed.items())
    assert parse_choice(spec).config == expected == parse_selector(spec)
    assert make_settings({"selector": name, **changed}, "a test").selector == expected
    with pytest.raises(ValueError, match="unknown setting 'nothing'"):
        make_settings({"selector": name, "nothing": 1}, "a test")


@every
def test_names_and_mask_function(name: str) -> None:
    kind: Any = get_selector(name)
    assert kind.name == name
    if kind.__module__.startswith("flexprefill_fa."):
        assert getattr(flexprefill_fa, kind.__name__) is kind and kind.__name__ in flexprefill_fa.__all__
        create: Any = getattr(flexprefill_fa, f"create_{name}_block_mask")
        assert f"create_{name}_block_mask" == create.__name__ in flexprefill_fa.__all__
    else:
        create = flexprefill_fa.masks.mask_function(kind)
    query, key = blocky_qk(1, 2, 1, 300, 300, 16)
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
    with pytest.raises(ValueError, match=r"block_size must be one of \(64, 128\), got 32"):
        kind(block_size=32)


@every
def test_settings_round_trip(name: str) -> None:
    config = example(name)
    settings = config.settings()
    assert settings.dtype == torch.float64 and settings.device.type == "cpu"
    assert type(config).from_settings(settings, config.block_size) == config
    assert type(config)() == type(config).from_settings(type(config)().settings(), 128)


@every
@pytest.mark.parametrize("tokens", [1, 200, 5000, 40000, 300000])
def test_expected_density(name: str, tokens: int) -> None:
    config = example(name)
    density = config.expected_density(tokens)
    assert 0 < density <= 1
    if tokens <= config.dense_tokens:
        assert density == 1


@every
def test_prompts_of_dense_tokens_keep_every_block(name: str) -> None:
    config = example(name)
    query, key = blocky_qk(1, 2, 1, config.dense_tokens, config.dense_tokens, 16)
    assert (select_blocks(query, key, config).density() == 1).all()


def test_the_documented_calls() -> None:
    """The document's second block, with its names taken from where a reader's file would put them."""
    kind: Any = get_selector("pooled_top")
    query, key = blocky_qk(1, 4, 2, 2100, 2100, 32)
    model = tiny_model("llama")
    names = {
        "flexprefill_fa": flexprefill_fa,
        "query": query,
        "key": key,
        "value": torch.randn_like(key),
        "model": model,
        "input_ids": prompt(1, 2100),
        "PooledTopConfig": kind,
        "create_pooled_top_block_mask": flexprefill_fa.masks.mask_function(kind),
    }
    code = documented(1).replace("PooledTopConfig, create_pooled_top_block_mask, ", "")
    with torch.no_grad():
        exec(compile(code, "adding_a_selector.md", "exec"), names)
    keep = select_blocks(query, key, kind(count=8))
    expected, _, real = causal_oracle(query, key, names["value"], keep)
    assert keep.density().mean() < 0.95 and relative_error(names["out"], expected, real) < 1e-5
    assert names["block_mask"].kv_num_blocks.sum() == keep.kv_num_blocks.sum()


def test_the_documented_class_is_short() -> None:
    body = documented(0).partition("@dataclass")[2].strip().splitlines()
    assert len(body) <= 15
