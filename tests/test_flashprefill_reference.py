"""FlashPrefill's reference against the brute-force oracle, block for block, and what the method promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from comparison_flashprefill import compare_with_oracle
from hf_models import recorded_layers
from torch import Tensor
from workloads import blocky_qk, random_qk, structured_qk

from flexprefill_fa import FlashPrefillConfig, select_blocks
from flexprefill_fa.grid import Grid, visible_blocks
from flexprefill_fa.masks.element import Element, element_of
from flexprefill_fa.masks.flashprefill.reference import block_scores
from flexprefill_fa.tools.needle.prompts import build_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens; (first real key, real keys) of each batch element."""

    q_len: int
    kv_len: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    padding: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32


SHAPES = {
    "one token": Shape(1, 1),
    "127": Shape(127, 127),
    "129": Shape(129, 129, heads=3, kv_heads=1),
    "300": Shape(300, 300, dim=80),
    "whole blocks": Shape(1024, 1024),
    "odd": Shape(1001, 1001, heads=6, kv_heads=3),
    "chunk, aligned": Shape(512, 1024),
    "chunk, odd offset": Shape(500, 1133),
    "chunk of 127": Shape(127, 1100),
    "chunk of 129": Shape(129, 1100),
    "one query": Shape(1, 900),
    "left padding": Shape(700, 700, heads=2, kv_heads=1, padding=((0, 700), (131, 569), (128, 572), (640, 60))),
    "right padding": Shape(700, 700, heads=2, kv_heads=1, padding=((0, 700), (0, 569), (0, 640), (0, 1))),
    "both paddings": Shape(900, 900, heads=2, kv_heads=1, padding=((3, 800), (200, 600), (64, 836), (700, 100))),
    "padded chunk": Shape(400, 900, heads=2, kv_heads=1, padding=((0, 900), (77, 823), (550, 350), (10, 690))),
    "queries all padded": Shape(200, 900, heads=2, kv_heads=1, padding=((0, 680), (0, 700), (0, 701), (699, 2))),
    "small scale": Shape(700, 700, scale=0.02),
    "large scale": Shape(700, 700, scale=0.9),
    "bf16": Shape(700, 700, dtype=torch.bfloat16),
    "fp16, padded": Shape(700, 700, heads=2, kv_heads=1, padding=((0, 700), (300, 400)), dtype=torch.float16),
}
# (alpha, sink, window, last rows)
SETTINGS = [(0.1, 2, 4, 2), (0.5, 0, 1, 0), (0.01, 1, 1, 0), (1e-6, 0, 1, 1), (0.9, 1, 2, 0), (0.2, 0, 1, 0)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("make", [blocky_qk, structured_qk])
def test_equals_oracle(name: str, make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    shape = SHAPES[name]
    starts, lengths = zip(*shape.padding, strict=True) if shape.padding else (None, None)
    batch = len(shape.padding) if shape.padding else 1
    first = list(SHAPES).index(name)
    decided = near = 0
    for seed in range(4):
        config = FlashPrefillConfig(*SETTINGS[(first + seed) % len(SETTINGS)], block_size=(64, 128)[seed % 2])
        query, key = make(batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.dim, seed=seed)
        query, key = query.to(shape.dtype), key.to(shape.dtype)
        cells, _, ties, _ = compare_with_oracle(query, key, config, starts, lengths, shape.scale)
        decided, near = decided + cells, near + ties
    assert near <= 0.01 * decided, f"{near} of {decided} cells are near-ties: the comparison says too little"


def test_inputs_leave_the_decision_to_the_scores() -> None:
    """The inputs above mean something: of the cells that a score decides, many are kept and many dropped."""
    for make in (blocky_qk, structured_qk):
        query, key = make(1, 4, 2, 1001, 1001, 32, seed=5)
        cells, kept, _, _ = compare_with_oracle(query, key, FlashPrefillConfig(0.3, 0, 1, 0, 64))
        assert 0.1 * cells < kept < 0.9 * cells, (cells, kept)


@pytest.mark.parametrize("sharpness", [0.01, 5.0, 30.0])
def test_flat_and_peaked_scores(sharpness: float) -> None:
    """Nearly equal scores, and scores so far apart that P underflows in fp32."""
    for alpha in (1e-6, 0.1, 0.95):
        query, key = random_qk(2, 2, 1, 500, 500, 32, sharpness=sharpness)
        compare_with_oracle(query, key, FlashPrefillConfig(alpha, 0, 1, 0, 64))


def test_alpha_one_keeps_the_best_block_alone() -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    selection = select_blocks(query, key, FlashPrefillConfig(1.0, 0, 1, 0, 64))
    kept = selection.to_dense().sum(-1)  # [1, 4, 15]
    assert ((kept >= 1) & (kept <= 2)).all()  # the diagonal and the best
    assert (kept == 2).any()
    everything = select_blocks(query, key, FlashPrefillConfig(1e-30, 0, 1, 0, 64))
    assert (everything.density() == 1).all()


def test_a_vanished_score_is_kept_by_no_alpha() -> None:
    """P that is 0 in fp32 is dropped even where alpha times the largest P is 0 too."""
    query, key = random_qk(1, 1, 1, 400, 400, 16)
    query[..., 0], key[..., 0] = 30.0, 0.0
    key[:, :, 64:128, 0] = 30.0  # block 1 takes all: e^-225 for the others
    selection = select_blocks(query, key, FlashPrefillConfig(1e-60, 0, 1, 0, 64))
    assert selection.to_dense()[0, 0, 4].tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("sink", "window", "last"), [(2, 4, 2), (0, 1, 0), (1, 1, 3)])
def test_dense_up_to_the_documented_length(sink: int, window: int, last: int, block_size: int) -> None:
    """Exactly: one token more, and there is a block that its score alone decides."""
    config = FlashPrefillConfig(1.0, sink, window, last, block_size)
    limit = (sink + window + last) * block_size
    assert config.dense_tokens == limit
    query, key = structured_qk(2, 2, 1, limit + 1, limit + 1, 16)
    key[:, :, sink * block_size : (sink + 1) * block_size] = -query[:, :1].mean(2, keepdim=True)  # nobody's best
    whole = select_blocks(query[:, :, :limit], key[:, :, :limit], config)
    assert (whole.density() == 1).all()
    part = select_blocks(query[:, :, 5:limit], key[:, :, :limit], config, starts=[0, 77 % limit])
    assert (part.density() == 1).all()
    assert (select_blocks(query, key, config).density() < 1).any()


def test_padding_of_whole_blocks_changes_nothing() -> None:
    n = 901
    query, key = structured_qk(1, 4, 2, n, n, 32, seed=3)
    config = FlashPrefillConfig(0.4, 1, 1, 1, 64)
    alone = select_blocks(query, key, config).to_dense()[0]
    assert not alone.all()
    rows = alone.shape[-1]
    noise = torch.full_like(query[:, :, :256], torch.nan), torch.full_like(key[:, :, :256], torch.inf)
    left = [torch.cat((pad, real), 2) for pad, real in zip(noise, (query, key), strict=True)]
    right = [torch.cat((real, pad), 2) for pad, real in zip(noise, (query, key), strict=True)]
    padded = select_blocks(left[0], left[1], config, starts=[256]).to_dense()[0]
    assert torch.equal(padded[:, 4:, 4:], alone)
    assert not padded[:, :4].any() and not padded[:, :, :4].any()
    padded = select_blocks(right[0], right[1], config, lengths=[n]).to_dense()[0]
    assert torch.equal(padded[:, :rows, :rows], alone)
    assert not padded[:, rows:].any() and not padded[:, :, rows:].any()


@pytest.mark.parametrize("name", SHAPES)
def test_well_formed_and_within_the_rules(name: str) -> None:
    """Causal, ascending, unique, in one list only; diagonal, sink, window and last rows kept."""
    shape = SHAPES[name]
    starts, lengths = zip(*shape.padding, strict=True) if shape.padding else (None, None)
    batch = len(shape.padding) if shape.padding else 1
    config = FlashPrefillConfig(0.6, 1, 2, 1, 64)
    query, key = structured_qk(batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.dim)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
    for count, indices in (
        (selection.kv_num_blocks, selection.kv_indices),
        (selection.full_kv_num_blocks, selection.full_kv_indices),
    ):
        pairs = torch.arange(1, indices.shape[-1]) < count[..., None]
        assert (indices.diff(dim=-1)[pairs] > 0).all()
    keep, visible = selection.to_dense(), visible_blocks(selection.grid, selection.ranges)[:, None]
    assert torch.equal(keep.sum((-2, -1)), selection.kept_blocks()), "no block in both lists"
    assert not (keep & ~visible).any()
    grid, (start, end) = selection.grid, selection.ranges.T[:, :, None, None]
    block = torch.arange(grid.kv_blocks)
    diagonal = (grid.offset + torch.arange(grid.q_blocks) * 64)[:, None] // 64
    must = (block == start // 64) | (diagonal - block < 2) | (diagonal + 1 > (end - 1) // 64)
    assert (keep | ~(visible & must[:, None])).all()
    assert (selection.js_distance == 0).all() and selection.js_distance.dtype == torch.float32
    partial = select_blocks(query, key, config, starts=starts, lengths=lengths, all_partial=True)
    assert torch.equal(partial.to_dense(), keep) and (partial.full_kv_num_blocks == 0).all()


def test_trained_heads(needle_model: PreTrainedModel, needle_tokenizer: Tokenizer) -> None:
    """Queries and keys of the needle model on its own kind of text, all layers."""
    ids = torch.tensor([build_prompt(needle_tokenizer, 1500, needles=4, seed=1).token_ids])
    with recorded_layers(needle_model) as layers, torch.no_grad():
        needle_model.model(ids)
    assert len(layers) == needle_model.config.num_hidden_layers
    cells = kept = 0
    for index, (query, key) in enumerate(layers):
        config = FlashPrefillConfig((0.1, 0.3)[index % 2], 1, 1, 0, (128, 64)[index % 2])
        decided, by_score, near, _ = compare_with_oracle(query[:, ::4], key[:, ::4], config)
        cells, kept = cells + decided, kept + by_score
        assert near <= 0.01 * decided
    assert 0.02 * cells < kept < 0.9 * cells, (kept, cells)


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_rounded_means_turn_near_ties_alone(dtype: torch.dtype, near: float) -> None:
    """Mean keys in the inputs' dtype beside the fp32 rule: P moves a little, a few cells in a thousand change sides."""
    cells = turned = 0
    for make, alpha in itertools.product((random_qk, blocky_qk, structured_qk), (0.1, 0.5)):
        query, key = (x.to(dtype) for x in make(1, 4, 2, 2048, 2048, 64, seed=3))
        both = (query, key), (query.float(), key.float())
        config = FlashPrefillConfig(alpha, 1, 1, 0, 64)
        kept, exact = (select_blocks(*pair, config).to_dense()[0] for pair in both)
        scores, unrounded = (block_scores(whole_element(query, key, 64)) for query, key in both)
        assert not torch.equal(scores, unrounded)
        gap = (unrounded / (unrounded.amax(-1, keepdim=True) * alpha)).log().abs()
        assert gap[kept != exact].le(near).all(), gap[kept != exact]
        cells, turned = cells + kept.shape[0] * 32 * 33 // 2, turned + int((kept != exact).sum())
    assert turned <= 1e-3 * cells, (turned, cells)


def whole_element(query: Tensor, key: Tensor, block_size: int) -> Element:
    """A prompt without padding as the rule sees it."""
    length, dim = query.shape[2:]
    found = element_of(query[0], key[0], 0, length, Grid(length, length, block_size), dim**-0.5)
    assert found is not None
    return found[0]
