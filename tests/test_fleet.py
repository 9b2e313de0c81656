"""One service of several models: what is asked for, what fits, and real processes behind the real router.

The servers here are small ones that answer as vLLM does, so that starting, killing and routing are tested in seconds;
`python -m benchmarks.fleet` does the same with vLLM.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import kubernetes_validate
import psutil
import pytest
import yaml
from tiny_models import make_tiny

from benchmarks.fleet import listening
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.fleet import launcher, local, memory, render
from taq_vllm.fleet.services import Service, addresses, bearer, services
from taq_vllm.fleet.spec import Fleet, load_fleet
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan

GIB = 1 << 30
KEY = "a-key-that-is-nowhere-else"
CPU = memory.Device("cpu", 4, {"memory": memory.Memory("this machine", 24 * GIB, 18 * GIB)}, ("memory",))
GPUS = {number: memory.Memory(f"GPU {number} (NVIDIA H200)", 140 * GIB, 139 * GIB) for number in "0123"}
GPU = memory.Device("cuda", 16, GPUS, tuple(GPUS))

# Answers as vLLM does: health, the model's name in its answers, 404 for another name, 401 without the key under /v1
# alone. An answer holds the request, a streamed one comes in pieces.
FAKE_SERVER = """
import os, sys, json, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
task, port = sys.argv[1], int(sys.argv[2])
key = os.environ.get("VLLM_API_KEY")
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def send(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send(200, {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.startswith("/v1") and key and self.headers.get("authorization") != f"Bearer {key}":
            return self.send(401, {"error": "Unauthorized"})
        if asked["model"] != task:
            return self.send(404, {"error": {"type": "NotFoundError", "code": 404}})
        if asked.get("stream"):
            return self.stream()
        self.send(200, {"model": task, "choices": [{"text": f"{task} {os.getpid()}"}], "asked": asked})
    def stream(self):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        for piece in ({"piece": 1}, {"piece": 2}, "[DONE]"):
            self.wfile.write(f"data: {json.dumps(piece)}\\n\\n".encode())
            time.sleep(0.5)
    def log_message(self, *arguments):
        pass
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fleet_of(**tasks):
    return Fleet.model_validate({"port": free_ports(8), "tasks": tasks})


def free_ports(count):
    """The first of so many ports in a row that nobody listens on."""
    for first in range(20000, 40000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def write(folder, content):
    (folder / "fleet.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return folder / "fleet.yaml"


class TestSpec:
    def test_folders_are_relative_to_the_file(self, model, tmp_path):
        (tmp_path / "out").symlink_to(model)
        fleet = load_fleet(write(tmp_path, {"tasks": {"a": {"checkpoint": "out", "memory": 0.5}}}))
        assert fleet.tasks["a"].checkpoint == str(model)
        assert fleet.host == "127.0.0.1"
        assert fleet.is_local

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("tasks: {a: [", "is not YAML"),
            ({"tasks": {}}, "tasks: .*at least 1"),
            ({"tasks": {"a": {"checkpoint": "x"}}}, r"tasks\.a\.memory: Field required"),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 1.5}}}, "less than or equal to 1"),
            ({"tasks": {"a b": {"checkpoint": "x", "memory": 0.5}}}, "pattern"),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 0.5, "port": 1}}}, "Extra inputs"),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 0.5, "arguments": ["--port", "1"]}}}, "--port, which the"),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 0.5, "replicas": 2, "devices": ["0"]}}}, "1 devices for 2"),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 0.5, "arguments": ["--gpu_memory_utilization=1"]}}},
                "itself",
            ),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 0.5, "arguments": ["--max-model-len", "big"]}}},
                "or 25.6k",
            ),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 1, "devices": ["0"], "arguments": ["-tp", "2"]}}}, "2 GPUs"),
            ({"tasks": {"endpoint": {"checkpoint": "x", "memory": 0.5}}}, "name it otherwise"),
            ({"host": "::1", "tasks": {"a": {"checkpoint": "x", "memory": 0.5}}}, "IPv4"),
            ({"version": 2, "tasks": {"a": {"checkpoint": "x", "memory": 0.5}}}, "version: .*equal to 1"),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 1, "devices": ["0"], "arguments": ["-dp", "2"]}}},
                "2 GPUs",
            ),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 1, "environment": {"VLLM_API_KEY": "secret"}}}},
                "environment: got VLLM_API_KEY: .* set it where `taq fleet up` is called",
            ),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 1, "environment": {"CUDA_VISIBLE_DEVICES": "1"}}}},
                "got CUDA_VISIBLE_DEVICES: name the GPUs in `devices`",
            ),
            (
                {"tasks": {"a": {"checkpoint": "x", "memory": 1, "arguments": ["--seed", True]}}},
                r"arguments\.1: .*valid string, got True: put it in quotes",
            ),
            (
                "tasks: {a: {checkpoint: x, memory: 0.5}, b: {checkpoint: x, memory: 0.5}, a: {memory: 0.5}}",
                "'a' is there twice",
            ),
            ({"port": 65535, "tasks": {"a": {"checkpoint": "x", "memory": 0.5}}}, "give a smaller"),
        ],
    )
    def test_what_cannot_be_is_refused_by_field(self, tmp_path, content, said):
        with pytest.raises(ValueError, match=said):
            load_fleet(write(tmp_path, content))

    def test_a_file_that_is_not_there_is_answered_with_an_example(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"no fleet at .*fleet\.yaml: write one, as\n(.|\n)*checkpoint: out/trivia"
        ):
            load_fleet(tmp_path / "fleet.yaml")

    def test_a_servers_argument_is_found_in_every_spelling_of_vllm(self):
        arguments = ["--dtype=half", "--max_model_len", "4k", "-tp", "2"]
        member = fleet_of(a={"checkpoint": "x", "memory": 0.5, "arguments": arguments}).tasks["a"]
        assert member.argument("dtype") == "half"
        assert member.number("max-model-len") == 4000
        assert member.gpus == 2
        assert member.argument("seed") is None

    @pytest.mark.parametrize(
        "value", ["4096", "4k", "4K", "25.6k", "1M", "1.5m", "2g", "1G", "1.5K", "4096.5", "K", "1e3"]
    )
    def test_a_length_is_read_as_vllm_reads_it(self, value):
        import argparse

        from vllm.utils.argparse_utils import human_readable_int

        task = {"checkpoint": "x", "memory": 0.5, "arguments": ["--max-model-len", value]}
        try:
            expected = human_readable_int(value)
        except (ValueError, argparse.ArgumentTypeError):
            with pytest.raises(ValueError, match="write a number"):
                fleet_of(a=task)
        else:
            assert fleet_of(a=task).tasks["a"].number("max-model-len") == expected

    def test_numbers_stay_as_they_are_written(self, tmp_path):
        text = (
            "{tasks: {a: {checkpoint: x, memory: 0.50, replicas: 1, devices: [0], environment: {OMP_NUM_THREADS: 04},"
            " arguments: [--max-model-len, 4096, --revision, 1.10]}}}"
        )
        member = load_fleet(write(tmp_path, text)).tasks["a"]
        assert member.arguments == ("--max-model-len", "4096", "--revision", "1.10")
        assert (member.devices, member.environment) == (("0",), {"OMP_NUM_THREADS": "04"})
        assert (member.memory, member.replicas) == (0.5, 1)

    def test_copies_of_a_server_take_gpus_too(self):
        arguments = ["-tp", "2", "-pp=2", "--data-parallel-size", "3", "-pcp", "2"]
        member = fleet_of(a={"checkpoint": "x", "memory": 0.5, "arguments": arguments}).tasks["a"]
        assert (member.gpus, member.shards) == (24, 4)


