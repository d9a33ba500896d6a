"""Time to first token of a model with random weights: `generate` of one token, with dense and with sparse prefill.

Random weights have no attention pattern. Each selector therefore runs in full, and attention is then over seeded random
blocks of a stated density (`bench.stand_in`); a selector whose budget bounds its choice may also attend over that
choice. Rows say which it was.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.laps import Laps
from bench.prefill_kernels import DensePrefill, implementation, timed_attention
from bench.shapes import FIRST_TOKEN, head_dim
from bench.stand_in import StandIn
from bench.timing import summarise
from bench.ttft_ranks import Ranks, build_model
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.integrations.hf_mask import MIN_QUERY_TOKENS
from flexprefill_fa.integrations.transformers import NAME, compile_prefill, enable_sparse_prefill
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row, environment, package_version

_COMPILING_TOKENS = 2048  # of a prompt that only serves to compile kernels


@dataclass(frozen=True)
class Attention:
    """What a row is about: a dense kernel, or a selector.

    Attributes:
        kernel: of `flexprefill_fa.dense.DENSE_KERNELS`, None for a selector.
        config: of the selector, None for a kernel.
        density: of the blocks that take the place of the selector's choice; None for its own choice.
    """

    kernel: str | None = None
    config: Any = None
    density: float | None = None

    def keeps_all(self, length: int) -> bool:
        """Whether a selector keeps every block of a prompt so short, which then runs dense."""
        return self.config is not None and length <= self.config.dense_tokens

    def fields(self) -> Row:
        """What tells its rows from others."""
        if self.config is None:
            return {"selector": None, "kernel": self.kernel, "settings": {}, "synthetic_density": None}
        return {
            "selector": self.config.name,
            "kernel": None,
            "settings": dataclasses.asdict(self.config),
            "synthetic_density": self.density,
        }


@dataclass(frozen=True)
class TtftPlan:
    """What to measure.

    Attributes:
        shape: name of the config.
        config: transformers config of the model.
        lengths: prompt lengths in tokens.
        attentions: what to measure at each length.
        modes: whether the model is compiled, for each that is measured; uncompiled first.
        chunk: tokens of the prompt at a time, transformers' prefill_chunk_size; None for the whole prompt.
        repeats: timed passes, fewer (at least one) where they would take longer than `seconds` together.
        once_from: prompts from which on a dense kernel gets one pass, uncompiled and without a warm-up, and a selector
            one warm-up instead of two.
        dtype, seed: of weights and prompts.
    """

    shape: str
    config: Any
    lengths: Sequence[int]
    attentions: Sequence[Attention]
    modes: Sequence[bool]
    chunk: int | None
    repeats: int
    seconds: float
    once_from: int
    dtype: torch.dtype
    seed: int

    def passes(self) -> Iterator[tuple[bool, int, Attention]]:
        """(compiled, length, attention) of each row, in the order of measuring."""
        for compiled, length, attention in itertools.product(self.modes, self.lengths, self.attentions):
            once = attention.kernel is not None and length >= self.once_from
            if not (compiled and once) and not attention.keeps_all(length):
                yield compiled, length, attention


def check_lengths(plan: TtftPlan) -> None:
    """Check that there is something to measure, and that every prompt and every chunk of one runs sparse.

    Raises:
        UsageError: for a plan without a pass, prompts or last chunks that are too short, or chunks that a selector
            keeps whole.
    """
    if not any(plan.passes()):
        raise UsageError(
            "there is nothing to measure: selectors keep every block of prompts so short, and dense kernels have no "
            "compiled pass of prompts so long"
        )
    shortest = min((length for _, length, attention in plan.passes() if attention.config), default=MIN_QUERY_TOKENS)
    if shortest < MIN_QUERY_TOKENS:
        raise UsageError(f"lengths must be at least {MIN_QUERY_TOKENS} tokens for selectors to run, got {shortest}")
    if plan.chunk is None:
        return
    least = max((attention.config.dense_tokens for attention in plan.attentions if attention.config), default=0)
    if plan.chunk <= least:
        raise UsageError(f"chunk must be above {least} tokens, of which a selector keeps every block, got {plan.chunk}")
    for length in plan.lengths:
        if plan.chunk < length and 0 < length % plan.chunk < MIN_QUERY_TOKENS:
            raise UsageError(
                f"the last chunk must hold at least {MIN_QUERY_TOKENS} tokens, got {length % plan.chunk} of {length}"
            )


def ttft_rows(plan: TtftPlan, ranks: Ranks, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows, uncompiled ones first; one with `error` where something ran out of memory, or did not run sparse,
    which `ran_sparse` then says.

    Args:
        plan: what to measure.
        ranks: this process among those that share the model.
        note: called with a line about what is being done.
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
    """The kernel that sparse prefill takes, or that of the first chunk and that of the others.

    Args:
        probe: a tensor of the queries' device, dtype and head_dim.
        block_size: of the selector.
        offset_in_graph: whether the model is compiled and the prompt in chunks: those after the first then compute
            their offset in the graph, which rules a kernel out.
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
        self._ran: set[tuple[Attention, bool]] = set()
        self._dense = DensePrefill(model)
        self._stand_ins: dict[Attention, StandIn] = {}
        self._same: Row = {
            "kind": "ttft",
            "device": ranks.device.type,
            **environment(ranks.device),
            "transformers": package_version("transformers"),
            "shape": plan.shape,
            "layers": plan.config.num_hidden_layers,
            "heads": plan.config.num_attention_heads,
            "kv_heads": plan.config.num_key_value_heads,
            "head_dim": head_dim(plan.config),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "ranks": ranks.world_size,
            "seed": plan.seed,
        }

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
        laps = Laps(self.ranks.device)
        stand_in = self._stand_in(attention)
        with ExitStack() as stack:
            stack.enter_context(self._installed(attention, stand_in, compiled))
            if not compiled:
                name = NAME if attention.kernel is None else implementation(attention.kernel)
                stack.enter_context(timed_attention(name, laps))
            if attention.kernel is not None and length >= plan.once_from:
                if (attention, compiled) not in self._ran:
                    self._pass(tokens[:, :_COMPILING_TOKENS])
                row["warm_up"] = False
                count = 1
            else:
                first = warm = self._pass(tokens)
                if length < plan.once_from and (stand_in is not None or (attention, compiled) not in self._ran):
                    warm = self._pass(tokens)  # the first one may have compiled, or drawn blocks
                row |= {"warm_up": True, "first_s": round(first, 3)}
                count = self.ranks.least(max(1, min(plan.repeats, int(plan.seconds / warm))))
            self._ran.add((attention, compiled))
            if stand_in is not None:
                stand_in.forget()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.ranks.device)
            passes, attending, selecting = [], [], []
            for _ in range(count):
                laps.forget()
                passes.append(1e3 * self._pass(tokens))
                attending.append(laps.total_ms())
                if stand_in is not None:
                    selecting.append(stand_in.selecting.total_ms())
                    stand_in.selecting.forget()
            row |= summarise(passes, "wall clock").fields("ttft_ms")
            row["repeats"] = count
            if self.cuda:
                row["peak_gib"] = round(torch.cuda.max_memory_allocated(self.ranks.device) / 2**30, 2)
            if not compiled:
                row["attention_ms"] = round(statistics.median(attending), 3)
        if stand_in is None:
            return row
        row |= {
            "density": round(stand_in.kept_density(), 5) if stand_in.calls else None,
            "select_ms": round(statistics.median(selecting), 3),
        }
        expected = count * plan.config.num_hidden_layers * -(-length // (row["chunk"] or length))
        if stand_in.calls != expected:
            row |= {"ran_sparse": False, "error": f"{stand_in.calls} of {expected} calls of attention ran sparse"}
        return row

    def _pass(self, tokens: Tensor) -> float:
        """Seconds to the first token."""
        chunk = self._chunk(tokens.shape[1])
        options = {} if chunk is None else {"prefill_chunk_size": chunk}
        self.ranks.barrier()
        start = time.perf_counter()
        self.model.generate(  # pyright: ignore[reportCallIssue]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        if self.cuda:
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter() - start

    def _stand_in(self, attention: Attention) -> StandIn | None:
        if attention.config is None:
            return None
        if attention not in self._stand_ins:
            made = StandIn(attention.config, attention.density, self.plan.seed, self.ranks.device)
            self._stand_ins[attention] = made
        return self._stand_ins[attention]

    @contextmanager
    def _installed(self, attention: Attention, stand_in: StandIn | None, compiled: bool) -> Iterator[None]:
        if attention.kernel is not None:
            with self._dense.installed(attention.kernel, compiled):
                yield
            return
        with (
            enable_sparse_prefill(self.model, stand_in),
            compile_prefill(self.model) if compiled else nullcontext(),
        ):
            yield
