"""Prefill-heavy load on a serving engine: its default attention backend, and the same engine with sparse prefill.

The model has the shape of Llama-3.1-8B and random weights, so its attention has no pattern of its own. The sparse
engine therefore runs its selection in full, throws the result away, and attends over seeded random blocks of a given
density (`synthetic_attention`). That hook is in the benchmark alone: no setting of the backend reaches it.
"""

from __future__ import annotations

import functools
import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.models import SHAPES
from bench.serve_job import EngineError, run_job
from bench.serve_tables import ENGINES
from bench.synthetic import chunk_selection
from bench.timing import Stopwatch, described
from flexprefill_fa import BlockSelection, block_sparse_attention, select_blocks
from flexprefill_fa.integrations.engine_paged import GatherBuffer, gather
from flexprefill_fa.integrations.engine_settings import SECTION, Settings, make_settings
from flexprefill_fa.tools.rows import Row, package_version

MODEL = SHAPES["llama-3.1-8b"]

_SEED = 0
_STEP_TOKENS = 8192  # of prompts, at most
_ANSWER_TOKENS = 16  # room behind the longest prompt
_DECODE_REQUESTS, _DECODE_PROMPT, _DECODE_TOKENS = 32, 512, 128
_LONG = 65536  # prompts from which on fewer repeats are enough
_TOGETHER = 4  # prompts of the throughput rows


