"""Where nothing is compiled, or by another backend than TorchInductor, the kept blocks are computed all the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import graphs
from oracle_attention import masked_attention
from surroundings import CONFIG, check_call, check_calls, check_model
from torch.utils.flop_counter import FlopCounterMode
from workloads import structured_qk

from flexprefill_fa import FlashPrefillConfig, select_blocks, sparse_prefill_attention, uncompiled
from flexprefill_fa.dense import causal_attention
from flexprefill_fa.region import reads_block_lists
from flexprefill_fa.validation import CPU_MEAN_CORRECTION_TORCH, torch_version

HERE = Path(__file__).parent
CHECKS = {  # torch reads both in one line, so that one of them is followed everywhere
    "TORCH_COMPILE_DISABLE": "import surroundings; surroundings.check_calls(); surroundings.check_model()",
    "TORCHDYNAMO_DISABLE": "import surroundings; surroundings.check_call()",
}


@pytest.mark.parametrize("variable", CHECKS)
def test_switched_off_by_the_environment(variable: str) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, variable: "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CHECKS[variable]], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("torch.compile does not compile here") == 1, "said, and said once"


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_switched_off_by_a_stance(stance: str) -> None:
    torch._dynamo.reset()  # nothing compiled that the second stance could use
    with torch.compiler.set_stance(stance):
        check_calls()
        check_model()
    check_call()


def test_another_backend_in_place_of_ours() -> None:
    with torch.compiler.set_stance(force_backend="eager"):
        torch._dynamo.reset()
        check_calls()
    torch._dynamo.reset()
    check_call()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_graph_of_another_backend(backend: str) -> None:
    check_calls(torch.compile(sparse_prefill_attention, backend=backend, dynamic=True))
    check_model(lambda model: torch.compile(model, backend=backend))


def test_under_a_mode_that_sees_every_operator() -> None:
    """And compiled again behind it."""
    with FlopCounterMode(display=False):
        check_call()
        check_model()
    before = graphs()
    check_call(seed=1)
    check_call(seed=2)
    assert graphs() <= before + 1
    with torch.compiler.set_stance("fail_on_recompile"):
        check_call(seed=3)


@pytest.mark.parametrize(("backend", "expected"), [("inductor", True), ("eager", False), ("aot_eager", False)])
def test_what_compiles_a_trace_is_known(backend: str, expected: bool) -> None:
    def told(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if reads_block_lists() else x - 1

    assert (torch.compile(told, backend=backend, fullgraph=True)(torch.zeros(())) == 1) == expected


def test_a_failed_compilation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=True), monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", fails)
        with pytest.raises(RuntimeError, match="no compiler"):
            check_call()
    torch._dynamo.reset()


@pytest.mark.skipif(torch_version() < CPU_MEAN_CORRECTION_TORCH, reason="mean correction on the CPU needs torch 2.13")
def test_mean_correction_is_the_compiled_one() -> None:
    query, key = structured_qk(2, 4, 2, 700, 900, 32)
    value = torch.randn(key.shape)
    config = FlashPrefillConfig(alpha=0.9, sink_blocks=1, window_blocks=1, last_full_blocks=0)
    paddings: list[dict[str, Any]] = [{}, {"starts": [3, 0], "lengths": [890, 850]}]
    for padding in paddings:
        with torch.no_grad():
            compiled = sparse_prefill_attention(query, key, value, config, mean_correction=True, **padding)
            with torch.compiler.set_stance("force_eager"):
                plain = sparse_prefill_attention(query, key, value, config, mean_correction=True, **padding)
                without = sparse_prefill_attention(query, key, value, config, **padding)
        rows = slice(0, 650)  # the last ones of the second element are padding
        torch.testing.assert_close(plain[:, :, rows], compiled[:, :, rows], atol=1e-5, rtol=1e-5)
        assert (plain - without)[:, :, rows].abs().max() > 1e-3


def test_a_dropped_block_changes_the_output() -> None:
    query, key = structured_qk(1, 4, 2, 600, 600, 32)
    value = torch.randn(key.shape)
    selection = select_blocks(query, key, CONFIG)
    fewer = (selection.full_kv_num_blocks - 1).clamp(min=0)
    arguments: dict[str, Any] = {"block_size": 128, "scale": None, "mask_mod": None, "score_mod": None}
    lists = selection.lists
    whole = uncompiled.attend_uncompiled(query, key, value, lists, None, None, **arguments)
    lists = (lists[0], lists[1], fewer, lists[3])
    less = uncompiled.attend_uncompiled(query, key, value, lists, None, None, **arguments)
    changed = (whole - less).abs().amax(-1) > 1e-6
    had = selection.full_kv_num_blocks.repeat_interleave(128, -1)[..., :600] > 0
    assert torch.equal(changed, had)


def test_sinks_take_their_share() -> None:
    query, key = structured_qk(1, 2, 2, 300, 300, 32)
    value, sinks = torch.randn(key.shape), torch.tensor([0.5, 3.0])
    selection = select_blocks(query, key, CONFIG)
    out = uncompiled.attend_uncompiled(
        query, key, value, selection.lists, None, None, block_size=128, scale=None, mask_mod=None, score_mod=None,
        sinks=sinks,
    )  # fmt: skip
    scores = (query @ key.mT * 32**-0.5).masked_fill(~torch.ones(300, 300, dtype=torch.bool).tril(), -torch.inf)
    kept = selection.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :300, :300]
    scores = scores.masked_fill(~kept, -torch.inf)
    weights = torch.cat((scores, sinks[:, None, None].expand(1, 2, 300, 1)), -1).softmax(-1)[..., :300]
    torch.testing.assert_close(out, weights @ value, atol=1e-5, rtol=1e-5)


def test_dense_attention_stays_dense() -> None:
    query, key = structured_qk(2, 4, 2, 300, 300, 32)
    value = torch.randn(key.shape)
    exact = masked_attention(query, key, value, torch.ones(2, 4, 3, 3, dtype=torch.bool), 128)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(causal_attention(query, key, value, "CPU").double(), exact, atol=1e-5, rtol=1e-5)


def test_it_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncompiled, "_said", False)
    with torch.compiler.set_stance("force_eager"), caplog.at_level(logging.WARNING):
        check_call()
        check_call()
    assert [record.message for record in caplog.records] == [
        "torch.compile does not compile here: sparse attention runs in plain PyTorch, with the same result, slowly"
    ]