def nvidia_smi(folder, lines, monkeypatch, code=0):
    """One on the path that says this."""
    (folder / "bin").mkdir()
    said = "\n".join(lines)
    (folder / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


class TestMemory:
    def test_weights_and_cache_are_those_of_the_plan_and_the_config(self, model, tmp_path):
        from plans import make_plan, mixed

        quantize_model(ModelFiles(model), make_plan(model, mixed), tmp_path / "out", Calibration(method="rtn"))
        fleet = fleet_of(a={"checkpoint": str(tmp_path / "out"), "memory": 0.15})
        need = memory.needs(fleet, CPU)["a"]
        assert need.weight_bytes == Plan.load(tmp_path / "out" / "taq_plan.json").budget.resident_bytes
        # 2 tensors * 3 layers * 2 heads * 64 numbers * 2 bytes
        assert need.token_bytes == 2 * 3 * 2 * 64 * 2
        # 3.6 GiB less the engine's own 1.5: vLLM takes whole GiB on a CPU.
        assert need.cache_bytes == 2 * GIB
        assert memory.needs(fleet, GPU)["a"].cache_bytes > 18 * GIB

    def test_a_share_too_small_for_one_request_says_which_would_do(self, model):
        with pytest.raises(ValueError, match=r"task a: 0\.08 of .* Give it a share of at least 0\.11") as refused:
            memory.needs(fleet_of(a={"checkpoint": str(model), "memory": 0.08}), CPU)
        assert "one request of 256 tokens needs" in str(refused.value)
        memory.needs(fleet_of(a={"checkpoint": str(model), "memory": 0.11}), CPU)

    def test_shares_that_do_not_fit_together_are_refused(self, model):
        member = {"checkpoint": str(model), "memory": 0.3}
        memory.needs(fleet_of(a=member, b=member), CPU)
        with pytest.raises(ValueError, match=r"the fleet needs .*: 1 x a .*, 2 x b .*; free are"):
            memory.needs(fleet_of(a=member, b=member | {"replicas": 2}), CPU)
        # On GPUs of their own they do.
        most = member | {"memory": 0.8}
        memory.needs(fleet_of(a=most | {"devices": ["0"]}, b=most | {"devices": ["1"]}), GPU)
        two = most | {"devices": ["0,1"], "arguments": ["-tp", "2"]}
        for other in (most, most | {"devices": ["0"]}, two):
            with pytest.raises(ValueError, match=r"the fleet needs .* of GPU 0"):
                memory.needs(fleet_of(a=two, b=other), GPU)

    def test_two_gpus_share_weights_and_cache_of_a_server(self, model):
        one = {"checkpoint": str(model), "memory": 0.8}
        whole = memory.needs(fleet_of(a=one), GPU)["a"]
        half = memory.needs(fleet_of(a=one | {"arguments": ["--tensor-parallel-size=2"]}), GPU)["a"]
        assert (half.weight_bytes, half.token_bytes) == (whole.weight_bytes // 2, whole.token_bytes // 2)
        fp8 = memory.needs(fleet_of(a=one | {"arguments": ["--kv-cache-dtype", "fp8"]}), GPU)["a"]
        assert fp8.token_bytes == whole.token_bytes // 2

    def test_copies_of_a_server_hold_all_weights_each(self, model):
        one = {"checkpoint": str(model), "memory": 0.8}
        two = one | {"arguments": ["-dp", "2"]}
        whole, copies = memory.needs(fleet_of(a=one), GPU)["a"], memory.needs(fleet_of(a=two), GPU)["a"]
        assert (copies.weight_bytes, copies.token_bytes) == (whole.weight_bytes, whole.token_bytes)
        with pytest.raises(ValueError, match=r"the fleet needs .* of GPU 1"):
            memory.needs(fleet_of(a=two, b=one | {"devices": ["1"]}), GPU)
        with pytest.raises(ValueError, match=r"runs on 5 GPUs, .* 4 can be seen"):
            memory.needs(fleet_of(a=one | {"arguments": ["-dp", "5"]}), GPU)

    def test_a_share_is_taken_of_every_gpu_also_of_a_larger_one(self, model):
        small, large = (memory.Memory(f"GPU {size}", size << 30, size << 30) for size in (80, 140))
        device = memory.Device("cuda", 8, {"0": small, "1": large}, ("0", "1"))
        both = {"checkpoint": str(model), "memory": 0.6, "replicas": 2, "devices": ["0", "1"]}
        other = {"checkpoint": str(model), "memory": 0.5, "devices": ["1"]}
        memory.needs(fleet_of(a=both), device)
        # As much as the small one's share leaves would do for half of the large one.
        with pytest.raises(ValueError, match=r"the fleet needs .* of GPU 140: 1 x a 90\.19 GB, 1 x b 75\.16 GB"):
            memory.needs(fleet_of(a=both, b=other), device)

    def test_every_gpu_is_measured_by_itself(self, model, tmp_path, monkeypatch):
        lines = ["0, GPU-a, NVIDIA H200, 140000, 1000", "1, GPU-b, NVIDIA GB10, [N/A], [N/A]"]
        lines += ["3, GPU-d, NVIDIA H100, 80000, 79000"]
        nvidia_smi(tmp_path, lines, monkeypatch)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        task = {"checkpoint": str(model), "memory": 0.5}
        device = memory.this_device()
        for devices in (["3"], ["GPU-d"]):
            need = memory.needs(fleet_of(a=task | {"devices": devices}), device)["a"]
            assert need.share_bytes == 40000 << 20
        with pytest.raises(ValueError, match=r"of GPU 3 \(NVIDIA H100\): .* free are 82\.84 GB of 83\.89 GB"):
            memory.needs(fleet_of(a=task | {"memory": 1, "devices": ["3"]}), device)
        with pytest.raises(ValueError, match=r"of GPU 0 \(NVIDIA H200\): .* free are 1\.05 GB"):
            memory.needs(fleet_of(a=task), device)
        for absent in ("1", "2"):
            with pytest.raises(ValueError, match=f"task a: .* no GPU '{absent}', but of 0, 3"):
                memory.needs(fleet_of(a=task | {"devices": [absent]}), device)
        # Who names no GPU takes the first of those that are visible.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0")
        assert memory.needs(fleet_of(a=task), memory.this_device())["a"].share_bytes == 40000 << 20
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert memory.this_device().kind == "cpu"

    def test_without_a_working_driver_it_is_this_machine(self, tmp_path, monkeypatch):
        nvidia_smi(tmp_path, ["Failed to initialize NVML: Driver/library version mismatch"], monkeypatch, code=18)
        device = memory.this_device()
        assert (device.kind, list(device.memories)) == ("cpu", ["memory"])

    @pytest.mark.parametrize(
        ("field", "said"),
        [("num_hidden_layers", "fleet cannot plan"), ("max_position_embeddings", "--max-model-len")],
    )
    def test_what_a_config_does_not_tell_is_named(self, model, tmp_path, field, said):
        shutil.copytree(model, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        del config[field]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        task = {"checkpoint": str(tmp_path / "model"), "memory": 0.5}
        with pytest.raises(ValueError, match=rf"task a: .*config\.json has no {field}: .*{said}"):
            memory.needs(fleet_of(a=task), CPU)
        if said == "--max-model-len":
            memory.needs(fleet_of(a=task | {"arguments": ["--max-model-len", "256"]}), CPU)


def test_servers_get_their_share_their_cores_and_ports_of_loopback(model):
    fleet = fleet_of(
        a={"checkpoint": str(model), "memory": 0.3, "arguments": ["--seed", "1"]},
        b={"checkpoint": str(model), "memory": 0.3, "environment": {"OMP_NUM_THREADS": "7"}},
    )
    first, second, endpoint = services(fleet, memory.needs(fleet, CPU), CPU)
    text = " ".join(first.command)
    assert f"serve {model} --served-model-name a --seed 1 --host 127.0.0.1 --port {fleet.port + 1}" in text
    assert first.environment["VLLM_CPU_KVCACHE_SPACE"] == "5"
    assert {first.environment["GLOO_SOCKET_IFNAME"], second.environment["NCCL_SOCKET_IFNAME"]} == {"lo"}
    assert (first.environment["OMP_NUM_THREADS"], second.environment["OMP_NUM_THREADS"]) == ("2", "7")
    assert endpoint.command[-2:] == tuple(
        f"{name}=http://127.0.0.1:{fleet.port + i}" for i, name in ((1, "a"), (2, "b"))
    )
    assert (first.gives_way, endpoint.gives_way) == (True, False)
    on_gpu, *_ = services(fleet, memory.needs(fleet, GPU), GPU)
    assert not on_gpu.gives_way
    assert on_gpu.command[-6:-4] == ("--gpu-memory-utilization", "0.3")
    assert "CUDA_VISIBLE_DEVICES" not in on_gpu.environment
    fleet = fleet_of(a={"checkpoint": str(model), "memory": 0.3, "devices": ["1"]})
    on_second, _ = services(fleet, memory.needs(fleet, GPU), GPU)
    assert on_second.environment.items() >= {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}.items()


def fake_services(fleet, folder):
    program = folder / "fake_vllm.py"
    program.write_text(FAKE_SERVER)
    *servers, endpoint = addresses(fleet)
    fakes = [Service(a, (sys.executable, str(program), a.task, str(a.port)), {}, gives_way=True) for a in servers]
    workers = [f"{a.task}={a.url}" for a in servers]
    front = (sys.executable, "-m", "taq_vllm.fleet.endpoint", fleet.host, str(fleet.port), *workers)
    return [*fakes, Service(endpoint, front, {})]


def send(fleet, method, path, key=KEY, **request):
    url = f"http://127.0.0.1:{fleet.port}{path}"
    return httpx.request(method, url, headers=bearer(key), timeout=20, **request)


def ask(fleet, task, key=KEY, path="/v1/completions", **fields):
    return send(fleet, "POST", path, key, json={"model": task, "prompt": "x"} | fields)


def healthy_servers(fleet):
    return send(fleet, "GET", "/workers").json()["stats"]["healthy_workers"]


def wait_for(condition, timeout_s=40):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="class")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f") / "with a space"
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1, "replicas": 2}, b={"checkpoint": "x", "memory": 0.1})
    said = []
    local.up(folder, fake_services(fleet, folder.parent), KEY, said.append, timeout_s=60)
    assert len(said) == len(addresses(fleet))
    yield fleet, folder
    local.down(folder)
    assert not any(launcher.answers(address.url) for address in addresses(fleet))


