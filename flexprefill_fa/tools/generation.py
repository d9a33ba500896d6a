"""Answers and prefill times of one Hugging Face model, dense and sparse, on one prompt."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from flexprefill_fa.integrations.hf_check import check_some_sparse
from flexprefill_fa.integrations.transformers import default_correction, enable_sparse_prefill
from flexprefill_fa.masks import Selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.progress import WorkProgress

WARM_UP_TOKENS = 2048
"""Prompt length of the runs before the timed one. One compiled graph serves every length, so this compiles it."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer kept, over its heads: mean density, mean recall, recall of the worst head (None: not asked)."""

    layer: int
    density: float
    recall: float | None
    lowest_recall: float | None


@dataclass(frozen=True)
class Measurement:
    """One way of answering a prompt.

    Attributes:
        token_ids: the new tokens, greedy.
        prefill_seconds: from the prompt to the first new token, median of the warm runs.
        compile_seconds: what the first sparse prefill took longer than the second; None for dense.
        layers: per attention layer that ran sparse; empty for dense, and for a prompt that was too short to run sparse.
    """

    token_ids: list[int]
    prefill_seconds: float
    compile_seconds: float | None = None
    layers: tuple[LayerReport, ...] = ()

    @property
    def density(self) -> float | None:
        """Kept blocks / causal blocks over the heads of all layers that ran sparse."""
        return statistics.fmean(layer.density for layer in self.layers) if self.layers else None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, device: torch.device) -> Tensor:
    """The prompt as int64 `[1, n]`, with the special tokens that the tokenizer adds.

    Raises:
        UsageError: if the tokenizer finds no token in it.
    """
    token_ids = tokenizer(text)["input_ids"]
    if not token_ids:
        raise UsageError("the model's tokenizer finds no tokens in the prompt")
    return torch.tensor([token_ids], dtype=torch.int64, device=device)


def measure_dense(
    model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, progress: WorkProgress, *, repeats: int = 1
) -> Measurement:
    """Answer with the model's own attention.

    Args:
        model: a causal language model.
        input_ids: int64 `[1, n]`.
        max_new_tokens: tokens to generate at most.
        progress: shows the work.
        repeats: number of timed prefills, after a shorter one that warms up.
    """
    generate_greedily(model, input_ids[:, :WARM_UP_TOKENS], 1, progress, "warming up dense")
    token_ids, seconds = _timed(model, input_ids, max_new_tokens, progress, "dense", repeats)
    return Measurement(token_ids, seconds)


def measure_sparse(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: Selector,
    max_new_tokens: int,
    progress: WorkProgress,
    *,
    mean_correction: MeanCorrection = False,
    dense_layers: Sequence[int] = (),
    repeats: int = 1,
    recall: bool = False,
) -> Measurement:
    """Answer with sparse prefill and dense decoding.

    Args:
        model, input_ids, max_new_tokens, progress, repeats: as for `measure_dense`.
        config: a selector's config.
        mean_correction, dense_layers: as for `enable_sparse_prefill`.
        recall: measure recall too, in one more prefill that computes exact attention.

    Raises:
        UsageError: if the integration refuses the model, or none of its layers runs sparse.
    """
    warm_ids = input_ids[:, : max(WARM_UP_TOKENS, 2 * config.dense_tokens)]
    options: dict[str, Any] = {"mean_correction": mean_correction, "dense_layers": dense_layers}
    with ExitStack() as stack:
        with refusal_in_one_line():
            handle = stack.enter_context(enable_sparse_prefill(model, config, statistics="density", **options))
            check_some_sparse(model)
            _, first = generate_greedily(model, warm_ids, 1, progress, "compiling sparse")
        _, second = generate_greedily(model, warm_ids, 1, progress, "warming up sparse")
        token_ids, seconds = _timed(model, input_ids, max_new_tokens, progress, "sparse", repeats)
        kept = dict(handle.statistics)
    if recall and kept:
        with enable_sparse_prefill(model, config, statistics="recall", **options) as handle:
            generate_greedily(model, input_ids, 1, progress, "measuring recall against exact attention")
            kept = dict(handle.statistics)
    layers = tuple(_report(layer, kept[layer]) for layer in sorted(kept))
    return Measurement(token_ids, seconds, max(first - second, 0.0), layers)


def _report(layer: int, kept: Any) -> LayerReport:
    density = kept.density.mean().item()
    if kept.recall is None:
        return LayerReport(layer, density, None, None)
    return LayerReport(layer, density, kept.recall.mean().item(), kept.recall.min().item())


@contextmanager
def refusal_in_one_line() -> Iterator[None]:
    """Turn what the integration raises in the body into a `UsageError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(first_line(error)) from error


def usual_correction(model: PreTrainedModel) -> MeanCorrection:
    """`default_correction`, for commands.

    Raises:
        UsageError: if the integration refuses the model.
    """
    with refusal_in_one_line():
        return default_correction(model)


def _timed(
    model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, progress: WorkProgress, name: str, repeats: int
) -> tuple[list[int], float]:
    label = f"{name}, {input_ids.shape[1]} tokens"
    token_ids, seconds = generate_greedily(model, input_ids, max_new_tokens, progress, label)
    again = [generate_greedily(model, input_ids, 1, progress, label)[1] for _ in range(repeats - 1)]
    return token_ids, statistics.median([seconds, *again])


def generate_greedily(
    model: Any, input_ids: Tensor, max_new_tokens: int, progress: WorkProgress, label: str
) -> tuple[list[int], float]:
    """Greedy new tokens, and the seconds from the prompt to the first of them.

    Args:
        model: a causal language model.
        input_ids: int64 `[1, n]`.
        max_new_tokens: tokens to generate at most.
        progress: shows the work, under `label`.
        label: what it is.
    """
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
    settings.update(max_length=None, max_new_tokens=max_new_tokens)
    layers = getattr(model.get_decoder(), "layers", ())
    with progress.task(label, len(layers) + max_new_tokens - 1) as advance:
        clock = _PrefillClock(input_ids.device, layers, advance)
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings, streamer=clock
        )
    return output[0, input_ids.shape[1] :].tolist(), clock.times[1] - clock.times[0]


class _PrefillClock(BaseStreamer):
    """A streamer: `generate` hands it the prompt just before prefill, and then each new token.

    While a bar is shown, it advances once per layer of the prefill and once per token after the first.
    """

    def __init__(self, device: torch.device, layers: Any, advance: Callable[[], None] | None):
        self.device = device
        self.advance = advance
        self.times: list[float] = []
        self.hooks = []
        if advance is not None:
            step = advance
            self.hooks = [layer.register_forward_hook(lambda *_: step()) for layer in layers]

    def put(self, value: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.end()
        elif len(self.times) > 2 and self.advance is not None:
            self.advance()

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
