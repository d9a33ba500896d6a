"""The needle model (`model/`): how it is made, and the questions that it answers.

- What is hidden and asked: `formats` (the words), `questions` (as text), `batches` (as tensors), `source` (the text
  around them), `prompts` (single numbers, for the demo, benchmarks and tests), `text_tasks` and `tasks/` (for lm-eval).
- Making it: `prepare` and `train` are the commands; `tokenization`, `corpus`, `settings`, `network`, `learning` (one
  step), `run` (all of them, from its checkpoint on), `checkpoint`, `pace`, `release` and `card`.
- Measuring it: `evaluate` is the command; `evaluation`, `run_tables`; `capture` takes queries, keys and values from it.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
