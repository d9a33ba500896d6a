"""From the options of a command line to a checked plan of what to measure, and to its inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.capture import needle_layers, text_layer
from bench.spec import WORKLOADS, backends_of, parse_lengths, parse_list, parse_place, parse_selectors, parse_share
from bench.workloads import Inputs, sharpness_of, structured_inputs
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.fidelity.texts import CORPORA
from flexprefill_fa.tools.loading import UsageError, load_config, model_name
from flexprefill_fa.tools.needle import MODEL_DIR

_sha256 = functools.cache(model_sha256)  # large files, read again for each length
_HEADS = (32, 8, 128)  # query heads, kv heads, head_dim
DENSE_KERNELS = {
    "cuda": ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn_4", "FLASH", "TRITON"),
    "cpu": ("sdpa", "CPU"),
}
YARDSTICK = {"cuda": "sdpa_flash", "cpu": "sdpa"}
"""The dense kernel that most published speed-ups are measured against."""


class Plan:
    """What to measure, from a command's options by their names, checked before any work.

    That is selectors, or random selections of `densities` instead, each by every one of `backends`.
    """

    def __init__(
        self,
        *,
        lengths: str,
        selectors: str,
        device: str,
        dtype: str,
        workload: str,
        seed: int,
        density: str | None = None,
        backends: str | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        model: Path | None = None,
        text: str = "source",
        layer: int = 0,
        repeats: int = 1,
        seconds: float = 0.0,
        dense: bool = True,
        mean_correction: bool = False,
        **_: object,
    ) -> None:
        self.configs = [] if density else parse_selectors("selectors", selectors)
        self.densities = [parse_share("density", item) for item in parse_list("density", density)] if density else []
        self.workload, self.model, self.text, self.layer, self.seed = workload, model, text, layer, seed
        self.repeats, self.seconds, self.mean_correction = repeats, seconds, mean_correction
        self.heads, self.kv_heads, self.head_dim = self._head_shape((heads, kv_heads, head_dim))
        self.device, self.dtype = parse_place(device, dtype)
        place = (self.device, self.dtype, self.head_dim)
        self.backends = parse_list("backends", backends) if backends else backends_of(*place)
        self._check_backends()
        self.lengths = parse_lengths(lengths)
        self.kernels = DENSE_KERNELS[self.device.type] if dense else ()  # of dense attention
        for length, share in itertools.product(self.lengths, self.densities):
            blocks = -(-length // 128)
            causal, always = blocks * (blocks + 1) // 2, 2 * blocks - 1
            if round(share * causal) < always:
                raise UsageError(
                    f"density at {length} tokens must be in [{always / causal:.4g}, 1] (the diagonal and the first "
                    f"block are always kept), got {share:g}"
                )

    def _check_backends(self) -> None:
        """Check that each backend can run with each selector here at all."""
        probe = torch.empty(1, 1, 1, self.head_dim, dtype=self.dtype, device=self.device)
        sizes = {config.block_size for config in self.configs} or {128}
        for backend, block_size in itertools.product(self.backends, sizes):
            try:
                resolve_backend(backend, probe, block_size)
            except ValueError as error:
                raise UsageError(str(error)) from error

    def _head_shape(self, asked: Sequence[int | None]) -> tuple[int, int, int]:
        """Query heads, kv heads and head_dim of the workload; None means its default."""
        if self.workload not in WORKLOADS:
            raise UsageError(f"workload must be one of {', '.join(WORKLOADS)}, got {self.workload!r}")
        if (self.workload == "model") != (self.model is not None):
            raise UsageError(f"--workload model and --model FOLDER go together, got {self.workload} and {self.model}")
        if self.text not in CORPORA:
            raise UsageError(f"text must be one of {', '.join(CORPORA)}, got {self.text!r}")
        if self.workload in ("needle", "model"):
            return _model_heads(self.model or MODEL_DIR, self.layer, asked)
        heads, kv_heads, head_dim = (size or usual for size, usual in zip(asked, _HEADS, strict=True))
        if heads % kv_heads:
            raise UsageError(f"heads must be a multiple of kv-heads, got {heads} and {kv_heads}")
        if head_dim % 16:
            raise UsageError(f"head-dim must be a multiple of 16, got {head_dim}")
        return heads, kv_heads, head_dim

    def steps(self) -> int:
        """Rows per length."""
        return len(self.kernels) + len(self.backends) * (len(self.configs) + len(self.densities))

    def on_device(self) -> AbstractContextManager[Any]:
        """The GPU as the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def inputs(self, length: int) -> tuple[Inputs, dict[str, Any]]:
        """Queries, keys and values, and what a row must say about them besides their shapes."""
        where: Any = {"dtype": self.dtype, "device": self.device}
        if self.workload == "needle":
            found = needle_layers(length, [self.layer], seed=self.seed, **where)[self.layer]
            return found, {"layer": self.layer, "model_sha256": _sha256(MODEL_DIR)}
        if self.model is not None:
            found, tokens = text_layer(self.model, self.text, length, self.layer, **where)
            said = {"model": model_name(str(self.model)), "model_sha256": _sha256(self.model)}
            return found, said | {"layer": self.layer, "text": tokens.name, "text_sha256": tokens.sha256(length)}
        sharpness, shape = sharpness_of(self.workload, length), (self.heads, self.kv_heads, self.head_dim)
        found = structured_inputs(length, *shape, sharpness=sharpness, seed=self.seed, **where)
        return found, {"sharpness": round(sharpness, 4)}


def _model_heads(folder: Path, layer: int, asked: Sequence[int | None]) -> tuple[int, int, int]:
    """As `Plan._head_shape`, of a model's config."""
    config: Any = load_config(folder).get_text_config(decoder=True)
    if layer >= config.num_hidden_layers:
        raise UsageError(f"layer must be in [0, {config.num_hidden_layers}), got {layer}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = (heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)
    if any(size not in (None, own) for size, own in zip(asked, found, strict=True)):
        told = "the model has {} heads, {} kv-heads and head-dim {}: leave those options out"
        raise UsageError(told.format(*found))
    return found
