import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from taq_vllm import journal
from taq_vllm.allocate import Request, allocate
from taq_vllm.checkpoint import (
    Calibration,
    calibration_batches,
    check_tensors,
    disk_bytes,
    pack,
    quantize_model,
    unpack,
    verify,
)
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import MatrixPlan, Plan
from taq_vllm.quantizer import Quantized, quantize
from taq_vllm.scoring import baseline
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import load_task

MIXED_LAYER = ("layers.1.self_attn.q_proj=4", "layers.1.self_attn.k_proj=8", "layers.1.self_attn.v_proj=16")
RTN = Calibration(method="rtn")
CLIP = Calibration(method="clip", examples=6, batch_size=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plan(files):
    return allocate(files, baseline(files, "random"), Request("8bits", pins=MIXED_LAYER))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": f"Question: {i}?\nAnswer:", "answers": [f"{i * 7}"]} for i in range(8)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text("name: tiny\nmetric: em\ncalibration: calibration.jsonl\n")
    return load_task(folder)


@pytest.fixture
def written(files, plan, tmp_path):
    quantize_model(files, plan, tmp_path / "out", RTN)
    return tmp_path / "out"


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [16, 20, 37])
def test_pack_and_unpack_are_exact_inverses(bits, symmetric, rows):
    generator = torch.Generator().manual_seed(bits)
    zero = (
        torch.full((rows, 2), 2 ** (bits - 1))
        if symmetric
        else torch.randint(0, 2**bits, (rows, 2), generator=generator)
    )
    original = Quantized(
        bits=bits,
        symmetric=symmetric,
        codes=torch.randint(0, 2**bits, (rows, 256), generator=generator).to(torch.uint8),
        scale=torch.rand(rows, 2, generator=generator).bfloat16(),
        zero_point=zero.to(torch.uint8),
    )
    entry = MatrixPlan(bits=bits, symmetric=symmetric, shape=(rows, 256), why="score")
    restored = unpack("m", pack("m", original), entry)
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(restored, name), getattr(original, name))


def test_bytes_on_disk_are_what_the_plan_said(written, plan):
    tensors = ModelFiles(written).tensors.values()
    assert sum(info.end - info.start for info in tensors) == plan.budget.disk_bytes


def test_transformers_loads_it_alone_and_equals_its_fake_quantized_twin_to_the_bit(files, plan, written):
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "with torch.inference_mode():\n"
        "    logits = model(input_ids=torch.arange(3, 43)[None]).logits\n"
        "assert not [m for m in sys.modules if m.startswith('taq_')]\n"
        "torch.save(logits, sys.argv[2])\n"
    )
    result = written.parent / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(written), str(result)], check=True)
    twin = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
    for name, entry in plan.matrices.items():
        if entry.bits < 16:
            module = twin.get_submodule(name)
            module.weight.data = quantize(module.weight.data, entry.bits, entry.symmetric).dequantize()
    with torch.inference_mode():
        expected = twin(input_ids=torch.arange(3, 43)[None]).logits
    assert torch.equal(torch.load(result), expected)


def test_the_config_is_one_that_compressed_tensors_reads(written, plan):
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["taq"]["plan_sha256"] == plan.sha256()
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k not in ("taq", "quant_method")})
    by_name = {t: g.weights.num_bits for g in parsed.config_groups.values() for t in g.targets}
    assert by_name == {n: m.bits for n, m in plan.matrices.items() if m.bits < 16}
    assert set(parsed.ignore) == {n for n, m in plan.matrices.items() if m.bits == 16} | {"lm_head"}


def test_clip_reads_the_inputs_of_the_quantized_prefix(files, plan, task, tmp_path):
    quantize_model(files, plan, tmp_path / "quantized", CLIP, task)
    full = Calibration(method="clip", examples=6, batch_size=3, inputs="full")
    quantize_model(files, plan, tmp_path / "full", full, task)
    first, last = "model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"
    assert (tmp_path / "quantized" / first).read_bytes() == (tmp_path / "full" / first).read_bytes()
    assert (tmp_path / "quantized" / last).read_bytes() != (tmp_path / "full" / last).read_bytes()


def test_a_finished_checkpoint_is_not_written_again_and_another_is_not_overwritten(files, plan, task, written):
    before = folder_bytes(written)
    assert quantize_model(files, plan, written, RTN) is False
    with pytest.raises(ValueError, match="holds something else"):
        quantize_model(files, plan, written, CLIP, task)
    assert folder_bytes(written) == before