class TestRunning:
    def test_a_request_goes_to_the_model_that_it_names(self, running):
        fleet, _ = running
        for task in ("a", "b"):
            assert ask(fleet, task).json()["model"] == task

    def test_an_unknown_model_is_refused_as_vllm_does_it(self, running):
        answer = ask(running[0], "c")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"

    def test_a_wrong_key_is_refused_and_the_key_is_in_no_file_and_no_argument(self, running):
        fleet, folder = running
        assert ask(fleet, "a", key="wrong").status_code == 401
        assert not any(KEY.encode() in file.read_bytes() for file in folder.iterdir() if file.is_file())
        states = local.status(folder, addresses(fleet))
        commands = [" ".join(psutil.Process(state.pid).cmdline()) for state in states]
        assert "fake_vllm.py" in commands[0]
        assert not any(KEY in command for command in commands)

    def test_the_endpoint_lists_the_tasks(self, running):
        listed = send(running[0], "GET", "/v1/models").json()
        assert sorted(listed["models"]) == ["a", "b"]

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            *(("GET", path) for path in ("/health", "/v1/models", "/workers", "/list_workers", "/metrics")),
            *(("POST", path) for path in ("/v1/completions", "/v1/responses", "/invocations", "/tokenize")),
            *(("POST", path) for path in ("/workers", "/add_worker?url=x", "/remove_worker?url=x", "/anything")),
            ("DELETE", "/workers/x"),
        ],
    )
    def test_every_path_of_the_endpoint_asks_for_the_key(self, running, method, path):
        fleet, _ = running
        body = {"json": {"model": "a", "prompt": "x", "url": "http://127.0.0.1:1"}} if method == "POST" else {}
        for key in (None, "wrong"):
            assert send(fleet, method, path, key, **body).status_code == 401
        if not path.startswith(("/add", "/remove", "/workers")):
            # Paths that the router only forwards are forwarded, or not, as it is drawn when it starts.
            is_routed = path in ("/health", "/v1/models", "/list_workers", "/v1/completions")
            assert send(fleet, method, path, **body).status_code in ((200,) if is_routed else (200, 405, 503))
        assert healthy_servers(fleet) == fleet.servers

    def test_the_key_is_right_also_when_it_is_used_first_while_all_servers_are_away(self, running):
        fleet, folder = running
        servers = [address.name for address in addresses(fleet) if address.task]
        supervisor = local._running(folder)
        for name in servers:
            supervisor.stopProcess(name)
        supervisor.stopProcess("endpoint")
        supervisor.startProcess("endpoint", False)
        wait_for(lambda: launcher.answers(addresses(fleet)[-1].url))
        wait_for(lambda: ask(fleet, "a").status_code == 503)
        for name in servers:
            supervisor.startProcess(name, False)
        # The router takes servers for healthy until it has asked them: all have to be back before the next test.
        wait_for(lambda: all(launcher.answers(address.url) for address in addresses(fleet)))
        wait_for(lambda: ask(fleet, "a").status_code == ask(fleet, "b").status_code == 200)

    def test_what_is_asked_arrives_also_what_only_vllm_knows(self, running):
        fields = {
            "structured_outputs": {"regex": "a+"},
            "repetition_penalty": 1.1,
            "top_k": 5,
            "logit_bias": {"1": 2},
            "vllm_xargs": {"a": 1},
            "unheard_of": [1, {"x": None}],
        }
        asked = ask(running[0], "a", max_tokens=3, **fields).json()["asked"]
        assert asked.items() >= (fields | {"prompt": "x", "max_tokens": 3}).items()
        chat = {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "yes", "reasoning_content": "why"},
            ],
            "chat_template_kwargs": {"enable_thinking": False},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        }
        asked = ask(running[0], "a", path="/v1/chat/completions", **chat, **fields).json()["asked"]
        reasoning = chat["messages"][2].pop("reasoning_content")
        chat["messages"][2]["reasoning"] = reasoning
        assert asked.items() >= (chat | fields).items()

    @pytest.mark.parametrize(
        "refused",
        [
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"response_format": {"type": "structural_tag"}},
            {"logprobs": None},
            {"max_tokens": -1},
        ],
    )
    def test_what_the_router_does_not_take_is_refused_and_not_changed(self, running, refused):
        messages = [{"role": "user", "content": "x"}]
        answer = ask(running[0], "a", path="/v1/chat/completions", messages=messages, **refused)
        assert answer.status_code == 422

    def test_a_streamed_answer_comes_in_pieces(self, running):
        url = f"http://127.0.0.1:{running[0].port}/v1/completions"
        body = {"model": "a", "prompt": "x", "stream": True}
        with httpx.stream("POST", url, json=body, headers=bearer(KEY)) as answer:
            pieces = [(time.monotonic(), piece) for piece in answer.iter_text()]
        assert [piece for _, piece in pieces] == [
            'data: {"piece": 1}\n\n',
            'data: {"piece": 2}\n\n',
            'data: "[DONE]"\n\n',
        ]
        assert pieces[-1][0] - pieces[0][0] > 0.5

    def test_everything_listens_on_loopback_alone(self, running):
        fleet, folder = running
        leaders = [state.pid for state in local.status(folder, addresses(fleet))]
        found = listening(leaders)
        assert {address.port for address in addresses(fleet)} <= {where.port for where in found}
        assert {where.ip for where in found} == {"127.0.0.1"}

    def test_a_killed_server_is_an_error_for_its_clients_alone_and_comes_back(self, running):
        fleet, folder = running
        states = {state.name: state for state in local.status(folder, addresses(fleet))}
        os.kill(states["b-0"].pid, signal.SIGKILL)
        found = []
        wait_for(lambda: found.append(ask(fleet, "b").status_code) or found[-1] == 200)
        assert set(found[:-1]) <= {500, 502, 503}
        assert ask(fleet, "a").status_code == 200
        assert {state.name: state.pid for state in local.status(folder, addresses(fleet))}["b-0"] != states["b-0"].pid

    def test_a_server_that_ends_again_and_again_is_still_started_again(self, running):
        fleet, folder = running
        killed = set()
        while len(killed) < 6:
            (pid,) = (state.pid for state in local.status(folder, addresses(fleet)) if state.name == "b-0")
            if pid and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.1)
        wait_for(lambda: ask(fleet, "b").status_code == 200)

    def test_servers_that_answer_give_way_to_those_that_start_and_the_endpoint_does_not(self, running):
        fleet, folder = running
        *servers, endpoint = (state.pid for state in local.status(folder, addresses(fleet)))
        normal = psutil.Process().nice()
        wait_for(lambda: {psutil.Process(pid).nice() for pid in servers} == {normal + 5})
        assert psutil.Process(endpoint).nice() == normal
        groups = {os.getpgid(pid) for pid in servers}
        # Whoever lowered it has ended.
        wait_for(lambda: not [p for p in psutil.pids() if p not in servers and os.getpgid(p) in groups])

    def test_one_of_two_replicas_answers_for_both_while_the_other_is_away(self, running):
        fleet, folder = running
        local._running(folder).stopProcess("a-1")
        # The router's health check has to notice first.
        wait_for(lambda: healthy_servers(fleet) == fleet.servers - 1)
        answers = [ask(fleet, "a") for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        local._running(folder).startProcess("a-1")
        wait_for(lambda: healthy_servers(fleet) == fleet.servers)

    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
    def test_an_ended_endpoint_comes_back_and_knows_the_servers(self, running, sign):
        fleet, folder = running
        states = {state.name: state for state in local.status(folder, addresses(fleet))}
        os.kill(states["endpoint"].pid, sign)

        def is_back():
            try:
                now = {state.name: state.pid for state in local.status(folder, addresses(fleet))}
                found = [ask(fleet, task).status_code for task in ("a", "b")]
            except httpx.HTTPError:
                return False
            return found == [200, 200] and now["endpoint"] not in (0, states["endpoint"].pid)

        wait_for(is_back, timeout_s=60)

    def test_it_is_not_started_twice_and_a_changed_file_is_noticed(self, running):
        fleet, folder = running
        with pytest.raises(ValueError, match="is up already"):
            local.up(folder, fake_services(fleet, folder.parent), None, print)
        more = fleet_of(c={"checkpoint": "x", "memory": 0.1})
        with pytest.raises(ValueError, match=r"has no c-0: fleet\.yaml was changed"):
            local.status(folder, addresses(more))


def test_a_server_that_does_not_start_ends_the_others_and_shows_its_log(tmp_path):
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1}, b={"checkpoint": "x", "memory": 0.1})
    first, second, endpoint = fake_services(fleet, tmp_path)
    broken = Service(second.address, (sys.executable, "-c", "raise SystemExit('the weights are damaged')"), {})
    with pytest.raises(ValueError, match=r"b-0 did not start; the end of .*b-0\.log:\n(.|\n)*the weights are damaged"):
        local.up(tmp_path / "run", [first, broken, endpoint], None, print, timeout_s=60)
    with pytest.raises(ValueError, match="the fleet is not up"):
        local.status(tmp_path / "run", addresses(fleet))
    assert not any(launcher.answers(address.url) for address in addresses(fleet))


