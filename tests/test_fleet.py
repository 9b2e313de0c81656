"""One service of several models: what is asked for, what fits, and real processes behind the real router.

The servers here are small ones that answer as vLLM does, so that starting, killing and routing are tested in seconds;
`python -m benchmarks.fleet` does the same with vLLM.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import kubernetes_validate
import psutil
import pytest
import yaml
from tiny_models import make_tiny

from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.fleet import launcher, local, memory, render
from taq_vllm.fleet.services import Service, addresses, services
from taq_vllm.fleet.spec import Fleet, load_fleet
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan

GIB = 1 << 30
KEY = "a-key-that-is-nowhere-else"
CPU = memory.Device("cpu", "this machine", 24 * GIB, 18 * GIB, 4)
GPU = memory.Device("cuda", "NVIDIA H200", 140 * GIB, 139 * GIB, 16)

# Answers as vLLM does: health, the model's name in its answers, 404 for another name, 401 without the key.
FAKE_SERVER = """
import os, sys, json
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
        if key and self.headers.get("authorization") != f"Bearer {key}":
            return self.send(401, {"error": "Unauthorized"})
        if asked["model"] != task:
            return self.send(404, {"error": {"type": "NotFoundError", "code": 404}})
        self.send(200, {"model": task, "choices": [{"text": f"{task} {os.getpid()}"}]})
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
                "or 4K",
            ),
            ({"tasks": {"a": {"checkpoint": "x", "memory": 1, "devices": ["0"], "arguments": ["-tp", "2"]}}}, "2 GPUs"),
            ({"tasks": {"endpoint": {"checkpoint": "x", "memory": 0.5}}}, "name it otherwise"),
            ({"host": "::1", "tasks": {"a": {"checkpoint": "x", "memory": 0.5}}}, "IPv4"),
            ({"version": 2, "tasks": {"a": {"checkpoint": "x", "memory": 0.5}}}, "version: Input should be 1"),
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


def test_servers_get_their_share_their_cores_and_ports_of_loopback(model):
    fleet = fleet_of(
        a={"checkpoint": str(model), "memory": 0.3, "arguments": ["--seed", "1"]},
        b={"checkpoint": str(model), "memory": 0.3, "environment": {"OMP_NUM_THREADS": "7"}},
    )
    first, second, endpoint = services(fleet, memory.needs(fleet, CPU), CPU)
    text = " ".join(first.command)
    assert f"serve {model} --served-model-name a --seed 1 --host 127.0.0.1 --port {fleet.port + 1}" in text
    assert first.environment["VLLM_CPU_KVCACHE_SPACE"] == "5"
    assert (first.environment["OMP_NUM_THREADS"], second.environment["OMP_NUM_THREADS"]) == ("2", "7")
    assert endpoint.command[-2:] == tuple(
        f"{name}=http://127.0.0.1:{fleet.port + i}" for i, name in ((1, "a"), (2, "b"))
    )
    assert (first.gives_way, endpoint.gives_way) == (True, False)
    on_gpu, *_ = services(fleet, memory.needs(fleet, GPU), GPU)
    assert not on_gpu.gives_way
    assert on_gpu.command[-6:-4] == ("--gpu-memory-utilization", "0.3")


def fake_services(fleet, folder):
    program = folder / "fake_server.py"
    program.write_text(FAKE_SERVER)
    *servers, endpoint = addresses(fleet)
    fakes = [Service(a, (sys.executable, str(program), a.task, str(a.port)), {}, gives_way=True) for a in servers]
    workers = [f"{a.task}={a.url}" for a in servers]
    front = (sys.executable, "-m", "taq_vllm.fleet.endpoint", fleet.host, str(fleet.port), *workers)
    return [*fakes, Service(endpoint, front, {})]


