"""A plain model of paged attention: requests whose keys and values lie in scattered blocks of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {
    "selector": "streaming_llm",
    "sink": 0,
    "window": 128,
    "min_prefill_tokens": 128,
    "min_prompt_tokens": 256,
    "log_seconds": 0,
}
"""Settings under which a short step has long and short chunks."""
MIXED = [(1, 90), (260, 700), (1, 17), (300, 300), (40, 300), (200, 210)]  # rows 1 and 3 are long


@dataclass
class CommonAttentionMetadata:
    """The fields of vLLM 0.24's class of this name that the integration reads or replaces."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    logits_indices_padded: Tensor | None = None
    encoder_seq_lens: Tensor | None = None
    dcp_local_seq_lens: Tensor | None = None
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    mm_req_doc_ranges: dict[int, Any] | None = None
    _seq_lens_cpu: Tensor | None = None
    _num_computed_tokens_cpu: Tensor | None = None
    _num_computed_tokens_cache: Tensor | None = None


@dataclass
class PagedBatch:
    """A step: `requests` of (queries, keys), their keys and values in a cache whose other places hold NaN.

    Attributes:
        cache: `[blocks, 2, block_size, Hkv, D]` or, with kv_dim 0, `[2, blocks, block_size, Hkv, D]`, or, with None,
            `[blocks, Hkv, block_size, 2 * D]`.
        query: `[rows + padding, Hq, D]`.
        keys, values: of each request, `[Hkv, kv_len, D]`.
    """

    requests: list[tuple[int, int]]
    block_size: int = 16
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    kv_dim: int | None = 1
    padding: int = 0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    cache: Tensor = field(init=False)
    query: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)
    common: CommonAttentionMetadata = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        size = self.block_size
        counts = [-(-kv_len // size) for _, kv_len in self.requests]
        total = sum(counts) + 3
        order = torch.randperm(total, generator=generator)
        shape = (total, size, self.kv_heads, self.head_dim)
        pages = torch.full((2, *shape), float("nan"), dtype=self.dtype)
        table = torch.full((len(self.requests), max(counts) + 2), 10**6, dtype=torch.int32)  # behind the blocks: junk
        self.keys, self.values, slots, positions = [], [], [], []
        used = 0
        for request, (q_len, kv_len) in enumerate(self.requests):
            blocks = order[used : used + counts[request]]
            used += counts[request]
            table[request, : len(blocks)] = blocks.to(torch.int32)
            place = torch.arange(kv_len)
            slot = blocks[place // size] * size + place % size
            both = torch.randn(2, kv_len, self.kv_heads, self.head_dim, generator=generator).to(self.dtype)
            pages.flatten(1, 2)[:, slot] = both
            self.keys.append(both[0].transpose(0, 1))
            self.values.append(both[1].transpose(0, 1))
            slots.append(slot[kv_len - q_len :])
            positions.append(place[kv_len - q_len :])
        if self.kv_dim is None:
            self.cache = torch.cat(pages.unbind(), -1).transpose(1, 2).contiguous()
        else:
            self.cache = pages if self.kv_dim == 0 else pages.transpose(0, 1).contiguous()
        q_lens = [q_len for q_len, _ in self.requests]
        kv_lens = torch.tensor([kv_len for _, kv_len in self.requests], dtype=torch.int32)
        rows = sum(q_lens)
        self.query = torch.randn(rows + self.padding, self.heads, self.head_dim, generator=generator).to(self.dtype)
        start_loc = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.common = CommonAttentionMetadata(
            query_start_loc=start_loc,
            query_start_loc_cpu=start_loc.clone(),
            seq_lens=kv_lens,
            num_reqs=len(self.requests),
            num_actual_tokens=rows,
            max_query_len=max(q_lens),
            max_seq_len=int(kv_lens.max()),
            block_table_tensor=table,
            slot_mapping=torch.cat([*slots, torch.full((self.padding,), -1)]),
            positions=torch.cat(positions),
            is_prefilling=torch.tensor(q_lens) > 1,
            seq_lens_cpu_upper_bound=kv_lens.clone(),
        )

    def rows_of(self, request: int) -> slice:
        """Rows of a request's queries."""
        start = self.common.query_start_loc_cpu
        return slice(int(start[request]), int(start[request + 1]))

    def dense(self) -> Tensor:
        """Causal attention of every request, fp64 `[rows, Hq, D]`, from its own keys: no pages."""
        parts = []
        for request, (q_len, kv_len) in enumerate(self.requests):
            key, value = (x.double().repeat_interleave(self.heads // self.kv_heads, 0) for x in self._of(request))
            query = self.query[self.rows_of(request)].double().transpose(0, 1)
            hidden = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
            scores = (query @ key.mT * self.head_dim**-0.5).masked_fill(hidden, -torch.inf)
            parts.append((scores.softmax(-1) @ value).transpose(0, 1))
        return torch.cat(parts)

    def _of(self, request: int) -> tuple[Tensor, Tensor]:
        return self.keys[request], self.values[request]


def paged_attention(
    query: Tensor, cache: Tensor, common: CommonAttentionMetadata, block_size: int, kv_dim: int | None = 1
) -> Tensor:
    """What a dense paged kernel computes of a step's metadata alone, fp64 `[num_actual_tokens, Hq, D]`."""
    if kv_dim is None:
        keys, values = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
    else:
        keys, values = cache.unbind(kv_dim)
    out = []
    start = common.query_start_loc.tolist()
    for request in range(common.num_reqs):
        kv_len = int(common.seq_lens[request])
        place = torch.arange(kv_len)
        block = common.block_table_tensor[request, place // block_size].long()
        rows = query[start[request] : start[request + 1]].double().transpose(0, 1)  # [Hq, q, D]
        groups = query.shape[1] // keys.shape[2]
        key, value = (
            pages[block, place % block_size].double().transpose(0, 1).repeat_interleave(groups, 0)
            for pages in (keys, values)
        )
        hidden = torch.ones(rows.shape[1], kv_len, dtype=torch.bool).triu(kv_len - rows.shape[1] + 1)
        scores = (rows @ key.mT * query.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        out.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)
