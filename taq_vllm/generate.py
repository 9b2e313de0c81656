"""Greedy outputs of a model in memory, without a server, and the shortcut that makes them nearly free.

Greedy decoding repeats a reference output if and only if every token of it is the most likely one after those before
it. One teacher-forced pass over the references of the full-precision model therefore tells which outputs a changed
model leaves as they are, and where the others begin to differ: only those are generated, from there on.

Works on plain Hugging Face models with their key-value cache, in any dtype and on any device. Batches are padded (left
to generate, right to teacher-force); masks and positions keep padding out of every row's result, which so depends on
the batch in the order of float sums only. Where two tokens are equally likely up to that, either may win, here as in
any server that batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taq_vllm.distributed import gather, share, total
from taq_vllm.evaluate import judge
from taq_vllm.memory import available_bytes
from taq_vllm.rounding import Rounding, is_quantizable
from taq_vllm.sandbox import require_permission
from taq_vllm.scoring import Run
from taq_vllm.stream import Head

Stop = Callable[[list[int]], bool]
"""Whether an output so far is over, for other reasons than an end token or its length."""


@torch.inference_mode()
def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Stop | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """The most likely token after token.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: of every output.
        stop: asked after every token; the token that it is true after is the output's last.
        batch_size: rows that run together, of similar length.

    Returns:
        Each prompt's output, the end token included where there is one.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    _continue(model, prompts, outputs, range(len(prompts)), max_new_tokens, stop, batch_size)
    return outputs


@torch.inference_mode()
def greedy_given(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Stop | None = None,
    batch_size: int = 32,
) -> tuple[list[list[int]], int]:
    """`greedy`, given outputs that are likely the same: those of the model before a change.

    Args:
        model: as in `greedy`.
        prompts: as in `greedy`.
        references: whole outputs of `greedy` with the same limits, one per prompt.
        max_new_tokens: of every output.
        stop: as in `greedy`.
        batch_size: rows that run together.

    Returns:
        The outputs, and how many had to be generated because they differ.
    """
    outputs = [list(reference) for reference in references]
    changed = []
    for i, difference in enumerate(_first_differences(model, prompts, references, batch_size)):
        if difference is not None:
            place, token = difference
            outputs[i] = [*references[i][:place], token]
            changed.append(i)
    ends = _end_tokens(model)
    unfinished = [i for i in changed if not _is_over(outputs[i], ends, max_new_tokens, stop)]
    _continue(model, prompts, outputs, unfinished, max_new_tokens, stop, batch_size)
    return outputs, len(changed)


def _continue(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    outputs: list[list[int]],
    chosen: Sequence[int],
    max_new_tokens: int,
    stop: Stop | None,
    batch_size: int,
) -> None:
    """Lengthen the chosen outputs, which may have begun, to their ends."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ends = _end_tokens(model)
    begun = {i: [*prompts[i], *outputs[i]] for i in chosen}
    order = sorted(begun, key=lambda i: len(begun[i]))
    for start in range(0, len(order), batch_size):
        running = order[start : start + batch_size]
        longest = len(begun[running[-1]])
        padding = [longest - len(begun[i]) for i in running]
        ids = torch.tensor([[0] * pad + begun[i] for i, pad in zip(running, padding, strict=True)], device=device)
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long().to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        while running:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            tokens = logits[:, -1].float().argmax(-1)
            for i, token in zip(running, tokens.tolist(), strict=True):
                outputs[i].append(token)
            left = [row for row, i in enumerate(running) if not _is_over(outputs[i], ends, max_new_tokens, stop)]
            if len(left) < len(running):  # rows that are over leave the batch
                kept = torch.tensor(left, dtype=torch.long, device=device)
                running = [running[row] for row in left]
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                cache.batch_select_indices(kept)
            ids = tokens[:, None]
            mask = nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1


def _first_differences(
    model: nn.Module, prompts: Sequence[Sequence[int]], references: Sequence[Sequence[int]], batch_size: int
) -> list[tuple[int, int] | None]:
    """Where each reference first is not the most likely token, and which token is; None where it always is."""
    device = next(model.parameters()).device
    differences: list[tuple[int, int] | None] = [None] * len(prompts)
    rows_at_once = Head(model.model.norm, model.lm_head.weight).rows_at_once
    sequences = [[*prompt, *reference] for prompt, reference in zip(prompts, references, strict=True)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(sequences[batch[-1]])
        # Padding on the right needs no mask: causal attention does not look there.
        ids = torch.tensor([sequences[i] + [0] * (longest - len(sequences[i])) for i in batch], device=device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            states = hidden[row, len(prompts[i]) - 1 : len(sequences[i]) - 1]
            chosen = [
                token
                for rows in states.split(rows_at_once)
                for token in model.lm_head(rows).float().argmax(-1).tolist()
            ]
            differences[i] = next(
                (
                    (place, token)
                    for place, (token, reference) in enumerate(zip(chosen, references[i], strict=True))
                    if token != reference
                ),
                None,
            )
    return differences


def _is_over(output: list[int], ends: frozenset[int], max_new_tokens: int, stop: Stop | None) -> bool:
    return output[-1] in ends or len(output) >= max_new_tokens or (stop is not None and stop(output))


def _end_tokens(model: nn.Module) -> frozenset[int]:
    """The model's end tokens, as servers take them: of its generation config, else of its config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


