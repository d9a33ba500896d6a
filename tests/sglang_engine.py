"""An engine of SGLang on the CPU, as far as attention goes: pools, layers, a parent backend, and steps for them.

The classes are SGLang's own where SGLANG_IN_PLACE names a folder with its files (see `test_sglang_files.py`), else the
stand-ins of `sglang_stubs`. The configuration is always a stand-in.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang_files
import sglang_stubs
import torch
from paged import SMALL
from stand_in_modules import PACKAGE, stand_in_modules
from torch import Tensor

FOLDER = os.environ.get("SGLANG_IN_PLACE", "")
HEADS, KV_HEADS, DIM, LAYERS, CONTEXT = 4, 2, 32, 2, 1024
_OURS = ("sglang_backend", "sglang_engine", "sglang_prefill")


def sglang(module: str) -> Any:
    """A module of SGLang's, as far as it is in place."""
    return importlib.import_module(f"sglang.srt.{module}")


def ours(module: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{module}")


@contextmanager
def sglang_in_place() -> Iterator[None]:
    """SGLang's files for the rest of the process, or stand-ins for as long as the context lasts."""
    if FOLDER:
        if "sglang" not in sys.modules:
            sglang_files.put_in_place(Path(FOLDER))
        registry = sglang("layers.attention.attention_registry").ATTENTION_BACKENDS
        choices, before = sglang("arg_groups.choices").ATTENTION_BACKEND_CHOICES, dict(registry)
        names = list(choices)
        try:
            yield
        finally:
            registry.clear()
            registry.update(before)
            choices[:] = names
            ours("sglang_backend").backends.clear()
        return
    try:
        with stand_in_modules(sglang_stubs.contents(), _OURS):
            yield
    finally:
        ours("sglang")._answer_in_server_info.cache_clear()


def parent_class() -> Any:
    """A dense backend that, as SGLang's, plans a step and serves that step alone, from copies of what it needs."""

    class PlannedBackend(sglang("layers.attention.base_attn_backend").AttentionBackend):
        def __init__(self, runner: Any) -> None:
            super().__init__()
            self.runner, self.served, self.planned = runner, [], []
            runner.parents.append(self)

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.planned.append(forward_batch)
            lengths = forward_batch.extend_seq_lens
            self.forward_metadata = types.SimpleNamespace(
                rows=forward_batch.extend_start_loc.tolist(),
                lengths=None if lengths is None else lengths.tolist(),
                kv_lens=forward_batch.seq_lens.tolist(),
                table=self.runner.req_to_token_pool.req_to_token[forward_batch.req_pool_indices],
                tokens=forward_batch.extend_num_tokens,
            )

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **extra: Any
        ) -> Any:
            assert forward_batch is self.planned[-1], "SGLang's backends serve the step that they planned last"
            self.served.append((layer.layer_id, forward_batch, save_kv_cache, extra))
            pool, plan = self.runner.token_to_kv_pool, self.forward_metadata
            if save_kv_cache and k is not None:
                write = sglang("mem_cache.memory_pool").KVWriteLoc(forward_batch.out_cache_loc)
                pool.set_kv_buffer(layer, write, k, v)
            query = q.reshape(len(q), layer.tp_q_head_num, layer.head_dim)
            out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
            for start, length, kv_len, table in zip(plan.rows, plan.lengths, plan.kv_lens, plan.table, strict=True):
                slots = table[:kv_len].long()
                keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
                rows = slice(start, start + length)
                out[rows] = attention(query[rows], keys[slots], values[slots], layer.scaling).to(out.dtype)
            return out.view(len(out), -1)

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
        ) -> Any:
            self.served.append((layer.layer_id, forward_batch, save_kv_cache, {}))
            return q

    return PlannedBackend


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention in fp64: query `[q, Hq, D]`, the last of keys `[kv, Hkv, D]`."""
    groups = query.shape[1] // keys.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, keys, values))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    return ((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


class Model(torch.nn.Module):
    """Attention layers under the names that models give them."""

    def __init__(self, changes: list[dict[str, Any]]) -> None:
        super().__init__()
        kind = sglang("layers.radix_attention").RadixAttention
        layers = [kind(HEADS, DIM, DIM**-0.5, KV_HEADS, index, **change) for index, change in enumerate(changes)]
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"attn": layer}) for layer in layers)

    def attention(self, index: int) -> Any:
        return self.layers[index]["attn"]  # pyright: ignore[reportIndexIssue]


def configuration(**settings: Any) -> types.SimpleNamespace:
    """What SGLang's `runtime_context` says of an engine, by group."""
    space, text = types.SimpleNamespace, json.dumps({"sparse_prefill": settings})
    return space(
        execution=space(
            kernel=space(attention_backend="planned"),
            dllm=space(dllm_algorithm=None),
            graph=space(cuda_graph_config=space(prefill=space(backend="breakable"))),
            overlap=space(enable_two_batch_overlap=False),
            deterministic=space(enable_deterministic_inference=False),
        ),
        backends=["flexprefill", "fa3"],
        disagg=space(enable_pdmux=False),
        model=space(json_model_override_args=text if settings else "{}"),
        parallel=space(attn_cp_size=1, attn_dcp_size=1),
        schedule=space(chunked_prefill_size=512, max_prefill_tokens=16384),
        spec=space(speculative_draft_attention_backend=None, speculative_attention_mode="prefill"),
    )


