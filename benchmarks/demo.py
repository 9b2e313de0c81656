"""The main job from end to end on the lab model: `make demo`.

For each of three tasks: score every layer (TAQ and the oracle TAQO) and every matrix (KL, what `taq` does if it is not
told otherwise), spend the same bytes on four plans (edges first, TAQ, TAQO, KL), write the specialised checkpoints
beside uniform 8 and 4 bits, evaluate all of them with the real vLLM engine on the task's test items, and compare them
item by item. One checkpoint is then served by a real `vllm serve` on loopback and asked over HTTP. Everything lands in
one folder; finished work is not repeated.

The model is the *conditioned* lab model (sigma 1.0, seed 0): the same function as the plain one, checked bit for bit,
with channels of very different size as large models have, which makes 4 bits matter. The plain one is shown beside it.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Before torch and vLLM are imported: threads that wait do not spin, and the engine takes little memory.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from rich.console import Console

from benchmarks.lab.condition import check_same_function, condition
from benchmarks.provenance import provenance
from benchmarks.server import ask, vllm_serve
from taq_vllm.allocate import Request, allocate
from taq_vllm.checkpoint import Calibration, quantize_model, verify
from taq_vllm.evaluate import Engine, Result, compare
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan, write_atomically
from taq_vllm.report import (
    Row,
    TaskPanel,
    agreement,
    relevance_figure,
    results_markdown,
    results_table,
    winner,
)
from taq_vllm.scores import Scores
from taq_vllm.scoring import baseline, score
from taq_vllm.tasks import Task, load_task
from taq_vllm.units import layer_of

LAB = Path(__file__).parent / "lab"
TASKS = ("trivia", "math", "code")
SIGMA, SEED = 1.0, 0
CHECK_PROMPTS = 4  # per task, for the check that conditioning left the function as it was
ORACLE_EXAMPLES = 128
CALIBRATION = Calibration(examples=128)
"""A quarter of what `taq quantize` reads, for the sake of time."""
UNIFORM = {"uniform 8-bit": "8.2bits", "uniform 4-bit": "4.2bits"}
CONTENDERS = ("edges", "TAQ", "TAQO", "KL")
"""`KL` decides matrix by matrix, the others layer by layer."""
FULL, PLAIN_FULL, PLAIN_4 = "full precision", "plain: full precision", "plain: uniform 4-bit"

console = Console(width=None if sys.stdout.isatty() else 130, soft_wrap=True)


@dataclass(frozen=True)
class Made:
    """What the offline half made for one task."""

    task: Task
    taq: Scores
    taqo: Scores
    kl: Scores
    plans: dict[str, Plan]
    checkpoints: dict[str, Path]


def say(step: str) -> None:
    """A heading."""
    console.print(f"\n[bold]{step}[/]")


def make_model(out: Path) -> Path:
    """The conditioned model, checked against the plain one."""
    say("1. The lab model, conditioned (sigma 1.0, seed 0): same function, 4 bits matter")
    model = condition(LAB / "model", out / "model", SIGMA, SEED)
    prompts = [example.prompt for name in TASKS for example in load_task(LAB / "tasks" / name).test[:CHECK_PROMPTS]]
    logits = check_same_function(LAB / "model", model, prompts)
    console.print(f"{model}: {logits} logit vectors of {len(prompts)} prompts equal the plain model's bit for bit")
    return model


def first_layers(scores: Scores) -> list[int]:
    """The three that need precision most."""
    return [layer_of(unit) for unit in scores.ranking[:3]]


def make_checkpoints(model: Path, name: str, budget: str, out: Path) -> Made:
    """Score, plan, quantize and verify for one task."""
    say(f"2. {name}: what the task needs of each layer, plans at {budget}, checkpoints")
    task = load_task(LAB / "tasks" / name)
    files, plain = ModelFiles(model), ModelFiles(LAB / "model")
    folder = out / name
    taq, _ = score(files, task, "taq", folder / "scores-taq.json")
    oracle = {"max_examples": ORACLE_EXAMPLES}
    taqo, _ = score(files, task, "taqo", folder / "scores-taqo.json", oracle, granularity="layer")
    kl, _ = score(files, task, "kl", folder / "scores-kl.json")
    found = agreement(taq, taqo)
    sure = [str(layer_of(s.unit)) for s in taqo.units if s.from_zero]
    console.print(
        f"TAQ's first three layers: {first_layers(taq)}, the oracle's: {first_layers(taqo)}; "
        f"Kendall's tau between their rankings {found.tau:+.2f} (p {found.p_value:.2f})\n"
        f"layers whose drop at 4 bits can be told from zero (n {ORACLE_EXAMPLES}): {', '.join(sure) or 'none'}; "
        "the others are ranked by the answer's likelihood"
    )
    orders = {"edges": baseline(files, "edges"), "TAQ": taq, "TAQO": taqo}
    plans = {label: allocate(files, None, Request(bits, "uniform")) for label, bits in UNIFORM.items()}
    plans |= {label: allocate(files, scores, Request(budget, "monotone")) for label, scores in orders.items()}
    sizes = {plans[label].budget.disk_bytes for label in orders}
    if len(sizes) > 1:
        raise RuntimeError("the plans by layer differ in size: choose a budget at which they do not")
    plans["KL"] = allocate(files, kl, Request(f"{sizes.pop()}B"))
    checkpoints = {}
    for label, plan in plans.items():
        slug = label.replace(" ", "-").lower() + (f"-{budget}" if label in CONTENDERS else "")
        plan.save(folder / "plans" / f"{slug}.json")
        checkpoints[label] = folder / slug
        quantize_model(files, plan, checkpoints[label], CALIBRATION, task)
        verify(checkpoints[label])
    plan = allocate(plain, None, Request(UNIFORM["uniform 4-bit"], "uniform"))
    checkpoints[PLAIN_4] = folder / "plain-uniform-4-bit"
    quantize_model(plain, plan, checkpoints[PLAIN_4], CALIBRATION, task)
    for label in CONTENDERS:
        layers: dict[int, list[str]] = {}
        for matrix, entry in plans[label].matrices.items():
            layers.setdefault(layer_of(matrix), []).append(str(entry.bits))
        bits = " ".join(found[0] if len(set(found)) == 1 else "/".join(found) for found in layers.values())
        console.print(
            f"{label:>5}: bits per layer {bits}; average "
            f"{plans[label].budget.average_bits:.3f}, {plans[label].budget.disk_bytes / 1e6:.2f} MB"
        )
    return Made(task, taq, taqo, kl, plans, checkpoints)


def evaluate_all(model: Path, made: list[Made], limit: int, out: Path) -> dict[str, list[Row]]:
    """All contenders on all tasks, by the real engine; one engine start per checkpoint."""
    say("3. Evaluation with the real vLLM engine (greedy, batched), the tests of generated code in a sandbox")
    results = out / "results.jsonl"
    by_label: dict[tuple[str, str], Result] = {}

    def run(path: Path, label: str, quantization: str | None, tasks: list[Task]) -> None:
        with Engine(path, quantization=quantization, engine_args={"enforce_eager": True}) as engine:
            for task in tasks:
                result, fresh = engine.evaluate(
                    task, limit=limit, allow_code_execution=True, label=label, results=results
                )
                by_label[task.name, label] = result
                note = "" if fresh else " (from an earlier run)"
                console.print(f"{task.name}, {label}: {result.metric} {100 * result.mean:.1f}{note}")

    run(model, FULL, None, [m.task for m in made])
    run(LAB / "model", PLAIN_FULL, None, [m.task for m in made])
    for one in made:
        for label, path in one.checkpoints.items():
            run(path, label, "taq", [one.task])
    order = [FULL, *UNIFORM, *CONTENDERS, PLAIN_FULL, PLAIN_4]
    return {
        one.task.name: [Row(label, by_label[one.task.name, label], label in CONTENDERS) for label in order]
        for one in made
    }


def serve_one(made: Made, label: str, questions: int = 3) -> None:
    """A real server for one checkpoint, asked over HTTP."""
    path = made.checkpoints[label]
    say(f"4. vllm serve {path} --quantization taq, asked over HTTP")
    started = time.monotonic()
    with vllm_serve(path, ["--quantization", "taq", "--enforce-eager"]) as client:
        console.print(f"the server answers after {time.monotonic() - started:.0f} s")
        for example in made.task.test[:questions]:
            answer = ask(client, path, example.prompt, made.task.max_new_tokens)
            console.print(f"{example.prompt}{answer}   (expected: {example.answers[0]})", markup=False, highlight=False)


def show(made: list[Made], rows: dict[str, list[Row]], budget: str, out: Path) -> None:
    """Tables and the picture."""
    say("5. What came of it")
    title = f"conditioned lab model (sigma {SIGMA}, seed {SEED})"
    text = [f"# Results: {title}, budget {budget}\n"]
    for one in made:
        name = one.task.name
        table = results_table(f"{name}, {title}, n {rows[name][0].result.n}", rows[name], rows[name][0].result)
        console.print(table)
        best = winner(rows[name])
        verdict = (
            f"{best} beats the other plans of its size: every paired interval excludes zero."
            if best
            else f"None of {', '.join(CONTENDERS)} beats all others: some paired interval holds zero."
        )
        console.print(f"{name}: {verdict}")
        text.append(f"## {name}\n\n{results_markdown(rows[name], rows[name][0].result)}\n{verdict}\n")
    text.append(
        "Rows marked *plain* are the model before conditioning, the same function. Differences are paired over items, "
        "against full precision. A bold row beats the other plans of its size on every paired interval.\n"
    )
    write_atomically(out / "results.md", "\n".join(text))
    write_summary(made, rows, budget, out / "summary.jsonl")
    panels = [
        TaskPanel(one.task.name, one.taq, one.taqo, one.kl, {label: one.plans[label] for label in CONTENDERS})
        for one in made
    ]
    relevance_figure(panels, f"Layer relevance per task, {title}; plans at {budget}", out / "relevance.png")


def write_summary(made: list[Made], rows: dict[str, list[Row]], budget: str, path: Path) -> None:
    """One line per task and plan without the items: what tables elsewhere are made from."""
    stamp = provenance()
    lines = []
    for one in made:
        name = one.task.name
        reference = rows[name][0].result
        found = agreement(one.taq, one.taqo)
        for row in rows[name]:
            result, paired = row.result, compare(row.result, reference)
            lines.append(
                {
                    "benchmark": "demo",
                    "task": name,
                    "plan": row.label,
                    "model": "lab, plain"
                    if row.label.startswith("plain")
                    else f"lab, conditioned (sigma {SIGMA}, seed {SEED})",
                    "budget": budget,
                    "metric": result.metric,
                    "n": result.n,
                    "mean": result.mean,
                    "interval": [result.low, result.high],
                    "difference_to_full": [paired.mean, paired.low, paired.high],
                    "answer_nll": [result.answer_nll, result.answer_nll_low, result.answer_nll_high],
                    "average_bits": result.average_bits,
                    "weight_bytes": result.weight_bytes,
                    "output_tokens_per_s": result.output_tokens_per_s,
                    "best_of_its_size": row.label == winner(rows[name]),
                    "rank_agreement_taq_taqo": [found.tau, found.p_value],
                    **stamp,
                }
            )
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is made")
    parser.add_argument("--budget", default="5.0bits", help="of the plans: average bits or bytes")
    parser.add_argument("--test-items", type=int, default=200, help="test items per task, of 500")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="the tasks to do")
    arguments = parser.parse_args()
    out = arguments.out
    started = time.monotonic()
    model = make_model(out)
    made = [make_checkpoints(model, name, arguments.budget, out) for name in arguments.tasks]
    rows = evaluate_all(model, made, arguments.test_items, out)
    serve_one(made[0], "KL")
    show(made, rows, arguments.budget, out)
    console.print(
        f"\n{(time.monotonic() - started) / 60:.1f} minutes. Look at {out / 'relevance.png'} (why each layer got its "
        f"bits) and {out / 'results.md'}; then README.md, 'Your own model and task'."
    )


if __name__ == "__main__":
    main()
