"""Time to first token of a model with random weights: `generate` of one token, with dense and with sparse prefill.

Random weights have no attention pattern. Each selector therefore runs in full, and attention is then over seeded random
blocks of a stated density (`bench.synthetic`).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.models import Ranks, build_model, model_config
from bench.planning import DENSE_KERNELS
from bench.prefill_kernels import dense_prefill, implementation, timed_attention
from bench.spec import backends_of, parse_lengths, parse_list, parse_place, parse_selectors, parse_share
from bench.synthetic import StandIn
from bench.timing import Timer, described, summarise
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.integrations.hf_mask import MIN_QUERY_TOKENS
from flexprefill_fa.integrations.transformers import NAME, compile_prefill, enable_sparse_prefill
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row, package_version

_FIRST_TOKEN = 3  # of random prompts; the ids below are special ones in most vocabularies


@dataclass(frozen=True)
class Pass:
    """What a row is about: a prompt, its first token by a dense kernel or by a selector's config.

    Tokens of the prompt come `step` at a time, which is all of them where it is not in chunks.
    """

    compiled: bool
    length: int
    step: int
    kernel: str | None
    config: Any

    @property
    def chunk(self) -> int | None:
        """`step`, where there are several."""
        return self.step if self.step < self.length else None

    @property
    def keeps_all(self) -> bool:
        """Whether a selector keeps every block of the first tokens, which then run dense."""
        return self.config is not None and self.step <= self.config.dense_tokens


class TtftPlan:
    """What to measure, from a command's options by their names, checked before any work: `passes` of a model.

    Every prompt and every chunk of one is to run sparse; `note` is called with a line about what is left out. The
    blocks that take the place of a selector's choice have a density of `density`. Timed are `repeats` passes, or fewer
    (at least one) where they would take longer than `seconds` together.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        *,
        config: str,
        lengths: str,
        selectors: str,
        density: float,
        dense: str | None,
        modes: str,
        chunk: int | None,
        repeats: int,
        seconds: float,
        device: str,
        dtype: str,
        seed: int,
        **_: object,
    ) -> None:
        self.shape, self.config = config, model_config(config)
        self.density = parse_share("density", f"{density:g}")
        self.repeats, self.seconds, self.seed = repeats, seconds, seed
        self.device, self.dtype = parse_place(device, dtype)
        compiled = sorted(mode == "compiled" for mode in parse_list("modes", modes, ("eager", "compiled")))
        kernels = _kernels(dense, chunk, self.device, self.dtype, self.config.head_dim)
        attentions = [(kernel, None) for kernel in kernels]
        attentions += [(None, found) for found in parse_selectors("selectors", selectors)]
        every = [
            Pass(mode, length, min(chunk or length, length), *attention)
            for mode, length, attention in itertools.product(compiled, parse_lengths(lengths), attentions)
        ]
        self.passes = [one for one in every if not one.keeps_all]
        if not self.passes:
            raise UsageError("there is nothing to measure: give dense kernels, or selectors that drop blocks")
        last = ((one.length - 1) % one.step + 1 for one in self.passes if one.config)
        if (shortest := min(last, default=MIN_QUERY_TOKENS)) < MIN_QUERY_TOKENS:
            raise UsageError(
                f"prompts and their last chunks must be at least {MIN_QUERY_TOKENS} tokens for selectors to run, got "
                f"{shortest}"
            )
        for length, name in dict.fromkeys((one.length, one.config.name) for one in every if one.keeps_all):
            note(f"{length} tokens: {name} keeps every block, so this is left out")


def _kernels(dense: str | None, chunk: int | None, device: torch.device, dtype: torch.dtype, dim: int) -> list[str]:
    """The dense kernels to measure."""
    if chunk is not None:
        if dense:
            raise UsageError("dense attention of a chunk needs a mask of its queries and all keys: leave out dense")
        return []
    sdpa = [kernel for kernel in DENSE_KERNELS[device.type] if kernel.startswith("sdpa")]
    there = [*sdpa, *backends_of(device, dtype, dim)[1:]]
    return parse_list("dense", dense, there) if dense else there if dense is None else []