def install(config: types.SimpleNamespace) -> None:
    """Have our modules read that configuration."""
    engine = ours("sglang_engine")
    engine.attention_backends = lambda: tuple(config.backends)
    names = {"get_exec": "execution"}
    for name in ("get_exec", "get_disagg", "get_model", "get_parallel", "get_schedule", "get_spec"):
        part = getattr(config, names.get(name, name.removeprefix("get_")))
        setattr(engine, name, lambda part=part: part)


class Runner(types.SimpleNamespace):
    """A class, so that there are weak references to it."""


def make_runner(changes: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
    """A `ModelRunner` with real pools; `changes` are arguments of each layer."""
    memory, no = sglang("mem_cache.memory_pool"), lambda: False
    changes = [{}] * LAYERS if changes is None else changes
    runner = Runner(
        device="cuda",
        is_draft_worker=False,
        use_mla_backend=False,
        enable_hisparse=False,
        kv_index_translator=types.SimpleNamespace(is_translating=False),
        spec_algorithm=types.SimpleNamespace(is_eagle=no, is_standalone=no),
        model_config=types.SimpleNamespace(
            is_encoder_decoder=False,
            context_len=CONTEXT,
            hf_config=types.SimpleNamespace(architectures=["LlamaForCausalLM"]),
        ),
        dtype=torch.bfloat16,
        model=Model(changes),
        req_to_token_pool=memory.ReqToTokenPool(16, CONTEXT, "cpu", False),
        token_to_kv_pool=memory.MHATokenToKVPool(4096, 1, torch.bfloat16, KV_HEADS, DIM, len(changes), "cpu", False),
        parents=[],
    )
    vars(runner).update(fields)
    return runner


def make_engine(changes: list[dict[str, Any]] | None = None, **settings: Any) -> tuple[Any, Any]:
    """A runner and its backend."""
    sglang("layers.attention.attention_registry").ATTENTION_BACKENDS["planned"] = parent_class()
    runner = make_runner(changes)
    install(configuration(**{**SMALL, **settings}))
    return runner, ours("sglang").create(runner)


@dataclass
class Step:
    """A step of `requests` (queries, keys) whose cached keys and values are in scattered slots of the pools.

    Attributes:
        batch: SGLang's `ForwardBatch`.
        query: `[rows + padding, Hq * D]`, parts of wider rows as a model has them.
        key, value: of the new tokens, `[rows + padding, Hkv, D]`; layers have the same ones.
        keys, values: of each request, `[kv_len, Hkv, D]`.
    """

    runner: Any
    requests: list[tuple[int, int]]
    mode: str = "MIXED"
    padding: int = 0
    seed: int = 0
    batch: Any = field(init=False)
    query: Tensor = field(init=False)
    key: Any = field(init=False)
    value: Any = field(init=False)
    keys: list[Tensor] = field(init=False, default_factory=list)
    values: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        info = sglang("model_executor.forward_batch_info")
        generator = torch.Generator().manual_seed(self.seed)
        pool, table = self.runner.token_to_kv_pool, self.runner.req_to_token_pool.req_to_token
        count, rows = len(self.requests), sum(q_len for q_len, _ in self.requests)
        where = torch.randperm(table.shape[0] - 1, generator=generator)[:count] + 1
        order = torch.randperm(pool.get_key_buffer(0).shape[0] - 1, generator=generator) + 1
        for layer in range(len(self.runner.model.layers)):
            pool.get_key_buffer(layer).fill_(float("nan"))
            pool.get_value_buffer(layer).fill_(float("nan"))
        table.fill_(0)
        new, used = [], 0
        for request, (q_len, kv_len) in enumerate(self.requests):
            slots = order[used : used + kv_len]
            used += kv_len
            table[where[request], :kv_len] = slots.to(torch.int32)
            both = torch.randn(2, kv_len, KV_HEADS, DIM, generator=generator).to(torch.bfloat16)
            self.keys.append(both[0])
            self.values.append(both[1])
            cached = kv_len - q_len
            for layer in range(len(self.runner.model.layers)):
                pool.get_key_buffer(layer)[slots[:cached]] = both[0, :cached]
                pool.get_value_buffer(layer)[slots[:cached]] = both[1, :cached]
            new.append(slots[cached:])
        tail = torch.zeros(self.padding, KV_HEADS, DIM, dtype=torch.bfloat16)
        pairs = list(zip(self.requests, range(count), strict=True))
        self.key = torch.cat([*(self.keys[i][kv - q :] for (q, kv), i in pairs), tail])
        self.value = torch.cat([*(self.values[i][kv - q :] for (q, kv), i in pairs), tail])
        wide = torch.randn(rows + self.padding, (HEADS + 2 * KV_HEADS) * DIM, generator=generator).to(torch.bfloat16)
        self.query = wide[:, : HEADS * DIM]
        q_lens, kv_lens = (torch.tensor(part) for part in zip(*self.requests, strict=True))
        prefixes = kv_lens - q_lens
        self.batch = info.ForwardBatch(
            forward_mode=info.ForwardMode[self.mode],
            batch_size=count,
            input_ids=torch.arange(rows),
            req_pool_indices=where,
            seq_lens=kv_lens,
            out_cache_loc=torch.cat([*new, torch.zeros(self.padding, dtype=torch.int64)]),
            seq_lens_sum=int(kv_lens.sum()),
            seq_lens_cpu=kv_lens.clone(),
            positions=torch.cat([torch.arange(kv - q, kv) for q, kv in self.requests]),
            extend_num_tokens=rows,
            extend_seq_lens=q_lens.to(torch.int32),
            extend_prefix_lens=prefixes.to(torch.int32),
            extend_start_loc=(q_lens.cumsum(0) - q_lens).to(torch.int32),
            extend_prefix_lens_cpu=prefixes.tolist(),
            extend_seq_lens_cpu=q_lens.tolist(),
            extend_logprob_start_lens_cpu=[0] * count,
        )

    def rows_of(self, request: int) -> slice:
        start = sum(q_len for q_len, _ in self.requests[:request])
        return slice(start, start + self.requests[request][0])

    def dense(self, request: int) -> Tensor:
        """Of a request, fp64 `[q, Hq * D]`, from its own keys: no pool."""
        rows = self.query[self.rows_of(request)].reshape(-1, HEADS, DIM)
        return attention(rows, self.keys[request], self.values[request], DIM**-0.5).flatten(1)

    def run(self, backend: Any, layer: int = 0, plan: bool = True, **options: Any) -> Tensor:
        """As SGLang runs a layer of it."""
        if plan:
            backend.init_forward_metadata(self.batch)
        module = self.runner.model.attention(layer)
        return backend.forward(self.query, self.key, self.value, module, self.batch, **options)
