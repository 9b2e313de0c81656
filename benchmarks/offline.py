"""A model with fake-quantized weights on a task's test set, in seconds on one core and without an engine.

The model stays in memory in float32 and plans are swapped in as dequantized matrices. One pass over the reference
completions gives each item's answer NLL and KL(full || quantized) over the answer's tokens. The outputs come nearly
free: greedy decoding repeats the full-precision model's output if and only if every token of it is the most likely one
after those before it, which the same kind of pass shows. Only items that differ are generated, from the first token
that differs on. So metrics are exactly those of greedy decoding, in float32.

Plans that agree on the first layers share them: the hidden states after every block are kept until another plan
changes a block before them, so plans are best asked for in the order of their first layers.

For models whose blocks attend to everything before (no sliding windows). What is served runs in 16 bits, where ties
and near-ties may fall differently: `benchmarks/accuracy_served.py` compares with the real engine. `gptq` is fitted on
inputs of the full-precision model, once per matrix and bitwidth, while `taq quantize` fits it on what the matrices
before it give as they are quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from taq_vllm.evaluate import judge
from taq_vllm.generate import greedy
from taq_vllm.methods import gptq
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import GROUP_SIZE
from taq_vllm.quantizer import quantize
from taq_vllm.tasks import Task, tokenize
from taq_vllm.units import layer_of

BATCH_TOKENS = 1536
"""Per forward pass. Measured on the lab model with one core: 8192 take 1.5 times as long, their activations leave the
cache."""
GENERATED_ROWS = 64
_LOGIT_ROWS = 1024

Bits = Mapping[str, int]
"""Per matrix."""


@dataclass(frozen=True)
class Items:
    """What one model does with every test item, in the order of the test set.

    Attributes:
        metric: 0 to 1, of the greedy output.
        nll: nats of the reference completion, end token included, summed over its tokens.
        kl: KL(full || this) in nats, summed over the same positions.
        generated: how many outputs had to be generated, because they differ from the full-precision model's.
    """

    metric: tuple[float, ...]
    nll: tuple[float, ...]
    kl: tuple[float, ...]
    generated: int


@dataclass(frozen=True)
class Pass:
    """One teacher-forced pass over all sequences.

    Attributes:
        nll: [sequences] float64, summed over the sequence's answer.
        kl: [sequences] float64; zeros where there was nothing to compare with.
        differs: per sequence the first place in the answer whose token is not the most likely one, and the one that
            is; None where all of them are.
    """

    nll: Tensor
    kl: Tensor
    differs: list[tuple[int, int] | None]


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    rows: tuple[int, ...]
    """Sequences, one per row."""
    predicted: Tensor
    """[B, T] bool: the next token belongs to the answer."""


class FakeQuantized:
    """Weight matrices as their codes stand for them, made once per matrix and bitwidth.

    Args:
        files: the full-precision model.
        symmetric: per bitwidth.
        moments: E[x x^T] [K, K] per matrix of the full-precision model's inputs, for `gptq`, which makes its factors
            of them in place; None rounds to nearest (`rtn`).
    """

    def __init__(
        self, files: ModelFiles, symmetric: Mapping[int, bool], moments: Mapping[str, Tensor] | None = None
    ) -> None:
        self._files = files
        self._symmetric = symmetric
        self._settings = gptq.Settings()
        self._factors = moments and {
            name: (second.diagonal().clone(), gptq.inverse_factor(second, self._settings.damping))
            for name, second in moments.items()
        }
        self._made: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, bits: int) -> Tensor:
        """[N, K] float32."""
        if (name, bits) not in self._made:
            weight = self._files.read(f"{name}.weight")
            if bits < 16:
                symmetric = self._symmetric[bits]
                if self._factors is None:
                    quantized = quantize(weight, bits, symmetric)
                else:
                    energy, factor = self._factors[name]
                    quantized = gptq.round_with(factor, weight, bits, symmetric, energy, weight.dtype, self._settings)
                weight = quantized.dequantize()
            self._made[name, bits] = weight.float()
        return self._made[name, bits]


@torch.no_grad()
def input_moments(files: ModelFiles, task: Task, examples: int) -> dict[str, Tensor]:
    """E[x x^T] [K, K] float32 of every matrix's inputs, full-precision model, over the first calibration examples."""
    model, tokenizer = _load(files)
    sequences = tokenize(
        task.calibration[:examples],
        tokenizer,
        task,
        with_completion=True,
        max_length=model.config.max_position_embeddings,
    )
    sums = {name: torch.zeros(shape[1], shape[1]) for name, shape in files.matrices.items()}
    tokens = 0

    def watch(name: str, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].flatten(0, -2)
        sums[name].addmm_(states.T, states)

    for name in sums:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
    for sequence in sequences:
        model.model(input_ids=torch.tensor([sequence.input_ids]), use_cache=False)
        tokens += len(sequence.input_ids)
    return {name: total / tokens for name, total in sums.items()}


