"""Which scorer makes the best plan? All of them at equal bytes, on the lab models, against random orders.

A *study* is a model and a quantizer: `conditioned-rtn` (the conditioned lab model, round to nearest), `plain-rtn`,
`dense-rtn` (the knowledge-dense model, bitwidths 3, 4 and 8), and the same with `gptq`, whose codes are fitted to the
task's own calibration inputs *of the full-precision model*, so that a matrix is fitted once per bitwidth (`taq
quantize` fits it to what the quantized matrices before it give). In each, for every task and budget, every contender
gets the same bytes: `random` (20 seeds), `edges`, `uniform (spread over the layers)`, `weight-error`, `taq` with both
signs of the stability term and with relative variance, and `taqo`, `kl`, `loss`; the last three and `weight-error`
also with the exact knapsack over their costs, per layer and per matrix; plans by `kl` that were made for the other
tasks, and variants of `kl` and `loss`. `uniform (the lowest bits)` stands beside them with fewer bytes. Plans are
evaluated offline with fake-quantized weights (`offline.py`) on 500 test items: the task's metric, answer NLL
and KL to full precision.

Statistics. All comparisons are paired over items. The mean of `random` is that of 20 seeds, a sample of all orders:
comparisons with it resample items and seeds together, each with replacement (the pigeonhole bootstrap, Owen 2007,
doi:10.1214/07-AOAS122, mildly conservative), so that their intervals hold for other seeds too. Where a budget admits at
most 12 plans (one layer above the others), all of them are evaluated, and their mean is the exact expectation of
`random`; comparisons with that (`all_random`) resample items alone. Lines hold raw p-values; what is said to hold, and
every mark in a table, is judged after Holm's correction for the contenders of that sentence, or of that table's column.
Tasks, budgets and quantities are not corrected for: each is a question of its own.

    python -m benchmarks.accuracy conditioned-rtn plain-rtn          # runs and writes results/accuracy-STUDY.jsonl
    python -m benchmarks.accuracy --table conditioned-rtn            # only prints tables and what they say

Finished evaluations lie in `--work` and are not repeated, so a second run only makes the lines again; plans that are
equal are evaluated once. `benchmarks/accuracy_served.py` compares the offline evaluator with the real engine.
"""

import argparse
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taq_vllm.methods import DEFAULT_EXAMPLES
from taq_vllm.metrics import CONFIDENCE, RESAMPLES, paired_difference, wilson_interval

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.offline import Evaluator, Items
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import Plan
    from taq_vllm.scores import Scores
    from taq_vllm.tasks import Task

LAB = Path(__file__).parent / "lab"
RESULTS = Path(__file__).parent / "results"
TASKS = ("trivia", "math", "code")
SEEDS = 20
SCORED_EXAMPLES = 128
"""Read by every scorer that reads examples, so that none is better for having seen more."""
QUANTITIES = ("metric", "nll", "kl")
SUMMARY = (
    "edges",
    "weight-error (knapsack)",
    "weight-error (knapsack, per matrix)",
    "taq (stability_sign -1, variance absolute)",
    "taq (stability_sign 1, variance relative)",
    "taqo (knapsack)",
    "taqo (knapsack, per matrix)",
    "loss (knapsack)",
    "loss (knapsack, per matrix)",
    "kl (knapsack)",
    "kl (knapsack, per matrix)",
    "kl (knapsack, per matrix, only the lowest bits measured)",
    "kl (knapsack, per matrix, of another task)",
)
"""Contenders of `summary`; the last stands for the plans made for either of the other two tasks."""
IN_POINTS = ("uniform (the lowest bits)", "random", "edges", "kl (knapsack, per matrix)")
"""Contenders of `points`; the first has fewer bytes than the others."""
PROOF = ("taqo", "kl", "loss")
"""At least one of these, with the exact knapsack per layer, has to beat random."""
MOST_PLANS = 12
"""Of a budget, up to which all plans of random are evaluated."""
EVALUATOR = 1
"""Version of what is evaluated. Evaluations are cached by it, the model's fingerprint, the quantizer and the test set's
hash, not by the commit: whoever changes what `offline.py`, `taq_vllm.quantizer` or `methods/gptq.py` compute raises it,
and old evaluations are refused."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A model and a quantizer.

    Attributes:
        model: `conditioned`, `plain` or `dense`.
        quantizer: `rtn` or `gptq`.
        menu: bitwidths of the plans, ascending.
        budgets: average bits, scales counted. Each is what whole layers come to (one, two and five of twelve at 8
            bits), so that plans per matrix, which fill any budget, have the same bytes.
    """

    model: str
    quantizer: str
    menu: tuple[int, ...] = (4, 8, 16)
    budgets: tuple[str, ...] = ("4.49bits", "4.82bits", "5.82bits")

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.model}-{self.quantizer}"

    @property
    def results(self) -> Path:
        """Where its lines are committed."""
        return RESULTS / f"accuracy-{self.name}.jsonl"


