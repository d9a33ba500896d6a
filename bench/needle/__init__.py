"""How the needle model of `flexprefill_fa.tools.needle` is made and measured.

`train` and `evaluate` are the commands. `corpus` has the text, `batches` the questions as tensors; `settings`,
`network` and `learning` (one step) make the model; `tables` tell what came out.
"""
