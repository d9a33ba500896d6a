"""FlexPrefill's selection as one operator: the reference on the CPU, the Triton kernels on CUDA."""

from typing import Any

from flexprefill_fa.masks.flexprefill import reference
from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig
from flexprefill_fa.masks.operator import Lists, select_operator


def _by_triton(*arguments: Any) -> Lists:
    from flexprefill_fa.masks.flexprefill import kernels  # Triton only where it runs

    return kernels.select(*arguments)


select_flexprefill = select_operator(FlexPrefillConfig.name, FlexPrefillConfig, reference.select, _by_triton)