DENSE = {"menu": (3, 4, 8), "budgets": ("3.41bits", "3.66bits", "4.04bits")}
"""Two, four and seven of the eight layers at 4 bits, the others at 3."""
STUDIES = {
    study.name: study
    for study in (
        Study("conditioned", "rtn"),
        Study("plain", "rtn"),
        Study("dense", "rtn", **DENSE),
        Study("conditioned", "gptq"),
        Study("plain", "gptq"),
        Study("dense", "gptq", **DENSE),
    )
}


@dataclass(frozen=True)
class Contender:
    """A way to make a plan.

    Attributes:
        scorer: one of `taq_vllm.scorers`; `uniform` needs none.
        allocation: `monotone`, `knapsack` or `uniform`.
        granularity: of its scores and its plans.
        settings: of the scorer.
        task: whose examples were scored; None for the task that is evaluated.
        lowest: only the lowest bits are measured, and costs of others derived from them, as `taq score` does if it is
            not told otherwise.
    """

    scorer: str
    allocation: str = "monotone"
    granularity: str = "layer"
    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    lowest: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        shown = [f"{key} {value}" for key, value in self.settings.items() if key not in ("max_examples", "bits")]
        parts = [*shown, *([self.allocation] if self.allocation == "knapsack" else [])]
        if self.scorer == "uniform":
            parts.append("the lowest bits" if self.allocation == "uniform" else "spread over the layers")
        parts += ["per matrix"] if self.granularity == "module" else []
        parts += [f"of {self.task}"] if self.task else []
        parts += ["only the lowest bits measured"] if self.lowest else []
        return f"{self.scorer} ({', '.join(parts)})" if parts else self.scorer


def contenders(study: Study) -> list[Contender]:
    """Everyone but random, which has seeds."""
    taq = [{"stability_sign": sign, "variance": kind} for kind in ("absolute", "relative") for sign in (-1, 1)]
    found = [Contender("uniform", "uniform"), Contender("uniform"), Contender("edges")]
    found += [Contender("taq", settings={**settings, "max_examples": SCORED_EXAMPLES}) for settings in taq]
    for scorer in ("weight-error", *PROOF):
        settings = _scorer_settings(scorer, study)
        found += [Contender(scorer, "monotone", "layer", settings), Contender(scorer, "knapsack", "layer", settings)]
        found.append(Contender(scorer, "knapsack", "module", settings))
    for scorer, variant in (
        ("kl", {"perturbation": "noise"}),
        ("loss", {"terms": "first"}),
        ("loss", {"curvature": "model"}),
    ):
        found.append(Contender(scorer, "knapsack", "layer", {**_scorer_settings(scorer, study), **variant}))
    if study.model == "dense":
        settings = {**_scorer_settings("kl", study), "on": "answers"}
        found += [Contender("kl", "knapsack", granularity, settings) for granularity in ("layer", "module")]
    found.append(Contender("kl", "knapsack", "module", _scorer_settings("kl", study), lowest=True))
    return found


def foreign_contenders(study: Study, task: str) -> list[Contender]:
    """Plans that were made for the other tasks: of `kl` per matrix, on the dense model also of all three per layer."""
    compared = [("kl", "module")]
    if study.model == "dense":
        compared += [(scorer, "layer") for scorer in PROOF]
    return [
        Contender(scorer, "knapsack", granularity, _scorer_settings(scorer, study), other)
        for scorer, granularity in compared
        for other in TASKS
        if other != task
    ]


def _scorer_settings(scorer: str, study: Study) -> dict[str, Any]:
    """The bitwidths of the menu, and as many examples for everyone.

    The oracle measures the lowest bitwidth only: each one more costs as much again.
    """
    low = [bits for bits in study.menu if bits < 16]
    if scorer == "weight-error":
        return {"bits": low}
    return {"bits": low[:1] if scorer == "taqo" else low, "max_examples": SCORED_EXAMPLES}


# Making plans.


def model_of(study: Study, work: Path) -> "ModelFiles":
    """The study's model; the conditioned one is made where it is missing."""
    from benchmarks.lab.condition import condition
    from taq_vllm.model_files import ModelFiles

    if study.model == "conditioned":
        return ModelFiles(condition(LAB / "model", work / "conditioned", 1.0, 0))
    return ModelFiles(LAB / "model" if study.model == "plain" else LAB / "dense" / "model")


def task_of(study: Study, name: str) -> "Task":
    """The study's task of a name."""
    from taq_vllm.tasks import load_task

    return load_task((LAB / "dense" if study.model == "dense" else LAB) / "tasks" / name)


def scores_of(study: Study, files: "ModelFiles", contender: Contender, task: str, work: Path) -> "Scores | None":
    """A contender's scores; those that read examples are kept in `work`."""
    from taq_vllm.scoring import baseline, score

    if contender.allocation == "uniform":
        return None
    if contender.scorer in ("random", "uniform", "edges", "weight-error"):
        return baseline(files, contender.scorer, contender.settings, contender.granularity)
    of_task = contender.task or task
    if contender.lowest:
        return _at_lowest_bits(scores_of(study, files, replace(contender, lowest=False), task, work))
    settings = "-".join(f"{key}-{value}" for key, value in contender.settings.items())
    slug = re.sub("[^a-z0-9_-]+", ".", f"{contender.scorer}-{contender.granularity}-{settings}")
    path = work / "scores" / study.model / of_task / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may need the same scores for its own task
        return score(
            files,
            task_of(study, of_task),
            contender.scorer,
            path,
            contender.settings,
            device="cpu",
            force=True,  # what lies there was made with other defaults
            granularity=contender.granularity,
        )[0]


