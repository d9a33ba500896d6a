"""How the needle model of `flexprefill_fa.tools.needle` is made and measured.

- Making it: `prepare` and `train` are the commands; `batches` (the questions as tensors), `tokenization`, `corpus`,
  `settings`, `network`, `learning` (one step), `run` (all of them, from its checkpoint on), `checkpoint`, `pace`,
  `release` and `card`.
- Measuring it: `evaluate` is the command; `evaluation`, `run_tables`; `capture` takes queries, keys and values from it.
"""
