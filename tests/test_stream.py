import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_tiny
from transformers import AutoModelForCausalLM

from taq_vllm import stream
from taq_vllm.model_files import ModelFiles
from taq_vllm.stream import StreamedModel, make_batches, matrices_of


class Sequence:
    def __init__(self, length, seed):
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(3, 3000, (length,), generator=generator).tolist()
        self.prompt_len = max(1, length // 2)


SEQUENCES = [Sequence(length, seed) for seed, length in enumerate((5, 40, 17, 33, 1, 28))]


def walk(model, batches):
    hidden = model.embed(batches)
    for layer in range(model.layers):
        with model.block(layer) as block:
            hidden = [model.run(layer, block, states) for states in hidden]
    return hidden


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_walk_gives_the_logits_of_a_plain_forward_pass_to_the_bit(model_type, tmp_path):
    folder = make_tiny(model_type, tmp_path)
    model = StreamedModel(ModelFiles(folder))
    batches = make_batches(SEQUENCES, batch_size=6)
    hidden = walk(model, batches)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=model.compute_dtype)
    with model.head() as head, torch.inference_mode():
        for batch, states in zip(batches, hidden, strict=True):
            expected = reference(input_ids=batch.input_ids).logits.float()
            assert torch.equal(head.logits(states)[batch.is_token], expected[batch.is_token])


def test_a_walk_in_float32_is_that_of_the_same_weights(tmp_path, monkeypatch):
    folder = make_tiny("qwen3", tmp_path)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda supported=supported: {"avx512_bf16": supported})
        model = StreamedModel(ModelFiles(folder))
        assert model.compute_dtype == dtype
        with model.block(0) as block:
            weight = block.mlp.up_proj.weight
            assert weight.dtype == dtype
            assert torch.equal(weight.bfloat16(), model.files.read("model.layers.0.mlp.up_proj.weight"))


def test_padding_does_not_reach_real_tokens(tmp_path):
    model = StreamedModel(ModelFiles(make_tiny("qwen3", tmp_path)))
    together = walk(model, make_batches(SEQUENCES, batch_size=6))[0]
    order = sorted(range(6), key=lambda i: len(SEQUENCES[i].input_ids))
    for row, place in enumerate(order):
        alone = walk(model, make_batches([SEQUENCES[place]], batch_size=1))[0][0]
        # products of other shapes add in another order: 2^-8 relative in bf16, grown over three blocks
        difference = (together[row, : len(alone)] - alone).float().norm() / alone.float().norm()
        assert difference < 0.02


def test_only_one_block_holds_weights_at_a_time(tmp_path):
    model = StreamedModel(ModelFiles(make_tiny("llama", tmp_path)))
    with model.block(1) as block:
        assert all(p.device.type == "cpu" for p in block.parameters())
        assert all(p.is_meta for p in model._decoder.layers[0].parameters())
    assert all(p.is_meta for p in model._decoder.parameters())


def test_batches_mark_real_and_predicted_tokens():
    batch = make_batches(SEQUENCES, batch_size=6)[0]
    assert batch.is_token.sum() == sum(len(s.input_ids) for s in SEQUENCES)
    # the token before the completion predicts its first token, the last token predicts nothing
    assert batch.is_predicted.sum() == sum(len(s.input_ids) - s.prompt_len for s in SEQUENCES)
    for row, place in enumerate(batch.examples.tolist()):
        sequence = SEQUENCES[place]
        targets = batch.input_ids[row].roll(-1)[batch.is_predicted[row]].tolist()
        assert targets == sequence.input_ids[sequence.prompt_len :]


def test_max_tokens_cuts_every_sequence():
    batches = make_batches(SEQUENCES, batch_size=2, max_tokens=20)
    assert max(int(batch.lengths.max()) for batch in batches) == 20


def test_matrices_of_a_block_are_those_that_headers_name(tmp_path):
    for model_type in ARCHITECTURES:
        files = ModelFiles(make_tiny(model_type, tmp_path / model_type))
        model = StreamedModel(files)
        with model.block(0) as block:
            shapes = {f"model.layers.0.{n}": tuple(m.weight.shape) for n, m in matrices_of(block).items()}
        assert shapes == {n: s for n, s in files.matrices.items() if n.startswith("model.layers.0.")}


