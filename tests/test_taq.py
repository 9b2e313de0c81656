import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from taq_vllm.hidden_states import HiddenStates
from taq_vllm.model_files import ModelFiles
from taq_vllm.scorers import taq
from taq_vllm.scoring import calibration_sequences, score
from taq_vllm.stream import StreamedModel, make_batches
from taq_vllm.tasks import load_task


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=4))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": "one two three " * (1 + i % 4) + str(i), "answers": ["x"]} for i in range(9)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(folder / "tiny.jsonl")


SETTINGS = {"batch_size": 2, "reservoir": 20, "variance": "relative"}


@pytest.fixture
def save_every_block(monkeypatch):
    monkeypatch.setattr(taq, "_SAVE_SHARE", float("inf"))


def _killed_in_block(layer, monkeypatch, after_saving=False):
    """The run dies while block `layer` runs, or between its statistics and the saving of its hidden states."""
    if after_saving:
        save = HiddenStates.save

        def die_in_save(self, file, blocks):
            if blocks == layer + 1:
                raise KeyboardInterrupt
            save(self, file, blocks)

        monkeypatch.setattr(HiddenStates, "save", die_in_save)
        return
    run = StreamedModel.run

    def die(self, number, block, hidden):
        if number == layer:
            raise KeyboardInterrupt
        return run(self, number, block, hidden)

    monkeypatch.setattr(StreamedModel, "run", die)


@pytest.mark.usefixtures("save_every_block")
@pytest.mark.parametrize(("layer", "in_save"), [(0, False), (2, False), (2, True), (3, True)])
def test_an_interrupted_score_goes_on_at_its_last_finished_block_and_finds_the_same(
    files, task, tmp_path, monkeypatch, layer, in_save
):
    whole, _ = score(files, task, "taq", tmp_path / "whole.json", SETTINGS, "cpu")
    with monkeypatch.context() as patch:
        _killed_in_block(layer, patch, in_save)
        with pytest.raises(KeyboardInterrupt):
            score(files, task, "taq", tmp_path / "s.json", SETTINGS, "cpu")
    assert not (tmp_path / "s.json").exists()
    for journal in tmp_path.glob("s.json.*.journal"):
        with journal.open("a") as file:
            file.write('{"layer": 3, "entropy": {"val')  # what a kill leaves
    ran = []
    run = StreamedModel.run
    monkeypatch.setattr(
        StreamedModel,
        "run",
        lambda self, number, block, hidden: (ran.append(number), run(self, number, block, hidden))[1],
    )
    resumed, fresh = score(files, task, "taq", tmp_path / "s.json", SETTINGS, "cpu")
    assert fresh
    assert sorted(set(ran)) == list(range(layer, 4))
    assert resumed.units == whole.units  # to the bit
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "whole.json"]


@pytest.mark.usefixtures("save_every_block")
def test_what_is_left_of_another_request_is_not_gone_on_with(files, task, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _killed_in_block(2, patch)
        with pytest.raises(KeyboardInterrupt):
            score(files, task, "taq", tmp_path / "s.json", SETTINGS, "cpu")
    other = SETTINGS | {"batch_size": 3}
    whole, _ = score(files, task, "taq", tmp_path / "whole.json", other, "cpu")
    found, _ = score(files, task, "taq", tmp_path / "s.json", other, "cpu")
    assert found.units == whole.units


@pytest.mark.usefixtures("save_every_block")
def test_hidden_states_without_their_statistics_are_not_gone_on_with(files, task, tmp_path, monkeypatch):
    whole, _ = score(files, task, "taq", tmp_path / "whole.json", SETTINGS, "cpu")
    with monkeypatch.context() as patch:
        _killed_in_block(2, patch)
        with pytest.raises(KeyboardInterrupt):
            score(files, task, "taq", tmp_path / "s.json", SETTINGS, "cpu")
    next(tmp_path.glob("*.journal")).write_text("")
    assert score(files, task, "taq", tmp_path / "s.json", SETTINGS, "cpu")[0].units == whole.units


def test_hidden_states_on_disk_give_the_same_scores(files, task, tmp_path):
    whole, _ = score(files, task, "taq", tmp_path / "a.json", SETTINGS, "cpu")
    spilled, _ = score(files, task, "taq", tmp_path / "b.json", SETTINGS, "cpu", hidden_limit_bytes=0)
    assert spilled.units == whole.units
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_activations_that_are_not_finite_name_the_layer_and_what_to_do(files, task, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(files.path, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.2 of .*not finite: compare its weights"):
        score(ModelFiles(damaged), task, "taq", tmp_path / "s.json", SETTINGS, "cpu")


def test_the_reservoir_does_not_depend_on_how_examples_are_batched(task, files):
    draws = []
    for batch_size in (1, 4):
        settings = taq.Settings(batch_size=batch_size, reservoir=15)
        model = StreamedModel(files, "cpu")
        sequences = calibration_sequences(model, task, 9, with_completion=False)
        draw = taq._draw(sequences, settings)
        batches = make_batches(sequences, batch_size)
        hidden = model.embed(batches)
        groups = taq._groups(batches, draw, 256)
        rows = torch.zeros(15, 256)
        for group in groups:
            tokens = torch.cat([hidden[b].flatten(0, 1) for b in group.batches])[group.places].float()
            rows[group.slots] = tokens[group.drawn]
        draws.append(rows)
    assert torch.equal(*draws)
    assert (draws[0].abs().sum(1) > 0).all()
