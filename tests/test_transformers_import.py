"""Importing the integration: what it registers, and what happens without transformers."""

from __future__ import annotations

import subprocess
import sys

from transformers import AttentionInterface

from flexprefill_fa.integrations.transformers import NAME

WITHOUT_TRANSFORMERS = """
import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Block())
import flexprefill_fa

try:
    import flexprefill_fa.integrations.transformers
except ImportError as error:
    print(error)
print([name for name in sys.modules if name.startswith(("transformers", "flexprefill_fa.integrations."))])
import torch
print(hasattr(torch.ops.flexprefill_fa, "sequence_ids"))
"""


def test_without_transformers() -> None:
    """The package works, the integration names the extra to install, and nothing is half registered."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=True)
    message, modules, operator = done.stdout.splitlines()
    assert "needs transformers: pip install 'flexprefill-fa[hf]'" in message
    assert modules == "[]" and operator == "False"


def test_registered_under_a_name_that_transformers_does_not_rewrite() -> None:
    assert NAME in AttentionInterface().valid_keys()
    assert not any(part in NAME for part in ("flash", "sdpa", "/"))