class TaskOutputs:
    """What a task's metric makes of the greedy outputs of one model with one unit changed at a time.

    The whole model is in memory, in the dtype that blocks run in elsewhere.

    Attributes:
        full: [examples of all processes] float64, the metric with nothing changed.
    """

    def __init__(self, run: Run, rounding: Rounding, batch_size: int, allow_code_execution: bool) -> None:
        """Load the model and generate with it as it is.

        Raises:
            ValueError: code to run without permission, an example without answers to judge by, prompts and outputs
                that exceed the model's context, or a model that does not fit into memory.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        task, streamed = run.task, run.model
        if task.metric == "pass@1":
            require_permission(allow_code_execution)
        self._run, self._rounding, self._batch_size = run, rounding, batch_size
        self._allow = allow_code_execution
        count = int(total(torch.tensor(len(run.sequences))))
        self._examples = share(task.calibration[:count])
        for example, tokens in zip(self._examples, run.sequences, strict=True):
            if task.metric != "pass@1" and not example.answers:
                raise ValueError(
                    f"{task.path}, example {example.id}: it has no answers, and metric {task.metric} compares outputs "
                    'with them; add "answers": ["..."] or use measure=teacher-forced'
                )
            if tokens.prompt_len + task.max_new_tokens > streamed.config.max_position_embeddings:
                raise ValueError(
                    f"{task.path}, example {example.id}: its prompt of {tokens.prompt_len} tokens and max_new_tokens "
                    f"{task.max_new_tokens} exceed the model's {streamed.config.max_position_embeddings}; lower "
                    "max_new_tokens or shorten the prompt"
                )
        _check_fits(run)
        self._prompts = [tokens.input_ids[: tokens.prompt_len] for tokens in run.sequences]
        self._tokenizer = AutoTokenizer.from_pretrained(run.files.path)
        model = AutoModelForCausalLM.from_pretrained(run.files.path, dtype=streamed.dtype, attn_implementation="sdpa")
        self._model = model.to(device=streamed.device, dtype=streamed.compute_dtype).eval().requires_grad_(False)
        self._outputs = greedy(self._model, self._prompts, task.max_new_tokens, self._stop(), batch_size)
        self._judged = self._judge(self._outputs)
        self.full = gather(self._judged)

    def changed(self, unit: str, bits: int) -> Tensor:
        """The metric with one unit quantized: [examples of all processes] float64."""
        task = self._run.task
        with self._quantized(unit, bits):
            outputs, _ = greedy_given(
                self._model, self._prompts, self._outputs, task.max_new_tokens, self._stop(), self._batch_size
            )
        new = [i for i, output in enumerate(outputs) if output != self._outputs[i]]
        metric = self._judged.clone()
        metric[new] = self._judge([outputs[i] for i in new], new)
        return gather(metric)

    @contextmanager
    def _quantized(self, unit: str, bits: int) -> Iterator[None]:
        before = {}
        for name in self._run.units[unit]:
            matrix = self._model.get_submodule(name)
            if is_quantizable(matrix.in_features):
                before[name] = matrix.weight
                weight = self._rounding(name, matrix.weight.to(self._run.model.dtype), bits)
                matrix.weight = nn.Parameter(weight.to(matrix.weight), requires_grad=False)
        try:
            yield
        finally:
            for name, weight in before.items():
                self._model.get_submodule(name).weight = weight

    def _stop(self) -> Stop | None:
        strings = self._run.task.stop
        return (lambda output: any(string in self._text(output) for string in strings)) if strings else None

    def _text(self, output: Sequence[int]) -> str:
        return self._tokenizer.decode(output, skip_special_tokens=True)

    def _judge(self, outputs: Sequence[list[int]], places: Sequence[int] | None = None) -> Tensor:
        task = self._run.task
        examples = self._examples if places is None else [self._examples[i] for i in places]
        texts = []
        for output in outputs:
            text = self._text(output)
            texts.append(text[: min([len(text), *(text.find(s) for s in task.stop if s in text)])])
        judged = judge(texts, examples, task, self._allow) if texts else []
        return torch.tensor(judged, dtype=torch.float64)


def _check_fits(run: Run) -> None:
    model = run.model
    needed = sum(math.prod(info.shape) for info in run.files.tensors.values()) * model.compute_dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = available_bytes()
    if needed > free:
        raise ValueError(
            f"generating keeps the whole model in memory: {run.files.id} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} "
            "are free; use measure=teacher-forced, or another device"
        )