@dataclass(frozen=True)
class LoadPlan:
    """What to measure with the engine `name`.

    `repeats` are of each prompt below 64K tokens, longer ones get a third; `settings` stand under "sparse_prefill" in
    the engine's configuration; `density` is of the synthetic blocks.
    """

    lengths: Sequence[int]
    settings: dict[str, Any]
    density: float
    repeats: int
    name: str = "vllm"

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        make_settings(self.settings, "settings")

    def engine(self, folder: str, sparse: bool) -> dict[str, Any]:
        """Arguments of `vllm.LLM` or `sglang.Engine`."""
        length = max(self.lengths) + _ANSWER_TOKENS
        arguments: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
        section = {SECTION: self.settings}
        if self.name == "vllm":
            arguments |= {"model": folder, "max_model_len": length, "seed": _SEED}
            ours = {"attention_backend": "CUSTOM", "additional_config": section}
        else:
            arguments |= {"model_path": folder, "context_length": length, "random_seed": _SEED, "log_level": "info"}
            ours = {"prefill_attention_backend": "flexprefill", "json_model_override_args": json.dumps(section)}
        return arguments | {ENGINES[self.name].step_tokens: _STEP_TOKENS} | (ours if sparse else {})

    def phases(self) -> list[dict[str, Any]]:
        """One of each length to time the first token, one of several long prompts at once, one of decoding."""
        draw = random.Random(_SEED)

        def phase(count: int, length: int, **more: Any) -> dict[str, Any]:
            prompts = [[draw.randrange(1000, 120000) for _ in range(length)] for _ in range(count)]
            return {"prompts": prompts, "max_tokens": 1, "ignore_eos": True, **more}

        phases = []
        for length in self.lengths:
            count = max(1, self.repeats // 3) if length >= _LONG else self.repeats
            # The first prompt of each length compiles and fills caches; it is not counted.
            phases.append(phase(count + 1, length))
        phases.append(phase(_TOGETHER, self.middle, together=True))
        decode = {"max_tokens": _DECODE_TOKENS, "together": True}
        return phases + [phase(_DECODE_REQUESTS, _DECODE_PROMPT, **decode) for _ in range(2)]

    @property
    def middle(self) -> int:
        """The length of several prompts at once."""
        return sorted(self.lengths)[len(self.lengths) // 2]


def load_rows(plan: LoadPlan, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows of both engines, the default one first, and of the gather; `note` is called with a line before each."""
    shape = {"heads": MODEL["num_attention_heads"], "kv_heads": MODEL["num_key_value_heads"]}
    shape |= {"layers": MODEL["num_hidden_layers"], "head_dim": MODEL["head_dim"]}
    shape |= {"model": "Llama-3.1-8B shape, random weights", ENGINES[plan.name].step_tokens: _STEP_TOKENS}
    conditions = described(plan.name, torch.device("cuda"), torch.bfloat16, **shape, seed=_SEED)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for sparse in (False, True):
            note(f"{ENGINES[plan.name].title} with {'sparse prefill' if sparse else 'its default backend'}")
            job = {"engine": plan.engine(folder, sparse), "phases": plan.phases()}
            result = run_job(job | ({"synthetic": plan.density} if sparse else {}), engine=plan.name)
            backend: Row = {"backend": "sparse prefill" if sparse else "default", **_versions(plan.name, result["log"])}
            if sparse:
                backend |= {"settings": plan.settings, "synthetic_density": plan.density}
            yield from ({**conditions, **backend, **row} for row in _measured(plan, result))
    parts = gather_share(plan)
    note(f"one layer, a chunk of {_STEP_TOKENS} queries over {max(plan.lengths)} keys: {parts}")
    same = {"backend": "gather", "measure": "gather", "length": max(plan.lengths), "settings": plan.settings}
    yield {**conditions, **same, **parts}


def _versions(engine: str, log: str) -> Row:
    """The engine's version and which dense kernel it took, from what it printed."""
    found = re.search(r"Using FlashAttention version (\d)|Use (\w+) backend by default", log)
    kernel = None if found is None else f"FlashAttention {found[1]}" if found[1] else found[2]
    return {engine: package_version(engine), "dense_kernel": kernel}


def _measured(plan: LoadPlan, result: dict[str, Any]) -> Iterator[Row]:
    *singles, together, _, decode = result["phases"]
    for length, phase in zip(plan.lengths, singles, strict=True):
        taken = [1000 * seconds for seconds in phase["seconds"][1:]]
        times = {"ttft_ms": statistics.median(taken), "ttft_min_ms": min(taken), "ttft_max_ms": max(taken)}
        row: Row = {name: round(value, 2) for name, value in times.items()}
        yield {"measure": "first token", "length": length, **row, "repeats": len(taken), **_density(phase)}
    row = {"measure": "prefill", "length": plan.middle, "requests": _TOGETHER}
    row["prompt_tokens_per_s"] = round(_TOGETHER * plan.middle / together["seconds"][0], 1)
    yield row | _density(together)
    row = {"measure": "decode", "length": _DECODE_PROMPT, "requests": _DECODE_REQUESTS}
    row["tokens_per_s"] = round(_DECODE_REQUESTS * _DECODE_TOKENS / decode["seconds"][0], 1)
    yield row | _density(decode)


def _density(phase: dict[str, Any]) -> Row:
    """Mean density and number of the sparse chunks of a phase, over layers."""
    everyone = [layer for worker in phase["statistics"] for layer in worker.values()]
    failures = sum(layer["failures"] for layer in everyone)
    if failures:
        raise EngineError(f"sparse attention failed for {failures} chunks of {len(everyone)} layers, see the log")
    layers = [layer for layer in everyone if layer["chunks"]]
    density = round(statistics.fmean(layer["density"] for layer in layers), 5) if layers else None
    return {"density": density, "chunks": max((layer["chunks"] for layer in layers), default=0), "failures": 0}


def synthetic_attention(density: float) -> Callable[..., tuple[Tensor, BlockSelection]]:
    """In the place of `attend_chunk`: the selection runs and is thrown away; the blocks of a shape are drawn once."""

    @functools.cache
    def blocks(q_len: int, kv_len: int, heads: int, block_size: int, device: torch.device) -> BlockSelection:
        return chunk_selection(q_len, kv_len, heads, density, block_size=block_size, device=device)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, settings: Settings, scale: float
    ) -> tuple[Tensor, BlockSelection]:
        select_blocks(query, key, settings.selector, scale=scale)
        size = settings.selector.block_size
        chosen = blocks(query.shape[2], key.shape[2], query.shape[1], size, query.device)
        return block_sparse_attention(query, key, value, chosen, scale=scale, backend=settings.backend), chosen

    return attend


def gather_share(plan: LoadPlan) -> Row:
    """Milliseconds of gathering, selecting and attending for one layer's last chunk of the longest prompt.

    The gather is all that a block table inside the mask could save.
    """
    device = torch.device("cuda")
    settings = make_settings(plan.settings, "settings")
    heads, kv_heads, dim = MODEL["num_attention_heads"], MODEL["num_key_value_heads"], MODEL["head_dim"]
    kv_len, page = max(plan.lengths), 16
    q_len = min(_STEP_TOKENS, kv_len)
    pages = -(-kv_len // page)
    cache = torch.randn(pages, 2, page, kv_heads, dim, dtype=torch.bfloat16, device=device)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    query = torch.randn(1, heads, q_len, dim, dtype=torch.bfloat16, device=device)
    scale, watch = dim**-0.5, Stopwatch(device, 10, 1.0)

    def milliseconds(call: Callable[[], object]) -> float:
        return round(watch.graph(call).median, 4)

    with torch.inference_mode():
        room = GatherBuffer().room(pages * page, kv_heads, query)

        def gather_both() -> list[Tensor]:
            return [gather(part, order, kv_len, out) for part, out in zip(cache.unbind(1), room, strict=True)]

        key, value = gather_both()
        chosen = synthetic_attention(plan.density)(query, key, value, settings, scale)[1]
        attend = functools.partial(block_sparse_attention, query, key, value, chosen)
        return {
            "q_len": q_len,
            "timed_by": "CUDA graph",
            "gather_ms": milliseconds(gather_both),
            "select_ms": milliseconds(lambda: select_blocks(query, key, settings.selector, scale=scale)),
            "attend_ms": milliseconds(lambda: attend(scale=scale, backend=settings.backend)),
        }
