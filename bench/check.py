"""Is what was timed right? Sampled query rows against attention in fp64 over the kept blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa import BlockSelection
from flexprefill_fa.index_lists import kept_table
from flexprefill_fa.tools.rows import Row

SAMPLED_ROWS = 32
_ALLOWED_LOSS = 2.0  # times what plain PyTorch loses in the same precision
_ROUNDING = 1e-5  # beside it, for fp32, where both lose next to nothing
_SPARSE_DENSITY = 0.9  # below it an output must be told from dense attention's


def sample_positions(length: int, rows: int = SAMPLED_ROWS) -> Tensor:
    """int64 `[rows]`, at most `length`: query positions spread evenly from the first to the last."""
    return torch.linspace(0, length - 1, min(rows, length), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Reference:
    """Attention of the sampled rows, `[B, Hq, R, D]`.

    Attributes:
        positions: int64 `[R]`, which rows.
        expected, dense: fp64, over the kept blocks; over every causal key.
        plain: over the kept blocks by plain PyTorch, with probabilities and values in the inputs' dtype.
        recall: fp64 `[B, Hq]`, share of the exact probability in kept blocks, mean over the rows.
        density: mean share of causal blocks that are kept, over whole heads; 1 without a selection.
    """

    positions: Tensor
    expected: Tensor
    dense: Tensor
    plain: Tensor
    recall: Tensor
    density: float


def kept_rows(selection: BlockSelection, positions: Tensor) -> Tensor:
    """bool `[B, Hq, R, nk]`: which blocks the selection keeps for the query rows at these positions."""
    rows = (positions // selection.block_size).to(selection.kv_num_blocks.device)
    return kept_table(*(part[:, :, rows] for part in selection.lists), selection.grid.kv_blocks)


def reference(inputs: Inputs, selection: BlockSelection | None, rows: int = SAMPLED_ROWS) -> Reference:
    """The attention of `rows` sampled query rows of every head over a selection's blocks, or over every causal key.

    Of inputs with as many queries as keys, without padding.
    """
    query, key, value = inputs
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    positions = sample_positions(length, rows).to(query.device)
    causal = torch.arange(length, device=query.device) <= positions[:, None]  # [R, n]
    queries = query[:, :, positions].unflatten(1, (-1, groups)).flatten(0, 1)  # [B Hkv, G, R, D]
    masks, density = [causal] * len(queries), 1.0
    if selection is not None:
        kept = kept_rows(selection, positions).unflatten(1, (-1, groups)).flatten(0, 1)  # [B Hkv, G, R, nk]
        masks = (causal & blocks.repeat_interleave(selection.block_size, -1)[..., :length] for blocks in kept)
        density = selection.density().mean().item()
    parts = []
    for q, k, v, mask in zip(queries, key.flatten(0, 1), value.flatten(0, 1), masks, strict=True):
        exact, wide = _probability(q.double(), k.double(), causal), v.double()  # [G, R, n]; a group's are large enough
        dense = exact @ wide
        exact = exact.masked_fill_(~mask, 0)
        mass = exact.sum(-1, keepdim=True)
        # As the kernels do it: scores in fp32, probabilities and values in the inputs' dtype.
        plain = _probability(q.float(), k.float(), mask).to(q.dtype) @ v
        parts.append((exact @ wide / mass, dense, plain, mass.mean((1, 2))))
    found = (torch.stack(part) for part in zip(*parts, strict=True))
    expected, dense, plain, recall = (part.view(batch, heads, *part.shape[2:]) for part in found)
    return Reference(positions, expected, dense, plain, recall, density)


def _probability(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill_(~mask, float("-inf")).softmax(-1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def verify(out: Tensor, reference: Reference) -> Row:
    """What a row says of an output `[B, Hq, n, D]`, judged by its sampled rows; `error` where something is wrong.

    It is right when every head loses at most twice what plain PyTorch loses in the same precision and, where blocks
    were dropped, when it lies nearer to the attention over the kept blocks than to dense attention.
    `check_error` is the relative L2 distance from `Reference.expected`, of all heads together or of the worst head
    where one fails, `check_allowed` the largest that is right, and `check_sparse_share` how far the output lies on the
    way from dense (0) to the expected attention (1), where blocks were dropped.
    """
    got, expected, plain = out[:, :, reference.positions].double(), reference.expected, reference.plain.double()
    size = expected.norm(dim=(-2, -1))
    errors, losses = ((x - expected).norm(dim=(-2, -1)) / size for x in (got, plain))  # [B, Hq]
    excess = (errors - _ALLOWED_LOSS * losses - _ROUNDING).nan_to_num(nan=float("inf"))
    worst = divmod(int(excess.argmax()), excess.shape[1])
    wrong = bool(excess[worst] > 0)
    error = errors[worst].item() if wrong else relative_error(got, expected)
    loss = losses[worst].item() if wrong else relative_error(plain, expected)
    allowed = _ALLOWED_LOSS * loss + _ROUNDING
    found: Row = {"check_error": error if math.isfinite(error) else None, "check_allowed": allowed}
    if wrong:
        what = f"relative error {error:.3g} of the sampled rows of head {worst}"
        return {**found, "error": f"{what}, allowed {allowed:.3g}"}
    if reference.density < _SPARSE_DENSITY:
        way = expected - reference.dense
        share = (((got - reference.dense) * way).sum() / way.square().sum()).item()
        found["check_sparse_share"] = round(share, 4)
        if not share > 0.5:
            found["error"] = (
                f"the sampled rows are those of dense attention, not of {reference.density:.3g} of its blocks "
                f"(share of the way from dense {share:.3g}, at least 0.5 expected)"
            )
    return found


def no_better_than_zeros(out: Tensor, reference: Reference) -> str | None:
    """What is wrong with an output `[B, Hq, n, D]` over unknown blocks, judged by its sampled rows.

    A row is no better than zeros where its relative L2 error is 1 or more, against dense attention and against
    `expected`, the attention over the blocks kept here. A row whose blocks hold at least half of the probability stays
    below against dense attention, for values that are uncorrelated; one whose blocks hold less stays below against
    `expected`, where they are about those kept here. A head is wrong where at least half of its rows are no better.
    """
    got = out[:, :, reference.positions].double()
    wrong = torch.ones(got.shape[:3], dtype=torch.bool, device=got.device)
    for right in (reference.dense, reference.expected):
        wrong &= ~((got - right).norm(dim=-1) < right.norm(dim=-1))
    share = wrong.double().mean(-1).flatten()
    worst = int(share.argmax())
    if share[worst] < 0.5:
        return None
    return (
        f"{share[worst]:.0%} of the sampled rows of head {divmod(worst, got.shape[1])} are no nearer than zeros "
        "to dense attention or to that over the blocks kept here, allowed less than 50%"
    )
