"""The data of the task files in `tasks/`, by the names that they call it."""

from __future__ import annotations

from flexprefill_fa.tools.evaluation.ruler import RECIPES
from flexprefill_fa.tools.evaluation.task_data import data_of, process_results

__all__ = ["process_results"]

niah_single_1 = data_of(RECIPES["niah_single_1"])
niah_multikey_2 = data_of(RECIPES["niah_multikey_2"])
niah_multikey_3 = data_of(RECIPES["niah_multikey_3"])
niah_multivalue = data_of(RECIPES["niah_multivalue"])
niah_multiquery = data_of(RECIPES["niah_multiquery"])
vt = data_of(RECIPES["vt"])
cwe = data_of(RECIPES["cwe"])
fwe = data_of(RECIPES["fwe"])
