"""What the selector promises beyond the oracle: coverage, dense limits, padding; and trained heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from comparison import compare_with_oracle
from hf_models import recorded_layers
from oracle_attention import attention_probabilities
from workloads import random_qk, structured_qk

from flexprefill_fa import FlexPrefillConfig, select_blocks
from flexprefill_fa.masks.flexprefill.config import Variant
from flexprefill_fa.tools.needle.prompts import build_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("n", [700, 1500, 1536])
def test_paper_covers_gamma_of_the_last_queries(gamma: float, n: int) -> None:
    """Algorithm 3's promise, on vertical-slash heads (tau = 0 makes all of them that)."""
    query, key = structured_qk(1, 6, 3, n, n, 32, seed=n)
    config = FlexPrefillConfig(gamma, 0.0, 1, None, 128, "paper")
    keep = select_blocks(query, key, config).to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3)
    rows = slice(n - 128, n)
    mass = attention_probabilities(query, key)[:, :, rows] * keep[:, :, rows, :n]
    covered = mass.sum(-1).mean(-1)  # [B, Hq]
    assert (covered >= gamma - 1e-5).all(), covered
    if gamma < 0.9:
        assert not keep[:, :, rows, :n].all()


@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_gamma_one_keeps_every_causal_block(variant: Any, tau: float) -> None:
    query, key = structured_qk(2, 4, 2, 900, 1000, 32)
    config = FlexPrefillConfig(1.0, tau, 1, None, 64, variant)
    assert (select_blocks(query, key, config, starts=[0, 333]).density() == 1).all()


@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize(("min_budget", "block_size"), [(1, 128), (500, 128), (500, 64)])
def test_an_element_is_dense_up_to_the_documented_length(variant: Any, min_budget: int, block_size: int) -> None:
    limit = max(2 * block_size, -(-min_budget // block_size) * block_size)
    query, key = structured_qk(3, 4, 2, 1200, 1200, 32)
    config = FlexPrefillConfig(0.3, 0.0, min_budget, None, block_size, variant)
    starts = [1200 - limit, 1200 - limit - 1, 0]
    selection = select_blocks(query, key, config, starts=starts, lengths=[limit, limit + 1, 1200])
    density = selection.density()
    assert (density[0] == 1).all()
    assert (selection.js_distance[0] == 0).all() and (selection.js_distance[1:] != 0).all()
    assert (density[2] < 1).all()


@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("make", [random_qk, structured_qk])
def test_padding_of_whole_blocks_changes_nothing(variant: Any, block_size: int, make) -> None:
    """Left padding by whole blocks shifts the blocks; right padding leaves them where they are."""
    n = 901
    query, key = make(1, 4, 2, n, n, 32, seed=3)
    config = FlexPrefillConfig(0.87, 0.3, 1, None, block_size, variant)
    alone = select_blocks(query, key, config).to_dense()[0]
    assert not alone.all()
    rows = alone.shape[-1]
    noise = torch.full_like(query[:, :, :256], torch.nan), torch.full_like(key[:, :, :256], 1e4)
    left = [torch.cat((pad, real), 2) for pad, real in zip(noise, (query, key), strict=True)]
    right = [torch.cat((real, pad), 2) for pad, real in zip(noise, (query, key), strict=True)]
    shift = 256 // block_size
    padded = select_blocks(left[0], left[1], config, starts=[256]).to_dense()[0]
    assert torch.equal(padded[:, shift:, shift:], alone)
    assert not padded[:, :shift].any() and not padded[:, :, :shift].any()
    padded = select_blocks(right[0], right[1], config, lengths=[n]).to_dense()[0]
    assert torch.equal(padded[:, :rows, :rows], alone)
    assert not padded[:, rows:].any() and not padded[:, :, rows:].any()


@pytest.mark.parametrize("n", [1000, 2048, 2177])
def test_trained_heads(needle_model: PreTrainedModel, needle_tokenizer: Tokenizer, n: int) -> None:
    """Queries and keys of the needle model on its own kind of text, all layers, published settings and others."""
    ids = torch.tensor([build_prompt(needle_tokenizer, n, needles=4, seed=n).token_ids])
    with recorded_layers(needle_model) as layers, torch.no_grad():
        needle_model.model(ids)
    assert len(layers) == needle_model.config.num_hidden_layers
    heads = near = 0
    densities = []
    for index, (query, key) in enumerate(layers):
        tau, min_budget, max_budget = [(0.1, 512, None), (0.5, 128, 1024), (0.0, 1, None)][index % 3]
        for variant in get_args(Variant):
            config = FlexPrefillConfig(0.9, tau, min_budget, max_budget, 128, variant)
            count, ties, selection = compare_with_oracle(query, key, config)
            heads, near = heads + count, near + ties
            densities.append(selection.density())
    assert near <= 0.03 * heads, f"{near} of {heads} heads hang on a near-tie"
    assert torch.cat(densities).min() < 0.7
