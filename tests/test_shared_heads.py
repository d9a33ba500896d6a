"""One choice for the query heads of a key head: the union of theirs, for every selector, by the rule and by kernels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from every_selector import check_laws, define_documented, example, names
from oracle import causal_oracle, relative_error
from torch import Tensor
from workloads import blocky_qk, structured_qk

from flexprefill_fa import (
    BlockSelection,
    FlashPrefillConfig,
    Selector,
    StreamingLLMConfig,
    create_block_mask,
    get_selector,
    select_blocks,
    selector_names,
    share_heads,
    sparse_prefill_attention,
)
from flexprefill_fa.choice import parse_choice
from flexprefill_fa.grid import Grid, real_ranges
from flexprefill_fa.integrations.vllm_config import make_settings
from flexprefill_fa.kernels.shared_heads import lists_of
from flexprefill_fa.masks.selector import _lists_of, kernels_of
from flexprefill_fa.tools.fidelity.knobs import knob_fields

PLACES: list[dict[str, Any]] = [{}, {"starts": [0, 70], "lengths": [700, 413]}]
ALIKE = "streaming_llm"  # looks at no head
SHARING = [name for name in names() if name != ALIKE]


@pytest.fixture(scope="module", autouse=True)
def documented_selector(tmp_path_factory: pytest.TempPathFactory) -> None:
    define_documented(tmp_path_factory.mktemp("documented"))


def united(selection: BlockSelection, groups: int) -> Tensor:
    kept = selection.to_dense().unflatten(1, (-1, groups))
    return kept.any(2).repeat_interleave(groups, 1)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("place", PLACES, ids=["whole", "padded"])
def test_it_keeps_what_one_of_the_heads_keeps(name: str, place: dict[str, Any]) -> None:
    query, key = blocky_qk(2, 6, 2, 600, 700, 16)
    alone, shared = (
        select_blocks(query, key, config, **place) for config in (example(name), share_heads(example(name)))
    )
    assert torch.equal(shared.to_dense(), united(alone, 3))
    differ = bool((alone.to_dense() != alone.to_dense()[:, :1]).any())  # a rule may keep the same for all heads
    assert torch.equal(shared.to_dense(), alone.to_dense()) is not differ and shared.density().min() < 1
    check_laws(shared, share_heads(example(name)))
    assert shared.kv_num_blocks.shape == (2, 6, 10), "FlexAttention wants lists of every query head"
    for report, values in alone.diagnostics.items():
        assert torch.equal(shared.diagnostics[report], values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there, see below")
@pytest.mark.parametrize(
    ("name", "chunk", "heads"),
    [("flashprefill", 4, 8), ("peakprefill", 512, 4)],
)
def test_kernels_unite(name: str, chunk: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexprefill_fa.kernels.shared_heads.CHUNK", chunk)
    query, key = blocky_qk(2, heads, 2, 140, 330, 16)
    place = torch.tensor([0, 70]), torch.tensor([330, 243])
    config = example(name)
    for all_partial in (False, True) if name == "flashprefill" else (False,):
        own = kernels_of(name)(query, key, *place, config, None, all_partial, True)
        got = kernels_of(f"{name}_shared_heads")(query, key, *place, share_heads(config), None, all_partial, True)
        alone, shared = (
            BlockSelection.of(lists, config.diagnostics, query, key, 64, *place, all_partial) for lists in (own, got)
        )
        assert torch.equal(shared.to_dense(), united(alone, heads // 2)) and not torch.equal(
            shared.to_dense(), alone.to_dense()
        )
        if all_partial:
            assert not shared.full_kv_num_blocks.any()
        else:
            check_laws(shared, share_heads(config))


@pytest.mark.parametrize("q_len,kv_len,size", [(321, 321, 64), (130, 400, 128), (1, 129, 64), (600, 600, 128)])
@pytest.mark.parametrize("place", [(None, None), ([0, 70], [390, 59]), ([5, 128], None)])
@pytest.mark.parametrize("all_partial", [False, True])
def test_a_table_becomes_the_lists_that_plain_pytorch_makes(
    q_len: int, kv_len: int, size: int, place: tuple[Any, Any], all_partial: bool
) -> None:
    grid, padded = Grid(q_len, kv_len, size), place != (None, None)
    starts, lengths = (None if x is None else torch.tensor(x) for x in place)
    ranges = real_ranges(starts, lengths, 2, kv_len, torch.device("cpu")) if padded else None
    kept = torch.rand(2, grid.q_blocks, 3, grid.kv_blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    kept = kept.transpose(1, 2)  # a rule may return any strides
    expected = _lists_of(kept, ranges, grid, all_partial, True)
    for got, right in zip(lists_of(kept, ranges, grid, all_partial, True), expected, strict=True):
        assert got.dtype == right.dtype and torch.equal(got, right)
    assert (expected[0] + expected[1]).any()


def test_one_query_head_for_each_key_head_is_left_as_it_is() -> None:
    query, key = blocky_qk(1, 2, 2, 300, 300, 16)
    config = example("flashprefill")
    alone, shared = (select_blocks(query, key, c).to_dense() for c in (config, share_heads(config)))
    assert torch.equal(alone, shared)


def test_attention_computes_the_union() -> None:
    query, key = structured_qk(1, 4, 2, 700, 700, 32)
    value = torch.randn_like(key)
    config = share_heads(example("flashprefill"))
    out, selection = sparse_prefill_attention(query, key, value, config, dense="never", return_selection=True)
    exact, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, exact, real) < 1e-5 and selection.density().max() < 1
    assert torch.equal(selection.to_dense(), united(select_blocks(query, key, example("flashprefill")), 2))
    mask = create_block_mask(query, key, config)
    assert mask.kv_num_blocks.shape[1] == 4


def test_it_is_named_wherever_a_selector_is() -> None:
    kind: Any = get_selector("flashprefill_shared_heads")
    config = kind(alpha=0.3)
    assert config == share_heads(FlashPrefillConfig(alpha=0.3)) == share_heads(config)
    assert isinstance(config, FlashPrefillConfig) and config != FlashPrefillConfig(alpha=0.3)
    assert config.name not in selector_names(), "no selector of its own"
    assert parse_choice("flashprefill_shared_heads:alpha=0.3").config == config
    assert knob_fields(config.name) == knob_fields("flashprefill"), "fidelity sweeps it"
    assert make_settings({"selector": config.name, "alpha": 0.3}, "settings").selector == config
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and type(copied) is kind


def test_what_cannot_share() -> None:
    with pytest.raises(ValueError, match="streaming_llm looks at no head: it keeps the same in all of them"):
        share_heads(StreamingLLMConfig())
    with pytest.raises(TypeError, match="config must be a selector config"):
        share_heads("flashprefill")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown selector 'nothing_shared_heads', expected one of"):
        get_selector("nothing_shared_heads")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARING)
def test_on_the_gpu(name: str) -> None:
    query, key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 8, 2, 3000, 3000, 128))
    config: Selector = example(name, block_size=128)
    alone, shared = (select_blocks(query, key, c, starts=[0, 200]) for c in (config, share_heads(config)))
    assert torch.equal(shared.to_dense(), united(alone, 4)) and not torch.equal(shared.to_dense(), alone.to_dense())
