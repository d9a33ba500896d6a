"""The SGLang backend: who is called with what, and what comes out.

Over stand-ins for SGLang, or over its own classes: see `sglang_engine.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import causal_oracle
from paged import MIXED, SMALL
from sglang_engine import (
    DIM,
    HEADS,
    Step,
    configuration,
    install,
    make_engine,
    make_runner,
    ours,
    sglang,
    sglang_in_place,
)

TOLERANCE = 2e-2  # of bfloat16 outputs of size 1


@pytest.fixture(autouse=True)
def engine_modules() -> Iterator[None]:
    with sglang_in_place():
        yield


def watch(backend: Any, layer: Any) -> list[Any]:
    """Every selection that a layer attends over."""
    state, found = backend.sparse_prefill.layers[layer], []
    attend = state.attend

    def attend_and_keep(*arguments: Any) -> Any:
        out, selection = attend(*arguments)
        found.append(selection)
        return out, selection

    state.attend = attend_and_keep
    return found


def kept_of(step: Step, request: int, selection: Any) -> torch.Tensor:
    """The fp64 oracle of a sparse request over the blocks that were selected for it, `[q, Hq * D]`."""
    rows = step.query[step.rows_of(request)].reshape(-1, HEADS, DIM)
    query, key, value = (x.transpose(0, 1)[None] for x in (rows, step.keys[request], step.values[request]))
    return causal_oracle(query, key, value, selection)[0][0].transpose(0, 1).flatten(1)


def off_by(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).abs().max())


def logged(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sglang.flexprefill_fa"]


@pytest.mark.parametrize(
    "requests", [MIXED, [(1, 90), (2, 5), (260, 700)], [(260, 700)], [(300, 300), (1, 9)], [(128, 520), (129, 700)]]
)
@pytest.mark.parametrize("padding", [0, 7])
def test_a_step(requests: list[tuple[int, int]], padding: int) -> None:
    """Long chunks are sparse, behind a cached prefix too, the rest dense; the pool gets what the model computed."""
    runner, backend = make_engine()
    step, layer = Step(runner, requests, padding=padding), runner.model.attention(1)
    attended = watch(backend, layer)
    out = step.run(backend, layer=1)
    sparse = [index for index, (q_len, kv_len) in enumerate(requests) if q_len >= 128 and kv_len >= 256]
    assert out.shape == step.query.shape and out.dtype == torch.bfloat16 and len(attended) == len(sparse)
    for request in range(len(requests)):
        rows, dense = step.rows_of(request), step.dense(request)
        if request in sparse:
            assert off_by(out[rows], kept_of(step, request, attended[sparse.index(request)])) < TOLERANCE
            assert off_by(out[rows], dense) > 5 * TOLERANCE, "sparse attention turned dense"
        else:
            assert off_by(out[rows], dense) < TOLERANCE
    assert not out[len(out) - padding :].any() if padding else not out.isnan().any()
    assert torch.equal(runner.token_to_kv_pool.get_key_buffer(1)[step.batch.out_cache_loc], step.key)
    assert runner.token_to_kv_pool.get_key_buffer(0)[step.batch.out_cache_loc[0]].isnan().all(), "another layer's"
    whole, rest = runner.parents
    assert not whole.served and len(rest.served) == (len(sparse) < len(requests))
    counted = ours("sglang").statistics()["layers.1.attn"]
    assert counted["chunks"] == len(sparse) and counted["queries"] == sum(requests[index][0] for index in sparse)
    assert 0 < counted["density"] < 0.95 and counted["failures"] == 0 and not counted["off"]
    assert counted["kept_blocks"] == sum(int(selection.kept_blocks().sum()) for selection in attended)


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED"])
def test_a_full_selection_is_dense_attention(mode: str) -> None:
    """At full selection the sparse path computes what the parent would; so nothing else is wrong with it."""
    runner, backend = make_engine(selector="streaming_llm", sink=128, window=1024)
    step = Step(runner, MIXED, mode=mode)
    out = step.run(backend)
    for request in range(len(MIXED)):
        assert off_by(out[step.rows_of(request)], step.dense(request)) < TOLERANCE
    counted = ours("sglang").statistics()["layers.0.attn"]
    assert counted["chunks"] == 2 and counted["density"] == 1.0 and not runner.parents[0].served


def test_the_default_selector_is_peakprefill() -> None:
    from flexprefill_fa import PeakPrefillConfig

    runner = make_runner()
    install(configuration(min_prompt_tokens=256, min_prefill_tokens=128))
    assert ours("sglang_engine").engine_settings_of(runner).selector == PeakPrefillConfig()


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_other_modes_are_the_parents(mode: str) -> None:
    runner, backend = make_engine()
    Step(runner, [(300, 700)]).run(backend)
    step = Step(runner, [(300, 700)], mode=mode)
    if mode == "TARGET_VERIFY":  # captured, where the plan of the step before must not count
        backend.planned.append(step.batch)
        backend.init_forward_metadata_out_graph(step.batch)
        step.run(backend, plan=False)
    else:
        step.run(backend)
    assert backend.sparse_prefill.step is None
    assert [batch is step.batch for _, batch, _, _ in runner.parents[0].served] == [True]


@pytest.mark.parametrize("requests", [[(127, 700)], [(200, 255)], [(1, 700), (100, 900)]])
def test_short_steps_are_the_parents(requests: list[tuple[int, int]]) -> None:
    runner, backend = make_engine()
    step = Step(runner, requests)
    out = step.run(backend)
    for request in range(len(requests)):
        assert off_by(out[step.rows_of(request)], step.dense(request)) < TOLERANCE
    assert len(runner.parents[0].served) == 1 and not runner.parents[1].planned


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"sliding_window_size": 64}, "a sliding window"),
        ({"logit_cap": 30.0}, "capped scores"),
        ({"is_cross_attention": True}, "attention that is not causal"),
        ({"use_irope": True}, "attention to chunks"),
        ({"pos_encoding_mode": "ALIBI"}, "positions in its scores"),
        ({"v_head_dim": 16}, "head dims of 32 for keys and 16 for values"),
    ],
)
def test_other_layers_are_the_parents(change: dict[str, Any], kind: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    runner, backend = make_engine([{}, change])
    assert [layer.layer_id for layer in backend.sparse_prefill.layers] == [0]
    assert f"sparse prefill: layers with {kind} are served by planned alone" in logged(caplog)
    assert any(
        "1 of 2 layers run long prefill chunks sparse, planned the rest: streaming_llm" in line
        for line in logged(caplog)
    )
    step = Step(runner, MIXED)
    backend.init_forward_metadata(step.batch)
    if "v_head_dim" not in change:
        step.run(backend, layer=1, plan=False)
        assert [(layer, batch is step.batch) for layer, batch, _, _ in runner.parents[0].served] == [(1, True)]


@pytest.mark.parametrize("kind", ["ENCODER_ONLY", "DECODER_BIDIRECTIONAL"])
def test_layers_that_are_not_causal(kind: str) -> None:
    attn_type = sglang("layers.radix_attention").AttentionType[kind]
    _, backend = make_engine([{"attn_type": attn_type}, {}])
    assert [layer.layer_id for layer in backend.sparse_prefill.layers] == [1]


@pytest.mark.parametrize("extra", [{"sinks": torch.zeros(HEADS)}, {"score_mod": len}, {"return_lse": True}])
def test_what_a_layer_is_called_with(extra: dict[str, Any]) -> None:
    """Sinks and the like come with the call; None and False ask for nothing."""
    runner, backend = make_engine()
    step = Step(runner, MIXED)
    nothing: dict[str, Any] = dict.fromkeys(extra)
    step.run(backend, **nothing)
    assert not runner.parents[0].served
    step.run(backend, plan=False, **extra)
    (call,) = runner.parents[0].served
    assert call[1] is step.batch and call[3] == extra


def test_a_layer_whose_keys_are_in_the_pool_already() -> None:
    """Models that fuse the writing, or read another layer's keys: nothing is written a second time."""
    runner, backend = make_engine()
    step = Step(runner, [(260, 700), (1, 20)])
    first = step.run(backend)
    pool = runner.token_to_kv_pool
    for key, value in ((None, None), (step.key * float("nan"), step.value)):
        step.key, step.value = key, value
        assert torch.equal(step.run(backend, save_kv_cache=False), first)
    assert not pool.get_key_buffer(0)[step.batch.out_cache_loc].isnan().any()
    assert {save for _, _, save, _ in runner.parents[1].served} == {False}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"encoder_lens": torch.ones(6)}, "the tokens of an encoder"),
        ({"cross_attention_custom_mask": torch.ones(6)}, "a mask of its own"),
        ({"multi_item_delimiter_indices": [torch.ones(1)]}, "several items in a prompt"),
        ({"attn_dcp_metadata": object()}, "context parallelism"),
        ({"extend_seq_lens_cpu": None}, "lengths that only the GPU knows"),
        ({"mha_return_lse": True}, "wanted log-sum-exps"),
    ],
)
def test_steps_that_are_more_than_causal_attention(changes: dict[str, Any], kind: str, caplog) -> None:
    runner, backend = make_engine()
    step = Step(runner, MIXED)
    for name, value in changes.items():
        setattr(step.batch, name, value)
    step.run(backend)
    step.run(backend)
    assert len(runner.parents[0].served) == 2 and not runner.parents[1].planned
    assert logged(caplog) == [f"sparse prefill: steps with {kind} are served by planned alone"]


