"""Which scorer makes the best plan? All of them at equal bytes, on the lab models, against random orders.

A *study* is a model and a quantizer: `conditioned-rtn` (the conditioned lab model, round to nearest), `plain-rtn`,
`dense-rtn` (the knowledge-dense model, bitwidths 3, 4 and 8), and the same with `clip` (ranges fitted on the task's
own calibration inputs of the full-precision model, so that a matrix is fitted once per bitwidth). In each, for every
task and budget, every contender gets the same bytes: `random` (20 seeds), `edges`, `uniform`, `weight-error`, `taq`
with both signs of the stability term and with relative variance, and `taqo`, `kl`, `loss`; the last four also with the
exact knapsack over their costs, per layer and per matrix. Plans are evaluated offline with fake-quantized weights
(`offline.py`) on 500 test items: the task's metric, answer NLL and KL to full precision.

Statistics are paired over items: against full precision, against uniform at the lowest bits, and against the mean of
`random`, which is the mean over its seeds of every item. The spread over the seeds is printed beside it.

    python -m benchmarks.accuracy conditioned-rtn plain-rtn          # runs and writes results/accuracy-STUDY.jsonl
    python -m benchmarks.accuracy --table conditioned-rtn            # only prints tables and what must hold
    python -m benchmarks.accuracy --validate                         # the offline evaluator against the real engine

Finished evaluations lie in `--work` and are not repeated; plans that are equal are evaluated once.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taq_vllm.metrics import CONFIDENCE, bootstrap_interval, paired_difference, wilson_interval

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
CALIBRATION_EXAMPLES = 128
"""Read by `clip`, as `taq quantize` does."""
SCORED_EXAMPLES = 128
"""Read by every scorer that reads examples, so that none is better for having seen more."""
QUANTITIES = ("metric", "nll", "kl")
PROOF = ("taqo", "kl", "loss")
"""At least one of these has to beat random."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A model and a quantizer.

    Attributes:
        model: `conditioned`, `plain` or `dense`.
        quantizer: `rtn` or `clip`.
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
        Study("conditioned", "clip"),
        Study("plain", "clip"),
        Study("dense", "clip", **DENSE),
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
    """

    scorer: str
    allocation: str = "monotone"
    granularity: str = "layer"
    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None

    @property
    def name(self) -> str:
        """In tables."""
        shown = [f"{key} {value}" for key, value in self.settings.items() if key not in ("max_examples", "bits")]
        parts = [*shown, *([self.allocation] if self.allocation == "knapsack" else [])]
        if self.scorer == "uniform":
            parts.append("the lowest bits" if self.allocation == "uniform" else "spread over the layers")
        parts += ["per matrix"] if self.granularity == "module" else []
        parts += [f"of {self.task}"] if self.task else []
        return f"{self.scorer} ({', '.join(parts)})" if parts else self.scorer


def contenders(study: Study) -> list[Contender]:
    """Everyone but random, which has seeds."""
    taq = [{"stability_sign": sign, **variance} for variance in ({}, {"variance": "relative"}) for sign in (-1, 1)]
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
    return found


def foreign_contenders(study: Study, task: str) -> list[Contender]:
    """Plans that were made for the other tasks, of the scorers that read examples."""
    return [
        Contender(scorer, "knapsack", "layer", _scorer_settings(scorer, study), other)
        for scorer in PROOF
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
    settings = "-".join(f"{key}-{value}" for key, value in contender.settings.items())
    slug = re.sub("[^a-z0-9_-]+", ".", f"{contender.scorer}-{contender.granularity}-{settings}")
    return score(
        files,
        task_of(study, of_task),
        contender.scorer,
        work / "scores" / study.model / of_task / f"{slug}.json",
        contender.settings,
        device="cpu",
        force=True,  # what lies there was made with other defaults
        granularity=contender.granularity,
    )[0]


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

    from benchmarks.offline import Evaluator, FakeQuantized, check_groups, input_energy
    from benchmarks.provenance import provenance
    from taq_vllm.plan import SYMMETRIC

    logging.disable_progress_bar()
    files, task = model_of(study, work), task_of(study, task_name)
    check_groups(files)
    planned = _plans(study, files, task_name, work)
    identity = {
        "evaluator": 1,
        "fingerprint": files.ref.fingerprint,
        "quantizer": study.quantizer,
        "calibration": task.calibration_sha256 if study.quantizer == "clip" else None,
        "test": task.test_sha256,
        "items": items,
    }
    suffix = f"-{items}" if items else ""
    journal = Journal(work / f"evaluations-{study.name}-{task_name}{suffix}.jsonl", identity)
    full = dict.fromkeys(files.matrices, 16)
    lowest = dict.fromkeys(files.matrices, study.menu[0])
    waiting = {_key(bits): bits for bits in (full, lowest, *(p.bits for p in planned)) if bits not in journal}
    tokens_file = work / f"tokens-{study.model}-{task_name}{suffix}.json"
    if waiting or not tokens_file.exists():
        importance = input_energy(files, task, CALIBRATION_EXAMPLES) if study.quantizer == "clip" else None
        evaluator = Evaluator(
            files, task, FakeQuantized(files, SYMMETRIC, importance), items, allow_code_execution=True
        )
        _evaluate_all(evaluator, [waiting[key] for key in sorted(waiting)], journal, f"{study.name} {task_name}")
        tokens_file.write_text(json.dumps(evaluator.tokens))
    tokens = json.loads(tokens_file.read_text())
    stamp = provenance()
    lines = make_lines(study, task, planned, journal, full, lowest, tokens)
    return [line | stamp for line in lines]


def _plans(study: Study, files: "ModelFiles", task: str, work: Path) -> list[Planned]:
    from taq_vllm.allocate import Request, allocate

    everyone = [Contender("random", settings={"seed": seed}) for seed in range(SEEDS)] + contenders(study)
    if study.model == "dense":
        everyone += foreign_contenders(study, task)
    planned = []
    for contender in everyone:
        scores = scores_of(study, files, contender, task, work)
        for budget in study.budgets:
            request = Request(budget, contender.allocation, granularity=contender.granularity, menu=study.menu)
            planned.append(Planned(contender, budget, allocate(files, scores, request)))
    return planned


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

    Args:
        study: model and quantizer.
        task: names and metric.
        planned: every plan, random's seeds included.
        journal: holds them all, and the two references.
        full: the full-precision plan.
        lowest: the uniform plan at the lowest bits.
        tokens: per test item's completion.
    """
    head = {"benchmark": "accuracy", "study": study.name, "task": task.name, "metric": task.metric}
    references = {"full": _values(journal[full]), "lowest": _values(journal[lowest])}
    lines = [
        head | {"budget": None, "contender": "full precision", "n": len(tokens)} | _summary(references["full"], tokens)
    ]
    for budget in study.budgets:
        of_budget = [one for one in planned if one.budget == budget]
        random = [one for one in of_budget if one.contender.scorer == "random"]
        seeds = [_values(journal[one.bits]) for one in random]
        mean = {name: np.mean([values[name] for values in seeds], axis=0) for name in QUANTITIES}
        compared = references | {"random": mean}
        line = _describe(random[0].plan, None) | _summary(mean, tokens) | _compared(mean, references, tokens)
        line["seeds"] = len(seeds)
        line["distinct_plans"] = len({_key(one.bits) for one in random})
        line["over_seeds"] = {name: [_mean(values[name], name, tokens) for values in seeds] for name in QUANTITIES}
        lines.append(head | {"budget": budget, "contender": "random", "n": len(tokens)} | line)
        cache: dict[str, Line] = {}
        for one in of_budget:
            if one.contender.scorer == "random":
                continue
            key = _key(one.bits)
            if key not in cache:
                values = _values(journal[one.bits])
                cache[key] = _summary(values, tokens) | _compared(values, compared, tokens)
            line = _describe(one.plan, one.contender) | cache[key]
            lines.append(head | {"budget": budget, "contender": one.contender.name, "n": len(tokens)} | line)
    return lines