def _at_lowest_bits(scores: "Scores") -> "Scores":
    """As if only the lowest bits had been measured: costs of one bitwidth do not depend on which others are."""
    units = []
    for unit in scores.units:
        bits = min(unit.costs)
        lowest = {"costs": {bits: unit.costs[bits]}, "cost_stderrs": {bits: unit.cost_stderrs[bits]}}
        units.append(unit.model_copy(update=lowest))
    return scores.model_copy(update={"units": tuple(units)})


# Evaluating.


class Journal:
    """Evaluations of one study and task, one JSON line each, found again by the bits of every matrix."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or begin.

        Raises:
            ValueError: the file belongs to another model, task or quantizer.
        """
        from benchmarks.offline import Items

        self._path = path
        self._found: dict[str, Items] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != identity:
            raise ValueError(f"{path} holds evaluations of {head}, not of {json.dumps(identity)}: delete it")
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a killed run
            values = {name: tuple(entry[name]) for name in QUANTITIES}
            self._found[entry["bits"]] = Items(**values, generated=entry["generated"])

    def __contains__(self, bits: Mapping[str, int]) -> bool:
        return _key(bits) in self._found

    def __getitem__(self, bits: Mapping[str, int]) -> "Items":
        return self._found[_key(bits)]

    def add(self, bits: Mapping[str, int], items: "Items") -> None:
        """Keep one more."""
        self._found[_key(bits)] = items
        with self._path.open("a", encoding="utf-8") as file:
            # The leading newline ends a line that a killed run may have left open.
            file.write("\n" + json.dumps({"bits": _key(bits), **asdict(items)}))


def _key(bits: Mapping[str, int]) -> str:
    """One character per matrix."""
    return "".join("g" if b == 16 else str(b) for b in bits.values())


@dataclass(frozen=True)
class Planned:
    """A plan to evaluate."""

    contender: Contender
    budget: str
    plan: "Plan"

    @property
    def bits(self) -> dict[str, int]:
        """Per matrix."""
        return {name: matrix.bits for name, matrix in self.plan.matrices.items()}


def run_task(study: Study, task_name: str, work: Path, items: int | None = None) -> list[Line]:
    """All plans of one task; returns the result lines.

    Args:
        study: model and quantizer.
        task_name: of the lab.
        work: models, scores and evaluations, kept for the next run.
        items: only the first so many test items.
    """
    from transformers.utils import logging

    from benchmarks.offline import Evaluator, FakeQuantized, check_groups, input_moments
    from benchmarks.provenance import provenance
    from taq_vllm.plan import SYMMETRIC

    logging.disable_progress_bar()
    files, task = model_of(study, work), task_of(study, task_name)
    check_groups(files)
    planned = _plans(study, files, task_name, work)
    identity = {
        "evaluator": EVALUATOR,
        "fingerprint": files.ref.fingerprint,
        "quantizer": study.quantizer,
        "calibration": f"{task.calibration_sha256} {DEFAULT_EXAMPLES}" if study.quantizer == "gptq" else None,
        "test": task.test_sha256,
        "items": items,
    }
    suffix = f"-{items}" if items else ""
    journal = Journal(work / f"evaluations-{study.name}-{task_name}{suffix}.jsonl", identity)
    full = dict.fromkeys(files.matrices, 16)
    lowest = dict.fromkeys(files.matrices, study.menu[0])
    asked = [full, lowest, *(one.bits for one in planned)]
    asked += [bits for budget in study.budgets for bits in all_of_random(_of_random(planned, budget))]
    waiting = {_key(bits): bits for bits in asked if bits not in journal}
    tokens_file = work / f"tokens-{study.model}-{task_name}{suffix}.json"
    if waiting or not tokens_file.exists():
        moments = input_moments(files, task, DEFAULT_EXAMPLES) if study.quantizer == "gptq" else None
        evaluator = Evaluator(files, task, FakeQuantized(files, SYMMETRIC, moments), items, allow_code_execution=True)
        _evaluate_all(evaluator, [waiting[key] for key in sorted(waiting)], journal, f"{study.name} {task_name}")
        tokens_file.write_text(json.dumps(evaluator.tokens))
    tokens = json.loads(tokens_file.read_text())
    stamp = provenance()
    # Evaluations may be older than the commit that made lines of them.
    stamp |= {"aggregated_commit": stamp["commit"], "evaluations": _origin(identity)}
    lines = make_lines(study, task, planned, journal, full, lowest, tokens)
    return [line | stamp for line in lines]


def _origin(identity: Mapping[str, Any]) -> str:
    """What cached evaluations were found by, in short."""
    shown = {
        name: " ".join(word[:8] for word in str(value).split()) for name, value in identity.items() if value is not None
    }
    return "cached by " + ", ".join(f"{name} {value}" for name, value in shown.items())


