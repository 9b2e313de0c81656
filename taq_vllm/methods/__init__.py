"""Methods: how scales, zero points and codes are found once the bits are fixed. One file each; adding a file adds one.

A method is a module of this package with

- `Settings`: a pydantic model of its own settings;
- `READS_INPUTS`: whether it needs the task's calibration examples;
- `READS_OUTPUTS`: whether it needs the full-precision outputs of each block as well (`Block.target`);
- `fit_block(block, settings) -> dict[str, Quantized]`: the codes of every matrix of `block.entries` that has fewer
  than 16 bits, by its name in the block. A method may change the other weights of the block in place (norms, biases,
  matrices at 16 bits); what it leaves there is what is stored.

`fitting.py` has what they share; `checkpoint.py` runs one over a model.
"""

import pkgutil

METHODS = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))
"""Names; a method's module is imported when it is used."""

DEFAULT_EXAMPLES = 512
"""Calibration examples, as many as the paper takes. With 128, gptq closes less of rtn's damage on every task of the
plain lab model: 40% instead of 60% on trivia."""
DEFAULT_METHOD = "gptq"
"""The only one that closed at least half of rtn's damage on every task of both lab models (README.md, "What was
measured")."""
