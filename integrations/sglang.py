r"""Sparse prefill in SGLang, as an attention backend on its own plug-in interface. Nothing is patched.

Installed beside SGLang, the package adds `flexprefill` to its attention backends, for prompts:

    python -m sglang.launch_server --model-path MODEL --prefill-attention-backend flexprefill \
        --json-model-override-args '{"sparse_prefill": {"peak": 0.2}}'

Long prefill chunks are then attended sparsely over the keys that they see, cached prefix included; decode steps, short
chunks and layers that cannot run sparse are served by the backend that SGLang would have chosen itself, or that
`--attention-backend` names. Importing this module imports no SGLang.

Written for SGLang 0.5.23.
"""

from __future__ import annotations

import functools
from typing import Any

from .engine_settings import SECTION
from .sglang_config import VARIABLE
from .sglang_version import REPORT, STATE, version_problem, version_warning

__all__ = ["NAME", "SECTION", "VARIABLE", "create", "register", "statistics"]

NAME = "flexprefill"
"""What `--prefill-attention-backend` calls it."""


def register() -> None:
    """Add the backend to SGLang's; SGLang calls it in every process, by the entry point.

    It only leaves a name: whoever does not ask for it never loads the backend.

    Raises:
        ImportError: where SGLang, or its registry of attention backends, is missing.
        ValueError: where somebody else has the name.
    """
    try:
        from sglang.srt.arg_groups.choices import (  # pyright: ignore[reportMissingImports]
            ATTENTION_BACKEND_CHOICES,
            add_attention_backend_choices,
        )
        from sglang.srt.layers.attention.attention_registry import (  # pyright: ignore[reportMissingImports]
            ATTENTION_BACKENDS,
            register_attention_backend,
        )
    except ImportError as error:
        raise ImportError(
            f"the SGLang integration needs SGLang with a registry of attention backends: {error}"
        ) from error
    if ATTENTION_BACKENDS.get(NAME, create) is not create:
        raise ValueError(
            f"the attention backend {NAME} is taken by {ATTENTION_BACKENDS[NAME].__module__}, so it is not sparse "
            "prefill; SGLANG_PLUGINS chooses which plug-ins SGLang loads"
        )
    register_attention_backend(NAME)(create)
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])


def create(runner: Any) -> Any:
    """The backend of an engine; SGLang calls it with its `ModelRunner`.

    Raises:
        ValueError: for a version of SGLang that lacks something, which it names, or as `sglang_backend.make_backend`.
    """
    from sglang.version import __version__ as version  # pyright: ignore[reportMissingImports]

    problem = version_problem(version)
    if problem is not None:
        raise ValueError(problem)
    from .sglang_backend import make_backend

    backend = make_backend(runner, version_warning(version))
    _answer_in_server_info()
    return backend


@functools.cache
def _answer_in_server_info() -> None:
    """Once in a process, and only where an engine asked for the backend."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # pyright: ignore[reportMissingImports]

    HookRegistry.register(f"{STATE}.{REPORT}", add_statistics, HookType.AFTER)
    HookRegistry.apply_hooks()


def add_statistics(answer: Any, *args: Any, **kwargs: Any) -> None:
    """`statistics` beside what SGLang says of a scheduler's state: a hook of its own plug-in interface."""
    found = statistics()
    if found:
        answer.internal_state[SECTION] = found


def statistics() -> dict[str, dict[str, Any]]:
    """What the sparse chunks of each layer in this process kept; waits for the GPU.

    SGLang's scheduler is a process of its own: `engine.get_server_info()`, or `/server_info` of a server, has it as
    `["internal_states"][rank]["sparse_prefill"]`, for the first rank of each data parallel one.

    Returns:
        Layer name -> `chunks`, `queries` (tokens in them), `density` (kept blocks / causal blocks; None before the
        first chunk), `kept_blocks` and `causal_blocks`, of all heads, `failures` (chunks that the parent had to serve
        because sparse attention failed), `declined` (chunks of long prompts that it served because they, or their step,
        could not run sparse: the short end of a prompt is one) and `off` (whether sparse attention was switched off
        after failures). All count from the start of the engine.
    """
    import torch

    from .sglang_backend import backends

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # it counts on the stream of the model, and this may be another
    return {name: counts for backend in backends for name, counts in backend.sparse_prefill.statistics().items()}
