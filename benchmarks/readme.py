"""Writes tables from the committed result lines: a summary into README.md, all into benchmarks/results/README.md.

python -m benchmarks.readme            # writes both; --check fails where they are not what the lines say
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by benchmarks/readme.py -->", "<!-- end of results -->"

ACCURACY_STUDIES = ("conditioned-rtn", "plain-rtn", "dense-rtn", "conditioned-gptq", "plain-gptq", "dense-gptq")
"""In the order of their tables; one that was not run yet has no lines and no table."""
STUDIES_IN_POINTS = ("conditioned-rtn", "dense-rtn", "dense-gptq")
"""Those where uniform plans lose points."""

Line = dict[str, Any]


def demo_table(lines: list[Line]) -> str:
    """Every plan of every task."""
    first = lines[0]
    text = [
        "**Accuracy at equal bytes** (`make demo ARGS='--test-items 500'`): the lab model "
        f"*{_variants(lines)}*, n {first['n']} per task, budget {first['budget']}, greedy, vLLM's CPU engine. In "
        "brackets 95% intervals; differences are paired with full precision. Bold: beats the other plans of its size "
        "on every paired interval.\n",
        "| task | plan | metric, % | difference | answer NLL | bits | MB | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        mark = "**" if line["best_of_its_size"] else ""
        difference = "-"
        if line["plan"] != "full precision":
            mean, low, high = (100 * value for value in line["difference_to_full"])
            difference = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        bits = "16" if line["average_bits"] is None else f"{line['average_bits']:.2f}"
        low, high = (100 * value for value in line["interval"])
        text.append(
            f"| {line['task']} ({line['metric']}) | {mark}{line['plan']}{mark} | {100 * line['mean']:.1f} [{low:.1f}, "
            f"{high:.1f}] | {difference} | {line['answer_nll'][0]:.4f} | {bits} | {line['weight_bytes'] / 1e6:.2f} | "
            f"{line['output_tokens_per_s']:.0f} |"
        )
    agreements = {line["task"]: line["rank_agreement_taq_taqo"] for line in lines}
    taus = ", ".join(f"{task} {tau:+.2f} (p {p:.2f})" for task, (tau, p) in agreements.items())
    text.append(
        f"\nKendall's tau between TAQ's ranking of the layers and the oracle's: {taus}. Tokens/s of a model this small "
        "are the engine's overhead, on a machine with other work; speed is measured below."
    )
    return "\n".join(text)


def parity_table(lines: list[Line]) -> str:
    """Distance of every way to serve from transformers."""
    text = [
        f"**Served logits** (`python -m benchmarks.parity`): distance to transformers, which loads the same checkpoint "
        f"without this project; lab model (plain), a plan with q at 4, k at 8 and v at 16 bits in one layer, "
        f"{lines[0]['prompts']} prompts. The first line is the yardstick: stock vLLM on the dequantized weights.\n",
        "| served by | mean abs. log-probability difference | x yardstick | greedy texts equal | others within noise |",
        "|---|---:|---:|---:|---:|",
    ]
    yardstick = lines[0]["mean_abs_logprob_difference"]
    for line in lines:
        others = line["prompts"] - line["texts_equal"]
        distance = line["mean_abs_logprob_difference"]
        to_stock = f", {line['texts_equal_to_stock']} equal stock vLLM's" if "texts_equal_to_stock" in line else ""
        text.append(
            f"| {line['way']} | {distance:.4f} | {distance / yardstick:.2f} | "
            f"{line['texts_equal']}/{line['prompts']}{to_stock} | {line['flips_within_noise']}/{others} |"
        )
    return "\n".join(text)


def decode_table(lines: list[Line]) -> str:
    """Speed and memory, and what must hold."""
    from benchmarks.decode import render

    table, profile, *sentences = render(lines)
    title = "**A decode step on a CPU** (`python -m benchmarks.decode`): "
    return "\n\n".join([title + _markdown(table), _bullets(sentences), "Where the time goes: " + _markdown(profile)])


def serving_table(lines: list[Line]) -> str:
    """Servers against each other, and what must hold."""
    from benchmarks.serving import render

    table, *sentences = render(lines)
    title = "**Servers on a CPU** (`python -m benchmarks.serving`): "
    return f"{title}{_markdown(table)}\n\n{_bullets(sentences)}"


def kernels_table(lines: list[Line]) -> str:
    """Speed of the kernel alone, and what must hold."""
    from benchmarks.kernels import readme_section

    title = "**The kernel alone on a CPU** (`python -m benchmarks.kernels --device cpu --threads 1`, then 2)"
    return (
        f"{title}: the fastest of the calls of one interleaved run, weights from memory. *half*: half of the bytes at "
        "4, half at 8 bits. Without bf16 instructions: `python -m benchmarks.kernels --report "
        "benchmarks/results/kernels-cpu.jsonl`.\n\n"
        "![Speedup over bf16 by tokens](kernels-cpu-bf16.png)\n\n"
        f"{readme_section(lines)}"
    )


def planning_table(lines: list[Line]) -> str:
    """Cost of scoring."""
    from benchmarks.planning import render

    return "**Cost of scoring** (`python -m benchmarks.planning`): " + _markdown(render(lines))


def fleet_table(lines: list[Line]) -> str:
    """Three models as one service."""
    from benchmarks.fleet import render

    table, *sentences = render(lines)
    title = "**One service for three tasks** (`python -m benchmarks.fleet`): "
    return f"{title}{_markdown(table)}\n\n{_bullets(sentences)}"


def soak_table(lines: list[Line]) -> str:
    """What a server is after ten minutes of mixed load."""
    from benchmarks.soak import render

    load, malformed, *sentences = render(lines)
    title = "**Ten minutes of mixed load** (`python -m benchmarks.soak`): "
    return "\n\n".join([title + _markdown(load), _markdown(malformed), _bullets(sentences)])


def large_table(lines: list[Line]) -> str:
    """Models larger than what they may take in memory."""
    from benchmarks.large import render

    commands = "`python -m benchmarks.large --size 8b --method rtn`, `--size 1b`"
    return f"**Models beyond memory** ({commands}): " + _markdown(render(lines))


def accuracy_table(lines: list[Line]) -> str:
    """One study of all scorers and their comparisons at its middle budget, and what must hold at every budget."""
    from benchmarks.accuracy import STUDIES, comparisons, must_hold, render

    study = STUDIES[lines[0]["study"]]
    title = f"**All scorers at equal bytes: {study.name}** (`python -m benchmarks.accuracy {study.name}`): "
    holds = [f"- {sentence}" for sentence in (*must_hold(lines), *comparisons(lines, study.budgets[1]))]
    if study.quantizer == "gptq":
        holds.append(
            "- `gptq` here is fitted once per matrix, on inputs of the full-precision model; `taq quantize` fits it on "
            "what the quantized matrices before it give."
        )
    others = f"All budgets, in tables and in sentences: `python -m benchmarks.accuracy --table {study.name}`."
    return "\n".join([title + _markdown(render(lines, study.budgets[1])), "", *holds, "", others])


def awq_table(lines: list[Line]) -> str:
    """The paper's baselines beside plans of the same bytes."""
    from benchmarks.accuracy_served import render

    table, *sentences = render(lines)
    title = "**AWQ and AWQ-OT, made by llm-compressor** (`python -m benchmarks.accuracy_served`): "
    return "\n".join([title + _markdown(table), "", *(f"- {sentence}" for sentence in sentences)])


