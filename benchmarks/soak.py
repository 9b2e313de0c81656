"""Ten minutes of everything at once: does the server of a plan stay what it was?

A mixed plan of the lab model is served by a real `vllm serve`, and beside it the model in 16 bits. To each of them
`vllm bench serve` sends requests of random lengths, round after round; at the same time clients break their connections
in the middle of an answer, and others send what no server should accept. Must hold: requests that were valid were all
answered, malformed ones got from both servers the same status, memory did not grow, and the answers are those of the
start, to the letter.

With glibc's malloc (2.36) memory does grow, with either model: the heap of vLLM's worker fragments. vLLM's own wheels
preload tcmalloc; where vLLM has none, preload it here (LD_PRELOAD; the line names it).

    python -m benchmarks.soak --out benchmarks/results/soak-cpu.jsonl
    python -m benchmarks.soak --table benchmarks/results/soak-cpu.jsonl
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measuring import print_and_exit
from benchmarks.random_model import make_prompts, quantize_cached
from benchmarks.server import Server, memory_bytes, serving, vllm_command

LAB = Path(__file__).parent / "lab"
MODEL_NAME = "model"
PLAN, REFERENCE = "plan", "16-bit"
MINUTES, LEAST_MINUTES = 10, 1
MAX_MODEL_LEN = 512
PROMPTS = 16
MAX_TOKENS = 24
ABORTERS = 2
LARGEST_BATCH = 24
VOCABULARY = 3072  # of the lab model
SAMPLE_S = 5
MOST_GROWTH = 0.01
"""Of the memory in the last third of the time over that in the second."""
VALID = {"model": MODEL_NAME, "prompt": "The", "max_tokens": 4, "temperature": 0}
MALFORMED: dict[str, bytes] = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[]",
    **{
        what: json.dumps(VALID | change).encode()
        for what, change in {
            "an unknown model": {"model": "another"},
            "a negative number of tokens": {"max_tokens": -1},
            "more tokens than the model has room for": {"max_tokens": 10**6},
            "a prompt that is too long": {"prompt": "word " * 4 * MAX_MODEL_LEN},
            "a number as prompt": {"prompt": 7},
            "tokens outside of the vocabulary": {"prompt": [10**6]},
            "a temperature in words": {"temperature": "hot"},
            "a negative temperature": {"temperature": -1},
            "too many log-probabilities": {"logprobs": 10**4},
            "a broken expression": {"structured_outputs": {"regex": "("}},
            "no samples": {"n": 0},
        }.items()
    },
}


def make_checkpoint(work: Path) -> Path:
    """The lab model with every bitwidth in it."""
    from taq_vllm.allocate import Request, allocate
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.scoring import baseline

    files, out = ModelFiles(LAB / "model"), work / "checkpoint"
    plan = allocate(files, baseline(files, "random"), Request("7bits", pins=("layers.3.self_attn.v_proj=16",)))
    quantize_cached(files, plan, out)
    return out


def serve_lab(model: Path, plugins: str) -> AbstractContextManager[Server]:
    """A server of the lab model or of its plan."""
    arguments = ["--served-model-name", MODEL_NAME, "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 28), "--disable-uvicorn-access-log"]
    env = {"VLLM_PLUGINS": plugins, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env["VLLM_CPU_KVCACHE_SPACE"] = None  # in whole GiB, and it would win over --kv-cache-memory-bytes
    # A server closes a connection that was idle for 5 s, and clients keep theirs for longer: of 800 requests 16 failed
    # with ServerDisconnectedError, none of 1200 since. Seen with a plan; it does not depend on the model.
    env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "3600"
    return serving(vllm_command(model, arguments), env | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})


def answers(server: Server) -> list[str]:
    """Greedy completions, one at a time."""
    lines = (LAB / "tasks/trivia/test.jsonl").read_text().splitlines()[:PROMPTS]
    return [
        server.client.completions.create(
            model=MODEL_NAME, prompt=json.loads(line)["prompt"], max_tokens=MAX_TOKENS, temperature=0
        )
        .choices[0]
        .text
        for line in lines
    ]


async def warm_up(server: Server, http: Any) -> None:
    """More and longer prompts at once than will come: malloc keeps what the largest batch has taken."""
    for seed in range(2):
        prompts = make_prompts(LARGEST_BATCH, MAX_MODEL_LEN - MAX_TOKENS, VOCABULARY, seed)
        bodies = [VALID | {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True} for prompt in prompts]
        url = f"{server.url}/v1/completions"
        for response in await asyncio.gather(*(http.post(url, json=body) for body in bodies)):
            response.raise_for_status()


class Load:
    """What is done to a server until a time has come, and what came of it."""

    def __init__(self, server: Server, end: float, work: Path) -> None:
        self.server, self.end, self.work = server, end, work
        self.completed = self.failed = self.aborted = 0
        self.errors: Counter[str] = Counter()
        self.memory: list[int] = []

    async def run(self, http: Any) -> None:
        """All at once."""
        self.work.mkdir(exist_ok=True)
        aborters = [self._abort(http, index) for index in range(ABORTERS)]
        await asyncio.gather(self._bench(), self._watch_memory(), *aborters)

    def found(self) -> dict[str, Any]:
        """For the result line."""
        counts = {"completed": self.completed, "failed": self.failed, "aborted": self.aborted}
        return {**counts, "errors": dict(self.errors), "memory_bytes": self.memory}

    async def _bench(self) -> None:
        """`vllm bench serve` with other lengths and another seed each time."""
        vllm = str(Path(sys.executable).parent / "vllm")
        out, log = self.work / "bench.json", self.work / "bench.log"
        round_ = 0
        while time.monotonic() < self.end:
            round_ += 1
            command = [vllm, "bench", "serve", "--base-url", self.server.url, "--model", MODEL_NAME]
            command += ["--tokenizer", str(LAB / "model"), "--dataset-name", "random", "--seed", str(round_)]
            command += ["--random-input-len", "128", "--random-output-len", "64", "--random-range-ratio", "0.9"]
            command += ["--num-prompts", "600", "--max-concurrency", "6", "--temperature", "0", "--disable-tqdm"]
            command += ["--save-result", "--save-detailed", "--result-dir", str(out.parent)]
            command += ["--result-filename", out.name]
            with log.open("w") as stream:
                process = await asyncio.create_subprocess_exec(*command, stdout=stream, stderr=stream)
                try:
                    await process.wait()
                finally:
                    if process.returncode is None:
                        process.kill()
            if process.returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"vllm bench serve ended with {process.returncode}; the end of {log}:\n{tail}")
            found = json.loads(out.read_text())
            out.unlink()
            self.completed += found["completed"]
            self.failed += found["failed"]
            self.errors.update(error.strip().splitlines()[-1] for error in found["errors"] if error)

    async def _abort(self, http: Any, index: int) -> None:
        """Requests for long answers whose connection is closed after one to eight chunks."""
        while time.monotonic() < self.end:
            body = VALID | {"prompt": f"{index} {self.aborted}", "max_tokens": 256, "stream": True, "ignore_eos": True}
            async with http.stream("POST", f"{self.server.url}/v1/completions", json=body) as response:
                chunks, wanted = 0, 1 + self.aborted % 8
                async for line in response.aiter_lines():
                    chunks += line.startswith("data:") and '"error"' not in line
                    if chunks == wanted:
                        break
            if chunks == wanted:
                self.aborted += 1
            else:
                self.failed += 1
                self.errors[f"{response.status_code} with {chunks} of {wanted} chunks"] += 1
            await asyncio.sleep(0.2)

    async def _watch_memory(self) -> None:
        while time.monotonic() < self.end:
            self.memory.append(await asyncio.to_thread(memory_bytes, self.server.pid))
            await asyncio.sleep(SAMPLE_S)


async def send_malformed(servers: Sequence[Server], end: float, http: Any) -> dict[str, Counter[str]]:
    """For each malformed request the statuses that the servers gave, in their order, as "400 400"."""
    headers = {"content-type": "application/json"}
    statuses: dict[str, Counter[str]] = {what: Counter() for what in MALFORMED}
    while time.monotonic() < end:
        for what, body in MALFORMED.items():
            given = [
                (await http.post(f"{server.url}/v1/completions", content=body, headers=headers)).status_code
                for server in servers
            ]
            statuses[what][" ".join(map(str, given))] += 1
        await asyncio.sleep(1)
    return statuses


async def load_servers(servers: Mapping[str, Server], minutes: float, work: Path) -> dict[str, Any]:
    """Everything at once on all servers: what came of it, for the result line."""
    import httpx

    async with httpx.AsyncClient(timeout=60) as http:
        for server in servers.values():
            await warm_up(server, http)
        end = time.monotonic() + 60 * minutes
        loads = {name: Load(server, end, work / name) for name, server in servers.items()}
        running = [load.run(http) for load in loads.values()]
        malformed, *_ = await asyncio.gather(send_malformed(list(servers.values()), end, http), *running)
    return {
        "servers": {name: load.found() for name, load in loads.items()},
        "malformed": {what: dict(counts) for what, counts in malformed.items()},
    }


def measure(work: Path, minutes: float) -> dict[str, Any]:
    """The result line."""
    from benchmarks.provenance import provenance

    checkpoint = make_checkpoint(work)
    with serve_lab(checkpoint, "taq") as server, serve_lab(LAB / "model", "") as reference:
        before = answers(server)
        found = asyncio.run(load_servers({PLAN: server, REFERENCE: reference}, minutes, work))
        after = answers(server)
    return {
        "benchmark": "soak",
        "minutes": minutes,
        **found,
        "answers": PROMPTS,
        "answers_equal": sum(a == b for a, b in zip(before, after, strict=True)),
        **provenance(),
    }


def growth(samples: Sequence[int]) -> float:
    """Mean memory in the last third of the time over that in the second, less 1."""
    third = len(samples) // 3
    return mean(samples[-third:]) / mean(samples[third : 2 * third]) - 1


def requirements(line: Mapping[str, Any]) -> dict[str, bool]:
    """What must hold, and whether it does."""
    pairs = [pair.split() for counts in line["malformed"].values() for pair in counts]
    plan = line["servers"][PLAN]
    grown, reference = (growth(line["servers"][name]["memory_bytes"]) for name in (PLAN, REFERENCE))
    return {
        "no valid request failed": plan["failed"] == 0 and plan["completed"] > 0,
        "malformed requests got from both servers the same status": all(ours == theirs for ours, theirs in pairs),
        "and none of 500 and more": all(int(ours) < 500 for ours, _ in pairs),
        f"memory grew by at most {MOST_GROWTH:.0%} ({grown:+.2%}; in 16 bits {reference:+.2%})": grown <= MOST_GROWTH,
        "the answers at the end are those of the start": line["answers_equal"] == line["answers"],
    }


def render(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Tables of the valid and of the malformed requests, and a sentence per requirement."""
    from rich.table import Table

    (line,) = lines
    load = Table(title=f"{line['minutes']:g} minutes; requests, and memory in MB")
    for column in ("server", "answered", "failed", "broken off", "memory least", "most", "growth"):
        load.add_column(column, justify="left" if column == "server" else "right")
    for name, found in line["servers"].items():
        memory, counts = found["memory_bytes"], (found[count] for count in ("completed", "failed", "aborted"))
        ends = (f"{end / 1e6:.0f}" for end in (min(memory), max(memory)))
        load.add_row(name, *map(str, counts), *ends, f"{growth(memory):+.2%}")
    table = Table(title="malformed requests")
    for column in ("what is wrong", "sent", "status", "from the 16-bit server"):
        table.add_column(column, justify="left" if column == "what is wrong" else "right")
    for what, counts in line["malformed"].items():
        ours, theirs = (", ".join(sorted({pair.split()[side] for pair in counts})) for side in (0, 1))
        table.add_row(what, str(sum(counts.values())), ours, theirs)
    return [load, table, *(f"{sentence}: {'yes' if holds else 'NO'}" for sentence, holds in requirements(line).items())]


def main() -> None:
    """Measure and print, or print what was measured; exit 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the line goes")
    parser.add_argument("--work", type=Path, default=Path(".bench/soak"), help="the checkpoint")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of this line")
    arguments = parser.parse_args()
    if arguments.minutes < LEAST_MINUTES:
        parser.error(f"got --minutes {arguments.minutes:g}; memory is read now and then: give at least {LEAST_MINUTES}")
    if not arguments.table:
        arguments.work.mkdir(parents=True, exist_ok=True)
    line = json.loads(arguments.table.read_text()) if arguments.table else measure(arguments.work, arguments.minutes)
    if arguments.out:
        arguments.out.write_text(json.dumps(line) + "\n")
    print_and_exit(render([line]), requirements(line))


if __name__ == "__main__":
    main()
