"""The needle model (`model/`) and the questions that it answers: what the demo and `--tasks needle` use.

What is hidden and asked: `formats` (the words), `questions` (as text), `source` (the text around them), `prompts`
(single numbers, for the demo, benchmarks and tests), `text_tasks` and `tasks/` (for lm-eval). How the model is made
stands in `bench/needle/` of a checkout.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
TASKS_DIR = Path(__file__).parent / "tasks"
