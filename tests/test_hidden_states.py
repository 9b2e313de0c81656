import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_models import make_tiny

from taq_vllm.hidden_states import HiddenStates, Storage
from taq_vllm.model_files import ModelFiles
from taq_vllm.stream import StreamedModel, make_batches
from taq_vllm.tasks import TokenizedExample


def _states(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 8, generator=generator).to(dtype) for length in (3, 5, 5, 9)]


def _equal(one, other):
    """To the bit: NaN is NaN, -0 is not 0."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(words), other.view(words))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [0, 300, float("inf")])
def test_what_comes_back_is_what_was_put_in_to_the_bit(dtype, limit, tmp_path):
    states = _states(dtype)
    states[1][0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    storage = Storage(limit, tmp_path)
    hidden = HiddenStates(iter(states), storage)
    assert len(hidden) == 4
    assert storage.used_bytes <= limit
    assert storage.used_bytes + storage.spilled_bytes == sum(s.nbytes for s in states)
    assert all(_equal(found, put) for found, put in zip(hidden, states, strict=True))
    assert _equal(hidden[2], states[2])


@pytest.mark.parametrize("limit", [0, 300, float("inf")])
def test_map_keeps_the_old_ones_and_replace_does_not(limit, tmp_path):
    states = _states()
    hidden = HiddenStates(states, Storage(limit, tmp_path))
    doubled = hidden.map(lambda s: s * 2)
    # shorter and longer ones take the places of those before
    hidden.replace(lambda s: torch.cat([s, s], dim=1) if s.shape[1] == 5 else s[:, :2])
    for old, new, two in zip(states, hidden, doubled, strict=True):
        assert _equal(two, old * 2)
        assert _equal(new, torch.cat([old, old], dim=1) if old.shape[1] == 5 else old[:, :2])


def test_hidden_states_of_one_walk_share_the_limit_and_give_back_what_they_held(tmp_path):
    storage = Storage(500, tmp_path)
    first = HiddenStates(_states(), storage)
    second = first.map(lambda s: s + 1)
    assert storage.used_bytes <= 500
    held = storage.used_bytes + storage.spilled_bytes
    assert held == 2 * sum(s.nbytes for s in _states())
    del first
    assert storage.used_bytes + storage.spilled_bytes == held // 2
    del second
    assert storage.used_bytes == storage.spilled_bytes == 0


def test_no_file_is_left_over_also_when_the_process_is_killed(tmp_path):
    code = (
        "import torch, os, signal, sys; from taq_vllm.hidden_states import *;"
        f"h = HiddenStates([torch.ones(1, 9, 9)] * 3, Storage(0, {str(tmp_path)!r})); assert h[2].sum() == 81;"
        "print(h._storage.spilled_bytes, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip() == str(3 * 81 * 4)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [0, float("inf")])
def test_saved_ones_are_loaded_to_the_bit_with_the_blocks_behind_them(limit, tmp_path):
    file = tmp_path / "hidden"
    hidden = HiddenStates(_states(), Storage(limit, tmp_path))
    assert HiddenStates.load(file) is None
    hidden.save(file, blocks=1)
    hidden.replace(lambda s: -s)
    hidden.save(file, blocks=2)
    assert os.listdir(tmp_path) == ["hidden"]
    loaded, blocks = HiddenStates.load(file, Storage(limit, tmp_path))
    assert blocks == 2
    assert all(_equal(found, -put) for found, put in zip(loaded, _states(), strict=True))


def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path):
    file = tmp_path / "hidden"
    hidden = HiddenStates(_states(), Storage(0, tmp_path))
    hidden.save(file, blocks=1)
    content = file.read_bytes()
    (tmp_path / ".hidden.partial").write_bytes(content[:100])  # what a kill leaves
    _, blocks = HiddenStates.load(file)
    assert blocks == 1
    assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["hidden"]


def test_a_saved_file_that_is_cut_short_is_named(tmp_path):
    file = tmp_path / "hidden"
    HiddenStates(_states()).save(file, blocks=1)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="hidden has"):
        HiddenStates.load(file)


def test_a_walk_on_disk_is_the_walk_in_memory_and_goes_on_where_it_was_saved(tmp_path):
    files = ModelFiles(make_tiny("qwen3", tmp_path / "model"))
    sequences = [TokenizedExample(list(range(10, 10 + n)), n) for n in (5, 9, 14)]

    def walk(model, hidden, first=0):
        for layer in range(first, model.layers):
            with model.block(layer) as block:
                hidden.replace(lambda states, layer=layer, block=block: model.run(layer, block, states))
            hidden.save(tmp_path / "hidden", blocks=layer + 1)
            if layer == 1:
                (tmp_path / "hidden").rename(tmp_path / "second")
        return list(hidden)

    model = StreamedModel(files, "cpu")
    batches = make_batches(sequences, 1)
    whole = walk(model, model.embed(batches))
    spilled = StreamedModel(files, "cpu", hidden_limit_bytes=0, spill_folder=tmp_path)
    assert all(map(_equal, walk(spilled, spilled.embed(batches)), whole))
    assert spilled.storage.used_bytes == 0
    again = StreamedModel(files, "cpu")
    hidden, blocks = again.resume(tmp_path / "second")
    assert blocks == 2
    assert all(map(_equal, walk(again, hidden, blocks), whole))
