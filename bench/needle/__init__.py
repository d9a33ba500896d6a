"""The needle model (`model/`), and prompts that hide numbers in Python source for it to find."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