@pytest.mark.parametrize(
    ("name", "kind"), [("custom_mask", "a mask of its own"), ("image_token_ranges", "a mask of images")]
)
def test_masks_that_the_parent_makes(name: str, kind: str, caplog) -> None:
    runner, backend = make_engine()
    step = Step(runner, MIXED)
    backend.init_forward_metadata(step.batch)
    assert backend.sparse_prefill.step is not None
    setattr(backend.forward_metadata, name, torch.ones(1))
    backend.sparse_prefill.plan(step.batch, backend.forward_metadata)
    assert backend.sparse_prefill.step is None
    assert logged(caplog) == [f"sparse prefill: steps with {kind} are served by planned alone"]


def test_sglang_may_write_over_its_table_once_a_step_is_planned() -> None:
    """The scheduler prepares the next step while this one runs."""
    runner, backend = make_engine()
    step = Step(runner, MIXED)
    expected = step.run(backend)
    backend.init_forward_metadata(step.batch)
    runner.req_to_token_pool.req_to_token.fill_(0)
    assert torch.equal(step.run(backend, plan=False), expected)


def test_everything_else_of_the_parent_stays() -> None:
    runner, backend = make_engine()
    parent = sglang("layers.attention.attention_registry").ATTENTION_BACKENDS["planned"]
    assert isinstance(backend, parent) and backend is runner.parents[0] and type(backend) is not parent
    assert isinstance(backend, sglang("layers.attention.base_attn_backend").AttentionBackend)
    assert type(backend).__name__ == "SparsePrefillPlannedBackend"
    assert not hasattr(runner.parents[1], "sparse_prefill")


