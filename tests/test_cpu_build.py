import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from taq_kernels import cpu_build, tuned

ROOT = Path(__file__).parent.parent
REAL_COMPILER = next(filter(shutil.which, cpu_build.COMPILERS), None)

pytestmark = pytest.mark.skipif(sys.platform != "linux" or REAL_COMPILER is None, reason="needs a C++ compiler")

# Stands in for the compiler where what is compiled does not matter, which takes seconds: counts its calls, and gives a
# library with one function.
COMPILER = f"""#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in 1.0"; exit; fi
echo call >> "$(dirname "$0")/calls"
for target; do :; done
printf 'extern "C" int lowbit_best(int) {{ return 7; }}' | exec {REAL_COMPILER} -x c++ - -shared -fPIC -o "$target"
"""


@pytest.fixture(autouse=True)
def fresh_library():
    cpu_build.library.cache_clear()
    yield
    cpu_build.library.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The stand-in's file of calls; the cache is empty."""
    program = tmp_path / "bin" / "compiler"
    program.parent.mkdir()
    program.write_text(COMPILER)
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return program.with_name("calls")


def test_the_library_is_compiled_once_into_the_cache(compiler, tmp_path):
    assert cpu_build.library().lowbit_best(0) == 7
    cpu_build.library.cache_clear()
    assert cpu_build.library().lowbit_best(0) == 7
    assert compiler.read_text() == "call\n"
    # Nothing unfinished is left, and what is there is for the user alone to change.
    (library,) = (tmp_path / "cache" / "taq_kernels").glob("*.so")
    assert library.stat().st_mode & 0o022 == 0


def load_in_processes(count):
    """What the library answers to processes that start together."""
    program = "from taq_kernels import cpu_build; print(cpu_build.library().lowbit_best(0))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    return [process.communicate()[0].strip() for process in processes]


def test_processes_that_start_together_compile_once(compiler):
    assert load_in_processes(6) == ["7"] * 6
    assert compiler.read_text() == "call\n"


def test_a_damaged_library_in_the_cache_is_compiled_again_once(compiler, tmp_path):
    assert load_in_processes(1) == ["7"]
    (library,) = (tmp_path / "cache" / "taq_kernels").glob("*.so")
    library.write_bytes(b"not a library")
    assert load_in_processes(6) == ["7"] * 6
    assert load_in_processes(1) == ["7"]
    assert compiler.read_text() == "call\n" * 2


def test_a_packaged_library_that_does_not_load_is_compiled_here(compiler, tmp_path, monkeypatch, caplog):
    installed = tmp_path / "installed"
    installed.mkdir()
    for source in cpu_build.SOURCES:
        shutil.copy(cpu_build.FOLDER / source, installed)
    monkeypatch.setattr(cpu_build, "FOLDER", installed)
    cpu_build.packaged().write_bytes(b"for a newer glibc")
    for _ in range(2):
        assert cpu_build.library().lowbit_best(0) == 7
    assert compiler.read_text() == "call\n"
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert cpu_build.packaged().name in record.getMessage()


def test_other_sources_flags_or_compilers_are_compiled_anew(compiler, tmp_path, monkeypatch):
    cpu_build.library()
    monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-DOTHER"))
    cpu_build.library.cache_clear()
    cpu_build.library()
    changed = tmp_path / "sources"
    changed.mkdir()
    for source in cpu_build.SOURCES:
        (changed / source).write_bytes((cpu_build.FOLDER / source).read_bytes() + b"\n")
    monkeypatch.setattr(cpu_build, "FOLDER", changed)
    cpu_build.library.cache_clear()
    cpu_build.library()
    program = compiler.with_name("compiler")
    program.write_text(program.read_text().replace("1.0", "2.0"))
    cpu_build.library.cache_clear()
    cpu_build.library()
    assert compiler.read_text() == "call\n" * 4
    assert len(list((tmp_path / "cache" / "taq_kernels").glob("*.so"))) == 4