def ask(fleet, task, key=KEY):
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": task, "prompt": "x"}
    return httpx.post(f"http://127.0.0.1:{fleet.port}/v1/completions", json=body, headers=headers, timeout=20)


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
        assert "fake_server.py" in commands[0]
        assert not any(KEY in command for command in commands)

    def test_the_endpoint_lists_the_tasks(self, running):
        listed = httpx.get(f"http://127.0.0.1:{running[0].port}/v1/models").json()
        assert sorted(listed["models"]) == ["a", "b"]

    def test_everything_listens_on_loopback_alone(self, running):
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
        open_to_all = {
            int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[1].startswith("00000000")
        }
        assert not open_to_all & {address.port for address in addresses(running[0])}

    def test_a_killed_server_is_an_error_for_its_clients_alone_and_comes_back(self, running):
        fleet, folder = running
        states = {state.name: state for state in local.status(folder, addresses(fleet))}
        os.kill(states["b-0"].pid, signal.SIGKILL)
        found = []
        wait_for(lambda: found.append(ask(fleet, "b").status_code) or found[-1] == 200)
        assert set(found[:-1]) <= {500, 502, 503}
        assert ask(fleet, "a").status_code == 200
        assert {state.name: state.pid for state in local.status(folder, addresses(fleet))}["b-0"] != states["b-0"].pid

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

        def healthy():
            return httpx.get(f"http://127.0.0.1:{fleet.port}/workers").json()["stats"]["healthy_workers"]

        # The router's health check has to notice first.
        wait_for(lambda: healthy() == fleet.servers - 1)
        answers = [ask(fleet, "a") for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        local._running(folder).startProcess("a-1")
        wait_for(lambda: healthy() == fleet.servers)

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


def test_a_new_server_ends_what_a_killed_one_has_left(tmp_path):
    engine = [sys.executable, "-c", "import time; time.sleep(600)  # as vllm's"]
    code = f"import subprocess, time; subprocess.Popen({engine!r}); time.sleep(600)"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    other = subprocess.Popen(engine, start_new_session=True)
    record = launcher.record_of(tmp_path / "a-0.json")
    record.write_text(json.dumps([leader.pid, 5.0]))
    time.sleep(1)
    leader.kill()
    leader.wait()
    assert launcher.end_leftovers(record, 6.0) == []  # of another supervisor
    assert len(launcher.end_leftovers(record, 5.0)) == 1
    assert launcher.end_leftovers(record, 5.0) == []
    record.write_text(json.dumps([os.getpgrp(), 5.0]))
    assert launcher.end_leftovers(record, 5.0) == []
    assert launcher.end_leftovers(tmp_path / "none", 5.0) == []
    assert other.poll() is None
    other.kill()


class TestRender:
    def test_kubernetes_manifests_are_valid(self, model):
        fleet = fleet_of(
            trivia={"checkpoint": str(model), "memory": 0.3, "replicas": 2, "environment": {"A": "b"}},
            code={"checkpoint": "org/model", "memory": 0.3, "arguments": ["--tensor-parallel-size", "2"]},
        )
        documents = list(yaml.safe_load_all(render.kubernetes(fleet, "me/taq:1", "models")))
        for document in documents:
            kubernetes_validate.validate(document, "1.31", strict=True)
        assert [d["kind"] for d in documents] == ["Deployment", "Service"] * 3
        trivia, code, router = (d["spec"]["template"]["spec"]["containers"][0] for d in documents[::2])
        assert trivia["command"][2] == "/models/trivia"
        assert code["command"][2] == "org/model"
        assert code["resources"]["limits"]["nvidia.com/gpu"] == "2"
        assert router["command"][-2:] == ["trivia=http://trivia:8000", "code=http://code:8000"]

    def test_a_folder_needs_a_volume_and_a_name_has_to_suit_a_service(self, model):
        with pytest.raises(ValueError, match="--volume-claim"):
            render.kubernetes(fleet_of(a={"checkpoint": str(model), "memory": 0.3}), "me/taq:1", None)
        with pytest.raises(ValueError, match="Kubernetes Service"):
            render.kubernetes(fleet_of(**{"7b": {"checkpoint": str(model), "memory": 0.3}}), "me/taq:1", "models")

    def test_vllm_takes_the_engine_arguments_of_the_ray_configuration(self, model):
        from vllm.engine.arg_utils import AsyncEngineArgs

        arguments = ["--max-model-len", "64", "--enforce-eager", "-tp", "2", "--no-enable-prefix-caching", "--seed=3"]
        fleet = fleet_of(a={"checkpoint": str(model), "memory": 0.3, "arguments": arguments})
        (application,) = yaml.safe_load(render.ray_serve(fleet))["applications"]
        (config,) = application["args"]["llm_configs"]
        found = AsyncEngineArgs(model=config["model_loading_config"]["model_source"], **config["engine_kwargs"])
        assert (found.max_model_len, found.enforce_eager, found.enable_prefix_caching, found.seed) == (
            64,
            True,
            False,
            3,
        )


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