def test_a_failure_costs_no_request(caplog) -> None:
    """Whatever goes wrong in sparse attention, the parent serves the step, and it is said and counted."""
    runner, backend = make_engine()
    step, layer = Step(runner, MIXED), runner.model.attention(0)
    state, calls = backend.sparse_prefill.layers[layer], []
    attend = state.attend

    def fails_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return attend(*arguments)

    state.attend = fails_late
    out = step.run(backend)
    for request in range(len(MIXED)):
        assert off_by(out[step.rows_of(request)], step.dense(request)) < TOLERANCE
    counted = ours("sglang").statistics()["layers.0.attn"]
    assert (counted["failures"], counted["chunks"], counted["density"]) == (2, 0, None), "each chunk is counted once"
    assert "sparse prefill failed for chunks of (queries, keys) [(260, 700), (300, 300)]" in logged(caplog)[-1]


def test_lasting_failures_switch_a_layer_off(caplog) -> None:
    runner, backend = make_engine()
    step, layer = Step(runner, [(300, 700)]), runner.model.attention(0)
    state, tried = backend.sparse_prefill.layers[layer], []
    attend = state.attend

    def fails(*arguments: Any) -> Any:
        tried.append(arguments)
        raise RuntimeError("broken")

    for good in (False, False, True, False, False, False, False):
        state.attend = attend if good else fails
        step.run(backend)
    assert len(tried) == 5 and ours("sglang").statistics()["layers.0.attn"]["off"]
    assert "sparse prefill of layers.0.attn is off until the engine ends: 3 steps failed in a row" in logged(caplog)
    step.run(backend, layer=1)
    assert ours("sglang").statistics()["layers.1.attn"]["chunks"] == 1, "one broken layer leaves the others sparse"
    backend.sparse_prefill.layers[runner.model.attention(1)].sparse_off = True
    planned = len(runner.parents[1].planned)
    assert off_by(step.run(backend), step.dense(0)) < TOLERANCE
    assert len(runner.parents[1].planned) == planned, "nothing is planned for nobody"


def test_a_step_that_cannot_be_split_is_the_parents(caplog, monkeypatch) -> None:
    runner, backend = make_engine()

    def fails(*arguments: Any) -> Any:
        raise AttributeError("no such field")

    monkeypatch.setattr(ours("sglang_prefill"), "split_step", fails)
    step = Step(runner, MIXED)
    for _ in range(5):
        assert off_by(step.run(backend)[step.rows_of(1)], step.dense(1)) < TOLERANCE
    assert [line[:44] for line in logged(caplog)] == [
        *["sparse prefill failed to split a step; plann"] * 3,
        "sparse prefill is off until the engine ends:",
    ]


def test_declined_chunks_are_counted() -> None:
    runner, backend = make_engine(min_prefill_tokens=512)
    Step(runner, [(500, 700), (1, 700), (200, 210)]).run(backend)
    assert backend.sparse_prefill.step is None
    Step(runner, [(512, 700), (300, 400)]).run(backend)
    assert ours("sglang").statistics()["layers.0.attn"]["declined"] == 2


def test_the_density_is_logged_by_later_steps(caplog) -> None:
    caplog.set_level(logging.INFO)
    runner, backend = make_engine(log_seconds=60)
    Step(runner, [(300, 300)]).run(backend)
    for _ in range(3):
        Step(runner, [(5, 300)]).run(backend)
    assert len([line for line in logged(caplog) if "sparse prefill so far: 1 chunks of 300 tokens" in line]) == 1


def test_what_compiles_and_is_taken_before_the_first_request(caplog) -> None:
    """The longest chunk of the engine, over its longest prompt, once for all layers of a shape."""
    caplog.set_level(logging.INFO)
    _, backend = make_engine(**SMALL)
    (buffer,) = backend.sparse_prefill._buffers.values()
    assert buffer.room(1, 2, torch.empty(1, DIM))[0].shape[0] == 1024
    assert any(line.startswith("sparse prefill: compiled and ran 4 chunks in") for line in logged(caplog))
    assert ours("sglang").statistics()["layers.0.attn"]["chunks"] == 0, "it is not counted"
