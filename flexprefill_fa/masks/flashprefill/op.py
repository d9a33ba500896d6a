"""FlashPrefill's selection as one operator: the reference on the CPU, the Triton kernels on CUDA."""

from typing import Any

from flexprefill_fa.masks.flashprefill import reference
from flexprefill_fa.masks.flashprefill.config import FlashPrefillConfig
from flexprefill_fa.masks.operator import Lists, select_operator


def _by_triton(*arguments: Any) -> Lists:
    from flexprefill_fa.masks.flashprefill import kernels  # Triton only where it runs

    return kernels.select(*arguments)


select_flashprefill = select_operator(FlashPrefillConfig.name, FlashPrefillConfig, reference.select, _by_triton)
