"""Sparse prefill in vLLM, as an attention backend of its own plug-in interface. Nothing is patched.

Installed beside vLLM, the package registers itself as the backend FLEXPREFILL and, where nobody else has that name, as
CUSTOM; before vLLM 0.32 a backend cannot have a name of its own, and CUSTOM is the only one:

    vllm serve MODEL --attention-backend FLEXPREFILL --additional-config '{"sparse_prefill": {"peak": 0.2}}'

Long prefill chunks are then attended sparsely over the keys that they see, cached prefix included; decode steps, short
chunks and layers that cannot run sparse are served by the backend that vLLM would have chosen itself. Importing this
module imports no vLLM.

vLLM 0.24 was run on GPUs. 0.25 to 0.33 are served by what their files say: `vllm_version` has what differs. Another
version is tried with a warning, and refused when an engine with this backend starts if it lacks something.
"""

from __future__ import annotations

from typing import Any

from .vllm_config import SECTION, VARIABLE
from .vllm_version import register_names

__all__ = ["SECTION", "VARIABLE", "WorkerExtension", "register", "statistics"]


def register() -> None:
    """Make this package a backend of vLLM; vLLM calls it in every process, by the entry point.

    It only leaves names: whoever does not ask for FLEXPREFILL or CUSTOM never loads the backend, and an unfit version
    of vLLM is an error for those who do, when their engine starts.

    Raises:
        ImportError: where vLLM is missing.
    """
    try:
        from vllm.version import __version__ as version  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the vLLM integration needs vLLM: pip install 'flexprefill-fa[vllm]'") from error
    register_names(version)


def statistics(worker: Any, reset: bool = False) -> dict[str, dict[str, Any]]:
    """What the sparse chunks of each layer kept; waits for the GPU. `WorkerExtension` is how to call it from outside.

    Args:
        worker: vLLM's.
        reset: count from nothing afterwards.

    Returns:
        Layer name -> `chunks`, `queries` (tokens in them), `density` (kept blocks / causal blocks; None before the
        first chunk), `failures` (chunks that the parent had to serve because sparse attention failed), `declined`
        (chunks of long prompts that it served because they, or their step, could not run sparse: the short end of a
        prompt is one) and `off` (whether sparse attention was switched off after failures).
    """
    found = {}
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        impl: Any = getattr(layer, "impl", None)
        if getattr(impl, "sparse_counter", None) is not None:
            found[name] = impl.statistics()
            if reset:
                impl.sparse_counter.reset()
    return found


class WorkerExtension:
    """`statistics` by a name, one answer from each worker. The engine runs in a process of its own, where vLLM sends no
    functions by default.

    LLM(..., worker_extension_cls="flexprefill_fa.integrations.vllm.WorkerExtension")
    llm.collective_rpc("sparse_prefill_statistics")
    """

    def sparse_prefill_statistics(self, reset: bool = False) -> dict[str, dict[str, Any]]:
        """See `statistics`."""
        return statistics(self, reset)
