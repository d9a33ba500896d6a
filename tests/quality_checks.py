"""What a selector must reach on the needle model, and the checks of it, which return what they find wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality import Exact
from flexprefill_fa import (
    BlockSelection,
    FlashPrefillConfig,
    FlexPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.integrations.transformers import enable_sparse_prefill
from flexprefill_fa.masks import SelectorConfig
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NeedlePrompt, is_correct

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

WINDOW = 512
SINK = 128


@dataclass(frozen=True)
class Limits:
    """Of the means over prompts, layers and heads."""

    least_recall: float
    density: tuple[float, float]
    most_error: float


@dataclass(frozen=True)
class Setting:
    """A selector, with or without mean correction, and what it must reach."""

    config: SelectorConfig
    limits: Limits
    mean_correction: bool = False


LITTLE = {"sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 0}  # of what FlashPrefill keeps in any case
# Measured with Python 3.11's library as the haystack, on layers 0, 4 and 5. In brackets: what 16 single seeds (recall,
# density) and 8 pairs of seeds (error, as the tests have a pair) gave; the limits leave room beyond it, because another
# Python's library gives other prompts. All but StreamingLLM keep little in any case, so that their own choices show:
# first block and diagonal alone have recall 0.73, density 0.119 and error 0.40.
SETTINGS = {
    # Most heads vertical-slash, the others query-aware.
    "flexprefill-published": Setting(  # recall 0.937 [0.915, 0.940], density 0.367 [0.308, 0.381], error 0.119 [0.145]
        FlexPrefillConfig(gamma=0.95, min_budget=128), Limits(0.895, (0.28, 0.41), 0.165)
    ),
    # Every head vertical-slash: shares of query-aware heads that differ by prompt would ask for loose limits.
    "flexprefill-paper": Setting(  # 0.957 [0.947, 0.972], 0.339 [0.295, 0.404], 0.058 [0.065]
        FlexPrefillConfig(gamma=0.7, tau=0, min_budget=128, variant="paper"), Limits(0.93, (0.27, 0.43), 0.085)
    ),
    # Every head query-aware; a smaller gamma adds little to the diagonal.
    "flexprefill-aware": Setting(  # 0.939 [0.931, 0.941], 0.323 [0.285, 0.367], 0.126 [0.143]
        FlexPrefillConfig(gamma=0.97, tau=1, min_budget=128), Limits(0.92, (0.265, 0.39), 0.16)
    ),
    "flashprefill": Setting(  # 0.948 [0.943, 0.951], 0.299 [0.273, 0.320], 0.072 [0.081]
        FlashPrefillConfig(alpha=0.1, **LITTLE), Limits(0.93, (0.25, 0.34), 0.1)
    ),
    "streaming_llm": Setting(  # 0.939 [0.927, 0.944], 0.3352 (geometry alone), 0.074 [0.086]
        StreamingLLMConfig(sink=SINK, window=WINDOW), Limits(0.915, (0.335, 0.336), 0.1)
    ),
    "vertical_slash": Setting(  # 0.917 [0.910, 0.930], 0.273 [0.268, 0.279], 0.096 [0.099]
        VerticalSlashConfig(vertical_size=512, slash_size=512), Limits(0.89, (0.262, 0.285), 0.12)
    ),
    # What is kept is geometry, and little, so that the means have much to make up for.
    "corrected": Setting(  # 0.728 [0.723, 0.758], 0.1193, 0.332 [0.341]
        StreamingLLMConfig(sink=1, window=1), Limits(0.7, (0.119, 0.12), 0.36), mean_correction=True
    ),
}
MOST_OF_UNCORRECTED = 0.885
"""Error with mean correction / error without; measured: 0.82 to 0.87 for 8 pairs of prompts.

With means that count once, and not as often as their block has keys, 0.99; with half the counts 0.87 of one prompt, so
that such a mistake is left to the comparison with the definition in test_mean_correction.py.
"""


COLUMN_KEEPERS: dict[str, SelectorConfig] = {  # with room for columns beside the first block
    "flexprefill-published": FlexPrefillConfig(gamma=0.9, min_budget=512),
    "flexprefill-paper": FlexPrefillConfig(gamma=0.9, min_budget=512, variant="paper"),
    "vertical_slash": VerticalSlashConfig(vertical_size=512, slash_size=512),
}

NEEDLE_SETTINGS: dict[str, tuple[SelectorConfig | None, bool]] = {
    "dense": (None, False),
    "flexprefill": (FlexPrefillConfig(gamma=0.95), False),
    "flashprefill-corrected": (FlashPrefillConfig(alpha=0.1), True),
}


@dataclass(frozen=True)
class Layer:
    """What one layer's attention gets, and its exact result."""

    query: Tensor
    key: Tensor
    value: Tensor
    exact: Exact