@pytest.mark.parametrize("method", ["rtn", "clip"])
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(files, plan, task, tmp_path, method):
    plan.save(tmp_path / "plan.json")
    calibration = CLIP if method == "clip" else RTN
    quantize_model(files, plan, tmp_path / "whole", calibration, task)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import taq_vllm.checkpoint as c\n"
        "from taq_vllm.plan import Plan\n"
        "from taq_vllm.tasks import load_task\n"
        "save = c.Shards.save\n"
        "def kill_in_the_second(self, number, tensors):\n"
        "    if number == 1:\n"
        "        (self.folder / self.name(number)).write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self, number, tensors)\n"
        "c.Shards.save = kill_in_the_second\n"
        "model, plan, output, task, method = sys.argv[1:]\n"
        "calibration = c.Calibration(method=method, examples=6, batch_size=3)\n"
        "c.quantize_model(c.ModelFiles(model), Plan.load(plan), Path(output), calibration, load_task(task))\n"
    )
    output = tmp_path / "out"
    arguments = [str(files.path), str(tmp_path / "plan.json"), str(output), str(task.path), method]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    first = tmp_path / ".out.partial" / "model-00001-of-00004.safetensors"
    stamp = first.stat().st_mtime_ns
    assert quantize_model(files, plan, output, calibration, task) is True
    assert (output / first.name).stat().st_mtime_ns == stamp  # found again, not made again
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")
    assert not first.parent.exists()


def test_killed_just_before_the_end_nothing_is_quantized_again(files, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_model(files, plan, tmp_path / "out", RTN)
    monkeypatch.undo()
    monkeypatch.setattr("taq_vllm.methods.rtn.quantize", None)
    assert quantize_model(files, plan, tmp_path / "out", RTN) is True
    verify(tmp_path / "out")


def test_two_runs_do_not_write_into_each_others_folder(files, plan, tmp_path):
    from taq_vllm.checkpoint import _alone_in

    with _alone_in(tmp_path / ".out.partial"), pytest.raises(ValueError, match="another run is writing"):
        quantize_model(files, plan, tmp_path / "out", RTN)


def test_a_damaged_checkpoint_is_not_called_finished(files, plan, written):
    (written / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00004\.safetensors is missing\. Remove"):
        quantize_model(files, plan, written, RTN)


def test_another_tokenizer_makes_another_checkpoint(plan, tmp_path, files, written):
    copy = ModelFiles(shutil.copytree(files.path, tmp_path / files.path.name))
    config = tmp_path / files.path.name / "tokenizer_config.json"
    config.write_text(config.read_text().replace("512", "256"))
    with pytest.raises(ValueError, match="holds something else"):
        quantize_model(copy, plan, written, RTN)


def test_another_spelling_of_the_folder_or_the_budget_is_the_same_plan(files, monkeypatch):
    monkeypatch.chdir(files.path.parent)
    hashes = {
        allocate(ModelFiles(model), baseline(files, "edges"), Request(budget)).sha256()
        for model in (files.path, files.path.name, f"./{files.path.name}/")
        for budget in ("6bits", "6.0bits", " 6.00 bits ")
    }
    assert len(hashes) == 1


def test_clip_without_calibration_examples_says_what_to_add(files, plan, task, tmp_path):
    from dataclasses import replace

    with pytest.raises(ValueError, match="no calibration examples"):
        quantize_model(files, plan, tmp_path / "out", CLIP, replace(task, calibration=()))


def test_a_write_that_finds_the_disk_full_says_how_to_go_on(files, plan, tmp_path, monkeypatch):
    from taq_vllm.checkpoint import Shards

    save = Shards.save

    def full_at_the_second(self, number, tensors):
        if number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, number, tensors)

    monkeypatch.setattr(Shards, "save", full_at_the_second)
    with pytest.raises(OSError, match=r"no space left .* run the same command again"):
        quantize_model(files, plan, tmp_path / "out", RTN)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert quantize_model(files, plan, tmp_path / "out", RTN) is True


def test_what_another_request_left_behind_is_not_mixed_in(files, plan, task, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "request.json").write_text('{"method": "other"}')
    (partial / "model-00001-of-00004.safetensors").write_bytes(b"other")
    quantize_model(files, plan, tmp_path / "out", RTN)
    assert verify(tmp_path / "out").files > 5


def test_a_disk_known_to_be_too_small_is_refused_before_anything_is_written(files, plan, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs .* GB more") as error:
        quantize_model(files, plan, tmp_path / "out", RTN)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "inputs", "chains", "held"),
    [("rtn", "quantized", 0, 0), ("clip", "quantized", 1, 1), ("gptq", "full", 1, 2), ("learned", "quantized", 2, 2)],
)
def test_hidden_states_count_among_what_the_disk_must_hold(
    files, plan, task, tmp_path, monkeypatch, method, inputs, chains, held
):
    calibration = Calibration(
        method, examples=6, batch_size=3, inputs=inputs, settings={"steps": 1} if method == "learned" else {}
    )
    model = StreamedModel(files, "cpu", hidden_limit_bytes=0)
    batches = calibration_batches(model, calibration, task)
    sizes = [batch.input_ids.numel() * 256 * model.compute_dtype.itemsize for batch in batches]
    needed = disk_bytes(model, plan, calibration, batches)
    # Saved twice over, and all that is held is spilled: while a batch is replaced it is there twice.
    states = 2 * chains * sum(sizes) + held * sum(sizes) + max(sizes, default=0)
    assert needed == plan.budget.disk_bytes + states
    most, save = [0], HiddenStates.save

    def watched(self, file, blocks):
        save(self, file, blocks)
        kept = sum(each.stat().st_size for each in file.parent.glob("*.safetensors") if each.name.startswith("states"))
        most.append(kept + self._storage.spilled_bytes)

    monkeypatch.setattr(HiddenStates, "save", watched)
    quantize_model(files, plan, tmp_path / "out", calibration, task, "cpu", hidden_limit_bytes=0)
    headers = 2000 * chains
    assert (
        0.7 * states <= max(most) <= states + headers
    )  # with inputs in full, and at the replacing, more than when saved
    usage = shutil.disk_usage(tmp_path)
    enough = needed + (64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough - 1))
    with pytest.raises(OSError, match="more and its disk has"):
        quantize_model(files, plan, tmp_path / "again", calibration, task, "cpu", hidden_limit_bytes=0)


