"""From the options of a command line to a checked plan of what to measure, and to its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from bench.check import SAMPLED_ROWS
from bench.needle.capture import capture_layers
from bench.needle.network import model_config
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
from flexprefill_fa.tools.fidelity.memory import free_bytes
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle import MODEL_DIR

_OUTPUTS = 4  # of dense, of sparse, one more while a graph holds its own, and what a kernel makes beside it
_HEADS = (32, 8, 128)  # query heads, kv heads, head_dim
_USUAL = {
    **dict.fromkeys(("density", "backends", "heads", "kv_heads", "head_dim")),
    **{"batch": 1, "dense": True, "mean_correction": False, "layer": 0, "repeats": 1, "seconds": 0.0},
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
        if self.workload == "needle":
            try:
                found = capture_layers(length, [self.layer], dtype=self.dtype, device=self.device, seed=self.seed)
            except ValueError as error:
                raise UsageError(str(error)) from error
            tensors = [tensor.repeat(self.batch, 1, 1, 1) for tensor in found[self.layer]]
            return Inputs(*tensors), {"layer": self.layer, "model_sha256": model_sha256(MODEL_DIR)}
        sharpness = sharpness_of(self.workload, length)
        same = {name: getattr(self, name) for name in ("batch", "dtype", "device", "seed")}
        shape = (self.heads, self.kv_heads, self.head_dim)
        return structured_inputs(length, *shape, sharpness=sharpness, **same), {"sharpness": round(sharpness, 4)}


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
    for length in lengths:
        needed, free = needed_bytes(length, given.batch, *shape, dtype, device, given.dense), free_bytes(device)
        if needed > free:
            sizes = f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            raise UsageError(f"{length} tokens: it needs about {sizes}")
    same = ("batch", "workload", "layer", "seed", "repeats", "seconds", "dense", "mean_correction")
    plain = {name: getattr(given, name) for name in same}
    return Plan(lengths, configs, densities, backends, *shape, dtype=dtype, device=device, **plain)


def _head_shape(given: SimpleNamespace) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a workload; None means its default."""
    asked = (given.heads, given.kv_heads, given.head_dim)
    if given.workload not in WORKLOADS:
        raise UsageError(f"workload must be one of {', '.join(WORKLOADS)}, got {given.workload!r}")
    if given.workload == "needle":
        if asked != (None, None, None):
            raise UsageError("the needle model has its own heads, kv-heads and head-dim: leave those options out")
        config = model_config()
        if given.layer >= config["num_hidden_layers"]:
            raise UsageError(f"layer must be in [0, {config['num_hidden_layers']}), got {given.layer}")
        return config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    heads, kv_heads, head_dim = (size or usual for size, usual in zip(asked, _HEADS, strict=True))
    if heads % kv_heads:
        raise UsageError(f"heads must be a multiple of kv-heads, got {heads} and {kv_heads}")
    if head_dim % 16:
        raise UsageError(f"head-dim must be a multiple of 16, got {head_dim}")
    return heads, kv_heads, head_dim


def needed_bytes(
    length: int,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    dense: bool = True,
) -> int:
    """An estimate of what measuring one length takes at once, inputs included, on the safe side; `dense` or without."""
    query = batch * heads * length * head_dim * dtype.itemsize
    key = batch * kv_heads * length * head_dim * dtype.itemsize
    blocks = -(-length // 128)
    lists = 4 * 4 * batch * heads * blocks * blocks  # int32 lists of three selections, one in a graph; block scores
    groups = heads // kv_heads
    check = 8 * length * (2 * head_dim + 4 * groups * SAMPLED_ROWS)  # fp64 keys and values, scores of a kv group
    needed = query + 2 * key + (_OUTPUTS if dense else _OUTPUTS - 1) * query + lists + check
    if device.type == "cpu":  # the plain selection: fp32 scores of 128 queries; queries, and keys for every head
        needed += heads * length * 4 * (5 * 128 + 2 * head_dim)
    return needed