class Evaluator:
    """One model on one task's test set, for any number of plans.

    Args:
        files: the full-precision model.
        task: with a test set and without stop strings.
        weights: the matrix of a name at so many bits, [N, K] float32.
        limit: only the first so many test items.
        allow_code_execution: permission to run what the model writes (pass@1).

    Attributes:
        tokens: of every item's completion, end token included.

    Raises:
        ValueError: the task has stop strings or no test set.
    """

    def __init__(
        self,
        files: ModelFiles,
        task: Task,
        weights: Callable[[str, int], Tensor],
        limit: int | None = None,
        allow_code_execution: bool = False,
    ) -> None:
        if task.stop or not task.test:
            raise ValueError(f"{task.path}: needs a test set and no stop strings, got stop {list(task.stop)}")
        self._model, self._tokenizer = _load(files)
        self._decoder = self._model.model
        if getattr(self._model.config, "sliding_window", None):
            raise ValueError(f"{files.id} has sliding windows, which this evaluator does not know")
        self._task = task
        self._examples = task.test[:limit]
        self._weights = weights
        self._allow = allow_code_execution
        self._judged: dict[tuple[int, str], float] = {}
        self._full_bits = dict.fromkeys(files.matrices, 16)
        self._bits: Bits = {}
        self._hidden: list[list[Tensor]] = []
        most = self._model.config.max_position_embeddings
        gold = tokenize(self._examples, self._tokenizer, task, with_completion=True, max_length=most)
        self._prompts = [one.input_ids[: one.prompt_len] for one in gold]
        completions = [one.input_ids[one.prompt_len :] for one in gold]
        self.tokens = tuple(len(completion) for completion in completions)
        self._sequences: list[tuple[int, list[int]]] = list(enumerate(completions))
        """(item, answer): the completions, then the full-precision outputs that are others."""
        self._full_outputs: list[list[int]] = completions
        self._log_probabilities: list[Tensor] = []
        self._prepare()
        self._find_full_outputs()

    def __call__(self, bits: Bits) -> Items:
        """Evaluate one plan."""
        seen = self._pass(bits)
        outputs, generated = self._outputs(seen)
        n = len(self._examples)
        return Items(
            metric=tuple(self._judge(outputs)),
            nll=tuple(seen.nll[:n].tolist()),
            kl=tuple(seen.kl[:n].tolist()),
            generated=generated,
        )

    def full(self) -> Items:
        """Evaluate the full-precision model."""
        return self(self._full_bits)

    @torch.inference_mode()
    def outputs(self, bits: Bits) -> list[str]:
        """Greedy outputs, as text."""
        outputs, _ = self._outputs(self._pass(bits))
        return [self._text(output) for output in outputs]

    def _prepare(self) -> None:
        """Batches of all sequences; forgets what belongs to others."""
        self._hidden = []
        ids = [self._prompts[item] + answer for item, answer in self._sequences]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        groups: list[list[int]] = [[]]
        for i in order:
            if groups[-1] and (len(groups[-1]) + 1) * len(ids[i]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(i)
        self._batches = []
        for group in groups:
            longest = len(ids[group[-1]])
            input_ids = torch.zeros(len(group), longest, dtype=torch.long)
            predicted = torch.zeros(len(group), longest, dtype=torch.bool)
            for row, i in enumerate(group):
                input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
                predicted[row, len(self._prompts[self._sequences[i][0]]) - 1 : len(ids[i]) - 1] = True
            self._batches.append(_Batch(input_ids, tuple(group), predicted))

    def _find_full_outputs(self) -> None:
        """The full-precision model's own outputs, guessed to be the completions."""
        # The completion may be longer than what the task lets a model generate: then it is no possible output.
        outputs, _ = self._outputs(self._pass(self._full_bits, compare=False))
        others = [item for item, output in enumerate(outputs) if output != self._full_outputs[item]]
        self._full_outputs = outputs
        self._sequences += [(item, outputs[item]) for item in others]
        self._prepare()
        self._log_probabilities = []
        self._pass(self._full_bits, compare=False, keep=True)

    @torch.inference_mode()
    def _pass(self, bits: Bits, compare: bool = True, keep: bool = False) -> Pass:
        self._run_blocks(bits)
        count = len(self._sequences)
        nll, kl = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        differs: list[tuple[int, int] | None] = [None] * count
        for place, (batch, hidden) in enumerate(zip(self._batches, self._hidden[-1], strict=True)):
            targets = batch.input_ids.roll(-1, dims=1)[batch.predicted]
            owners = torch.tensor(batch.rows)[:, None].expand_as(batch.predicted)[batch.predicted]
            states = self._decoder.norm(hidden[batch.predicted])
            chosen = []
            full = self._log_probabilities[place].split(_LOGIT_ROWS) if compare else None
            kept = []
            for i, (rows, target, owner) in enumerate(
                zip(states.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), owners.split(_LOGIT_ROWS), strict=True)
            ):
                log_p = self._model.lm_head(rows).log_softmax(-1)
                chosen.append(log_p.argmax(-1))
                nll.index_add_(0, owner, -log_p.gather(1, target[:, None])[:, 0].double())
                if full is not None:
                    divergence = (full[i].exp() * (full[i] - log_p)).sum(-1)
                    kl.index_add_(0, owner, divergence.double())
                if keep:
                    kept.append(log_p)
            if keep:
                self._log_probabilities.append(torch.cat(kept))
            for owner, group in _by_owner(owners.tolist(), torch.cat(chosen).tolist(), targets.tolist()).items():
                differs[owner] = next(((at, mine) for at, (mine, other) in enumerate(group) if mine != other), None)
        return Pass(nll, kl, differs)

    def _run_blocks(self, bits: Bits) -> None:
        """Hidden states after every block; blocks before the first change are not run again."""
        changed = [layer_of(name) for name in self._full_bits if bits[name] != self._bits.get(name)]
        layers = len(self._decoder.layers)
        first = min([*changed, max(len(self._hidden) - 1, 0)])
        for name in self._full_bits:
            if bits[name] != self._bits.get(name):
                self._model.get_submodule(name).weight = torch.nn.Parameter(self._weights(name, bits[name]), False)
        self._bits = dict(bits)
        if not self._hidden:
            self._hidden = [[self._decoder.embed_tokens(batch.input_ids) for batch in self._batches]]
        del self._hidden[first + 1 :]
        for layer in range(first, layers):
            after = []
            for hidden in self._hidden[layer]:
                positions = torch.arange(hidden.shape[1])[None]
                rotary = self._decoder.rotary_emb(hidden, positions)
                # Padding is on the right, where causal attention does not look.
                after.append(
                    self._decoder.layers[layer](
                        hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary
                    )
                )
            self._hidden.append(after)

    def _outputs(self, seen: Pass) -> tuple[list[list[int]], int]:
        """Greedy outputs of the weights at hand, end token included where there is one; how many were generated."""
        own = dict(enumerate(seen.differs[: len(self._examples)]))
        # An item whose full-precision output is not its completion is looked at where that output is the sequence.
        for i in range(len(self._examples), len(self._sequences)):
            own[self._sequences[i][0]] = seen.differs[i]
        outputs: list[list[int]] = []
        unfinished = []
        end, most = self._tokenizer.eos_token_id, self._task.max_new_tokens
        for item, differs in own.items():
            guess = self._full_outputs[item]
            output = guess if differs is None else [*guess[: differs[0]], differs[1]]
            outputs.append(output[:most])
            if len(output) < most and output[-1] != end:
                unfinished.append(item)
        for item, more in self._generate({item: outputs[item] for item in unfinished}).items():
            outputs[item] = outputs[item] + more
        return outputs, len(unfinished)

    def _generate(self, begun: dict[int, list[int]]) -> dict[int, list[int]]:
        """Greedy continuations of outputs that have begun."""
        left = {item: self._task.max_new_tokens - len(output) for item, output in begun.items()}
        prompts = [self._prompts[item] + output for item, output in begun.items()]
        made = greedy(self._model, prompts, max(left.values(), default=1), batch_size=GENERATED_ROWS)
        return {item: output[: left[item]] for item, output in zip(begun, made, strict=True)}

    def _text(self, output: list[int]) -> str:
        return self._tokenizer.decode(output, skip_special_tokens=True)

    def _judge(self, outputs: Sequence[list[int]]) -> list[float]:
        """The metric of every output; an output that was seen before is not judged again."""
        texts = [(item, self._text(output)) for item, output in enumerate(outputs)]
        new = [(item, text) for item, text in texts if (item, text) not in self._judged]
        if new:
            examples = [self._examples[item] for item, _ in new]
            judged = judge([text for _, text in new], examples, self._task, self._allow)
            self._judged |= dict(zip(new, judged, strict=True))
        return [self._judged[key] for key in texts]


def _by_owner(owners: list[int], chosen: list[int], targets: list[int]) -> dict[int, list[tuple[int, int]]]:
    """(most likely token, token of the sequence) of every answer, in order."""
    answers: dict[int, list[tuple[int, int]]] = {}
    for owner, mine, other in zip(owners, chosen, targets, strict=True):
        answers.setdefault(owner, []).append((mine, other))
    return answers


def _load(files: ModelFiles) -> tuple[torch.nn.Module, "AutoTokenizer"]:
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(files.path)


def check_groups(files: ModelFiles) -> None:
    """Every matrix must be quantizable, or plans of a study would leave some of them out.

    Raises:
        ValueError: in-features that 128 does not divide.
    """
    for name, (_, columns) in files.matrices.items():
        if columns % GROUP_SIZE:
            raise ValueError(f"{files.id}: {name} has {columns} in-features, which {GROUP_SIZE} does not divide")
