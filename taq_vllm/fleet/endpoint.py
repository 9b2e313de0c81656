"""The endpoint: vllm-router in front of the fleet's servers, which it is told of as soon as it runs.

    python -m taq_vllm.fleet.endpoint HOST PORT TASK=URL ...

The router (the vLLM project's own) sends a request to a healthy server of the model that it names, and the answer back
as it is, streamed ones in pieces. An unknown model is refused by a vLLM server, with OpenAI's 404. The router tries no
request twice, since a generation that was cut off may have been half read. A server that is gone is left out until its
health check answers again.

Of completions and chats it reads the JSON and writes it again. Fields that it does not know arrive as they were (as
`structured_outputs`), but not within a message, `stream_options` or `json_schema`; `null` ones are left out, and some
get their default (`"ignore_eos": false`); a message's `reasoning_content` becomes `reasoning`. A value that it does not
take gets 422 from it, where vLLM has 400; among them are some that vLLM takes: no `prompt` beside `prompt_embeds`, a
tool without `parameters`, a `response_format` of type `structural_tag`, `"logprobs": null` of a chat.

Of other paths (`/v1/responses`, `/tokenize`) it is drawn when it starts whether it forwards them or answers 503: it
holds a second router, without servers, and asks the one that comes first.

With a key in VLLM_API_KEY every path asks for it, also the router's administration, `/health`, and those that vLLM
leaves open (`/invocations`, `/tokenize`); else 401, as a line of text. Without a key every path is open.

This process starts the router, registers the servers (the router forgets them when it ends), answers whether a key is
right, and lives as long as the router.
"""

import hmac
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType

import httpx

from taq_vllm.fleet import router as routing
from taq_vllm.fleet.services import bearer, check_key
from taq_vllm.fleet.spec import KEY_VARIABLE

_HEALTH_INTERVAL_S = 2
_START_TIMEOUT_S = 60


def router_command(host: str, port: int, check: str = routing.NO_CHECK) -> list[str]:
    """How vllm-router is started; its metrics are on a free port of loopback, and ask for no key."""
    return [
        *(sys.executable, "-m", routing.__name__, check),
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

    Raises:
        ValueError: no request can bring the key.
    """
    host, port, *workers = arguments
    key = os.environ.get(KEY_VARIABLE)
    check_key(key)
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"no {KEY_VARIABLE}: whoever reaches {host}:{port} can ask the models and register servers", flush=True)
    check = _answer_for_keys(key) if key else routing.NO_CHECK
    # A proxy is for what lies outside: the router would send the servers' requests there, and the key.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    router = subprocess.Popen(router_command(host, int(port), check), env=environment)

    def stop(number: int, frame: FrameType | None) -> None:
        router.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    local = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        _register(f"http://{local}:{port}", workers, router, bearer(key))
        return router.wait()
    finally:
        router.kill()


def _answer_for_keys(key: str) -> str:
    """Say on a port of loopback whether a request has the key; the URL.

    The router remembers what it was told of a key until it ends. Servers may be away when it asks, and then it would
    refuse the right key from there on; this process runs as long as the router.
    """
    right = bearer(key)["authorization"].encode()

    class Check(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("authorization", "").encode()
            self.send_response(200 if hmac.compare_digest(given, right) else 401)
            self.send_header("content-length", "0")
            self.end_headers()

        timeout = 10  # seconds, for one who connects and asks nothing

        def log_message(self, *arguments: object) -> None:
            """Nothing: requests are the router's to log."""

    class Checks(ThreadingHTTPServer):
        request_queue_size = 1024  # a connection that is turned away is a key that was refused

    server = Checks(("127.0.0.1", 0), Check)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def _register(url: str, workers: list[str], router: subprocess.Popen[bytes], headers: dict[str, str]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(base_url=url, headers=headers, timeout=_START_TIMEOUT_S, trust_env=False) as client:
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
