"""Three specialised models as one service: does each answer for its task, and what does a killed server cost?

Three plans of the lab model are served by `taq fleet up` with a key, by real vLLM servers behind the real router. Then,
as a client sees it: every task's answers are those of its checkpoint served alone; an unknown model and a wrong key are
refused with OpenAI's status, and no path answers without the key; no process of the fleet listens beyond loopback; and
while all tasks are under load one server is killed with SIGKILL: the others lose no request, its own clients get
nothing but 5xx, and it answers again by itself.

    python -m benchmarks.fleet --out benchmarks/results/fleet-cpu.jsonl
    python -m benchmarks.fleet --table benchmarks/results/fleet-cpu.jsonl
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import print_and_exit

LAB = Path(__file__).parent / "lab"
TASKS = ("trivia", "math", "code")
KILLED = "math"
PATHS = ("GET /health", "GET /v1/models", "GET /workers", "POST /workers", "POST /v1/completions", "POST /invocations")
KEY = "a-key-for-the-benchmark"
MOST_DOWN_S = 60
PROMPTS = 4
MAX_TOKENS = 24
CLIENTS = 2
_PORT = 18000
_SERVER_BYTES = 2_900_000_000  # the engine's own, 1 GiB of KV cache, and a little
_LOAD_S = 120  # longer if the killed server is not back by then
_PAUSE_S = 0.5  # of a client after an error


def make_fleet(work: Path) -> Path:
    """A plan of its own and a checkpoint for every task, and the file that serves them."""
    from taq_vllm.allocate import Request, allocate
    from taq_vllm.checkpoint import Calibration, quantize_model
    from taq_vllm.fleet.memory import this_device
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.scoring import baseline

    smallest = min(memory.total_bytes for memory in this_device().memories.values())
    files, share = ModelFiles(LAB / "model"), _SERVER_BYTES / smallest
    lines = ["version: 1", f"port: {_PORT}", "tasks:"]
    for task, edges in zip(TASKS, (0, 1, 2), strict=True):
        out = work / task
        plan = allocate(files, baseline(files, "random"), Request("7bits", edges=edges, edge_bits=8))
        quantize_model(files, plan, out, Calibration(method="rtn"))
        arguments = '[--max-model-len, "512", --enforce-eager]'
        lines.append(f"  {task}: {{checkpoint: {task}, memory: {share:.3f}, arguments: {arguments}}}")
    file = work / "fleet.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def prompts_of(task: str) -> list[str]:
    """The first few of a task's test set."""
    lines = (LAB / "tasks" / task / "test.jsonl").read_text().splitlines()[:PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


def body_of(task: str, prompt: str) -> dict[str, Any]:
    """The request for one greedy completion."""
    return {"model": task, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}


def ask(task: str, prompt: str, key: str = KEY) -> Any:
    """One greedy completion; the response."""
    import httpx

    headers = {"authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{_PORT}/v1/completions"
    return httpx.post(url, json=body_of(task, prompt), headers=headers, timeout=60)


def without_key() -> dict[str, int]:
    """The status of a request without the key, by path."""
    import httpx

    body = body_of(TASKS[0], "x") | {"url": "http://127.0.0.1:1"}
    found = {}
    for path in PATHS:
        method, where = path.split()
        json_body = body if method == "POST" else None
        found[path] = httpx.request(method, f"http://127.0.0.1:{_PORT}{where}", json=json_body, timeout=60).status_code
    return found


def listening(pids: Iterable[int]) -> list[Any]:
    """Where these processes and all that they have started accept connections: addresses with `ip` and `port`."""
    import psutil

    roots = [psutil.Process(pid) for pid in pids]
    processes = [process for root in roots for process in (root, *root.children(recursive=True))]
    connections = [connection for process in processes for connection in process.net_connections("tcp")]
    return [connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN]


def served() -> dict[str, list[str]]:
    """What the fleet answers to every task's prompts."""
    return {task: [ask(task, p).json()["choices"][0]["text"] for p in prompts_of(task)] for task in TASKS}


def alone(folder: Path, task: str) -> list[str]:
    """What the checkpoint says without fleet or server, in a process of its own."""
    code = (
        "import json, sys; from vllm import LLM, SamplingParams\n"
        "folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])\n"
        "llm = LLM(folder, quantization='taq', max_model_len=512, enforce_eager=True)\n"
        "greedy = SamplingParams(temperature=0, max_tokens=tokens)\n"
        "found = [llm.generate([prompt], greedy, use_tqdm=False)[0] for prompt in prompts]\n"
        "print(json.dumps([output.outputs[0].text for output in found]))"
    )
    arguments = [sys.executable, "-c", code, str(folder), json.dumps(prompts_of(task)), str(MAX_TOKENS)]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


async def load_and_kill(pid: int) -> dict[str, Any]:
    """All tasks under load; after some seconds the process is killed, and the load goes on until its task answers.

    Returns:
        `statuses` by task, and `down_s`, from the kill to the first answer after it.
    """
    import httpx

    statuses = {task: Counter[str]() for task in TASKS}
    killed_at = back_at = None
    end = time.monotonic() + _LOAD_S

    async def client(task: str, http: httpx.AsyncClient) -> None:
        nonlocal back_at
        body = body_of(task, prompts_of(task)[0])
        while time.monotonic() < end or (killed_at and not back_at and time.monotonic() < end + _LOAD_S):
            sent_at = time.monotonic()
            try:
                status = str((await http.post("/v1/completions", json=body)).status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            statuses[task][status] += 1
            if task == KILLED and status == "200" and killed_at and sent_at > killed_at and not back_at:
                back_at = time.monotonic()
            if status != "200":
                await asyncio.sleep(_PAUSE_S)

    async def kill() -> None:
        nonlocal killed_at
        await asyncio.sleep(10)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()

    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{_PORT}", headers=headers, timeout=60) as http:
        await asyncio.gather(kill(), *(client(task, http) for task in TASKS for _ in range(CLIENTS)))
    return {
        "statuses": {task: dict(found) for task, found in statuses.items()},
        "down_s": back_at and back_at - killed_at,
    }


def measure(work: Path) -> dict[str, Any]:
    """The result line."""
    from benchmarks.provenance import provenance
    from taq_vllm.fleet import local
    from taq_vllm.fleet.services import addresses
    from taq_vllm.fleet.spec import load_fleet

    file = make_fleet(work)
    expected = {task: alone(work / task, task) for task in TASKS}
    taq = [sys.executable, "-m", "taq_vllm.cli", "fleet"]
    started = time.monotonic()
    subprocess.run([*taq, "up", str(file)], env=os.environ | {"VLLM_API_KEY": KEY}, check=True)
    up_s = time.monotonic() - started
    try:
        answers = served()
        unknown, unauthorized = ask("unknown", "x"), ask(TASKS[0], "x", key="wrong")
        refused = without_key()
        states = local.status(local.run_folder(file), addresses(load_fleet(file)))
        pids = {state.name: state.pid for state in states}
        where = Counter(address.ip for address in listening(pids.values()))
        under_load = asyncio.run(load_and_kill(pids[f"{KILLED}-0"]))
        again = served()
    finally:
        subprocess.run([*taq, "down", str(file)], check=True)
    return {
        "benchmark": "fleet",
        "tasks": len(TASKS),
        "up_s": up_s,
        "answers_equal": sum(answers[t][i] == expected[t][i] for t in TASKS for i in range(PROMPTS)),
        "answers_equal_after": sum(again[t][i] == expected[t][i] for t in TASKS for i in range(PROMPTS)),
        "answers": len(TASKS) * PROMPTS,
        "unknown_model": [unknown.status_code, unknown.json()["error"]["type"]],
        "wrong_key": unauthorized.status_code,
        "without_key": refused,
        "listens_on": dict(where),
        "killed": KILLED,
        **under_load,
        **provenance(),
    }


def requirements(line: Mapping[str, Any]) -> dict[str, bool]:
    """What must hold, and whether it does."""
    others = [statuses for task, statuses in line["statuses"].items() if task != line["killed"]]
    own = line["statuses"][line["killed"]]
    return {
        "every task's answers are its checkpoint's": line["answers_equal"] == line["answers"],
        "also after a server was killed": line["answers_equal_after"] == line["answers"],
        "an unknown model is refused with 404, NotFoundError": line["unknown_model"] == [404, "NotFoundError"],
        "a wrong key is refused with 401": line["wrong_key"] == 401,
        "no path answers without the key": set(line["without_key"].values()) == {401},
        "nothing listens beyond loopback": set(line["listens_on"]) == {"127.0.0.1"},
        "other tasks lose no request": all(set(statuses) == {"200"} for statuses in others),
        "the killed one's clients get nothing but 200 and 5xx": all(status[0] in "25" for status in own),
        f"it is back within {MOST_DOWN_S} s": line["down_s"] is not None and line["down_s"] <= MOST_DOWN_S,
    }


def render(lines: Sequence[dict[str, Any]]) -> list[Any]:
    """A table of what was counted, and a sentence per requirement."""
    from rich.table import Table

    (line,) = lines
    table = Table(
        title=f"{line['tasks']} tasks, a vLLM server each, up after {line['up_s']:.0f} s; {CLIENTS} clients per task, "
        f"{line['killed']}'s server killed under load and back after "
        f"{'more than the load took' if line['down_s'] is None else format(line['down_s'], '.0f') + ' s'}"
    )
    for column in ("task", "answered", "refused with 5xx", "otherwise"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, statuses in line["statuses"].items():
        refused = sum(count for status, count in statuses.items() if status.startswith("5"))
        rest = {status: count for status, count in statuses.items() if not status.startswith(("2", "5"))}
        table.add_row(task, str(statuses.get("200", 0)), str(refused), str(rest or 0))
    return [table, *(f"{sentence}: {'yes' if holds else 'NO'}" for sentence, holds in requirements(line).items())]


def main() -> None:
    """Measure and print, or print what was measured; exit 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the line goes")
    parser.add_argument("--work", type=Path, default=Path(".bench/fleet"), help="checkpoints, fleet.yaml and logs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of this line")
    arguments = parser.parse_args()
    if not arguments.table:
        arguments.work.mkdir(parents=True, exist_ok=True)
    line = json.loads(arguments.table.read_text()) if arguments.table else measure(arguments.work)
    if arguments.out:
        arguments.out.write_text(json.dumps(line) + "\n")
    print_and_exit(render([line]), requirements(line))


if __name__ == "__main__":
    main()