def needle_place(prompt: NeedlePrompt) -> int:
    return prompt.positions[list(prompt.needles).index(prompt.key)]


def attention(layer: Layer, config: SelectorConfig, correction: bool) -> tuple[Tensor, BlockSelection]:
    return sparse_prefill_attention(
        layer.query,
        layer.key,
        layer.value,
        config,
        mean_correction=correction,
        backend="CPU",
        return_selection=True,
    )


def column_problems(layers: list[Layer], config: SelectorConfig) -> list[str]:
    """Rows that miss a column planted in captured queries and keys: one early key that every query attends to.

    Recall on the tensors as they are says little about columns, because diagonals cover most of the same blocks.
    """
    problems = []
    block = 6
    for layer in layers:
        query = F.pad(layer.query, (0, 16))  # the further dims hold the planted score alone
        key = F.pad(layer.key, (0, 16))
        query[..., -1] = 2 * query.norm(dim=-1).max()  # so that no other key comes near, whatever the model
        key[..., block * config.block_size + 5, -1] = key.norm(dim=-1).max()
        kept = select_blocks(query, key, config, scale=layer.query.shape[-1] ** -0.5).to_dense()[:, :, block:, block]
        if not kept.all():
            problems.append(f"the planted column is in {kept.double().mean():.3f} of the rows")
    return problems


def selection_problems(layers: list[Layer], setting: Setting) -> list[str]:
    """What is wrong with a selector's choice, and with attention over it, on captured layers."""
    measured, without = [], 0
    for layer in layers:
        out, selection = attention(layer, setting.config, setting.mean_correction)
        keep = selection.to_dense()
        without += int((~(keep[..., 0] & keep.diagonal(dim1=-2, dim2=-1))).sum())
        error = layer.exact.head_errors(out)
        uncorrected = error
        if setting.mean_correction:
            uncorrected = layer.exact.head_errors(attention(layer, setting.config, False)[0])
        values = layer.exact.recall(selection), selection.density(), error, uncorrected
        measured.append(torch.stack([value.double().mean() for value in values]))
    recall, density, error, uncorrected = torch.stack(measured).mean(0).tolist()
    limits = setting.limits
    low, high = limits.density
    most_error = limits.most_error
    if setting.mean_correction:
        most_error = min(most_error, uncorrected * MOST_OF_UNCORRECTED)
    checks = {  # each is what must hold, so that NaN fails
        f"recall {recall:.4f} is below {limits.least_recall}": recall >= limits.least_recall,
        f"density {density:.4f} is not in [{low}, {high}]": low <= density <= high,
        f"error {error:.4f} is above {most_error:.4f}": error <= most_error,
        f"{without} rows are without the first block or their diagonal": without == 0,
    }
    return [problem for problem, good in checks.items() if not good]


def needle_problems(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[NeedlePrompt],
    config: SelectorConfig | None,
    correction: bool = False,
) -> list[str]:
    """The prompts that a model answers wrong; config None is the dense model."""
    problems = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        options: dict[str, Any] = {"max_new_tokens": ANSWER_DIGITS, "do_sample": False}
        if config is None:
            out = model.generate(ids, **options)  # type: ignore[operator]
        else:
            with enable_sparse_prefill(model, config, mean_correction=correction, statistics="density") as sparse:
                out = model.generate(ids, **options)  # type: ignore[operator]
            dense = [index for index, layer in sparse.statistics.items() if layer.density.min() == 1]
            if len(sparse.statistics) != model.config.num_hidden_layers or dense:
                problems.append(f"sparse layers: {sorted(sparse.statistics)}, of which keep every block: {dense}")
        answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        if not is_correct(answer, prompt.answer):
            problems.append(f"{prompt.key}: {answer!r}, not {prompt.answer!r}")
    return problems