def test_config_and_weights_of_different_models_are_refused(tmp_path):
    folder = make_tiny("llama", tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 512'))
    model = StreamedModel(ModelFiles(folder))
    with pytest.raises(ValueError, match="config and weights are not of one model"), model.block(0):
        pass


def test_only_the_rows_that_are_looked_up_are_read(tmp_path, monkeypatch):
    files = ModelFiles(make_tiny("llama", tmp_path))
    read = []
    rows_of = ModelFiles.read_rows
    monkeypatch.setattr(
        ModelFiles,
        "read_rows",
        lambda self, name, rows: (read.append((name, sorted(rows))), rows_of(self, name, rows))[1],
    )
    monkeypatch.setattr(ModelFiles, "read", lambda self, name: pytest.fail(f"{name} was read whole"))
    model = StreamedModel(files, "cpu")
    batch = make_batches(SEQUENCES, batch_size=6)[0]
    hidden = model.embed([batch])[0]
    assert read == [("model.embed_tokens.weight", batch.input_ids.unique().tolist())]
    monkeypatch.undo()
    whole = files.read("model.embed_tokens.weight").to(model.compute_dtype)
    assert torch.equal(hidden, whole[batch.input_ids])


def test_tokens_of_another_model_are_named(tmp_path):
    model = StreamedModel(ModelFiles(make_tiny("llama", tmp_path)), "cpu")
    batch = make_batches(SEQUENCES, batch_size=6)[0]
    batch.input_ids[0, 0] = 3072
    with pytest.raises(ValueError, match=r"has 3072 rows, got row 3072 .*another model"):
        model.embed([batch])


def test_a_head_converted_in_parts_gives_the_logits_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    model = StreamedModel(ModelFiles(make_tiny("llama", tmp_path)), "cpu")
    states = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    with model.head() as head:
        assert head.weight.dtype == torch.bfloat16
        whole = torch.nn.functional.linear(head.norm(states), head.weight.float())
        monkeypatch.setattr(stream, "_HEAD_PART_BYTES", 1000 * 256 * 4)  # 4 parts, the last one shorter
        found = head.logits(states)
    # products of other shapes may add in another order
    assert torch.allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_the_heads_rows_at_once_keep_logits_below_their_limit(tmp_path):
    model = StreamedModel(ModelFiles(make_tiny("llama", tmp_path)), "cpu")
    with model.head() as head:
        assert head.rows_at_once * 3072 * 4 <= 256 << 20 < (head.rows_at_once + 1) * 3072 * 4


@pytest.mark.parametrize(
    ("tensor", "named"), [("embed_tokens", "model.embed_tokens"), ("layers.1.self_attn.v_proj", "model.layers.1")]
)
def test_states_that_are_not_finite_name_what_gives_them(tensor, named, tmp_path):
    folder = make_tiny("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.{tensor}.weight"][:] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = StreamedModel(ModelFiles(folder), "cpu")
    with pytest.raises(ValueError, match=f"{named} of .* not finite: compare its weights with the model's source"):
        walk(model, make_batches(SEQUENCES, batch_size=6))


def test_a_walk_does_not_hold_what_it_has_read(tmp_path):
    """Resident memory, pages of mapped files included, of a process that walks 12 blocks of 8 MB each."""
    folder = make_tiny("llama", tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    code = f"""
from pathlib import Path
from taq_vllm.model_files import ModelFiles
from taq_vllm.scoring import peak_memory_bytes
from taq_vllm.stream import StreamedModel, make_batches
from taq_vllm.tasks import TokenizedExample
model = StreamedModel(ModelFiles({str(folder)!r}), "cpu")
hidden = model.embed(make_batches([TokenizedExample(list(range(3, 40)), 5)], 1))
for layer in range(model.layers):
    with model.block(layer) as block:
        hidden.replace(lambda states: model.run(layer, block, states))
    if layer == 1:
        two = peak_memory_bytes()
print(peak_memory_bytes() - two)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    # Ten more blocks are 200 MB in float32, and 100 MB of file; the allocator may keep one block's worth
    assert int(done.stdout) < 24e6
