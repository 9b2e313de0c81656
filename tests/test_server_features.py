"""What vLLM's server offers, on a mixed checkpoint: each against the same checkpoint without the feature.

The lab model is a trained one, so that its greedy texts mean something. In float32 only the order of sums is left
between two ways to compute the same numbers, and greedy texts are equal token for token. Tests with the mark `feature`
make the support table: `python -m pytest -m feature --support FILE`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import engine, in_a_process
from plans import make_plan, mixed
from tiny_models import LAB_MODEL, make_tiny
from vllm import SamplingParams, __version__
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

from taq_vllm.allocate import Request, allocate
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.scoring import baseline

# q, k and v of one layer differ, and every bitwidth occurs.
PINS = ("layers.3.self_attn.q_proj=4", "layers.3.self_attn.k_proj=8", "layers.3.self_attn.v_proj=16")
QUESTIONS = [json.loads(line)["prompt"] for line in (LAB_MODEL.parent / "tasks/trivia/test.jsonl").open()][:24]
# vLLM's CPU engine caches blocks of 128 tokens.
LONG = [f"{' '.join(QUESTIONS[:12])}\n{question}" for question in QUESTIONS[16:20]]
QUESTIONS = QUESTIONS[:6]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
NEW_TOKENS = 12
SUMS = 1e-3  # nats: what another order of sums moves a log-probability by in float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    files = ModelFiles(LAB_MODEL)
    plan = allocate(files, baseline(files, "random"), Request("7bits", pins=PINS))
    out = tmp_path_factory.mktemp("checkpoints") / "lab-7bits"
    quantize_model(files, plan, out, Calibration(method="rtn"))
    return out


def ask(llm, prompts=QUESTIONS, **sampling):
    parameters = SamplingParams(**({"temperature": 0, "max_tokens": NEW_TOKENS} | sampling))
    return llm.generate(prompts, parameters, use_tqdm=False)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def prompt_logprobs(outputs):
    return torch.tensor(
        [
            entry[token].logprob
            for output in outputs
            for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        ]
    )


def lab_engine(checkpoint, **settings):
    return engine(checkpoint, **({"skip_tokenizer_init": False, "dtype": "float32"} | settings))


@pytest.fixture(scope="module")
def plain(checkpoint):
    """What an engine says that caches nothing and computes every prompt in one piece: the texts for the questions, and
    texts and prompt log-probabilities of the long prompts."""
    with lab_engine(checkpoint, enable_prefix_caching=False, max_num_batched_tokens=4096) as llm:
        outputs = ask(llm, LONG, prompt_logprobs=0)
        return texts(ask(llm)), prompt_logprobs(outputs), texts(outputs)


@pytest.mark.feature("prefix caching", "same texts; the second time the prompts come from the cache")
def test_prompts_from_the_cache_give_the_same_texts(checkpoint, plain):
    with lab_engine(checkpoint, enable_prefix_caching=True) as llm:
        assert texts(ask(llm, LONG)) == plain[2]
        again = ask(llm, LONG)
    assert texts(again) == plain[2]
    assert all(output.num_cached_tokens > 0 for output in again)


@pytest.mark.feature("chunked prefill", "same texts, prompt log-probabilities within 0.001 nats in float32")
def test_prompts_in_pieces_give_the_same_log_probabilities(checkpoint, plain):
    with lab_engine(checkpoint, enable_prefix_caching=False, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        outputs = ask(llm, LONG, prompt_logprobs=0)
    assert min(len(output.prompt_token_ids) for output in outputs) > 2 * 48
    assert texts(outputs) == plain[2]
    assert (prompt_logprobs(outputs) - plain[1]).abs().max() < SUMS


@pytest.mark.feature("n-gram speculative decoding", "same greedy texts; drafts are made and accepted")
def test_speculation_changes_no_greedy_text(checkpoint, tmp_path):
    # Texts with a repetition to draft from; in processes of their own, because the drafts' compiler (numba) leaves
    # something behind that vLLM's next engine in the process trips over.
    code = """
        import json
        from test_server_features import LONG, ask, lab_engine, texts
        with lab_engine({folder!r}, **{settings!r}, disable_log_stats=False) as llm:
            found = texts(ask(llm, LONG, max_tokens=32, ignore_eos=True))
            counts = {{metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}}
        open({out!r}, "w").write(json.dumps([found, counts]))
    """
    found = []
    for settings in ({}, {"speculative_config": NGRAM}):
        out = str(tmp_path / "out.json")
        in_a_process(code.format(folder=str(checkpoint), settings=settings, out=out), tmp_path)
        found.append(json.loads(Path(out).read_text()))
    (expected, _), (drafted, counts) = found
    assert drafted == expected
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.feature("structured output", "free texts are unchanged where they obey; regex and JSON schema are obeyed")
def test_structured_output_is_obeyed_and_leaves_obedient_texts_alone(checkpoint, plain):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    # Where whitespace is free a model this small writes nothing else.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    with lab_engine(checkpoint, structured_outputs_config=compact) as llm:
        obedient = StructuredOutputsParams(choice=[text.strip("\n") for text in plain[0]])
        assert [text.strip("\n") for text in texts(ask(llm, structured_outputs=obedient))] == [
            text.strip("\n") for text in plain[0]
        ]
        numbers = texts(ask(llm, structured_outputs=StructuredOutputsParams(regex=r"\d{4}")))
        objects = texts(ask(llm, structured_outputs=StructuredOutputsParams(json=schema)))
    assert all(text.isdigit() and len(text) == 4 for text in numbers)
    assert all(isinstance(json.loads(text)["a"], bool) for text in objects)


@pytest.mark.feature("log-probabilities", "of sampled and of prompt tokens; those of one text agree with each other")
def test_log_probabilities_of_a_text_are_the_same_as_a_prompt(checkpoint):
    with lab_engine(checkpoint) as llm:
        (output,) = ask(llm, QUESTIONS[:1], logprobs=2, ignore_eos=True)
        generated = output.outputs[0]
        whole = {"prompt_token_ids": [*output.prompt_token_ids, *generated.token_ids]}
        (again,) = ask(llm, [whole], prompt_logprobs=0, max_tokens=1)
    sampled = [entry[token].logprob for entry, token in zip(generated.logprobs, generated.token_ids, strict=True)]
    read = prompt_logprobs([again])[-len(sampled) :]
    assert (torch.tensor(sampled) - read).abs().max() < SUMS


@pytest.mark.feature("several samples per request", "seeded samples do not depend on what else is in the batch")
def test_seeded_samples_do_not_depend_on_the_batch(checkpoint):
    with lab_engine(checkpoint) as llm:
        alone = ask(llm, QUESTIONS[:1], temperature=1.0, n=3, seed=7)
        together = ask(llm, QUESTIONS, temperature=1.0, n=3, seed=7)
    assert [part.text for part in alone[0].outputs] == [part.text for part in together[0].outputs]


@pytest.mark.feature("sleep mode", "same texts after sleep and wake_up")
def test_sleep_is_what_the_platform_makes_of_it(checkpoint, plain):
    on_gpu = torch.cuda.is_available()
    with lab_engine(checkpoint, enable_sleep_mode=on_gpu) as llm:
        llm.sleep(1)
        llm.wake_up()
        assert texts(ask(llm)) == plain[0]
    if not on_gpu:
        pytest.skip("vLLM's CPU worker ignores sleep and wake_up, with a warning")


@pytest.mark.engine
@pytest.mark.feature("pipeline parallel 2", "same texts")
def test_two_stages_give_the_same_texts(checkpoint, plain, tmp_path):
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def serve_in_two_stages(model):
        code = f"""
            import json
            from test_server_features import ask, lab_engine, texts
            with lab_engine({str(model)!r}, pipeline_parallel_size=2) as llm:
                open({str(tmp_path / "out.json")!r}, "w").write(json.dumps(texts(ask(llm))))
        """
        in_a_process(code, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")

    if not torch.cuda.is_available():
        try:
            serve_in_two_stages(LAB_MODEL)
        except AssertionError:  # "intermediate_tensors" is None in 0.32
            pytest.skip(f"vLLM {__version__} fails on a CPU with two stages of the 16-bit model too")
    serve_in_two_stages(checkpoint)
    assert json.loads((tmp_path / "out.json").read_text()) == plain[0]


@pytest.mark.engine
@pytest.mark.feature("Ray executor", "same texts")
def test_ray_workers_give_the_same_texts(checkpoint, plain, tmp_path):
    if not current_platform.ray_device_key:
        pytest.skip("vLLM has no Ray workers on a CPU")
    pytest.importorskip("ray", reason="Ray is not installed")
    code = f"""
        import json
        from test_server_features import ask, lab_engine, texts
        with lab_engine({str(checkpoint)!r}, distributed_executor_backend="ray") as llm:
            open({str(tmp_path / "out.json")!r}, "w").write(json.dumps(texts(ask(llm))))
    """
    in_a_process(code, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert json.loads((tmp_path / "out.json").read_text()) == plain[0]


@pytest.mark.engine
@pytest.mark.feature("vllm bench latency, throughput", "run to their end")
@pytest.mark.parametrize(
    "arguments",
    [
        "latency --input-len 8 --output-len 4 --batch-size 2 --num-iters 1 --num-iters-warmup 1",
        "throughput --dataset-name random --random-input-len 8 --random-output-len 4 --num-prompts 4",
    ],
    ids=["latency", "throughput"],
)
def test_vllm_bench_runs(tmp_path, arguments):
    # `vllm bench latency` draws tokens from 10,000.
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=2, vocab_size=10240)
    quantize_model(ModelFiles(model), make_plan(model, mixed), tmp_path / "out", Calibration(method="rtn"))
    command = [Path(sys.executable).parent / "vllm", "bench", *arguments.split(), "--model", tmp_path / "out"]
    command += ["--enforce-eager", "--output-json", tmp_path / "out.json", "--quantization", "taq"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "out.json").read_text())
