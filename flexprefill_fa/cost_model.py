"""Whether a prompt is long enough to gain from sparsity: predicted times of both paths, from measured rates.

    dense ms  = launch + FLOP / rate                    FLOP = 4 D x causal pairs x heads, of the fastest dense kernel
    sparse ms = select launch + select per key x keys x heads + select share x FLOP / rate
                + attend launch + density x FLOP / sparse rate

The density is not known before the selection has run, and reading it back would make the host wait; so the model takes
the density that the selector's config expects at this length. Only whole prompts without padding are asked for: dense
attention needs a mask for others. Constants: `python -m bench fit` on the rows of
bench/results/attention.jsonl; a test holds them to those rows. Nothing is predicted for what was not measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.backends import compute_capability
from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.selector import Selector

_BLOCK = 128


@dataclass(frozen=True)
class Rates:
    """Measured costs of one kernel on one device and head dim, bf16.

    Attributes:
        dense_launch_ms, dense_tflops: of the fastest dense kernel beside it.
        select_launch_ms: what a selection costs however short the prompt is.
        select_ns: selection time per key and query head.
        select_share: what a selection computes for every query and block, as a share of dense attention.
        attend_launch_ms, attend_tflops: of sparse attention over the kept blocks.
    """

    dense_launch_ms: float
    dense_tflops: float
    select_launch_ms: float
    select_ns: float
    attend_launch_ms: float
    attend_tflops: float
    select_share: float = 0.0


# By compute capability, selector, backend and head dim; for half precision and blocks of 128 tokens.
RATES: dict[tuple[tuple[int, int], str, str, int], Rates] = {
    ((9, 0), "flexprefill", "FLASH", 128): Rates(0.021, 647.8, 0.058, 0.4668, 0.0176, 655.4),
    ((9, 0), "flexprefill", "TRITON", 128): Rates(0.0193, 600.3, 0.058, 0.4668, 0.0251, 421.2),
    ((9, 0), "peakprefill", "FLASH", 128): Rates(0.021, 647.8, 0.0175, 0.6242, 0.0068, 365.1, 0.04322),
    ((9, 0), "peakprefill", "TRITON", 128): Rates(0.0193, 600.3, 0.0175, 0.6242, 0.0109, 236.0, 0.04069),
}


def causal_flop(*, batch: int, heads: int, head_dim: int, tokens: int) -> int:
    """FLOP of dense attention over every causal block, the masked half of the diagonal ones included."""
    blocks = cdiv(tokens, _BLOCK)
    return 4 * head_dim * _BLOCK**2 * (blocks * (blocks + 1) // 2) * batch * heads


def predicted_ms(
    rates: Rates, *, batch: int, heads: int, head_dim: int, tokens: int, density: float
) -> tuple[float, float]:
    """(dense, sparse) milliseconds of one layer's attention over a whole prompt."""
    flop = causal_flop(batch=batch, heads=heads, head_dim=head_dim, tokens=tokens)
    dense = rates.dense_launch_ms + flop / rates.dense_tflops / 1e9
    select = rates.select_launch_ms + rates.select_ns * batch * heads * tokens / 1e6
    select += rates.select_share * flop / rates.dense_tflops / 1e9
    attend = rates.attend_launch_ms + density * flop / rates.attend_tflops / 1e9
    return dense, select + attend


def prefers_dense(query: Tensor, key: Tensor, config: Selector, backend: str) -> bool:
    """Whether dense attention is expected to be faster than `backend` with this selector.

    Args:
        query: `[B, Hq, L, D]`. key: `[B, Hkv, L, D]`, a whole prompt.
        config: the selector.
        backend: "FLASH", "TRITON" or "CPU".
    """
    batch, heads, tokens, head_dim = query.shape
    if tokens <= config.dense_tokens:
        return True
    if not query.is_cuda or query.dtype == torch.float32 or config.block_size != _BLOCK:
        return False
    rates = RATES.get((compute_capability(query.device.index), config.name, backend, head_dim))
    if rates is None:
        return False
    density = config.expected_density(key.shape[2])
    dense, sparse = predicted_ms(rates, batch=batch, heads=heads, head_dim=head_dim, tokens=tokens, density=density)
    return dense <= sparse
