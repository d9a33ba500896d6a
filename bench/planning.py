"""From the options of a command line to a checked plan of what to measure, and to its inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.capture import needle_layers, text_layer
from bench.spec import (
    WORKLOADS,
    backends_of,
    check_backends,
    parse_lengths,
    parse_list,
    parse_place,
    parse_selectors,
    parse_share,
)
from bench.workloads import Inputs, sharpness_of, structured_inputs
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.fidelity.texts import CORPORA
from flexprefill_fa.tools.loading import UsageError, load_config, model_name
from flexprefill_fa.tools.needle import MODEL_DIR

_sha256 = functools.cache(model_sha256)  # large files, read again for each length
_HEADS = (32, 8, 128)  # query heads, kv heads, head_dim
_USUAL = {
    **dict.fromkeys(("density", "backends", "heads", "kv_heads", "head_dim", "model")),
    **{"batch": 1, "text": "source", "dense": True, "mean_correction": False, "layer": 0, "repeats": 1, "seconds": 0.0},
}  # of options that not every command has
DENSE_KERNELS = {
    "cuda": ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn_4", "FLASH", "TRITON"),
    "cpu": ("sdpa", "CPU"),
}
YARDSTICK = {"cuda": "sdpa_flash", "cpu": "sdpa"}
"""The dense kernel that most published speed-ups are measured against."""


@dataclass(frozen=True)
class Plan:
    """What to measure: selectors, or synthetic selections of `densities` instead, each by every one of `backends`."""

    lengths: Sequence[int]
    configs: Sequence[Any]
    densities: Sequence[float]
    backends: Sequence[str]
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: torch.dtype
    workload: str
    model: Path | None
    text: str
    layer: int
    device: torch.device
    seed: int
    repeats: int
    seconds: float
    dense: bool
    mean_correction: bool

    @property
    def kernels(self) -> Sequence[str]:
        """Dense kernels to time."""
        return DENSE_KERNELS[self.device.type] if self.dense else ()

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
            try:
                found = needle_layers(length, [self.layer], seed=self.seed, **where)[self.layer]
            except ValueError as error:
                raise UsageError(str(error)) from error
            return self._batch(found), {"layer": self.layer, "model_sha256": _sha256(MODEL_DIR)}
        if self.model is not None:
            found, tokens = text_layer(self.model, self.text, length, self.layer, **where)
            said = {"model": model_name(str(self.model)), "model_sha256": _sha256(self.model)}
            said |= {"layer": self.layer, "text": tokens.name, "text_sha256": tokens.sha256(length)}
            return self._batch(found), said
        sharpness = sharpness_of(self.workload, length)
        same = {name: getattr(self, name) for name in ("batch", "dtype", "device", "seed")}
        shape = (self.heads, self.kv_heads, self.head_dim)
        return structured_inputs(length, *shape, sharpness=sharpness, **same), {"sharpness": round(sharpness, 4)}

    def _batch(self, inputs: Inputs) -> Inputs:
        return Inputs(*(tensor.repeat(self.batch, 1, 1, 1) for tensor in inputs))


def make_plan(**options: Any) -> Plan:
    """The plan of a command's options by their names, checked before any work."""
    given = SimpleNamespace(**_USUAL | options)
    density = given.density
    configs = [] if density else parse_selectors("selectors", given.selectors)
    densities = [parse_share("density", item) for item in parse_list("density", density)] if density else []
    shape = _head_shape(given)
    device, dtype = parse_place(given.device, given.dtype)
    backends = parse_list("backends", given.backends) if given.backends else backends_of(device, dtype, shape[2])
    check_backends(backends, dtype, shape[2], configs, device)
    lengths = parse_lengths(given.lengths)
    for length, share in itertools.product(lengths, densities):
        blocks = -(-length // 128)
        causal, always = blocks * (blocks + 1) // 2, 2 * blocks - 1
        if round(share * causal) < always:
            raise UsageError(
                f"density at {length} tokens must be in [{always / causal:.4g}, 1] (the diagonal and the first block "
                f"are always kept), got {share:g}"
            )
    same = ("batch", "workload", "model", "text", "layer", "seed", "repeats", "seconds", "dense", "mean_correction")
    plain = {name: getattr(given, name) for name in same}
    return Plan(lengths, configs, densities, backends, *shape, dtype=dtype, device=device, **plain)


def _head_shape(given: SimpleNamespace) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a workload; None means its default."""
    asked = (given.heads, given.kv_heads, given.head_dim)
    if given.workload not in WORKLOADS:
        raise UsageError(f"workload must be one of {', '.join(WORKLOADS)}, got {given.workload!r}")
    if (given.workload == "model") != (given.model is not None):
        raise UsageError(f"--workload model and --model FOLDER go together, got {given.workload} and {given.model}")
    if given.text not in CORPORA:
        raise UsageError(f"text must be one of {', '.join(CORPORA)}, got {given.text!r}")
    if given.workload in ("needle", "model"):
        return _model_heads(given.model or MODEL_DIR, given.layer, asked)
    heads, kv_heads, head_dim = (size or usual for size, usual in zip(asked, _HEADS, strict=True))
    if heads % kv_heads:
        raise UsageError(f"heads must be a multiple of kv-heads, got {heads} and {kv_heads}")
    if head_dim % 16:
        raise UsageError(f"head-dim must be a multiple of 16, got {head_dim}")
    return heads, kv_heads, head_dim


def _model_heads(folder: Path, layer: int, asked: Sequence[int | None]) -> tuple[int, int, int]:
    """As `_head_shape`, of a model's config."""
    config: Any = load_config(folder).get_text_config(decoder=True)
    if layer >= config.num_hidden_layers:
        raise UsageError(f"layer must be in [0, {config.num_hidden_layers}), got {layer}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = (heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)
    if any(size not in (None, own) for size, own in zip(asked, found, strict=True)):
        own = "{} heads, {} kv-heads and head-dim {}".format(*found)
        raise UsageError(f"the model has {own}: leave those options out")
    return found