@pytest.mark.parametrize(("folder", "said"), [("100%", "cannot have %"), ("long" * 40, "shorter path")])
def test_a_folder_that_supervisor_cannot_use_is_named(tmp_path, folder, said):
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1})
    with pytest.raises(ValueError, match=said):
        local.up(tmp_path / folder, fake_services(fleet, tmp_path), None, print)


def test_a_taken_port_is_named(tmp_path):
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", fleet.port + 1))
        taken.listen()
        with pytest.raises(ValueError, match=f"port {fleet.port + 1} of a-0 is taken: the servers' ports follow"):
            local.up(tmp_path / "run", fake_services(fleet, tmp_path), None, print)


def test_without_a_key_none_is_asked_for_and_a_killed_supervisor_leaves_nothing_that_cannot_be_ended(tmp_path):
    fleet, folder = fleet_of(a={"checkpoint": "x", "memory": 0.1}), tmp_path / "run"
    said = []
    for _ in range(2):
        local.up(folder, fake_services(fleet, tmp_path), None, said.append, timeout_s=60)
        assert ask(fleet, "a", key=None).status_code == 200
        assert send(fleet, "GET", "/workers", key=None).status_code == 200
        supervisor = psutil.Process(local._running(folder).getPID())
        processes = supervisor.children(recursive=True)
        # One that cannot be spoken to, as while it ends, keeps what it runs.
        (folder / "supervisor.sock").rename(tmp_path / "away")
        with pytest.raises(ValueError, match="runs and does not answer"):
            local.down(folder)
        (tmp_path / "away").rename(folder / "supervisor.sock")
        supervisor.kill()
        supervisor.wait()
        assert launcher.answers(addresses(fleet)[0].url)
    # The second time it is `up` that has ended them.
    assert sum(text.startswith("ended what an earlier fleet has left: ") for text in said) == 1
    local.down(folder)
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    with pytest.raises(ValueError, match="the fleet is not up"):
        local.down(folder)


