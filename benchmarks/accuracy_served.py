"""The paper's two baselines and this project's plans at the same bytes, all served by the real vLLM engine.

AWQ (arXiv 2511.06516, section 4.1) is made by llm-compressor in an environment of its own: `AWQ` with the mixed
math, trivia and code calibration pool, `AWQ-OT` with the task's own calibration set; 4 bits, asymmetric, groups of
128, all linears but the head. Every quantizer that reads examples reads the first 128 of a task's 512 calibration
examples, or the first 42 of each of the three tasks' (126). Beside them stand plans of the same bytes, uniform 4 bits
as `taq quantize` writes it by `--method rtn`, `clip`, `gptq` and `awq` (own and mixed calibration), and, with more
bytes and therefore compared with neither, plans per matrix by the `kl` scorer and the exact knapsack. Lab model, plain
and conditioned (whose channel scales AWQ can undo: a win there proves nothing), 500 test items per task, greedy.

    make peers-llmcompressor
    python -m benchmarks.accuracy_served                        # makes what is missing, evaluates, writes the lines
    python -m benchmarks.accuracy_served --table                # only prints them

One line more per task compares the offline evaluator of `benchmarks/accuracy.py` with the engine on uniform 4 bits.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy import LAB, RESULTS, STUDIES, TASKS, Study, contenders, model_of, scores_of, task_of

if TYPE_CHECKING:
    from rich.table import Table

    from taq_vllm.evaluate import Result
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import Plan
    from taq_vllm.tasks import Task

LINES = RESULTS / "accuracy-awq.jsonl"
PEER_PYTHON = Path(".venv-llmcompressor/bin/python")
EXAMPLES = 128
"""Calibration examples of every quantizer, of 512; a mixed pool has 42 from each task, 126 in all."""
LOWEST, PLANNED = "4.16bits", "4.82bits"
FULL = "full precision"

Line = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A checkpoint to evaluate.

    Attributes:
        label: in the table.
        path: its folder.
        quantization: what vLLM is told; None for what the checkpoint says itself.
        rival: the label of the baseline of the same bytes that it is compared with.
        examples: for calibration; None for what reads none.
    """

    label: str
    path: Path
    quantization: str | None
    rival: str | None = None
    examples: int | None = None


def make_peers(model: Path, out: Path) -> None:
    """AWQ checkpoints by llm-compressor, in its own environment.

    Raises:
        ValueError: the environment is not there.
    """
    if not PEER_PYTHON.exists():
        raise ValueError(f"no {PEER_PYTHON}: make it with `make peers-llmcompressor`")
    script = Path(__file__).parent / "peers" / "make_awq_checkpoints.py"
    arguments = [str(model), str(out), "--tasks", str(LAB / "tasks"), "--examples", str(EXAMPLES)]
    subprocess.run([str(PEER_PYTHON), str(script), *arguments], check=True)


def mixed_pool(tasks: "Sequence[Task]") -> "Task":
    """A task whose calibration set has a third of its examples from each of three."""
    each = EXAMPLES // len(tasks)
    examples = tuple(example for task in tasks for example in task.calibration[:each])
    digests = "+".join(str(task.calibration_sha256) for task in tasks)
    return replace(tasks[0], name="mixed", calibration=examples, calibration_sha256=digests)


def make_ours(study: Study, files: "ModelFiles", task: str, work: Path) -> list[Served]:
    """Plans at the bytes of AWQ, and one at more."""
    from taq_vllm.allocate import Request, allocate
    from taq_vllm.checkpoint import Calibration, quantize_model

    own = task_of(study, task)
    mixed = mixed_pool([task_of(study, name) for name in ("math", "trivia", "code")])
    uniform = allocate(files, None, Request(LOWEST, "uniform"))
    kl = next(each for each in contenders(study) if each.name == "kl (knapsack, per matrix)")
    planned = allocate(files, scores_of(study, files, kl, task, work), Request(PLANNED))
    made = []

    def add(label: str, plan: "Plan", method: str, calibration: "Task", rival: str | None) -> None:
        slug = label.replace(",", "").replace(" ", "-")
        # What does not read the task is the same for all.
        folder = work / "served" / study.model / ("any" if method == "rtn" or calibration is mixed else task) / slug
        quantize_model(files, plan, folder, Calibration(method=method, examples=EXAMPLES), calibration, device="cpu")
        examples = None if method == "rtn" else min(EXAMPLES, len(calibration.calibration))
        made.append(Served(label, folder, "taq", rival, examples))

    add("uniform 4-bit, rtn", uniform, "rtn", own, "AWQ-OT")
    add("uniform 4-bit, clip, own", uniform, "clip", own, "AWQ-OT")
    add("uniform 4-bit, gptq, own", uniform, "gptq", own, "AWQ-OT")
    add("uniform 4-bit, awq, mixed", uniform, "awq", mixed, "AWQ")
    add("uniform 4-bit, awq, own", uniform, "awq", own, "AWQ-OT")
    for method in ("awq", "gptq"):  # with more bytes than either baseline
        add(f"kl per matrix, {method}, own", planned, method, own, None)
    return made


