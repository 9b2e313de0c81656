import pytest
import torch
from tiny_models import ARCHITECTURES, make_tiny
from transformers import AutoModelForCausalLM

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
