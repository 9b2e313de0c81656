"""Greedy outputs against transformers' own, whatever the batch, and the shortcut against generating."""

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from taq_vllm import stream
from taq_vllm.generate import greedy, greedy_given

TOKENS = 12
PROMPTS = [[5, 9, 13], [7] * 9, [100, 200, 300, 400, 500], [3000, 1], [42] * 30, [11, 12, 13, 14, 15, 16, 17]]


# mistral's window of 24 tokens is shorter than the longest prompt and its output
@pytest.fixture(scope="module", params=["qwen3", "mistral", "phi3"])
def model(request, tmp_path_factory):
    folder = make_tiny(request.param, tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def alone(model, prompt, count=TOKENS):
    """Transformers' greedy search on a single prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_outputs_are_those_of_transformers_whatever_the_batch(model, batch_size):
    assert greedy(model, PROMPTS, TOKENS, batch_size=batch_size) == [alone(model, prompt) for prompt in PROMPTS]


def test_an_end_token_ends_an_output_and_leaves_the_others_running(model):
    outputs = greedy(model, PROMPTS, TOKENS)
    end = outputs[0][3]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end, 2]
    try:
        ended = greedy(model, PROMPTS, TOKENS)
    finally:
        model.generation_config.eos_token_id = before
    for whole, cut in zip(outputs, ended, strict=True):
        assert cut == whole[: whole.index(end) + 1 if end in whole else None]
    assert len(ended[0]) <= 4


def test_stop_ends_an_output_with_the_token_that_it_is_true_after(model):
    outputs = greedy(model, PROMPTS, TOKENS, stop=lambda output: sum(output) > 9000)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        whole = alone(model, prompt)
        ends = [i + 1 for i in range(len(whole)) if sum(whole[: i + 1]) > 9000]
        assert output == whole[: ends[0] if ends else None]


@pytest.mark.parametrize("size", [0.0, 0.003, 0.05])
@pytest.mark.parametrize("stop", [None, lambda output: sum(output) > 15000])
def test_outputs_given_those_before_a_change_are_those_generated_after_it(model, size, stop):
    before = greedy(model, PROMPTS, TOKENS, stop)
    weight = model.model.layers[0].mlp.down_proj.weight
    original = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight += size * noise
    try:
        outputs, changed = greedy_given(model, PROMPTS, before, TOKENS, stop, batch_size=4)
        after = greedy(model, PROMPTS, TOKENS, stop)
    finally:
        with torch.no_grad():
            weight.copy_(original)
    assert outputs == after
    assert changed == sum(one != other for one, other in zip(before, after, strict=True))
    if size == 0:
        assert changed == 0
    if size == 0.05:
        assert changed > 0


def test_logits_are_made_a_few_rows_at_a_time_whatever_the_vocabulary(model, monkeypatch):
    before = greedy(model, PROMPTS, TOKENS)
    monkeypatch.setattr(stream, "_LOGITS_BYTES", 5 * 4 * model.lm_head.weight.shape[0])
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    try:
        assert greedy_given(model, PROMPTS, before, TOKENS) == (before, 0)
    finally:
        handle.remove()
    assert max(rows) == 5
    assert sum(rows) == len(PROMPTS) * TOKENS
