"""Sparse prefill is a matter of one model's modules: whatever shares, holds or copies them ends as it began."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from typing import Any, cast

import pytest
import torch
from hf_models import prompt, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.compat import patch_model
from flexprefill_fa.integrations.transformers import (
    NAME,
    SparsePrefill,
    collect_statistics,
    compile_prefill,
    describe_sparse_prefill,
    enable_sparse_prefill,
)

SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def run(model: Any, length: int = 400) -> Tensor:
    return (
        model(prompt(1, length)).last_hidden_state if not hasattr(model, "lm_head") else model(prompt(1, length)).logits
    )


def is_sparse(model: Any, dense: Tensor) -> bool:
    """By what it computes, which is either dense exactly or far from it."""
    difference = (run(model) - dense).abs().max()
    assert difference == 0 or difference > 0.01
    return bool(difference > 0)


def state(model: PreTrainedModel) -> list[Any]:
    """Which config objects the modules hold, what those say, and what else the modules carry."""
    held = [
        (id(module.config), cast(Any, module.config)._attn_implementation)
        for module in model.modules()
        if "config" in vars(module)
    ]
    return [held, [sorted(vars(module)) for module in model.modules()]]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def dense(llama: PreTrainedModel) -> Tensor:
    return run(llama)


@pytest.mark.parametrize("first_off", [0, 1])
def test_two_models_that_share_a_config(llama: PreTrainedModel, dense: Tensor, first_off: int) -> None:
    other = LlamaForCausalLM(cast(Any, llama.config)).eval()
    other.load_state_dict(llama.state_dict())
    models = (llama, other)
    before = [state(model) for model in models]
    handles = [enable_sparse_prefill(llama, SPARSE)]
    assert [is_sparse(model, dense) for model in models] == [True, False]
    assert other.config._attn_implementation == "sdpa"
    handles.append(enable_sparse_prefill(other, SPARSE))
    assert [is_sparse(model, dense) for model in models] == [True, True]
    handles[first_off].disable()
    assert [is_sparse(model, dense) for model in models] == [first_off == 1, first_off == 0]
    handles[1 - first_off].disable()
    assert [state(model) for model in models] == before
    assert other.config is llama.config


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_model_and_the_model_inside_it(llama: PreTrainedModel, dense: Tensor, order: tuple[int, ...]) -> None:
    """Any order of on and off: sparse until the last handle is off, then as before."""
    before = state(llama)
    for inside in itertools.product([False, True], repeat=3):
        handles = [enable_sparse_prefill(llama.model if inner else llama, SPARSE) for inner in inside]
        assert SparsePrefill.all_of(llama) == handles
        for index in order[:-1]:
            handles[index].disable()
            assert llama.model.config._attn_implementation == NAME
            plans = {id(layer.self_attn._sparse_prefill_plan) for layer in llama.model.layers}
            latest = max(set(range(3)) - set(order[: order.index(index) + 1]))
            assert plans == {id(plan) for plan in handles[latest]._plans.values()}
        if inside[0] and not any(inside[1:]):
            assert is_sparse(llama, dense)
        handles[order[-1]].disable()
        assert state(llama) == before
    assert not is_sparse(llama, dense)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
def test_a_copy_is_what_the_model_was_before(llama: PreTrainedModel, dense: Tensor, make: Any) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        clone = make(llama)
        assert is_sparse(llama, dense) and not is_sparse(clone, dense)
        assert clone.config._attn_implementation == "sdpa" and type(clone.config) is type(clone.model.config)
        assert clone.config is clone.model.config
        with pytest.raises(ValueError, match="call enable_sparse_prefill"):
            collect_statistics(clone)
        with enable_sparse_prefill(clone, SPARSE):
            assert is_sparse(clone, dense)
        assert not is_sparse(clone, dense)
    assert not is_sparse(llama, dense)
    assert state(clone)[0][0][0] != state(llama)[0][0][0]


def test_a_copy_of_a_model_that_is_sparse_by_name(dense: Tensor) -> None:
    model = tiny_model("llama", attn_implementation=NAME)
    with enable_sparse_prefill(model, SPARSE):
        clone = copy.deepcopy(model)
    torch.testing.assert_close(run(clone), dense, **CLOSE)  # the default settings keep all of a short prompt
    patch_model(clone, "default")
    torch.testing.assert_close(run(clone), dense, **CLOSE)
    assert clone.config._attn_implementation == NAME


def test_a_shallow_copy_shares_its_layers_and_ends_with_them(llama: PreTrainedModel, dense: Tensor) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        other = copy.copy(llama)
        kept = llama.config
        assert is_sparse(other, dense)
    assert not is_sparse(other, dense)
    assert other.config._attn_implementation == kept._attn_implementation == "sdpa"


def test_a_pickle_is_read_without_this_package(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        data = pickle.dumps(llama)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flexprefill_fa"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert pickle.loads(data).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", [LlamaForCausalLM, AutoModelForCausalLM.from_config])
def test_a_model_made_from_a_sparse_models_config_is_dense_in_the_end(make: Any) -> None:
    """It is so by name until then, for that is what it was asked for."""
    model = tiny_model("llama")
    before = state(model)
    handle = enable_sparse_prefill(model, SPARSE)
    made = make(model.config).eval()
    assert made.config._attn_implementation == NAME
    own = enable_sparse_prefill(made, SPARSE)
    handle.disable()
    assert made.config._attn_implementation == NAME and state(model) == before
    own.disable()
    assert made.config._attn_implementation == "sdpa" and state(model) == before


def test_what_is_set_on_a_sparse_models_config_stays(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    before = model.config
    with enable_sparse_prefill(model, SPARSE):
        model.config.use_cache = False
        model.resize_token_embeddings(160)
        assert model.config == model.model.config and "LlamaConfig" in repr(model.config)
        assert model.config.to_diff_dict() == before.to_diff_dict()
        model.half()
    assert model.config is before
    assert before.use_cache is False and before.vocab_size == 160 and before._attn_implementation == "sdpa"


def test_an_implementation_set_by_hand_holds_until_the_end(llama: PreTrainedModel, dense: Tensor) -> None:
    before = state(llama)
    outer = enable_sparse_prefill(llama, SPARSE)
    llama.set_attn_implementation("eager")
    torch.testing.assert_close(run(llama), dense, **CLOSE)
    told = [(layer.runs, layer.why) for layer in describe_sparse_prefill(llama)]
    assert told == [("dense", "its attention was set to 'eager' since")] * 2
    with enable_sparse_prefill(llama, SPARSE):
        assert is_sparse(llama, dense)
    outer.disable()
    assert state(llama) == before


def test_a_compiled_prefill_sees_the_switch() -> None:
    """What a compiler reads of a config is what Python reads of it."""
    llama, ids = tiny_model("llama", layers=1), prompt(1, 400)
    dense = run(llama)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}

    def first_logits() -> Tensor:
        found = llama.generate(ids, output_logits=True, return_dict_in_generate=True, **options)  # type: ignore[operator]
        return found.logits[0]

    with enable_sparse_prefill(llama, SPARSE):
        sparse = first_logits()
        with compile_prefill(llama):
            torch.testing.assert_close(first_logits(), sparse, atol=1e-4, rtol=1e-4)
    assert (sparse - dense[:, -1]).abs().max() > 0.01
    torch.testing.assert_close(first_logits(), dense[:, -1], **CLOSE)