def _plans(study: Study, files: "ModelFiles", task: str, work: Path) -> list[Planned]:
    from taq_vllm.allocate import Request, allocate

    everyone = [Contender("random", settings={"seed": seed}) for seed in range(SEEDS)] + contenders(study)
    everyone += foreign_contenders(study, task)
    planned = []
    for contender in everyone:
        scores = scores_of(study, files, contender, task, work)
        for budget in study.budgets:
            request = Request(budget, contender.allocation, granularity=contender.granularity, menu=study.menu)
            planned.append(Planned(contender, budget, allocate(files, scores, request)))
    return planned


def _of_random(planned: Sequence[Planned], budget: str) -> list[Planned]:
    return [one for one in planned if one.budget == budget and one.contender.scorer == "random"]


def all_of_random(random: Sequence[Planned]) -> list[dict[str, int]]:
    """Every plan that random orders make at a budget, or none where there are more than `MOST_PLANS`.

    Layers of equal bytes get the same bitwidths whatever the order is, arranged by it: every arrangement is as likely.

    Args:
        random: plans of some seeds.
    """
    from taq_vllm.units import layer_of

    by_layer = [{layer_of(name): width for name, width in one.bits.items()} for one in random]
    widths = sorted(by_layer[0].values())
    if any(sorted(layers.values()) != widths for layers in by_layer):
        return []  # layers differ in bytes
    count = math.factorial(len(widths))
    for width in set(widths):
        count //= math.factorial(widths.count(width))
    if count > MOST_PLANS:
        return []
    places = {layer: place for place, layer in enumerate(by_layer[0])}
    return [
        {name: arranged[places[layer_of(name)]] for name in random[0].bits} for arranged in _arrangements(tuple(widths))
    ]


