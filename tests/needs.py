"""What some tests need of the machine."""

import pytest
import torch

from flexprefill_fa.validation import corrects_means

mean_correction = pytest.mark.skipif(
    not (torch.cuda.is_available() or corrects_means(torch.device("cpu"))),
    reason=f"mean correction on the CPU needs torch 2.13, this is {torch.__version__}",
)