def test_without_a_writable_cache_the_library_is_compiled_for_the_process(compiler, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cpu_build.library().lowbit_best(0) == 7
    assert not list(tmp_path.glob("taq_kernels-*"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_cache_that_nothing_can_be_loaded_from_is_not_compiled_into(compiler, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    mounted_noexec = os.statvfs_result([*real[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax])
    monkeypatch.setattr("os.statvfs", lambda path: mounted_noexec)
    assert cpu_build.library().lowbit_best(0) == 7
    assert compiler.read_text() == "call\n"
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_without_a_home_the_library_is_compiled_for_the_process_and_packaged_tables_are_used(
    compiler, tmp_path, monkeypatch
):
    def no_such_user(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        cpu_build.cache_folder()
    assert cpu_build.library().lowbit_best(0) == 7
    assert not (tmp_path / "~").exists()
    assert tuned.user_file("NVIDIA H200") == tuned.PACKAGED / "nvidia-h200.json"


def test_compiled_libraries_and_tables_share_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_build.cache_folder() == tmp_path / "taq_kernels"
    assert tuned.user_file("cpu") == tmp_path / "taq_kernels" / "tuned" / "cpu.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cpu_build.cache_folder() == tmp_path / ".cache" / "taq_kernels"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo 'lowbit.cpp:1: error: what is this' >&2; exit 1", "error: what is this"),
        ("exit 3", "exit 3"),
        ("exit 0", "file too short"),
    ],
)
def test_a_compiler_that_fails_is_named_in_one_warning(compiler, script, cause, caplog):
    compiler.with_name("compiler").write_text(f"#!/bin/sh\n{script}\n")
    assert cpu_build.library() is None
    assert cpu_build.library() is None
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert cause in record.getMessage()
    assert "torch's int4 kernel" in record.getMessage()


def test_no_compiler_is_said(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O9")
    assert cpu_build.library() is None
    assert "CXX=/nowhere/c++ not found" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    cpu_build.library.cache_clear()
    assert cpu_build.library() is None
    assert "no C++ compiler (c++, g++, clang++)" in caplog.text


def test_a_compilers_name_that_the_shell_would_not_read_is_said(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "g++ -DNAME='unbalanced")
    assert cpu_build.library() is None
    assert "CXX=g++ -DNAME='unbalanced is not a command" in caplog.text


def test_a_compilers_version_may_be_in_any_encoding(compiler):
    program = compiler.with_name("compiler")
    program.write_bytes(program.read_bytes().replace(b"stand-in", b"stand-in \xe9"))  # Latin-1, not UTF-8
    assert cpu_build.library().lowbit_best(0) == 7


def test_other_machines_are_declined_without_a_compilation(compiler, monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_build.library() is None
    assert "aarch64 linux" in caplog.text
    assert not compiler.exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what a wheel is built from."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for package in ("taq_vllm", "kernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(project, target, kind):
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=True)
    name = done.stdout.splitlines()[-1]
    return name, zipfile.ZipFile(target / name).namelist(), done.stdout + done.stderr


def test_a_wheel_holds_the_library_of_its_sources_and_is_used_from_there(compiler, project, tmp_path, monkeypatch):
    (project / "build" / "lib" / "taq_kernels").mkdir(parents=True, exist_ok=True)
    (project / "build" / "lib" / "taq_kernels" / "lowbit-0123456789abcdef.so").touch()  # of an earlier build
    name, files, _ = build(project, tmp_path, "wheel")
    assert name.endswith("-py3-none-linux_x86_64.whl")
    assert [file for file in files if file.endswith(".so")] == [f"taq_kernels/{cpu_build.packaged().name}"]
    assert {f"taq_kernels/{source}" for source in cpu_build.SOURCES} < set(files)

    zipfile.ZipFile(tmp_path / name).extractall(tmp_path / "installed")
    path = tmp_path / "installed" / "taq_kernels" / "cpu_build.py"
    spec = importlib.util.spec_from_file_location("installed_cpu_build", path)
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert installed.library().lowbit_best(0) == 7
    # Once the sources have changed, the library is not theirs.
    path.with_name("lowbit.cpp").write_text("// nothing")
    installed.library.cache_clear()
    assert installed.library() is None


def test_a_wheel_is_built_without_a_compiler(project, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    name, files, output = build(project, tmp_path, "wheel")
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]
    assert {f"taq_kernels/{source}" for source in cpu_build.SOURCES} < set(files)
    assert "CXX=/nowhere/c++ not found" in output


def test_an_editable_installation_holds_no_library(compiler, project, tmp_path):
    name, files, _ = build(project, tmp_path, "editable")
    assert name.endswith(".whl")
    assert not [file for file in files if file.endswith(".so")]
    assert not list((project / "kernels").rglob("*.so"))
    assert not compiler.exists()
