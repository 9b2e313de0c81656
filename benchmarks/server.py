"""A real server with OpenAI's API on loopback, for as long as a block of code needs it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import APIConnectionError, InternalServerError, OpenAI

from benchmarks.measuring import status_bytes

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a path.
        client: that talks to it.
        pid: of its first process.
        start_s: from its start to its first answer.
    """

    url: str
    client: OpenAI
    pid: int
    start_s: float


@contextlib.contextmanager
def vllm_serve(model: Path, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[OpenAI]:
    """Serve a model with vLLM; the server and all its processes are ended on leaving.

    Args:
        model: the folder.
        arguments: of `vllm serve`, besides host and port.
        env: variables set on top of this process's.

    Yields:
        A client that talks to the server.

    Raises:
        RuntimeError: the server ended or did not answer in time; holds the end of its log.
    """
    with serving(vllm_command(model, arguments), env) as server:
        yield server.client


def vllm_command(model: Path, arguments: Sequence[str]) -> list[str]:
    """What serves a model with vLLM, besides host and port."""
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(model), *arguments]


@contextlib.contextmanager
def serving(command: Sequence[str], env: Mapping[str, str | None] | None = None) -> Iterator[Server]:
    """Run a server until the block ends; all its processes are ended then.

    Args:
        command: that takes `--host` and `--port` too.
        env: variables on top of this process's, as for `environment`.

    Raises:
        RuntimeError: the server ended or did not answer in time; holds the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        variables = environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(env or {})})
        started = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT, env=variables)
        try:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            _wait_until_it_answers(client, process, log)
            yield Server(url, client, process.pid, time.monotonic() - started)
        finally:
            _end(process)


def environment(env: Mapping[str, str | None]) -> dict[str, str]:
    """This process's variables with others on top; those that are None are taken away."""
    return {name: value for name, value in {**os.environ, **env}.items() if value is not None}


def memory_bytes(pid: int) -> int:
    """Anonymous memory of a server's processes: without files that are mapped, which others may share."""
    import psutil

    root = psutil.Process(pid)
    return sum(status_bytes("RssAnon", process.pid) for process in [root, *root.children(recursive=True)])


def ask(client: OpenAI, model: Path, prompt: str, max_tokens: int) -> str:
    """One greedy completion."""
    answer = client.completions.create(model=str(model), prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


def _wait_until_it_answers(client: OpenAI, server: subprocess.Popen, log: tempfile.SpooledTemporaryFile) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.models.list()
            return
        except (APIConnectionError, InternalServerError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                name = " ".join(map(str, server.args[:2]))
                raise RuntimeError(f"{name} did not answer; the end of its log:\n{log.read()[-3000:]}") from error
            time.sleep(0.5)


def _end(server: subprocess.Popen) -> None:
    """End the server's process group, also what a dead or stubborn leader left of it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_S)