def quantizers_table(lines: list[Line]) -> str:
    """What each method undoes of the damage, or how long it takes."""
    from benchmarks.quantizers import render

    flag = " --peer" if lines[0]["benchmark"] == "quantizers-time" else ""
    title = f"**Quantizers** (`python -m benchmarks.quantizers{flag}`): "
    return "\n\n".join(title + _markdown(table) for table in render(lines))


def _markdown(table: "Table", columns: Sequence[str] = ()) -> str:
    """A rich table as Markdown, its title as the sentence above; all columns if none are named."""
    headers = [column.header for column in table.columns]
    assert set(columns) <= set(headers), f"{columns} of {headers}"
    chosen = [column for column in table.columns if not columns or column.header in columns]
    rows = zip(*(column.cells for column in chosen), strict=True)
    header = [str(column.header) for column in chosen]
    lines = [f"{table.title}\n", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    cells = [[str(cell).replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def support_table(lines: list[Line]) -> str:
    """What of vLLM works with a mixed checkpoint, from the tests' own outcomes."""
    command = "python -m pytest -m feature --support benchmarks/results/support-cpu.jsonl"
    models = "models are random ones of the named configuration, narrower and of two layers, and the trained lab model"
    text = [f"**What works, tested on a CPU** (`{command}`); {models}\n", "| | compared | works |", "|---|---|---|"]
    for name in dict.fromkeys(line["feature"] for line in lines):
        found = [line for line in lines if line["feature"] == name]
        failed = any(line["outcome"] == "failed" for line in found)
        reasons = [line["reason"] for line in found if line["outcome"] == "skipped"]
        works = "**no**" if failed else f"not here: {reasons[0]}" if reasons else "yes"
        text.append(f"| {name} | {found[0]['compared']} | {works} |")
    return "\n".join(text)


SECTIONS: dict[str, Callable[[list[Line]], str]] = {
    **{f"accuracy-{name}.jsonl": accuracy_table for name in ACCURACY_STUDIES},
    "accuracy-awq.jsonl": awq_table,
    "quantizers-cpu.jsonl": quantizers_table,
    "quantizers-time-cpu.jsonl": quantizers_table,
    "demo-cpu.jsonl": demo_table,
    "parity-cpu.jsonl": parity_table,
    "support-cpu.jsonl": support_table,
    "serving-cpu.jsonl": serving_table,
    "serving-cpu-bf16.jsonl": serving_table,
    "decode-cpu.jsonl": decode_table,
    "decode-cpu-bf16.jsonl": decode_table,
    "kernels-cpu-bf16.jsonl": kernels_table,
    "planning.jsonl": planning_table,
    "large-cpu.jsonl": large_table,
    "fleet-cpu.jsonl": fleet_table,
    "soak-cpu.jsonl": soak_table,
}


def results() -> str:
    """All tables, and what they were measured on."""
    parts = []
    for name, section in SECTIONS.items():
        if lines := read(name):
            where = lines[0]
            versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if k != "vllm")
            preloaded = f"; preloaded: {', '.join(where['preloaded'])}" if where.get("preloaded") else ""
            commits = ", ".join(dict.fromkeys(line["commit"] for line in lines if "commit" in line))
            stamp = f"{where['processor']}, {where['cores']} cores{preloaded}; {versions}; commit {commits}; `{name}`"
            parts.append(f"{section(lines)}\n\n<sub>{stamp}</sub>")
    return "\n\n".join(parts)


def summary() -> str:
    """What a reader of README.md wants to know first."""
    from benchmarks import accuracy, accuracy_served, decode, fleet, large, quantizers, serving, soak
    from taq_vllm.methods import DEFAULT_EXAMPLES

    parts = []
    studies = {name: lines for name in ACCURACY_STUDIES if (lines := read(f"accuracy-{name}.jsonl"))}
    if studies:
        parts.append("**Which scorer makes the best plan, at equal bytes?** " + _markdown(accuracy.summary(studies)))
        in_points = {name: lines for name, lines in studies.items() if name in STUDIES_IN_POINTS}
        parts.append(_markdown(accuracy.points(in_points)))
    if lines := read("quantizers-cpu.jsonl"):
        parts.append("**Which quantizer?** " + _markdown(quantizers.summary(lines, DEFAULT_EXAMPLES)))
    if lines := read("accuracy-awq.jsonl"):
        parts.append("**Against llm-compressor's AWQ**, " + _markdown(accuracy_served.summary(lines)))
    if lines := read("serving-cpu-bf16.jsonl"):
        table, *sentences = serving.render(lines)
        parts.append(f"**Servers on a CPU**, {_markdown(table)}\n\n{_bullets(sentences)}")
    if lines := read("decode-cpu-bf16.jsonl"):
        shown = ("contender", "tokens/s, batch 1", "tokens/s, batch 8", "share of floor", "memory MB", "load s")
        table, profile, *_ = decode.render(lines)
        parts.append("**A decode step on a CPU**, without a server, " + _markdown(table, shown))
        parts.append("Where its time goes: " + _markdown(profile))
    if lines := read("fleet-cpu.jsonl"):
        parts.append("**One service for three tasks**\n\n" + _bullets(fleet.render(lines)[1:]))
    if lines := read("soak-cpu.jsonl"):
        parts.append("**Ten minutes of mixed load on one server**\n\n" + _bullets(soak.render(lines)[2:]))
    if lines := read("support-cpu.jsonl"):
        parts.append(support_table(lines))
    if lines := read("large-cpu.jsonl"):
        shown = ("model", "GB", "quantizer", "out GB", "score, s (peak GB)", "quantize, s (peak GB)", "below 6 GB")
        parts.append("**Models beyond memory**: " + _markdown(large.render(lines), shown))
    return "\n\n".join(parts)


def read(name: str) -> list[Line]:
    """Committed lines; none where the file is not there."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _variants(lines: list[Line]) -> str:
    return next(line["model"].removeprefix("lab, ") for line in lines if "conditioned" in line["model"])


WRITTEN: dict[Path, Callable[[], str]] = {ROOT / "README.md": summary, RESULTS / "README.md": results}
"""Who writes what stands between the marks of which file."""


def rewritten(path: Path) -> str:
    """A file's text with what its part between the marks has to be."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{WRITTEN[path]()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Rewrite both files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    arguments = parser.parse_args()
    fresh = {path: rewritten(path) for path in WRITTEN}
    stale = [path.relative_to(ROOT) for path, text in fresh.items() if text != path.read_text(encoding="utf-8")]
    if arguments.check and stale:
        sys.exit(f"{', '.join(map(str, stale))}: not what benchmarks/results say; run python -m benchmarks.readme")
    for path, text in fresh.items() if not arguments.check else ():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
