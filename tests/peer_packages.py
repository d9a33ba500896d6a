"""Stand-ins for public implementations, with the signatures of released ones, and runs of `bench peers`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.peers import PEERS

SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32", "--device", "cpu")
FAST = ("--repeats", "2", "--seconds", "0.1", "--backends", "CPU")
SELECTORS = (
    "flexprefill:gamma=0.5+tau=0.05+min_budget=200+max_budget=400",
    "flashprefill:sink_blocks=1+window_blocks=2+last_full_blocks=3+alpha=0.4",
)
FLEX_FILE, FLASH_FILE = "flex_prefill/ops/flex_prefill_attention.py", "ops/flashprefill_native_forward.py"
INFER_FILE = "flashinfer/sparse.py"

DENSE = """
import torch


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def over(kept, q, k, v):
    n = q.shape[1]
    mask = kept.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :n, :n].tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)
"""
FLEX = """
import torch

from .common import dense, over

print("flex_prefill is imported")


def get_active_blocks(q, k, v, block_size, gamma, min_budget, max_budget, tau=0, gqa_interleave=False):
    assert (gamma, tau, min_budget, max_budget, block_size) == (0.5, 0.05, 2, 4, 128) and not gqa_interleave


def triton_block_wise_attention(q, k, v, block_idx, block_size, grid_offset=0, softmax_scale=None, **rest):
    blocks = -(-q.shape[1] // block_size)
    kept = torch.zeros(len(block_idx), len(block_idx[0]), blocks * blocks, dtype=torch.bool)
    for b, element in enumerate(block_idx):
        for h, head in enumerate(element):
            kept[b, h, head] = True
    return over(kept.unflatten(-1, (blocks, blocks)), q, k, v)


def flex_prefill_attention(q, k, v, gamma, tau=0, min_budget=None, max_budget=None, gqa_interleave=False,
                           softmax_scale=None, block_size=128, return_computational_ratio=False):
    print("flex_prefill is called")
    assert (gamma, tau, min_budget, max_budget, block_size) == (0.5, 0.05, 200, 400, 128)
    assert q.shape[2:] == (4, 32) and k.shape[2:] == v.shape[2:] == (2, 32) and q.is_contiguous()
    blocks = -(-q.shape[1] // 128)
    ratio = 1 if blocks <= 2 else (blocks + 1) / (2 * blocks)
    out = dense(q, k, v)
    return (out, ratio) if return_computational_ratio else out
"""
FLASH = """
import torch

from .common import dense, over


class Kernel:
    def __getitem__(self, grid):
        assert grid({"Q_TILE_SIZE": 64}) == (8, 4, 1)
        return self.run

    def run(self, q, k, v, out, index, counts, scale, *strides, BLOCK_SIZE, D_HEAD):
        assert (BLOCK_SIZE, D_HEAD, scale) == (128, 32, 32**-0.5) and len(strides) == 27
        assert strides[:4] == q.stride() and strides[-4:] == (512, 512, 4, 2)
        taken = torch.arange(index.shape[2])[:, None] < counts[:, :, None]  # [B, M, N, H]
        kept = torch.zeros(*index.shape[:2], index.shape[2] + 1, index.shape[3], dtype=torch.bool)
        kept.scatter_(2, index.where(taken, index.shape[2]), True)
        out.copy_(over(kept[:, :, :-1].permute(0, 3, 1, 2), q, k, v))


_flash_forward = Kernel()


def flash_prefill(q, k, v, out, block_size, attention_sink, window_size, alpha, last_n_block_full, min_budget):
    assert (block_size, attention_sink, window_size, alpha, last_n_block_full) == (128, 1, 2, 0.4, 3)
    assert min_budget == 0 and q.shape[2:] == (4, 32) and k.shape[2:] == v.shape[2:] == (2, 32)
    out.copy_(dense(q, k, v))
"""
INFER = """
import torch


class VariableBlockSparseAttentionWrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8 and backend == "auto"

    def plan(self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
             sm_scale=None, q_data_type="float16", kv_data_type=None):
        assert (num_qo_heads, num_kv_heads, head_dim, causal) == (4, 2, 32, True)
        assert q_data_type == torch.float32 and kv_data_type is None and block_mask_map.dtype == torch.bool
        assert (*block_row_sz.shape, block_col_sz.shape[1]) == block_mask_map.shape and len(block_mask_map) == 2
        self.planned = block_mask_map, block_row_sz.long(), block_col_sz.long()

    def run(self, q, k, v):
        out = torch.full_like(q, float("nan"))
        for head in range(4):
            blocks, rows, columns = (part[head // 2] for part in self.planned)
            assert q.shape[1] == rows.sum() and k.shape[1] == v.shape[1] == columns.sum()
            for queries, into, chosen in zip(q[head].split(rows.tolist()), out[head].split(rows.tolist()), blocks):
                tokens = chosen.repeat_interleave(columns).nonzero().flatten()
                mask = torch.ones(len(queries), len(tokens), dtype=torch.bool).tril(len(tokens) - len(queries))
                keys, values = k[head // 2, tokens], v[head // 2, tokens]
                into[:] = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return out
"""
FLEX_PEER, FLASH_PEER = (PEERS[name] for name in ("flexprefill", "flashprefill"))


def write(folder: Path, **files: str) -> None:
    """The modules of stand-ins by the name of their function; each package's other files are always the same."""
    for name, file in (("flex", FLEX_FILE), ("flash", FLASH_FILE), ("infer", INFER_FILE)):
        if name in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(files[name])
            (folder / file).with_name("common.py").write_text(DENSE)
            for package in list((folder / file).parents)[: file.count("/")]:
                (package / "__init__.py").touch()


def make_package(root: Path) -> Path:
    """A folder that is both checkouts."""
    write(root, flex=FLEX, flash=FLASH)
    (root / "flex_prefill" / "__init__.py").write_text('__version__ = "1.2"\n')
    return root


def forget_peers() -> None:
    """The peers' modules and what they change, gone."""
    torch.set_default_dtype(torch.float32)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flex_prefill", "ops", "flashinfer")]:
        del sys.modules[name]


def run(out: Path, *arguments: str) -> Result:
    given = {"--lengths": "512", "--selectors": ",".join(SELECTORS)}
    options = [text for option, value in given.items() if option not in arguments for text in (option, value)]
    return CliRunner().invoke(app, ["peers", *SMALL, *FAST, *options, "--out", str(out), *arguments])


def both(folder: Path) -> tuple[str, ...]:
    return "--peer", f"flexprefill={folder}", "--peer", f"flashprefill={folder}"


def rows_of(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(this package's and dense rows, the peers' rows)."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [row for row in rows if row["path"] != "peer"], [row for row in rows if row["path"] == "peer"]