def test_a_key_that_no_request_can_bring_is_refused(tmp_path):
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1})
    with pytest.raises(ValueError, match="the key has a space"):
        local.up(tmp_path / "run", fake_services(fleet, tmp_path), "key\n", print)


def test_the_endpoint_uses_no_proxy(tmp_path, monkeypatch):
    fleet = fleet_of(a={"checkpoint": "x", "memory": 0.1})
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    local.up(tmp_path / "run", fake_services(fleet, tmp_path), KEY, print, timeout_s=60)
    monkeypatch.undo()
    try:
        assert ask(fleet, "a").status_code == 200
    finally:
        local.down(tmp_path / "run")


def test_a_new_server_ends_what_a_killed_one_has_left(tmp_path):
    engine = [sys.executable, "-c", "import time; time.sleep(600)"]
    helper = [*engine[:2], engine[2] + "  # as vllm's multiprocessing.resource_tracker"]
    record = launcher.record_of(tmp_path / "a-0.json")
    code = (
        "import pathlib, subprocess, time; from taq_vllm.fleet import launcher\n"
        f"launcher.write_record(pathlib.Path({str(record)!r})); subprocess.Popen({engine!r})\n"
        f"subprocess.Popen({helper!r}); time.sleep(600)"
    )
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    other = subprocess.Popen(engine, start_new_session=True)
    wait_for(lambda: len(psutil.Process(leader.pid).children()) == 2)
    _, tracker = sorted(psutil.Process(leader.pid).children(), key=lambda child: child.pid)
    group, session, life = json.loads(record.read_text())
    leader.kill()
    leader.wait()
    for another in (
        [group, session, "of another boot"],
        [group, session + 1, life],
        [os.getpgrp(), os.getsid(0), life],
        [],
        1,
    ):
        record.write_text(json.dumps(another))
        assert launcher.end_leftovers(record) == []
    record.write_text(json.dumps([group, session, life]))
    assert len(launcher.end_leftovers(record)) == 1
    assert launcher.end_leftovers(record) == []
    assert launcher.end_leftovers(tmp_path / "none") == []
    assert other.poll() is None
    assert tracker.is_running()
    tracker.kill()
    other.kill()


