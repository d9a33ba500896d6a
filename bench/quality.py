"""What selections keep and what their outputs lose, on the queries, keys and values of the needle model's layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention import spread
from bench.capture import needle_layers
from bench.check import reference, verify
from bench.planning import Plan
from bench.quality_tables import KIND
from bench.timing import described, significant
from bench.workloads import Inputs
from flexprefill_fa import BlockSelection, get_selector, selector_names, sparse_prefill_attention
from flexprefill_fa.exact import block_mass, exact_probabilities
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row

_VARIANTS = ("published", "paper")
_BESIDE = {
    "flexprefill": [
        *(f"variant={variant}+tau={tau}+min_budget=512" for variant in _VARIANTS for tau in (0.1, 0)),
        *(f"variant={variant}+min_budget=128" for variant in _VARIANTS),
    ],
    "flashprefill": ["", "sink_blocks=1+window_blocks=1+last_full_blocks=0"],
}
"""What stands beside the swept settings. With little that is always kept, a prompt of a few thousand tokens reaches
densities of 5 and 10 %."""


LAYERS = 6  # of the needle model
MASS_BLOCK = 64
"""Tokens per block of `Exact.mass`: selections of 64- and of 128-token blocks both are unions of such blocks."""

_SCORE_BYTES = 256 * 2**20  # fp32 scores of one kv head held at a time


@dataclass(frozen=True)
class Exact:
    """Dense causal attention of as many queries as keys: its output, fp32 `[B, Hq, n, D]`, and `mass`.

    That is fp32 `[B, Hq, nb, nb]`: the probability that the rows of a query block give to the keys of a key block,
    summed over the rows; blocks of `MASS_BLOCK` tokens.
    """

    out: Tensor
    mass: Tensor

    def recall(self, selection: BlockSelection) -> Tensor:
        """What `BlockSelection.recall` computes, fp64 `[B, Hq]`, without computing the scores again.

        Its blocks must be a multiple of `MASS_BLOCK`.
        """
        factor, blocks = selection.block_size // MASS_BLOCK, self.mass.shape[-1]
        keep = selection.to_dense().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        kept = self.mass.double().masked_fill_(~keep[..., :blocks, :blocks], 0)
        return kept.sum((-2, -1)) / self.out.shape[2]

    def head_errors(self, out: Tensor) -> Tensor:
        """Relative L2 distance of an output `[B, Hq, n, D]` from `out`, over each head's rows, fp64 `[B, Hq]`."""
        exact = self.out.double()
        return (out.double() - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Exact:
    """Dense causal attention of `[B, H, n, D]` in fp32 at the default scale, some rows of one kv head at a time."""
    groups, length = query.shape[1] // key.shape[1], value.shape[2]
    values = F.pad(value.float(), (0, 0, 0, -length % MASS_BLOCK))
    out = torch.empty(*query.shape, device=query.device)
    for kv_head, first, probability in exact_probabilities(query, key, MASS_BLOCK, score_bytes=_SCORE_BYTES):
        rows, seen = probability.shape[2:]
        group = slice(kv_head * groups, (kv_head + 1) * groups)
        out[:, group, first : first + rows] = probability @ values[:, kv_head, None, :seen]
    return Exact(out, block_mass(query, key, MASS_BLOCK))


def sweep() -> str:
    """Selectors and settings, from few blocks to many, as `bench.spec.parse_selectors` reads them."""
    found = []
    for name in selector_names():
        fields = get_selector(name).sweep
        for others, values in itertools.product(_BESIDE.get(name, [""]), zip(*fields.values(), strict=True)):
            settings = [f"{field}={value}" for field, value in zip(fields, values, strict=True)]
            found.append(f"{name}:{'+'.join([*settings, *filter(None, [others])])}")
    return ",".join(found)


def quality_rows(plan: Plan, corrections: Sequence[bool], failed: Callable[[str], None], length: int) -> Iterator[Row]:
    """The rows of one length: every layer, selector and mean correction, over the plan's one backend.

    `failed` is called with a line about each setting that raised an error or whose output was wrong, which has no row.
    """
    captured = needle_layers(length, range(LAYERS), dtype=plan.dtype, device=plan.device, seed=plan.seed)
    shape = {"batch": 1, "heads": plan.heads, "kv_heads": plan.kv_heads, "head_dim": plan.head_dim}
    model = {"workload": "needle", "model_sha256": model_sha256(MODEL_DIR)}
    for layer in range(LAYERS):
        inputs = captured.pop(layer)
        where = {**model, "layer": layer, "seed": plan.seed}
        conditions = described(KIND, plan.device, plan.dtype, length=length, **shape, **where)
        with torch.no_grad(), plan.on_device():
            exact = exact_attention(*inputs)
            # Of rounding alone. Repeated by hand: in fp32 on a GPU, grouped heads would take a kernel that holds all
            # scores.
            key, value = (x.repeat_interleave(plan.heads // plan.kv_heads, 1) for x in (inputs.key, inputs.value))
            dense = F.scaled_dot_product_attention(inputs.query, key, value, is_causal=True)
            conditions["dense_error"] = significant(exact.head_errors(dense).mean().item())
            for config in plan.configs:
                for correction in corrections:
                    try:
                        found = measure(inputs, exact, config, plan.backends[0], correction)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:  # the other rows of a long run are still worth having
                        who = f"{length} tokens, layer {layer}, {config}, mean_correction={correction}"
                        failed(f"failed: {who}: {type(error).__name__}: {first_line(error)}")
                        continue
                    yield conditions | found


def measure(inputs: Inputs, exact: Exact, config: Any, backend: str, correction: bool) -> Row:
    """Density, recall and output error of one setting in one layer, batch 1: over the heads, and head by head.

    `error` is the relative L2 distance of a head's output from exact dense attention, in the mean over heads;
    `error_max` is the worst head's.
    """
    options: dict[str, Any] = {"mean_correction": True} if correction else {}
    out, selection = sparse_prefill_attention(
        *inputs, config, dense="never", backend=backend, return_selection=True, **options
    )
    problem = None if correction else verify(out, reference(inputs, selection)).get("error")
    found = {"density": selection.density(), "recall": exact.recall(selection), "error": exact.head_errors(out)}
    if problem is None and not found["error"].isfinite().all():
        problem = "the output is not finite"
    if problem is not None:
        raise ArithmeticError(problem)
    row = {"selector": config.name, "settings": dataclasses.asdict(config), "backend": backend}
    row["mean_correction"] = correction
    for name, ends in (("density", "min max"), ("recall", "min"), ("error", "max")):
        row |= spread(name, found[name], ends)
    return row | {f"head_{name}": [significant(value) for value in each[0].tolist()] for name, each in found.items()}