def _arrangements(values: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All different orders."""
    if not values:
        yield ()
    for first in sorted(set(values)):
        place = values.index(first)
        for others in _arrangements(values[:place] + values[place + 1 :]):
            yield (first, *others)


def _evaluate_all(evaluator: "Evaluator", waiting: Sequence[dict[str, int]], journal: Journal, title: str) -> None:
    started = time.monotonic()
    for number, bits in enumerate(waiting, start=1):
        journal.add(bits, evaluator(bits))
        if number % 5 == 0 or number == len(waiting):
            spent = time.monotonic() - started
            left = spent / number * (len(waiting) - number)
            print(
                f"{title}: {number} of {len(waiting)} plans, {spent / number:.1f} s each, {left:.0f} s left", flush=True
            )


# Statistics.


@dataclass(frozen=True)
class Measured:
    """One quantity of one plan, or of random's.

    Attributes:
        values: [n], or [seeds, n].
        mean: over items (and seeds), per token of the completions for NLL and KL.
        draws: [RESAMPLES] of the mean, over resampled items; where there are seeds, over resampled seeds as well.
    """

    values: Any
    mean: float
    draws: Any

    @property
    def is_binary(self) -> bool:
        """Right or wrong, of one plan."""
        return self.values.ndim == 1 and set(np.unique(self.values)) <= {0.0, 1.0}

    def interval(self) -> tuple[float, float]:
        """Wilson's where every item is right or wrong, else that of the draws."""
        if self.is_binary:
            return wilson_interval(int(self.values.sum()), len(self.values))
        return _limits(self.draws)

    def difference(self, other: "Measured") -> list[float]:
        """[difference, low, high, p] of this minus another, paired over items.

        Right against wrong: McNemar's exact test and Tango's interval. Else the bootstrap, where p is twice the smaller
        share of the draws on one side of zero.
        """
        if self.is_binary and other.is_binary:
            found = paired_difference(self.values, other.values)
            return _rounded([found.mean, found.low, found.high, found.p_value])
        draws = self.draws - other.draws
        # +1: the sample at hand is one more draw, so no p-value is smaller than the resampling can show.
        tail = min((draws <= 0).sum(), (draws >= 0).sum()) + 1
        return _rounded([self.mean - other.mean, *_limits(draws), min(1.0, 2 * float(tail) / (len(draws) + 1))])


class Bootstrap:
    """Resampled test sets and seeds, the same for every plan of a task, so that draws of two plans are paired.

    Args:
        tokens: per test item's completion.
        seeds: of random.
        seed: of the resampling.
    """

    def __init__(self, tokens: Sequence[int], seeds: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        n = len(tokens)
        self._tokens = np.asarray(tokens, dtype=np.float64)
        # [RESAMPLES, n] and [RESAMPLES, seeds]: how often each was drawn.
        self._items = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
        self._seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(np.float64)
        self._drawn_tokens = self._items @ self._tokens

    def measure(self, values: Any, name: str) -> Measured:
        """Mean and draws of one quantity.

        Args:
            values: [n], summed over an item's tokens for NLL and KL; [seeds, n] for random.
            name: of the quantity.
        """
        counts, drawn = self._tokens.sum(), self._drawn_tokens
        if name == "metric":
            counts, drawn = len(self._tokens), len(self._tokens)
        if values.ndim == 1:
            return Measured(values, float(values.sum() / counts), self._items @ values / drawn)
        sums = np.einsum("ri,ri->r", self._seeds @ values / len(values), self._items)
        return Measured(values, float(values.mean(0).sum() / counts), sums / drawn)


def _summary(measured: Mapping[str, Measured]) -> Line:
    """Per quantity [mean, low, high]."""
    return {name: _rounded([one.mean, *one.interval()]) for name, one in measured.items()}


def _compared(measured: Mapping[str, Measured], references: Mapping[str, Mapping[str, Measured]]) -> Line:
    """`nll_to_random`: [difference, low, high, p] and so on; KL is already a distance to full precision."""
    return {
        f"{name}_to_{reference}": measured[name].difference(others[name])
        for reference, others in references.items()
        for name in QUANTITIES
        if (reference, name) != ("full", "kl")
    }


def _limits(draws: Any) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def make_lines(
    study: Study,
    task: "Task",
    planned: Sequence[Planned],
    journal: Journal,
    full: Mapping[str, int],
    lowest: Mapping[str, int],
    tokens: Sequence[int],
) -> list[Line]:
    """One line per contender and budget, and one for full precision.

    Every line has `QUANTITY_to_REFERENCE`, [difference, low, high, p], for each reference that it has: `full` and
    `lowest` (uniform at the lowest bits), and among plans of its budget `random`, `all_random` (the exact expectation),
    `edges`, `weight_error`, `layer` (of a plan per matrix: the same scorer's per layer, both by knapsack), `own` (of a
    plan made for another task: the same scorer's for this one), `other_sign` (of taq with sign +1: with -1),
    `on_prompts` (of kl on answers), `all_bits` (of kl with only the lowest bits measured: with all of them).

    Args:
        study: model and quantizer.
        task: names and metric.
        planned: every plan, random's seeds included.
        journal: holds them all, and the two references.
        full: the full-precision plan.
        lowest: the uniform plan at the lowest bits.
        tokens: per test item's completion.
    """
    head = {"benchmark": "accuracy", "study": study.name, "task": task.name, "task_metric": task.metric}
    statistics = Bootstrap(tokens, len(_of_random(planned, study.budgets[0])))

    def stacked(plans: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        return {name: np.array([getattr(journal[bits], name) for bits in plans], float) for name in QUANTITIES}

    def measured(values: Mapping[str, Any]) -> dict[str, Measured]:
        return {name: statistics.measure(values[name], name) for name in QUANTITIES}

    def of_plan(bits: Mapping[str, int]) -> dict[str, Measured]:
        return measured({name: values[0] for name, values in stacked([bits]).items()})

    references = {"full": of_plan(full), "lowest": of_plan(lowest)}
    lines = [head | {"budget": None, "contender": "full precision", "n": len(tokens)} | _summary(references["full"])]
    for budget in study.budgets:
        named = head | {"budget": budget, "n": len(tokens)}
        random = _of_random(planned, budget)
        of_seeds = measured(stacked([one.bits for one in random]))
        line = _describe(random[0].plan, None) | _summary(of_seeds) | _compared(of_seeds, references)
        line["seeds"] = len(random)
        line["distinct_plans"] = len({_key(one.bits) for one in random})
        line["over_seeds"] = {
            name: _rounded([statistics.measure(values, name).mean for values in of_seeds[name].values])
            for name in QUANTITIES
        }
        lines.append(named | {"contender": "random"} | line)
        compared = references | {"random": of_seeds}
        every = all_of_random(random)
        if every and all(bits in journal for bits in every):
            exact = measured({name: values.mean(0) for name, values in stacked(every).items()})
            line = _describe(random[0].plan, None) | _summary(exact) | _compared(exact, compared)
            lines.append(named | {"contender": f"random, all {len(every)} plans", "plans": len(every)} | line)
            compared |= {"all_random": exact}
        others = [one for one in planned if one.budget == budget and one.contender.scorer != "random"]
        found = {one.contender.name: of_plan(one.bits) for one in others}
        for one in others:
            rivals = {what: found[rival] for what, rival in rivals_of(one.contender).items() if rival in found}
            own = found[one.contender.name]
            line = _describe(one.plan, one.contender) | _summary(own) | _compared(own, compared | rivals)
            lines.append(named | {"contender": one.contender.name} | line)
    return lines


def rivals_of(contender: Contender) -> dict[str, str]:
    """Names of the contenders at the same bytes that one is compared with, by what they are to it."""
    rivals = {}
    if contender.scorer != "edges":
        rivals["edges"] = Contender("edges").name
    if (contender.scorer, contender.allocation) != ("weight-error", "monotone"):
        rivals["weight_error"] = Contender("weight-error").name
    if contender.granularity == "module":
        rivals["layer"] = replace(contender, granularity="layer").name
    if contender.task:
        rivals["own"] = replace(contender, task=None).name
    if contender.lowest:
        rivals["all_bits"] = replace(contender, lowest=False).name
    if "on" in contender.settings:
        settings = {name: value for name, value in contender.settings.items() if name != "on"}
        rivals["on_prompts"] = replace(contender, settings=settings).name
    if contender.settings.get("stability_sign") == 1:
        rivals["other_sign"] = replace(contender, settings=contender.settings | {"stability_sign": -1}).name
    return rivals


def _describe(plan: "Plan", contender: Contender | None) -> Line:
    """How a plan was made and what it costs; the bits of random's plans differ from seed to seed."""
    described: Line = {"planned_bytes": plan.budget.planned_bytes, "average_bits": round(plan.budget.average_bits, 4)}
    if contender is not None:
        described |= {
            "scorer": contender.scorer,
            "allocation": contender.allocation,
            "granularity": contender.granularity,
            "settings": contender.settings,
            "scored_on": contender.task,
            "bits": _bits_by_layer(plan),
        }
    return described


def _bits_by_layer(plan: "Plan") -> str:
    """`8 4 4 ...`; a layer whose matrices differ shows each, as 4448444."""
    from taq_vllm.units import layer_of

    layers: dict[int, list[str]] = {}
    for name, matrix in plan.matrices.items():
        layers.setdefault(layer_of(name), []).append("g" if matrix.bits == 16 else str(matrix.bits))
    return " ".join(bits[0] if len(set(bits)) == 1 else "".join(bits) for bits in layers.values())


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


# What the lines say.


def better(line: Line, name: str, reference: str) -> int:
    """1 if the line beats a reference with an interval that excludes zero, -1 if it loses, else 0."""
    _, low, high, _ = line[f"{name}_to_{reference}"]
    sign = 1 if name == "metric" else -1
    return sign * (int(low > 0) - int(high < 0))


def verdicts(lines: Sequence[Line], name: str, reference: str) -> list[int]:
    """As `better`, after Holm's correction for the lines given."""
    corrected = holm([line[f"{name}_to_{reference}"][3] for line in lines])
    return [
        better(line, name, reference) if p < 1 - CONFIDENCE else 0 for line, p in zip(lines, corrected, strict=True)
    ]


def must_hold(lines: Sequence[Line]) -> list[str]:
    """Sentences: does `taqo`, `kl` or `loss` beat the mean of random, wherever uniform at the lowest bits loses?

    Judged on the three plans by knapsack per layer, after Holm's correction for three. Their variants (other
    allocations, granularities and settings) are listed after them, corrected for all variants.
    """
    sentences = []
    head = lines[0]
    menu = STUDIES[head["study"]].menu
    for task in _unique(line["task"] for line in lines):
        losses = _uniform_losses(lines, task)
        for budget in _unique(line["budget"] for line in lines if line["budget"]):
            of_budget = [line for line in lines if (line["task"], line["budget"]) == (task, budget)]
            [random] = [line for line in of_budget if line["contender"] == "random"]
            own = [line for line in of_budget if line.get("scorer") in PROOF and not line.get("scored_on")]
            named = [line for line in own if is_named(line)]
            variants = [line for line in own if not is_named(line)]
            parts = []
            for name in QUANTITIES:
                if name not in losses:
                    parts.append(f"{name}: uniform {menu[0]}-bit does not lose")
                    continue
                winners = _winners(named, name, "random")
                text = f"holds, {', '.join(winners)}" if winners else "DOES NOT HOLD"
                if named and all(f"{name}_to_all_random" in line for line in named):
                    beaten = _winners(named, name, "all_random")
                    if beaten != winners:
                        text += f", but the exact mean is beaten by {', '.join(beaten) or 'none'}"
                others = _winners(variants, name, "random")
                if variants:
                    listed = f": {', '.join(others)}" if others else ""
                    text += f" ({len(others)} of {len(variants)} variants better{listed})"
                parts.append(f"{name}: {text}")
            exact = "".join(
                f"; the exact mean, of all {line['plans']}, differs by {_shown(line, 'nll', 'random')} millinats of NLL"
                for line in of_budget
                if "plans" in line
            )
            sentences.append(
                f"{head['study']}, {task}, {budget} ({random['seeds']} random seeds, {random['distinct_plans']} plans"
                f"{exact}): {'; '.join(parts)}"
            )
    return sentences


def is_named(line: Line) -> bool:
    """Whether a line is of a scorer's knapsack plan per layer, with the scorer's own settings."""
    plain = set(line["settings"]) <= {"bits", "max_examples"}
    return (line["allocation"], line["granularity"]) == ("knapsack", "layer") and plain and not line["scored_on"]


def _winners(lines: Sequence[Line], name: str, reference: str) -> list[str]:
    judged = verdicts(lines, name, reference)
    return [line["contender"] for line, verdict in zip(lines, judged, strict=True) if verdict > 0]


def comparisons(lines: Sequence[Line], budget: str) -> list[str]:
    """Sentences of one budget: plans per matrix against plans per layer, plans for other tasks against the task's own,
    `taq` against random and its signs against each other. Each quantity of a sentence is corrected for its contenders.
    """
    sentences = []
    for task in _unique(line["task"] for line in lines):
        of_budget = [line for line in lines if (line["task"], line["budget"]) == (task, budget) and "scorer" in line]
        taq = [line for line in of_budget if line["scorer"] == "taq"]
        for title, reference, compared in (
            ("per matrix against per layer, same scorer, knapsack", "layer", of_budget),
            ("plans made for other tasks against the task's own, same scorer", "own", of_budget),
            ("taq against random", "random", taq),
            ("taq's stability sign +1 against -1", "other_sign", taq),
            ("kl on answers against on prompts", "on_prompts", of_budget),
            ("only the lowest bits measured against all, the others derived from them", "all_bits", of_budget),
        ):
            found = [line for line in compared if f"nll_to_{reference}" in line]
            if found:
                told = "; ".join(_told(found, name, reference) for name in QUANTITIES)
                sentences.append(f"{lines[0]['study']}, {task}, {budget}, {title}: {told}")
    return sentences


def _told(lines: Sequence[Line], name: str, reference: str) -> str:
    """Who is better and who is worse than a reference, by how much."""
    judged = verdicts(lines, name, reference)
    parts = []
    for verdict, word in ((1, "better"), (-1, "worse")):
        shown = [
            f"{line['contender']} {_shown(line, name, reference)}"
            for line, found in zip(lines, judged, strict=True)
            if found == verdict
        ]
        if shown:
            parts.append(f"{word} {', '.join(shown)}")
    if judged.count(0):
        parts.append(f"{judged.count(0)} of {len(lines)} cannot be told")
    return f"{name}: {', '.join(parts)}"


def _shown(line: Line, name: str, reference: str) -> str:
    """A difference with its interval: points of the metric, millinats of the others."""
    digits, factor = (1, 100) if name == "metric" else (2, 1000)
    difference, low, high, _ = (factor * value for value in line[f"{name}_to_{reference}"])
    return f"{difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    most = 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = most
    return corrected


def _uniform_losses(lines: Sequence[Line], task: str) -> list[str]:
    """Quantities in which the smallest uniform plan loses to full precision.

    KL is above zero for any change at all, so it counts only where the metric or the NLL loses.
    """
    uniform = [line for line in lines if line["task"] == task and line.get("scorer") == "uniform"]
    lowest = min(uniform, key=lambda line: line["planned_bytes"])
    lost = [name for name in ("metric", "nll") if better(lowest, name, "full") < 0]
    return [*lost, "kl"] if lost else []


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def render(lines: Sequence[Line], budget: str) -> "Table":
    """One study at one budget: contenders down, tasks across."""
    from rich.table import Table

    tasks = _unique(line["task"] for line in lines)
    of_budget = [line for line in lines if line["budget"] == budget]
    [random] = [line for line in of_budget if line["contender"] == "random" and line["task"] == tasks[0]]
    quantizer = STUDIES[lines[0]["study"]].quantizer
    fitted = ", fitted on inputs of the full-precision model" if quantizer == "gptq" else ""
    table = Table(
        title=f"{lines[0]['study']}{fitted}, {budget}, n {random['n']} per task. Metric in % with its paired "
        "difference to full precision; NLL and KL in millinats per answer token as differences to the mean of random, "
        "negative is better, their intervals over items and seeds. Bold: better than the mean of random after Holm's "
        "correction for all contenders of the column; (-): worse; no mark: cannot be told. Uniform at the lowest bits "
        "has fewer bytes"
    )
    table.add_column("contender")
    table.add_column("bits")
    for task in tasks:
        for column in ("metric", "NLL", "KL"):
            table.add_column(f"{task} {column}", justify="right")
    marks = _marks(of_budget)
    for contender in _unique(line["contender"] for line in of_budget):
        rows = {line["task"]: line for line in of_budget if line["contender"] == contender}
        bits = " / ".join(_unique(f"{rows[task]['average_bits']:.2f}" for task in tasks if task in rows))
        cells = []
        for task in tasks:
            verdict = [marks.get((task, contender, name), 0) for name in QUANTITIES]
            cells += _cells(rows.get(task), verdict)
        table.add_row(contender, bits, *cells)
    return table


def _marks(of_budget: Sequence[Line]) -> dict[tuple[str, str, str], int]:
    """By task, contender and quantity: better than the mean of random (1), worse (-1), or neither."""
    marks: dict[tuple[str, str, str], int] = {}
    for task in _unique(line["task"] for line in of_budget):
        judged = [line for line in of_budget if line["task"] == task and "scorer" in line]
        for name in QUANTITIES:
            found = verdicts(judged, name, "random")
            marks |= {(task, line["contender"], name): mark for line, mark in zip(judged, found, strict=True)}
    return marks


def summary(studies: Mapping[str, Sequence[Line]]) -> "Table":
    """What each contender's plans do on average: contenders down, studies across.

    Args:
        studies: lines by the study's name.
    """
    from rich.table import Table

    table = Table(
        title="KL to full precision divided by that of 20 random orders at the same bytes, geometric mean over tasks "
        "and budgets; in brackets, in how many of these cases the KL is below the mean of random and in how many above "
        "it, after Holm's correction for all contenders of a case"
    )
    table.add_column("plan")
    rows: dict[str, list[str]] = {contender: [] for contender in SUMMARY}
    for name, lines in studies.items():
        table.add_column(name, justify="right")
        ratios: dict[str, list[float]] = {contender: [] for contender in SUMMARY}
        verdict: dict[str, list[int]] = {contender: [] for contender in SUMMARY}
        for budget in STUDIES[name].budgets:
            of_budget = [line for line in lines if line["budget"] == budget]
            marks = _marks(of_budget)
            random = {line["task"]: line["kl"][0] for line in of_budget if line["contender"] == "random"}
            for line in of_budget:
                row = re.sub(f"of ({'|'.join(TASKS)})", "of another task", line["contender"])
                if row in rows:
                    ratios[row].append(line["kl"][0] / random[line["task"]])
                    verdict[row].append(marks[line["task"], line["contender"], "kl"])
        for contender, cells in rows.items():
            found = verdict[contender]
            mean = math.exp(sum(map(math.log, ratios[contender])) / len(found)) if found else 0.0
            cells.append(f"{mean:.2f} ({found.count(1)} below, {found.count(-1)} above)" if found else "-")
    for contender, cells in rows.items():
        table.add_row(contender, *cells)
    return table


def points(studies: Mapping[str, Sequence[Line]]) -> "Table":
    """What they mean for a task's metric: a few contenders at the middle budget, studies and tasks across.

    Args:
        studies: as `summary`.
    """
    from rich.table import Table

    table = Table(title="The same in points of the task's metric lost to full precision, at the middle budget")
    table.add_column("plan")
    rows: dict[str, list[str]] = {contender: [] for contender in IN_POINTS}
    for name, lines in studies.items():
        budget = STUDIES[name].budgets[1]
        for task in _unique(line["task"] for line in lines):
            table.add_column(f"{name}, {budget}: {task}", justify="right")
            found = {line["contender"]: line for line in lines if (line["task"], line["budget"]) == (task, budget)}
            for contender, cells in rows.items():
                lost = -100 * found[contender]["metric_to_full"][0] if contender in found else None
                cells.append("-" if lost is None else f"{lost:z.1f}")
    for contender, cells in rows.items():
        table.add_row(contender, *cells)
    return table


def _cells(line: Line | None, verdict: Sequence[int]) -> list[str]:
    """Of one task; the verdict is that of every quantity."""
    if line is None:
        return ["-"] * 3
    if line["contender"] == "random":
        spread = {name: line["over_seeds"][name] for name in QUANTITIES}
        low, high = (100 * bound(spread["metric"]) for bound in (min, max))
        return [
            f"{100 * line['metric'][0]:.1f} (seeds {low:.1f} to {high:.1f})",
            *(
                f"= {1e3 * line[name][0]:.2f} (seeds {1e3 * min(spread[name]):.2f} to {1e3 * max(spread[name]):.2f})"
                for name in ("nll", "kl")
            ),
        ]
    metric = f"{100 * line['metric'][0]:.1f} ({_shown(line, 'metric', 'full')})"
    shown = [metric, *(_shown(line, name, "random") for name in ("nll", "kl"))]
    return [_marked(text, mark) for text, mark in zip(shown, verdict, strict=True)]


def _marked(text: str, verdict: int) -> str:
    return f"**{text}**" if verdict > 0 else f"{text} (-)" if verdict < 0 else text


def read_lines(study: str) -> list[Line]:
    """A study's committed lines."""
    return [json.loads(line) for line in STUDIES[study].results.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run studies, or print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="what to run, one after another")
    parser.add_argument("--table", nargs="+", choices=STUDIES, help="only print what these found")
    parser.add_argument("--work", type=Path, default=Path(".bench/accuracy"), help="kept for the next run")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--items",
        type=int,
        help="only the first so many test items, to try: evaluations are kept in --work under names of their own, no "
        "results file is written and no table printed",
    )
    arguments = parser.parse_args()
    if bool(arguments.studies) == bool(arguments.table):
        parser.error(f"say which studies to run, or --table and which to print: {', '.join(STUDIES)}")
    from rich.console import Console

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that do the work
    console = Console(width=250)
    if not arguments.table:
        _run([STUDIES[name] for name in arguments.studies], arguments.work, arguments.jobs, arguments.items)
    for name in arguments.table or ([] if arguments.items else arguments.studies):
        lines = read_lines(name)
        for budget in STUDIES[name].budgets:
            console.print(render(lines, budget))
        for sentence in must_hold(lines):
            console.print(f"- {sentence}")
        for budget in STUDIES[name].budgets:
            for sentence in comparisons(lines, budget):
                console.print(f"- {sentence}")


def _run(studies: Sequence[Study], work: Path, jobs: int, items: int | None) -> None:
    """Every task of every study in processes of their own; a study's file is written when its last task ends."""
    work.mkdir(parents=True, exist_ok=True)
    if any(study.model == "conditioned" for study in studies):
        model_of(next(study for study in studies if study.model == "conditioned"), work)
    found: dict[str, dict[str, list[Line]]] = {study.name: {} for study in studies}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        # The longest first, so that no process waits for it at the end.
        running = {
            pool.submit(run_task, study, task, work, items): (study, task)
            for study in studies
            for task in reversed(TASKS)
        }
        for future in as_completed(running):
            study, task = running[future]
            found[study.name][task] = future.result()
            print(f"{study.name} {task}: done", flush=True)
            if len(found[study.name]) == len(TASKS) and not items:
                lines = [line for name in TASKS for line in found[study.name][name]]
                study.results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