class TestRender:
    def test_kubernetes_manifests_are_valid(self, model):
        fleet = fleet_of(
            trivia={"checkpoint": str(model), "memory": 0.3, "replicas": 2, "environment": {"A": "b"}},
            code={"checkpoint": "org/model", "memory": 0.3, "arguments": ["-tp", "2", "-dp", "2"]},
        )
        documents = list(yaml.safe_load_all(render.kubernetes(fleet, "me/taq:1", "models")))
        for document in documents:
            kubernetes_validate.validate(document, "1.31", strict=True)
        assert [d["kind"] for d in documents] == [*["Deployment", "Service"] * 3, "NetworkPolicy"]
        trivia, code, router = (d["spec"]["template"]["spec"]["containers"][0] for d in documents[:6:2])
        assert trivia["command"][2] == "/models/trivia"
        assert code["command"][2] == "org/model"
        assert code["resources"]["limits"]["nvidia.com/gpu"] == "4"
        assert router["command"][-2:] == ["trivia=http://trivia:8000", "code=http://code:8000"]
        # The endpoint's health asks for the key, and a probe has none.
        assert "tcpSocket" in router["readinessProbe"]
        assert all("secretKeyRef" in server["env"][0]["valueFrom"] for server in (trivia, code, router))
        assert "VLLM_API_KEY" not in render.kubernetes(fleet, "me/taq:1", "models", has_key=False)

    def test_a_folder_needs_a_volume_and_a_name_has_to_suit_a_service(self, model):
        with pytest.raises(ValueError, match="--volume-claim"):
            render.kubernetes(fleet_of(a={"checkpoint": str(model), "memory": 0.3}), "me/taq:1", None)
        with pytest.raises(ValueError, match="Kubernetes Service"):
            render.kubernetes(fleet_of(**{"7b": {"checkpoint": str(model), "memory": 0.3}}), "me/taq:1", "models")

    def test_vllm_takes_the_engine_arguments_of_the_ray_configuration(self, model):
        from vllm.engine.arg_utils import AsyncEngineArgs

        config = ray_config(model, RAY_ARGUMENTS)
        assert config["engine_kwargs"] == {
            "max_model_len": 4096,
            "enforce_eager": True,
            "tensor_parallel_size": 2,
            "enable_prefix_caching": False,
            "seed": 3,
            "revision": "1.10",
            "compilation_config": {"mode": 3},
            "hf_overrides": {"a": 1},
            "enable_auto_tool_choice": True,
            "tool_call_parser": "hermes",
        }
        engine = {
            k: v for k, v in config["engine_kwargs"].items() if k not in ("enable_auto_tool_choice", "tool_call_parser")
        }
        found = AsyncEngineArgs(model=config["model_loading_config"]["model_source"], **engine)
        assert (found.max_model_len, found.compilation_config.mode) == (4096, 3)

    def test_ray_takes_its_configuration(self, model):
        ray_llm = pytest.importorskip("ray.serve.llm", reason="Ray Serve LLM is not installed")
        from ray.serve.schema import ServeDeploySchema

        fleet = fleet_of(
            a={"checkpoint": str(model), "memory": 0.3, "arguments": RAY_ARGUMENTS, "environment": {"A": "b"}}
        )
        schema = ServeDeploySchema.model_validate(yaml.safe_load(render.ray_serve(fleet)))
        (config,) = schema.applications[0].args["llm_configs"]
        engine = ray_llm.LLMConfig.model_validate(config).get_engine_config()
        assert engine.frontend_kwargs == {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
        assert engine.num_devices == 2

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--headless"], "unrecognized arguments: --headless"),
            (["64"], "unrecognized arguments: 64"),
            (["--tensor-parallel-size", "two"], "invalid int value: 'two'|write a number"),
            (["--lora-modules", "a=b"], "plain values: .*LoRA"),
            (["-dp", "2"], "give `replicas` instead"),
        ],
    )
    def test_what_ray_cannot_take_is_refused_by_name(self, model, arguments, said):
        with pytest.raises(ValueError, match=said):
            ray_config(model, arguments)


RAY_ARGUMENTS = [
    *("--max-model-len", "4K", "--enforce-eager", "-tp", "2", "--no-enable-prefix-caching", "--seed=3"),
    *("--revision", "1.10", "--compilation-config.mode", "3", "--hf_overrides", '{"a": 1}'),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


def ray_config(model, arguments):
    fleet = fleet_of(a={"checkpoint": str(model), "memory": 0.3, "arguments": arguments})
    (application,) = yaml.safe_load(render.ray_serve(fleet))["applications"]
    (config,) = application["args"]["llm_configs"]
    return config


def test_a_dry_run_prints_what_fits_and_starts_nothing(model, tmp_path, monkeypatch, capsys):
    import taq_vllm.cli

    file = write(tmp_path, {"port": free_ports(4), "tasks": {"a": {"checkpoint": str(model), "memory": 0.2}}})
    monkeypatch.setattr(memory, "this_device", lambda: CPU)
    monkeypatch.setattr(sys, "argv", ["taq", "fleet", "up", str(file), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        taq_vllm.cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["a"]["cache_bytes"] == 3 * GIB
    assert not (tmp_path / "fleet.run").exists()