def run(model: str, work: Path, limit: int | None = None) -> list[Line]:
    """Everything on one model; one engine start per checkpoint.

    Args:
        model: `conditioned` or `plain`.
        work: checkpoints, scores and results, kept for the next run.
        limit: only the first so many test items.
    """
    from benchmarks.provenance import provenance
    from taq_vllm.evaluate import Engine

    study = STUDIES[f"{model}-rtn"]
    files = model_of(study, work)
    peers = work / "awq" / model
    make_peers(files.path, peers)
    results = work / f"served-{model}.jsonl"
    found: dict[tuple[str, str], Result] = {}
    made: dict[str, Served] = {}

    def evaluate(served: Served, tasks: Sequence[str]) -> None:
        made[served.label] = served
        with Engine(served.path, quantization=served.quantization, engine_args={"enforce_eager": True}) as engine:
            for task in tasks:
                found[task, served.label], _ = engine.evaluate(
                    task_of(study, task), limit=limit, allow_code_execution=True, label=served.label, results=results
                )

    evaluate(Served(FULL, files.path, None), TASKS)
    mixed = len(TASKS) * (EXAMPLES // len(TASKS))
    evaluate(Served("AWQ", peers / "awq-mixed", None, None, mixed), TASKS)
    for task in TASKS:
        evaluate(Served("AWQ-OT", peers / f"awq-ot-{task}", None, None, EXAMPLES), [task])
        for served in make_ours(study, files, task, work):
            evaluate(served, [task])
    lines = [_line(model, task, found, made[label]) for task in TASKS for of, label in found if of == task]
    lines += [_validation(study, files, task, found[task, "uniform 4-bit, rtn"], limit) for task in TASKS]
    stamp = provenance()
    return [line | stamp for line in lines]


def _line(model: str, task: str, found: "dict[tuple[str, str], Result]", served: Served) -> Line:
    from taq_vllm.evaluate import compare

    result = found[task, served.label]
    line = {
        "benchmark": "accuracy-awq",
        "model": model,
        "task": task,
        "contender": served.label,
        "calibration_examples": served.examples,
        "metric": result.metric,
        "n": result.n,
        "mean": [result.mean, result.low, result.high],
        "answer_nll": [result.answer_nll, result.answer_nll_low, result.answer_nll_high],
        "weight_bytes": result.weight_bytes,
    }
    references = {"full": FULL} | ({"rival": served.rival} if served.rival else {})
    for name, reference in references.items():
        for quantity in ("metric", "nll"):
            paired = compare(result, found[task, reference], quantity)
            line[f"{quantity}_to_{name}"] = [paired.mean, paired.low, paired.high, paired.p_value]
    return line | {"rival": served.rival}


def _validation(study: Study, files: "ModelFiles", task: str, served: "Result", limit: int | None) -> Line:
    """The offline evaluator beside the engine, on the same plan and codes."""
    from benchmarks.offline import Evaluator, FakeQuantized
    from taq_vllm.plan import SYMMETRIC

    evaluator = Evaluator(
        files, task_of(study, task), FakeQuantized(files, SYMMETRIC), limit, allow_code_execution=True
    )
    items = evaluator(dict.fromkeys(files.matrices, 4))
    return {
        "benchmark": "accuracy-validation",
        "model": study.model,
        "task": task,
        "n": served.n,
        "offline": sum(items.metric) / len(items.metric),
        "served": served.mean,
        "items_that_differ": sum(one != other for one, other in zip(items.metric, served.item_scores, strict=True)),
        "offline_nll": sum(items.nll) / sum(evaluator.tokens),
        "served_nll": served.answer_nll,
    }


def render(lines: Sequence[Line]) -> "list[Table | str]":
    """The table, and how near the offline evaluator is."""
    from rich.table import Table

    rows = [line for line in lines if line["benchmark"] == "accuracy-awq"]
    table = Table(
        title=f"served by vLLM, n {rows[0]['n']} per task, 95% intervals; paired differences, NLL in millinats per "
        "answer token. Rival, of the same bytes: AWQ for mixed calibration, AWQ-OT for the task's own; the plan per "
        "matrix has more bytes and none. Bold: better than its rival, interval without zero"
    )
    for column in ("model", "task", "contender", "metric, %", "to full", "to rival", "NLL", "NLL to rival", "MB"):
        table.add_column(column, justify="left" if column in ("model", "task", "contender") else "right")
    for line in rows:
        to_rival, nll_to_rival = "-", "-"
        if line["rival"]:
            to_rival = _difference(line["metric_to_rival"], 100, 1, higher_is_better=True)
            nll_to_rival = _difference(line["nll_to_rival"], 1000, 2, higher_is_better=False)
        table.add_row(
            line["model"],
            line["task"],
            line["contender"],
            f"{100 * line['mean'][0]:.1f} [{100 * line['mean'][1]:.1f}, {100 * line['mean'][2]:.1f}]",
            "-" if line["contender"] == FULL else f"{100 * line['metric_to_full'][0]:+.1f}",
            to_rival,
            f"{1000 * line['answer_nll'][0]:.2f}",
            nll_to_rival,
            f"{line['weight_bytes'] / 1e6:.2f}",
        )
    sentences = [
        f"offline evaluator and engine, uniform 4-bit rtn, {line['model']}, {line['task']}: "
        f"{100 * line['offline']:.1f} and {100 * line['served']:.1f} %, {line['items_that_differ']} of {line['n']} "
        "items differ; NLL "
        f"{1000 * line['offline_nll']:.2f} and {1000 * line['served_nll']:.2f} millinats"
        for line in lines
        if line["benchmark"] == "accuracy-validation"
    ]
    return [table, *sentences]


def summary(lines: Sequence[Line]) -> "Table":
    """Contenders down, models and tasks across."""
    from rich.table import Table

    rows = [line for line in lines if line["benchmark"] == "accuracy-awq"]
    table = Table(
        title=f"served by vLLM, n {rows[0]['n']} per task: points of the metric lost to full precision / NLL added, in "
        "millinats per answer token; bold: NLL below that of its rival of the same bytes (AWQ for mixed calibration, "
        "AWQ-OT for the task's own), paired interval without zero"
    )
    table.add_column("contender")
    table.add_column("MB", justify="right")
    found: dict[str, dict[tuple[str, str], str]] = {}
    sizes: dict[str, set[str]] = {}
    columns = [(line["model"], line["task"]) for line in rows if line["contender"] == FULL]
    for line in rows:
        if line["contender"] == FULL:
            table.add_column(f"{line['model']}: {line['task']}", justify="right")
            continue
        text = f"{-100 * line['metric_to_full'][0]:z.1f} / {1000 * line['nll_to_full'][0]:z.2f}"
        won = line["rival"] and line["nll_to_rival"][2] < 0
        found.setdefault(line["contender"], {})[line["model"], line["task"]] = f"**{text}**" if won else text
        sizes.setdefault(line["contender"], set()).add(f"{line['weight_bytes'] / 1e6:.2f}")
    for contender, cells in found.items():
        shown = sorted(sizes[contender])
        megabytes = shown[0] if len(shown) == 1 else f"{shown[0]}-{shown[-1]}"
        table.add_row(contender, megabytes, *(cells.get(column, "-") for column in columns))
    return table


def _difference(values: Sequence[float], factor: float, digits: int, *, higher_is_better: bool) -> str:
    mean, low, high = (factor * value for value in values[:3])
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    won = low > 0 if higher_is_better else high < 0
    return f"**{text}**" if won else text


def read_lines() -> list[Line]:
    """The committed lines."""
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Make, evaluate and print, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print what the committed lines say")
    parser.add_argument("--models", nargs="+", choices=("conditioned", "plain"), default=["conditioned", "plain"])
    parser.add_argument("--work", type=Path, default=Path(".bench/accuracy"), help="kept for the next run")
    parser.add_argument("--items", type=int, help="only the first so many test items; nothing is written")
    arguments = parser.parse_args()
    from rich.console import Console

    if arguments.table:
        lines = read_lines()
    else:
        lines = [line for model in arguments.models for line in run(model, arguments.work, arguments.items)]
        if not arguments.items:
            LINES.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    console = Console(width=250)
    for part in render(lines):
        console.print(part)


if __name__ == "__main__":
    main()