def ttft_rows(plan: TtftPlan, ranks: Ranks, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows, uncompiled ones first; one with `error` where something ran out of memory, or did not run sparse,
    which `ran_sparse` then says. `ranks` is this process among those that share the model.
    """
    started = time.perf_counter()
    model = build_model(plan.config, plan.dtype, ranks, plan.seed)
    note(f"{plan.shape}: {model.num_parameters() / 1e9:.2f} G parameters in {time.perf_counter() - started:.1f} s")
    bench = _ModelBenchmark(plan, model, ranks)
    for one in plan.passes:
        try:
            yield bench.row(one)
        except torch.OutOfMemoryError as error:
            if ranks.world_size > 1:  # the others wait inside a pass for this one, until torchrun ends them
                raise UsageError(f"rank {ranks.rank}: out of memory at {one.length} tokens") from error
            yield {**bench.conditions(one), "error": "out of memory"}
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def kernels_of(probe: Tensor, block_size: int, *, offset_in_graph: bool) -> str:
    """The kernel that sparse prefill takes for queries like the probe, or that of the first chunk and of the others.

    Of a compiled model, with the prompt in chunks, those after the first compute their offset in the graph, which rules
    a kernel out.
    """
    offsets = [False, True] if offset_in_graph else [False]
    found = [resolve_backend("auto", probe, block_size, position_in_graph=offset) for offset in offsets]
    return ", then ".join(dict.fromkeys(found))


class _ModelBenchmark:
    def __init__(self, plan: TtftPlan, model: PreTrainedModel, ranks: Ranks) -> None:
        self.plan, self.model, self.ranks = plan, model, ranks
        self.cuda = ranks.device.type == "cuda"
        self.stand_in = functools.cache(lambda config: StandIn(config, plan.density, plan.seed, ranks.device))
        config = plan.config
        sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
        sizes |= {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        same = {"transformers": package_version("transformers"), "shape": plan.shape, **sizes}
        self._same = described("ttft", ranks.device, plan.dtype, **same, ranks=ranks.world_size, seed=plan.seed)

    def conditions(self, one: Pass) -> Row:
        """The fields of a row that are known before it is measured."""
        row = {**self._same, "kernel": one.kernel, "length": one.length, "chunk": one.chunk, "compiled": one.compiled}
        if one.config is None:
            return {**row, "selector": None, "settings": {}, "synthetic_density": None}
        probe = torch.empty(1, 1, 1, self._same["head_dim"], dtype=self.plan.dtype, device=self.ranks.device)
        offset = one.compiled and one.chunk is not None
        row |= {"selector": one.config.name, "settings": dataclasses.asdict(one.config)}
        row["backend"] = kernels_of(probe, one.config.block_size, offset_in_graph=offset)
        return row | {"synthetic_density": self.plan.density}

    def row(self, one: Pass) -> Row:
        """One row, see `ttft_rows`."""
        plan, row = self.plan, self.conditions(one)
        generator = torch.Generator().manual_seed(plan.seed)
        tokens = torch.randint(_FIRST_TOKEN, plan.config.vocab_size, (1, one.length), generator=generator)
        tokens = tokens.to(self.ranks.device)
        timer, stand_in = Timer(self.ranks.device), None if one.config is None else self.stand_in(one.config)
        with ExitStack() as stack:
            if one.kernel is not None:
                stack.enter_context(dense_prefill(self.model, one.kernel, one.compiled))
            else:
                stack.enter_context(enable_sparse_prefill(self.model, stand_in))
                if one.compiled:
                    stack.enter_context(compile_prefill(self.model))
            if not one.compiled:
                stack.enter_context(timed_attention(implementation(one.kernel) if one.kernel else NAME, timer))
            warm = self._pass(tokens, one.chunk)
            if self.ranks.least(int(warm < plan.seconds)):
                warm = self._pass(tokens, one.chunk)  # the first one may have compiled, or drawn blocks
            count = self.ranks.least(max(1, min(plan.repeats, int(plan.seconds / warm))))
            timer.take_ms()
            if stand_in is not None:
                stand_in.forget()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.ranks.device)
            passes, attending, selecting = [], [], []
            for _ in range(count):
                passes.append(1e3 * self._pass(tokens, one.chunk))
                attending.append(timer.take_ms())
                selecting.append(stand_in.selecting.take_ms() if stand_in is not None else 0.0)
        row |= {"repeats": count, **summarise(passes, "wall clock").fields("ttft_ms")}
        if self.cuda:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated(self.ranks.device) / 2**30, 2)
        if not one.compiled:
            row["attention_ms"] = round(statistics.median(attending), 3)
        if stand_in is None:
            return row
        row["density"] = round(stand_in.kept_density(), 5) if stand_in.calls else None
        row["select_ms"] = round(statistics.median(selecting), 3)
        expected = count * plan.config.num_hidden_layers * -(-one.length // one.step)
        if stand_in.calls != expected:
            row |= {"ran_sparse": False, "error": f"{stand_in.calls} of {expected} calls of attention ran sparse"}
        return row

    def _pass(self, tokens: Tensor, chunk: int | None) -> float:
        """Seconds to the first token."""
        options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        options |= {} if chunk is None else {"prefill_chunk_size": chunk}
        self.ranks.barrier()
        start = time.perf_counter()
        self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)  # pyright: ignore[reportCallIssue]
        if self.cuda:
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter() - start
