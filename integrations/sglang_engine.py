"""Which engines of SGLang the backend serves, and which backend of SGLang's own is behind it.

A configuration that cannot work is refused when the engine starts; one that works dense is said in the log.
Only `sglang_backend` imports this module.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # pyright: ignore[reportMissingImports]
from sglang.srt.runtime_context import (  # pyright: ignore[reportMissingImports]
    attention_backends,
    get_disagg,
    get_exec,
    get_model,
    get_parallel,
    get_schedule,
    get_spec,
)

from .engine_settings import Settings
from .sglang_config import longest_chunk, read_settings

NAME = "flexprefill"
"""What the backend is called in SGLang."""
_ASK = f"--prefill-attention-backend {NAME}"


def parent_name() -> str:
    """SGLang's backend for prompts where ours is not asked for: `--attention-backend`, or its own choice.

    Raises:
        ValueError: where ours is asked for anywhere but for the prefill.
    """
    base, decode = get_exec().kernel.attention_backend, attention_backends()[1]
    for option, name in (("--attention-backend", base), ("--decode-attention-backend", decode)):
        if name == NAME:
            raise ValueError(
                f"the backend {NAME} is for prefill alone, got {option} {NAME}: start SGLang with {_ASK}, and with "
                f"{option} left away or naming one of its own"
            )
    return base


def refusal(runner: Any) -> str | None:
    """Why an engine cannot start with the backend, or None; `runner` is the `ModelRunner`."""
    config = runner.model_config
    if runner.use_mla_backend:
        kind = "multi-head latent attention, whose code in SGLang goes by the backend's name"
    elif config.is_encoder_decoder:
        kind = "models of an encoder and a decoder"
    elif get_exec().dllm.dllm_algorithm is not None:
        kind = "diffusion language models"
    else:
        return _combination_problem(runner)
    models = ", ".join(config.hf_config.architectures or ["this model"])
    return f"the backend {NAME} does not serve {kind} ({models}): start SGLang without {_ASK}"


def _combination_problem(runner: Any) -> str | None:
    spec, graphs = get_spec(), get_exec().graph.cuda_graph_config
    if graphs is not None and graphs.prefill.backend not in ("breakable", "disabled"):
        return (
            f"the backend {NAME} cannot run in a captured prefill, which would be dense: got "
            f"--cuda-graph-backend-prefill {graphs.prefill.backend}, expected breakable or disabled"
        )
    algorithm = runner.spec_algorithm
    with_a_draft = algorithm.is_eagle() or algorithm.is_standalone()
    if (
        with_a_draft
        and spec.speculative_draft_attention_backend is None
        and spec.speculative_attention_mode != "decode"
    ):
        return (
            f"the backend {NAME} serves no draft model: add --speculative-draft-attention-backend with a backend of "
            "SGLang's own"
        )
    return None


def dense_reason(runner: Any) -> str | None:
    """Why nothing in an engine can run sparse, or None."""
    parallel, execution = get_parallel(), get_exec()
    if parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1:
        return "context parallelism spreads the keys of a request"
    if execution.overlap.enable_two_batch_overlap or get_disagg().enable_pdmux:
        return "micro-batches split the chunks"
    if execution.deterministic.enable_deterministic_inference:
        return "deterministic inference, which a selection that depends on its chunk cannot keep"
    if runner.enable_hisparse:
        return "the keys of a request are not all on the GPU"
    if runner.kv_index_translator.is_translating:
        return "the slots of a unified memory pool move"
    return _pool_problem(runner.token_to_kv_pool, runner.dtype)


def _pool_problem(pool: Any, dtype: Any) -> str | None:
    pool = getattr(pool, "full_kv_pool", pool)  # beside one for windows, or for states
    if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd":
        return f"a KV cache is a {type(pool).__name__} with the layout {getattr(pool, 'kv_cache_layout', 'of its own')}"
    if pool.dtype != dtype:
        return f"a KV cache of {pool.dtype} for a model of {dtype}"
    return None


def in_the_window_pool(pool: Any, layer: Any) -> bool:
    """Whether a layer's keys are where old ones are dropped."""
    mapping = getattr(pool, "layers_mapping", None)
    return bool(mapping) and mapping[layer.layer_id][1]


def chunk_of(runner: Any) -> int:
    """Queries of an engine's longest prefill chunk."""
    schedule = get_schedule()
    return longest_chunk(schedule.chunked_prefill_size, schedule.max_prefill_tokens, runner.model_config.context_len)


def engine_settings_of(runner: Any) -> Settings:
    """`read_settings` for a `ModelRunner`."""
    return read_settings(get_model().json_model_override_args, chunk=chunk_of(runner))
