"""Scorers: what a task needs of each part of a model. One file each; adding a file adds a scorer of that name.

A scorer is a module of this package (`weight_error.py` is `weight-error`) with

- `Settings`: a pydantic model of its own settings;
- `READS`: `"weights"` (no examples), `"prompts"`, or `"answers"` (labelled examples: prompts with their completions);
  where that is up to its settings, they have a property `reads` (`kl.py`);
- `GRANULARITIES`: the granularities that it can score (`units.py`);
- `COST_UNIT`: the unit of its costs per bitwidth, or None if it gives none;
- `score_units(run, settings) -> list[UnitScore]`: one score per unit of `run.units` (`scoring.Run`), in that order.

and, where it holds the hidden states entering every block at once, `KEEPS_ALL_HIDDEN_STATES = True`, which
`preflight.py` reads.

`scoring.score` runs one and writes `scores.json`.
"""

import pkgutil

SCORERS = tuple(sorted(found.name.replace("_", "-") for found in pkgutil.iter_modules(__path__)))
"""Names; a scorer's module is imported when it is used."""

DEFAULT_SCORER = "kl"
"""Its plans per matrix were the best ones measured (README.md, "What was measured")."""
