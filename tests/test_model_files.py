import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from taq_vllm.model_files import ModelFiles


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def test_sizes_from_headers_equal_the_loaded_tensors(folder):
    files = ModelFiles(folder)
    tensors = load_file(folder / "model.safetensors")
    planned = sum(2 * rows * columns for rows, columns in files.matrices.values())
    assert planned + files.bytes_beside(files.matrices) == sum(t.numel() * 2 for t in tensors.values())
    assert torch.equal(files.read("model.norm.weight"), tensors["model.norm.weight"])
    assert files.layers == 3
    assert len(files.matrices) == 21


def test_the_fingerprint_tells_a_model_from_one_with_other_weights(folder, original):
    assert ModelFiles(folder).ref.fingerprint == ModelFiles(original).ref.fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ModelFiles(folder).ref.fingerprint != ModelFiles(original).ref.fingerprint


def test_a_truncated_file_is_named_with_its_size(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors has {len(content) - 100} bytes, its header says {len(content)}"
    ):
        ModelFiles(folder)
    file.write_bytes(content[:50])
    with pytest.raises(ValueError, match="cut short inside its header"):
        ModelFiles(folder)


def test_a_damaged_header_is_named(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged header"):
        ModelFiles(folder)


def test_any_flipped_bit_of_a_header_is_a_clear_error_or_harmless(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in range(0, header, 7):  # every byte of an 8 kB header would take a minute
        for bit in (0, 3, 6):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            try:
                ModelFiles(folder)
            except ValueError as error:
                assert "model.safetensors" in str(error)  # noqa: PT017


def test_a_damaged_index_is_named(folder):
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json is not an index"):
            ModelFiles(folder)


def test_a_missing_shard_is_named(folder):
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        ModelFiles(folder)


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no model at"):
        ModelFiles(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        ModelFiles(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping 30.0, which is not"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are Gemma3ForCausalLM, Llama"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(folder, change, said):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        ModelFiles(folder).check_plannable()
