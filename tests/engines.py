"""vLLM's engine in this process or in one of its own, and transformers as what it is compared with."""

import gc
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

NEW_TOKENS = 8
# Prompts below and above the number of tokens from which weights are unpacked (cpu.BLOCKWISE_FROM_TOKENS).
PROMPTS = [
    torch.randint(3, 3000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (2, 9, 40, 150)
]

# transformers and vLLM round to bf16 in other places (norms, rotary embedding, attention), which moves a
# log-probability of these models by 0.004 to 0.012 on average, quantized or not. 4-bit codes that are off by one
# move it by 0.1 and more.
MEAN_DIFFERENCE = 0.03
# Greedy tokens may differ only where the best two are closer than this noise.
TIE = 0.1


@contextmanager
def engine(folder, **kwargs):
    """vLLM in this process."""
    llm = None
    try:
        defaults = {"skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True, "seed": 0}
        llm = LLM(str(folder), **(defaults | kwargs))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def in_a_process(code, folder, **environment):
    """Run Python lines, which can import the modules of the tests, in a process of their own; its whole output."""
    main = folder / "main.py"
    main.write_text("if __name__ == '__main__':\n" + textwrap.indent(textwrap.dedent(code), "    "))
    result = subprocess.run(
        [sys.executable, str(main)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def generate(llm):
    """Greedy tokens and prompt log-probabilities."""
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        torch.tensor(
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        )
        for output, prompt in zip(outputs, PROMPTS, strict=True)
    ]
    return tokens, logprobs


def serve(folder, **kwargs):
    with engine(folder, **kwargs) as llm:
        return generate(llm)


@torch.no_grad()
def reference(folder, tokens=None):
    """transformers' prompt log-probabilities, and its margin of best over second and over `tokens` at each step."""
    model = folder if isinstance(folder, nn.Module) else AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    logprobs, margins = [], []
    for index, prompt in enumerate(PROMPTS):
        continued = prompt + (tokens[index] if tokens else [])
        ids = torch.tensor([continued])
        logits = model(ids).logits[0].float().log_softmax(-1)
        picked = logits[:-1].gather(1, ids[0, 1:, None])[:, 0]
        logprobs.append(picked[: len(prompt) - 1])
        margins.append(logits[len(prompt) - 1 : -1].amax(-1) - picked[len(prompt) - 1 :])
    return logprobs, margins


def assert_agrees(folder, tokens, logprobs, mean=MEAN_DIFFERENCE, tie=TIE):
    expected, margins = reference(folder, tokens)
    difference = torch.cat([(a - b).abs() for a, b in zip(logprobs, expected, strict=True)]).mean()
    assert difference < mean
    # Every token that was chosen is transformers' own choice too, given the same beginning, or as good as tied.
    assert max(margin.max().item() for margin in margins) < tie
