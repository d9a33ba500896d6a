"""How the needle model of `flexprefill_fa.tools.needle` is made and measured.

`prepare`, `train` and `evaluate` are the commands. `tokenization` and `corpus` make the text, `batches` the questions
in it, as tensors; `settings`, `network`, `learning` (one step), `run` (all of them) and `release` make the model;
`evaluation` measures it, `card` tells what came out. `capture` takes queries, keys and values from it.
"""