def _values(items: "Items") -> dict[str, Any]:
    return {name: np.asarray(getattr(items, name)) for name in QUANTITIES}


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


def _weights(name: str, tokens: Sequence[int]) -> Sequence[int] | None:
    """NLL and KL are per token of the completions."""
    return None if name == "metric" else tokens


def _mean(values: Any, name: str, tokens: Sequence[int]) -> float:
    return float(values.mean() if name == "metric" else values.sum() / sum(tokens))


def _summary(values: Mapping[str, Any], tokens: Sequence[int]) -> Line:
    summary = {}
    for name in QUANTITIES:
        if name == "metric" and set(np.unique(values[name])) <= {0.0, 1.0}:
            low, high = wilson_interval(int(values[name].sum()), len(tokens))
        else:
            low, high = bootstrap_interval(values[name], _weights(name, tokens))
        summary[name] = _rounded([_mean(values[name], name, tokens), low, high])
    return summary


def _compared(values: Mapping[str, Any], references: Mapping[str, Mapping[str, Any]], tokens: Sequence[int]) -> Line:
    """`nll_to_random`: [difference, low, high, p] and so on; KL is already a distance to full precision."""
    line = {}
    for reference, others in references.items():
        for name in QUANTITIES:
            if (reference, name) != ("full", "kl"):
                found = paired_difference(values[name], others[name], _weights(name, tokens))
                line[f"{name}_to_{reference}"] = _rounded([found.mean, found.low, found.high, found.p_value])
    return line


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


