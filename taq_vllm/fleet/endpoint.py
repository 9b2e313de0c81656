"""The endpoint: vllm-router in front of the fleet's servers, which it is told of as soon as it runs.

    python -m taq_vllm.fleet.endpoint HOST PORT TASK=URL ...

The router (the vLLM project's own) sends a request to a healthy server of the model that it names, as it is, and the
answer back as it is: an unknown model is refused by a vLLM server, with OpenAI's 404, and so is a request without the
key that the servers ask for. It tries no request twice, since a generation that was cut off may have been half read. A
server that is gone is left out until its health check answers again.

This process starts the router, registers the servers (the router forgets them when it ends) and lives as long as it.
"""

import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import httpx

from taq_vllm.fleet.services import SCRIPTS

ROUTER = SCRIPTS / "vllm-router"
_HEALTH_INTERVAL_S = 2
_START_TIMEOUT_S = 60


def router_command(host: str, port: int) -> list[str]:
    """How vllm-router is started; its metrics are on a free port of loopback."""
    return [
        str(ROUTER),
        *("--host", host, "--port", str(port), "--enable-igw", "--policy", "power_of_two"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(_free_port())),
        *("--disable-retries", "--cb-timeout-duration-secs", str(_HEALTH_INTERVAL_S), "--cb-success-threshold", "1"),
        *("--health-check-interval-secs", str(_HEALTH_INTERVAL_S), "--health-failure-threshold", "1"),
        *("--health-success-threshold", "1", "--log-level", "warning"),
    ]


def main(arguments: list[str]) -> int:
    """Run the router until it ends or this process is told to.

    Returns:
        The router's exit code.
    """
    host, port, *workers = arguments
    router = subprocess.Popen(router_command(host, int(port)))

    def stop(number: int, frame: FrameType | None) -> None:
        router.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    local = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        _register(f"http://{local}:{port}", workers, router)
        return router.wait()
    finally:
        router.kill()


def _register(url: str, workers: list[str], router: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(base_url=url, trust_env=False) as client:
        while True:
            try:
                client.get("/health").raise_for_status()
                break
            except httpx.HTTPError:
                if router.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        for worker in workers:
            task, _, server = worker.partition("=")
            client.post("/workers", json={"url": server, "model_id": task}).raise_for_status()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