def test_a_journal_ends_before_its_first_damaged_line(tmp_path):
    file = tmp_path / "journal.jsonl"
    assert journal.read(file) == []
    for number in range(4):
        journal.append(file, {"n": number})
    lines = file.read_bytes().splitlines(keepends=True)
    whole = [{"n": number} for number in range(4)]
    for damaged in (b'{"n": 1\n', b"\x00\x00\x00\n", b"\xff\xfe\n", b"7\n", b"\n"):
        file.write_bytes(lines[0] + damaged + lines[2])
        assert journal.read(file, mend=False) == whole[:1]
        assert file.read_bytes() == lines[0] + damaged + lines[2]
        assert journal.read(file) == whole[:1]
        journal.append(file, {"n": 9})
        assert journal.read(file) == [whole[0], {"n": 9}]
    file.write_bytes(b"".join(lines)[:-3])
    assert journal.read(file) == whole[:3]
    assert file.read_bytes() == b"".join(lines[:3])


def test_a_line_is_on_disk_when_it_is_appended(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or sync(handle))
    journal.append(tmp_path / "journal.jsonl", {"n": 1})
    assert synced == [len(b'{"n": 1}\n')]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_command_continues_when_there_is_room(
    files, plan, small_disk, monkeypatch
):
    monkeypatch.setattr("taq_vllm.checkpoint._check_free_space", lambda *args: None)  # another process ate the space
    with pytest.raises(OSError, match=r"no space left .* run the same command again") as error:
        quantize_model(files, plan, small_disk / "out", RTN)
    assert error.value.errno == errno.ENOSPC
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert quantize_model(files, plan, small_disk / "out", RTN) is True
    verify(small_disk / "out")


def test_a_whole_checkpoint_verifies(written, plan):
    result = verify(written)
    assert result.plan == plan


def test_a_flipped_bit_is_found_in_any_file(written):
    for name in ("model-00002-of-00004.safetensors", "config.json", "taq_plan.json", "tokenizer.json"):
        file = written / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        kept, _ = file.read_bytes(), file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} changed"):
            verify(written)
        file.write_bytes(kept)
    verify(written)


def test_a_truncated_missing_or_stray_file_is_named(written):
    file = written / "model-00002-of-00004.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} has {len(content) - 1} bytes"):
        verify(written)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing"):
        verify(written)
    file.write_bytes(content)
    shutil.copy(file, written / "stray.safetensors")
    with pytest.raises(ValueError, match="stray"):
        verify(written)


def test_a_folder_without_a_manifest_is_refused(files):
    with pytest.raises(ValueError, match="not written by `taq quantize`"):
        verify(files.path)


def test_a_plan_that_the_tensors_do_not_follow_is_named_matrix_by_matrix(written, plan):
    edited = plan.model_dump(mode="json")
    name = next(n for n, m in plan.matrices.items() if m.bits == 4)
    edited["matrices"][name]["bits"] = 8
    other = Plan.model_validate(edited)
    with pytest.raises(ValueError, match=r"not the plan that config\.json was written with"):
        check_tensors(ModelFiles(written), other)
    from taq_vllm.checkpoint import quantization_config

    config = json.loads((written / "config.json").read_text()) | {"quantization_config": quantization_config(other)}
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{name} is planned at 8 bits"):
        check_tensors(ModelFiles(written), other)


def test_a_plan_for_another_model_or_of_16_bits_alone_writes_nothing(files, plan, tmp_path):
    other = ModelFiles(make_tiny("qwen3", tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="fingerprint"):
        quantize_model(other, plan, tmp_path / "out", RTN)
    everything = allocate(files, None, Request("16bits", allocation="uniform"))
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_model(files, everything, tmp_path / "out", RTN)
    with pytest.raises(ValueError, match="give --task"):
        quantize_model(files, plan, tmp_path / "out", CLIP)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
    folder = make_tiny("qwen3", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = ModelFiles(folder)
    plan = allocate(files, baseline(files, "edges"), Request("6bits"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: got weights that are not finite"):
        quantize_model(files, plan, tmp_path / "out", RTN)
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_build_stays_in_the_checkpoint(written):
    names = set(os.listdir(written))
    assert {"config.json", "taq_plan.json", "manifest.json", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert not [name for name in names if "journal" in name or "request" in name or name.startswith(".")]