# What the lines say.


def better(line: Line, name: str, reference: str) -> int:
    """1 if the line beats a reference with an interval that excludes zero, -1 if it loses, else 0."""
    _, low, high, _ = line[f"{name}_to_{reference}"]
    sign = 1 if name == "metric" else -1
    return sign * (int(low > 0) - int(high < 0))


def must_hold(lines: Sequence[Line]) -> list[str]:
    """Sentences: who beats the mean of random, wherever uniform at the lowest bits loses.

    A star: also after Holm's correction for the number of contenders that could have.
    """
    sentences = []
    head = lines[0]
    menu = STUDIES[head["study"]].menu
    for task in _unique(line["task"] for line in lines):
        for budget in _unique(line["budget"] for line in lines if line["budget"]):
            of_budget = [line for line in lines if (line["task"], line["budget"]) == (task, budget)]
            [random] = [line for line in of_budget if line["contender"] == "random"]
            parts = []
            for name in QUANTITIES:
                if not _uniform_loses(lines, task, name):
                    parts.append(f"{name}: uniform {menu[0]}-bit does not lose")
                    continue
                own = [line for line in of_budget if line.get("scorer") in PROOF and not line.get("scored_on")]
                corrected = holm([line[f"{name}_to_random"][3] for line in own])
                winners = [
                    f"{line['contender']}{'*' if p < 1 - CONFIDENCE else ''}"
                    for line, p in zip(own, corrected, strict=True)
                    if better(line, name, "random") > 0
                ]
                parts.append(f"{name}: {'holds, ' + ', '.join(winners) if winners else 'DOES NOT HOLD'}")
            sentences.append(
                f"{head['study']}, {task}, {budget} ({random['seeds']} random seeds, {random['distinct_plans']} plans"
                f"): {'; '.join(parts)}"
            )
    return sentences


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    most = 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = most
    return corrected


def _uniform_loses(lines: Sequence[Line], task: str, name: str) -> bool:
    """The smallest uniform plan against full precision; KL is a distance to it and needs no difference."""
    uniform = [line for line in lines if line["task"] == task and line.get("scorer") == "uniform"]
    lowest = min(uniform, key=lambda line: line["planned_bytes"])
    return lowest["kl"][1] > 0 if name == "kl" else better(lowest, name, "full") < 0


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def render(lines: Sequence[Line], budget: str) -> "Table":
    """One study at one budget: contenders down, tasks across."""
    from rich.table import Table

    tasks = _unique(line["task"] for line in lines)
    of_budget = [line for line in lines if line["budget"] == budget]
    [random] = [line for line in of_budget if line["contender"] == "random" and line["task"] == tasks[0]]
    table = Table(
        title=f"{lines[0]['study']}, {budget}, n {random['n']} per task. Metric in % with its paired difference to "
        "full precision; NLL and KL in millinats per answer token as differences to the mean of random, negative is "
        "better. Bold: better than random, interval without zero; (-): worse; no mark: cannot be told"
    )
    table.add_column("contender")
    table.add_column("bits")
    for task in tasks:
        for column in ("metric", "NLL", "KL"):
            table.add_column(f"{task} {column}", justify="right")
    for name in _unique(line["contender"] for line in of_budget):
        rows = {line["task"]: line for line in of_budget if line["contender"] == name}
        bits = " / ".join(_unique(f"{rows[task]['average_bits']:.2f}" for task in tasks if task in rows))
        cells = [cell for task in tasks for cell in _cells(rows.get(task), random is rows.get(task))]
        table.add_row(name, bits, *cells)
    return table


def _cells(line: Line | None, is_random: bool) -> list[str]:
    if line is None:
        return ["-"] * 3
    difference, low, high, _ = (100 * value for value in line["metric_to_full"])
    metric = f"{100 * line['metric'][0]:.1f} ({difference:+.1f} [{low:+.1f}, {high:+.1f}])"
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
    cells = [_marked(metric, better(line, "metric", "random"))]
    for name in ("nll", "kl"):
        difference, low, high, _ = (1e3 * value for value in line[f"{name}_to_random"])
        cells.append(_marked(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]", better(line, name, "random")))
    return cells


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
    parser.add_argument("--items", type=int, help="only the first so many test items; nothing is written")
    arguments = parser.parse_args()
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
