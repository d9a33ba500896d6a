"""Time to first token of a model with random weights: `generate` of one token, with dense and with sparse prefill.

Random weights have no attention pattern. Each selector therefore runs in full, and attention is then over seeded random
blocks of a stated density (`bench.stand_in`); a selector whose budget bounds its choice may also attend over that
choice. Rows say which it was.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.planning import DENSE_KERNELS
from bench.prefill_kernels import dense_prefill, implementation, timed_attention
from bench.shapes import FIRST_TOKEN, model_config
from bench.spec import backends_of, parse_lengths, parse_list, parse_place, parse_selectors, parse_share
from bench.stand_in import StandIn
from bench.timing import Timer, described, summarise
from bench.ttft_ranks import Ranks, build_model
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.integrations.hf_mask import MIN_QUERY_TOKENS
from flexprefill_fa.integrations.transformers import NAME, compile_prefill, enable_sparse_prefill
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row, package_version


@dataclass(frozen=True)
class Attention:
    """What a row is about: a dense kernel, or a selector's config with the density of what takes its choice's place."""

    kernel: str | None = None
    config: Any = None
    density: float | None = None

    def keeps_all(self, length: int) -> bool:
        """Whether a selector keeps every block of a prompt so short, which then runs dense."""
        return self.config is not None and length <= self.config.dense_tokens

    def fields(self) -> Row:
        """What tells its rows from others."""
        name, settings = (self.config.name, dataclasses.asdict(self.config)) if self.config else (None, {})
        return {"selector": name, "kernel": self.kernel, "settings": settings, "synthetic_density": self.density}


@dataclass(frozen=True)
class TtftPlan:
    """What to measure: each of `attentions` at each length, in a model of random weights with the config of `shape`.

    `modes` say whether it is compiled, `chunk` how many tokens of the prompt come at a time, None for all. Timed are
    `repeats` passes, or fewer (at least one) where they would take longer than `seconds` together.
    """

    shape: str
    config: Any
    lengths: Sequence[int]
    attentions: Sequence[Attention]
    modes: Sequence[bool]
    chunk: int | None
    repeats: int
    seconds: float
    device: torch.device
    dtype: torch.dtype
    seed: int

    def passes(self) -> Iterator[tuple[bool, int, Attention]]:
        """(compiled, length, attention) of each row, in the order of measuring."""
        for compiled, length, attention in itertools.product(self.modes, self.lengths, self.attentions):
            if not attention.keeps_all(length):
                yield compiled, length, attention


def make_plan(**options: Any) -> TtftPlan:
    """The plan of a command's options by their names, checked before any work.

    Every prompt and every chunk of one is to run sparse.
    """
    given = SimpleNamespace(**options)
    config, chunk = model_config(given.config, given.layers), given.chunk
    share = parse_share("density", f"{given.density:g}")
    device, dtype = parse_place(given.device, given.dtype)
    modes = parse_list("modes", given.modes, ("eager", "compiled"))
    attentions = [Attention(kernel=name) for name in _kernels(given.dense, chunk, device, dtype, config.head_dim)]
    attentions += [Attention(config=found, density=share) for found in parse_selectors("selectors", given.selectors)]
    attentions += [Attention(config=found) for found in parse_selectors("own", given.own)]
    if not attentions:
        raise UsageError("there is nothing to measure: give selectors, own or dense")
    lengths, compiled = parse_lengths(given.lengths), sorted(mode == "compiled" for mode in modes)
    limits = (given.repeats, given.seconds)
    plan = TtftPlan(given.config, config, lengths, attentions, compiled, chunk, *limits, device, dtype, given.seed)
    if not any(plan.passes()):
        raise UsageError("there is nothing to measure: selectors keep every block of prompts so short")
    shortest = min((length for _, length, attention in plan.passes() if attention.config), default=MIN_QUERY_TOKENS)
    if shortest < MIN_QUERY_TOKENS:
        raise UsageError(f"lengths must be at least {MIN_QUERY_TOKENS} tokens for selectors to run, got {shortest}")
    if chunk is not None:
        least = max((attention.config.dense_tokens for attention in attentions if attention.config), default=0)
        if chunk <= least:
            raise UsageError(f"chunk must be above {least} tokens, of which a selector keeps every block, got {chunk}")
        for length in lengths:
            if chunk < length and 0 < (rest := length % chunk) < MIN_QUERY_TOKENS:
                raise UsageError(f"the last chunk must hold at least {MIN_QUERY_TOKENS} tokens, got {rest} of {length}")
    return plan


def _kernels(dense: str | None, chunk: int | None, device: torch.device, dtype: torch.dtype, dim: int) -> list[str]:
    """The dense kernels to measure."""
    if chunk is not None:
        if dense:
            raise UsageError("dense attention of a chunk needs a mask of its queries and all keys: leave out dense")
        return []
    sdpa = [kernel for kernel in DENSE_KERNELS[device.type] if kernel.startswith("sdpa")]
    there = [*sdpa, *backends_of(device, dtype, dim)[1:]]
    if dense is None:
        return there
    return parse_list("dense", dense, there) if dense else []


def ttft_rows(plan: TtftPlan, ranks: Ranks, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows, uncompiled ones first; one with `error` where something ran out of memory, or did not run sparse,
    which `ran_sparse` then says. `ranks` is this process among those that share the model.
    """
    started = time.perf_counter()
    model = build_model(plan.config, plan.dtype, ranks, plan.seed)
    for length, attention in itertools.product(plan.lengths, plan.attentions):
        if attention.keeps_all(length):
            note(f"{length} tokens: {attention.config.name} keeps every block, so this is left out")
    note(f"{plan.shape}: {model.num_parameters() / 1e9:.2f} G parameters in {time.perf_counter() - started:.1f} s")
    bench = _ModelBenchmark(plan, model, ranks)
    for compiled, length, attention in plan.passes():
        try:
            yield bench.row(attention, length, compiled)
        except torch.OutOfMemoryError as error:
            if ranks.world_size > 1:  # the others wait inside a pass for this one, until torchrun ends them
                raise UsageError(f"rank {ranks.rank}: out of memory at {length} tokens") from error
            yield {**bench.conditions(attention, length, compiled), "error": "out of memory"}
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
        self.plan = plan
        self.model = model
        self.ranks = ranks
        self.cuda = ranks.device.type == "cuda"
        self._stand_in = functools.cache(lambda one: StandIn(one.config, one.density, plan.seed, ranks.device))
        config = plan.config
        sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
        sizes |= {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        same = {"transformers": package_version("transformers"), "shape": plan.shape, **sizes}
        self._same = described("ttft", ranks.device, plan.dtype, **same, ranks=ranks.world_size, seed=plan.seed)

    def conditions(self, attention: Attention, length: int, compiled: bool) -> Row:
        """The fields of a row that are known before it is measured."""
        row = {**self._same, **attention.fields(), "length": length, "chunk": self._chunk(length), "compiled": compiled}
        if attention.config is not None:
            probe = torch.empty(1, 1, 1, self._same["head_dim"], dtype=self.plan.dtype, device=self.ranks.device)
            offset = compiled and row["chunk"] is not None
            row["backend"] = kernels_of(probe, attention.config.block_size, offset_in_graph=offset)
        return row

    def _chunk(self, length: int) -> int | None:
        """Tokens at a time, None for the whole prompt at once."""
        chunk = self.plan.chunk
        return chunk if chunk is not None and chunk < length else None

    def row(self, attention: Attention, length: int, compiled: bool) -> Row:
        """One row, see `ttft_rows`."""
        plan = self.plan
        row = self.conditions(attention, length, compiled)
        generator = torch.Generator().manual_seed(plan.seed)
        tokens = torch.randint(FIRST_TOKEN, plan.config.vocab_size, (1, length), generator=generator)
        tokens = tokens.to(self.ranks.device)
        timer, stand_in = Timer(self.ranks.device), None if attention.kernel else self._stand_in(attention)
        with ExitStack() as stack:
            if attention.kernel is not None:
                stack.enter_context(dense_prefill(self.model, attention.kernel, compiled))
            else:
                stack.enter_context(enable_sparse_prefill(self.model, stand_in))
                if compiled:
                    stack.enter_context(compile_prefill(self.model))
            if not compiled:
                name = NAME if attention.kernel is None else implementation(attention.kernel)
                stack.enter_context(timed_attention(name, timer))
            warm = self._pass(tokens)
            if self.ranks.least(int(warm < plan.seconds)):
                warm = self._pass(tokens)  # the first one may have compiled, or drawn blocks
            count = self.ranks.least(max(1, min(plan.repeats, int(plan.seconds / warm))))
            row["repeats"] = count
            timer.take_ms()
            if stand_in is not None:
                stand_in.forget()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.ranks.device)
            passes, attending, selecting = [], [], []
            for _ in range(count):
                passes.append(1e3 * self._pass(tokens))
                attending.append(timer.take_ms())
                selecting.append(stand_in.selecting.take_ms() if stand_in is not None else 0.0)
            row |= summarise(passes, "wall clock").fields("ttft_ms")
            if self.cuda:
                row["peak_gib"] = round(torch.cuda.max_memory_allocated(self.ranks.device) / 2**30, 2)
            if not compiled:
                row["attention_ms"] = round(statistics.median(attending), 3)
        if stand_in is None:
            return row
        row["density"] = round(stand_in.kept_density(), 5) if stand_in.calls else None
        row["select_ms"] = round(statistics.median(selecting), 3)
        expected = count * plan.config.num_hidden_layers * -(-length // (row["chunk"] or length))
        if stand_in.calls != expected:
            row |= {"ran_sparse": False, "error": f"{stand_in.calls} of {expected} calls of attention ran sparse"}
        return row

    def _pass(self, tokens: Tensor) -> float:
        """Seconds to the first token."""
        chunk = self._chunk(tokens.shape[1])
        options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        options |= {} if chunk is None else {"prefill_chunk_size": chunk}
        self.ranks.barrier()
        start = time.perf_counter()
        self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)  # pyright: ignore[reportCallIssue]
        if self.cuda:
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter() - start
