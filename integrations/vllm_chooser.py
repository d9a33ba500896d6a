"""What vLLM's names for the backend stand for: it looks at the version of vLLM before its changing parts are used."""

from __future__ import annotations

from typing import Any

from .vllm_version import version_problem


class SparsePrefillBackend:
    """What FLEXPREFILL and CUSTOM are registered as; no layer ever gets this class itself."""

    _answer: tuple[str, str]

    @classmethod
    def validate_configuration(cls, device_capability: Any, **asked: Any) -> list[str]:
        """Choose the class for layers of this kind; vLLM asks for its name, `full_cls_name`, right after.

        vLLM takes an ImportError here for a missing package and hides its text; so every problem is a ValueError.

        Raises:
            ValueError: for a version of vLLM that lacks something, which it names, a GPU that is not CUDA's, a model
                for which vLLM's own choice is not known here, or a bad setting.
        """
        from vllm.version import __version__ as version  # pyright: ignore[reportMissingImports]

        problem = version_problem(version)
        if problem is not None:
            raise ValueError(problem)
        try:
            from .vllm_backend import choose
        except ImportError as error:
            raise ValueError(f"the sparse prefill backend cannot be loaded with vLLM {version}: {error}") from error
        cls._answer = choose(asked, version)
        return []

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name of what the latest `validate_configuration` chose."""
        return cls._answer
