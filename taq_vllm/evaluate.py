"""A served model on a task: outputs of the real vLLM engine, judged, with intervals, one JSON line per result.

All test items go to the engine at once, greedy. Two passes: generation, whose outputs the task's metric judges and
whose duration gives output tokens per second; then the reference completions, whose negative log-likelihood (nats per
token, end token included) comes from the engine's prompt log-probabilities and resolves differences that right and
wrong do not show. A result keeps the values of every item, so that any two results on the same items can be compared
pair by pair later.

The engine runs inside this process (a start of seconds instead of half a minute) and several can follow each other.
An evaluation that already stands in the results file is not repeated: same model bytes, task, settings, versions and
hardware.
"""

import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from taq_vllm.metrics import (
    Interval,
    PairedResult,
    bootstrap_interval,
    exact_match,
    f1,
    math_match,
    paired_difference,
    wilson_interval,
)
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan
from taq_vllm.progress import Steps, steps, track
from taq_vllm.sandbox import Candidate, extract_code, require_permission, run_all
from taq_vllm.tasks import Example, Metric, Task, TokenizedExample, tokenize

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_PACKAGES = ("taq-vllm", "vllm", "torch", "transformers")
# Set before vLLM and torch are imported, unless the user has set them.
_ENVIRONMENT = {
    # The engine in this process: a small model starts in 4 s instead of 30 (measured on a 2-core CPU).
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Standard output belongs to the caller, and vLLM warns twenty times at every start on a CPU.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # GiB. vLLM's default on a CPU is 92% of the machine's memory, and an error where that is not free.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Threads that wait should not spin: on a machine with other work, spinning made the engine ten times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Settings(BaseModel):
    """Everything that an outcome depends on besides model, task data and machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantization: str | None
    engine_args: dict[str, Any]
    """Passed to `vllm.LLM` as given; whatever is not named here was vLLM's default."""
    limit: int | None
    seed: int
    max_new_tokens: int
    stop: tuple[str, ...]
    chat_template: bool


class Result(BaseModel):
    """One model on one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    key: str
    """sha256 over what makes two evaluations the same: model bytes, task, settings, versions, hardware."""
    label: str
    model: str
    model_sha256: str
    """Over the model's weights, configuration and tokenizer files."""
    plan_sha256: str | None
    """Of the plan that the weights were made with; None where there is none."""
    average_bits: float | None
    """Bits per planned weight, scales and zero points counted; None without a plan."""
    weight_bytes: int
    """Size of the safetensors files."""
    task: str
    test_sha256: str
    metric: Metric
    n: int
    mean: float
    low: float
    """95% interval of the mean."""
    high: float
    interval: Literal["wilson", "bootstrap"]
    answer_nll: float
    """Nats per token of the reference completions and their end token."""
    answer_nll_low: float
    """95% interval (bootstrap over items)."""
    answer_nll_high: float
    output_tokens: int
    generation_s: float
    output_tokens_per_s: float
    """Generated tokens over the wall time of the generation pass, prompts included, all items batched."""
    settings: Settings
    versions: dict[str, str]
    hardware: str
    started_at: str
    item_ids: tuple[str, ...]
    item_scores: tuple[float, ...]
    item_nll: tuple[float, ...]
    """Nats, summed over each item's completion."""
    item_tokens: tuple[int, ...]
    """Tokens of each item's completion, the end token included."""
    outputs: tuple[str, ...]


class Engine:
    """A vLLM engine for one model, started when the first evaluation needs it and freed at the end.

        with Engine("OUT", quantization="taq") as engine:
            for task in tasks:
                result, fresh = engine.evaluate(task, results=Path("results.jsonl"))

    Args:
        model: a folder or a hub id.
        quantization: `taq`, or None for vLLM's own choice.
        seed: of the engine and the bootstrap.
        engine_args: further arguments of `vllm.LLM`, such as `enforce_eager`, `dtype` or `max_model_len`.

    Raises:
        ValueError: no such model, or files of it are missing or damaged.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        quantization: str | None = None,
        seed: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._files = ModelFiles(model)
        self._quantization = quantization
        self._seed = seed
        self._engine_args = dict(engine_args or {})
        self._model_sha256: str | None = None
        self._llm: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine; the next evaluation starts another."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            _free()

    def evaluate(
        self,
        task: Task,
        *,
        limit: int | None = None,
        allow_code_execution: bool = False,
        label: str | None = None,
        results: Path | None = None,
    ) -> tuple[Result, bool]:
        """Evaluate one task.

        Args:
            task: with a test set.
            limit: only the first so many test items.
            allow_code_execution: permission to run the code that the model writes (pass@1).
            label: of the model in tables; by default its folder's name.
            results: JSON lines file that is searched for this very evaluation first, and gets the new result.

        Returns:
            The result, and whether it was made now (False: it stood in `results`).

        Raises:
            ValueError: no test set, code to run without permission, an item that does not fit the model, or a results
                file that cannot be read.
        """
        if not task.test:
            raise ValueError(f"{task.path} names no test set; add `test: test.jsonl` to the header")
        if limit is not None and limit < 1:
            raise ValueError(f"got limit {limit}; needs at least 1, or none for all {len(task.test)} items")
        if task.metric == "pass@1":
            require_permission(allow_code_execution)
        settings = Settings(
            quantization=self._quantization,
            engine_args=self._engine_args,
            limit=limit,
            seed=self._seed,
            max_new_tokens=task.max_new_tokens,
            stop=task.stop,
            chat_template=task.chat_template,
        )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        identity = self._identity(task, settings)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if results is not None and results.exists():
            same = {previous.label: previous for previous in read_results(results) if previous.key == key}
            if same and label not in (None, *same):
                # Only the name is new: it gets a line of its own, so that tables and comparisons find it.
                same[label] = next(iter(same.values())).model_copy(update={"label": label})
                append_result(results, same[label])
            if same:
                return same[label] if label else next(iter(same.values())), False
        label = label or self._files.id.rpartition("/")[2]
        result = self._measure(task, settings, allow_code_execution, key, label)
        if results is not None:
            append_result(results, result)
        return result, True

    def _identity(self, task: Task, settings: Settings) -> dict[str, Any]:
        if self._model_sha256 is None:
            self._model_sha256 = _folder_sha256(self._files.path)
        return {
            "model_sha256": self._model_sha256,
            "task": [task.name, task.metric, task.test_sha256],
            "settings": settings.model_dump(mode="json"),
            "versions": _versions(),
            "hardware": _hardware(),
        }

    def _measure(self, task: Task, settings: Settings, allow_code_execution: bool, key: str, label: str) -> Result:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        llm = self._start()
        examples = task.test[: settings.limit]
        tokenized = self._tokenized(examples, task)
        outputs, output_tokens, generation_s = self._generate(llm, tokenized, task)
        item_nll, item_tokens = self._completion_nll(llm, tokenized, task)
        item_scores = judge(outputs, examples, task, allow_code_execution)
        mean = sum(item_scores) / len(item_scores)
        if task.metric == "f1":
            interval, method = bootstrap_interval(item_scores, seed=self._seed), "bootstrap"
        else:
            interval, method = wilson_interval(round(sum(item_scores)), len(item_scores)), "wilson"
        nll_interval: Interval = bootstrap_interval(item_nll, item_tokens, seed=self._seed)
        plan = self._plan()
        return Result(
            key=key,
            label=label,
            model=self._files.id,
            model_sha256=self._model_sha256,
            plan_sha256=plan.sha256() if plan else None,
            average_bits=plan.budget.average_bits if plan else None,
            weight_bytes=sum(file.stat().st_size for file in self._files.path.glob("*.safetensors")),
            task=task.name,
            test_sha256=task.test_sha256,
            metric=task.metric,
            n=len(examples),
            mean=mean,
            low=interval.low,
            high=interval.high,
            interval=method,
            answer_nll=sum(item_nll) / sum(item_tokens),
            answer_nll_low=nll_interval.low,
            answer_nll_high=nll_interval.high,
            output_tokens=output_tokens,
            generation_s=generation_s,
            output_tokens_per_s=output_tokens / generation_s,
            settings=settings,
            versions=_versions(),
            hardware=_hardware(),
            started_at=started_at,
            item_ids=tuple(example.id for example in examples),
            item_scores=tuple(item_scores),
            item_nll=tuple(item_nll),
            item_tokens=tuple(item_tokens),
            outputs=tuple(outputs),
        )

    def _start(self) -> Any:
        if self._llm is None:
            # On a CPU vLLM finds the triton that the kernels' tests need, says so twice and does without it.
            logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)
            from vllm import LLM

            arguments = {"use_tqdm_on_load": False, "seed": self._seed, **self._engine_args}
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*reduce_op. is deprecated", category=FutureWarning)
                    self._llm = LLM(str(self._files.path), quantization=self._quantization, **arguments)
            except BaseException:
                _free()  # half an engine would stand in the way of the next one
                raise
        return self._llm

    def _tokenized(self, examples: Sequence[Example], task: Task) -> list[TokenizedExample]:
        longest = self._llm.model_config.max_model_len
        # One token less: the engine has to generate one behind a completion that it scores.
        tokenized = tokenize(examples, self._llm.get_tokenizer(), task, with_completion=True, max_length=longest - 1)
        for example, tokens in zip(examples, tokenized, strict=True):
            if tokens.prompt_len + task.max_new_tokens > longest:
                raise ValueError(
                    f"{task.path}, example {example.id}: its prompt of {tokens.prompt_len} tokens and max_new_tokens "
                    f"{task.max_new_tokens} exceed the model's {longest}; lower max_new_tokens or shorten the prompt"
                )
        return tokenized

    def _generate(self, llm: Any, tokenized: Sequence[TokenizedExample], task: Task) -> tuple[list[str], int, float]:
        """Outputs, how many tokens they have, and seconds."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": tokens.input_ids[: tokens.prompt_len]} for tokens in tokenized]
        # What happens once per engine (allocations, the first call of every kernel) is not generation.
        llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        parameters = SamplingParams(temperature=0, max_tokens=task.max_new_tokens, stop=list(task.stop))
        with steps(f"{task.name}: generate", len(prompts)) as bar:
            started = time.perf_counter()
            answers = llm.generate(prompts, parameters, use_tqdm=_tqdm_on(bar))
            seconds = time.perf_counter() - started
        outputs = [answer.outputs[0] for answer in answers]
        return [output.text for output in outputs], sum(len(output.token_ids) for output in outputs), seconds

    def _completion_nll(
        self, llm: Any, tokenized: Sequence[TokenizedExample], task: Task
    ) -> tuple[list[float], list[int]]:
        """NLL of each completion, summed, and its number of tokens."""
        from torch.compiler import set_stance
        from vllm import SamplingParams

        # An eager engine compiles nothing but one small function of prompt log-probabilities: 3 s and a C++ compiler.
        eager = set_stance("force_eager") if self._engine_args.get("enforce_eager") else contextlib.nullcontext()
        sequences = [{"prompt_token_ids": tokens.input_ids} for tokens in tokenized]
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        with eager, steps(f"{task.name}: answer NLL", len(sequences)) as bar:
            answers = llm.generate(sequences, parameters, use_tqdm=_tqdm_on(bar))
        sums = []
        for tokens, answer in zip(tokenized, answers, strict=True):
            scored = zip(tokens.input_ids, answer.prompt_logprobs, strict=True)
            logprobs = [of_position[token].logprob for token, of_position in list(scored)[tokens.prompt_len :]]
            sums.append(-math.fsum(logprobs))
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"{self._files.path} gives log-probabilities that are not numbers: its weights are broken")
        return sums, [len(tokens.input_ids) - tokens.prompt_len for tokens in tokenized]

    def _plan(self) -> Plan | None:
        """The plan beside the weights, unless nothing told vLLM to follow it."""
        file = self._files.path / PLAN_FILE
        followed = self._quantization == "taq" or "quantization_config" in self._files.config
        return Plan.load(file) if followed and file.is_file() else None


def evaluate(
    model: str | Path,
    task: Task,
    *,
    quantization: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    engine_args: Mapping[str, Any] | None = None,
    label: str | None = None,
    results: Path | None = None,
) -> tuple[Result, bool]:
    """Evaluate one model on one task with an engine of its own; see `Engine` and `Engine.evaluate`.

    Returns:
        The result, and whether it was made now (False: it stood in `results`).

    Raises:
        ValueError: see `Engine` and `Engine.evaluate`.
    """
    with Engine(model, quantization=quantization, seed=seed, engine_args=engine_args) as engine:
        return engine.evaluate(
            task, limit=limit, allow_code_execution=allow_code_execution, label=label, results=results
        )


def append_result(path: Path, result: Result) -> None:
    """Add one line to a results file: whole, or not at all, also with several writers or a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{result.model_dump_json()}\n".encode()
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {path}; free some space")
        except OSError:
            file.truncate(size)
            raise


def read_results(path: Path) -> list[Result]:
    """All results of a file, oldest first.

    Raises:
        ValueError: a line that is not a result; names it.
    """
    results = []
    # Not splitlines: outputs may hold other line separators, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            results.append(Result.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(
                f"{path}, line {number}, {where}: {first['msg']}; remove the line, or name another results file"
            ) from error
    return results


def compare(first: Result, second: Result, quantity: Literal["metric", "nll"] = "metric") -> PairedResult:
    """The first result minus the second on the same items: metric, or answer NLL in nats per token.

    Raises:
        ValueError: the two are not about the same task, metric and items.
    """
    for field in ("task", "metric", "test_sha256"):
        if getattr(first, field) != getattr(second, field):
            raise ValueError(
                f"{first.label} and {second.label} cannot be compared: {field} is {getattr(first, field)!r} in one and "
                f"{getattr(second, field)!r} in the other; evaluate both on the same task"
            )
    if first.item_ids != second.item_ids:
        common = len(set(first.item_ids) & set(second.item_ids))
        raise ValueError(
            f"{first.label} and {second.label} cannot be compared: they answered {first.n} and {second.n} items, "
            f"{common} of them the same; evaluate both with the same limit"
        )
    if quantity == "metric":
        return paired_difference(first.item_scores, second.item_scores)
    if first.item_tokens != second.item_tokens:
        raise ValueError(
            f"{first.label} and {second.label} split the answers into different tokens; their NLL per token cannot be "
            "compared"
        )
    return paired_difference(first.item_nll, second.item_nll, first.item_tokens)


def compare_labels(results: Path, first: str, second: str) -> list[dict[str, Any]]:
    """Compare the newest results of two labels on every task that both have, metric and NLL.

    Args:
        results: the results file.
        first: label of one model.
        second: label of the other.

    Raises:
        ValueError: no such file, label, or common task.
    """
    if not results.is_file():
        raise ValueError(f"no results at {results}: make them with `taq eval`")
    newest = {(result.label, result.task): result for result in read_results(results)}
    labels = sorted({label for label, _ in newest})
    for label in (first, second):
        if label not in labels:
            raise ValueError(f"{results} holds no results labelled {label!r}; its labels are {', '.join(labels)}")
    tasks = [task for label, task in newest if label == first and (second, task) in newest]
    if not tasks:
        raise ValueError(f"{first} and {second} have no task in common in {results}; evaluate both on the same task")
    return [
        {
            "task": task,
            "quantity": quantity,
            **asdict(compare(newest[first, task], newest[second, task], quantity)),
        }
        for task in tasks
        for quantity in ("metric", "nll")
    ]


def judge(outputs: Sequence[str], examples: Sequence[Example], task: Task, allow_code_execution: bool) -> list[float]:
    """The task's metric of one output per example, 0 to 1; for pass@1 their code is run, if that is allowed."""
    if task.metric == "pass@1":
        candidates = [
            Candidate(
                code=extract_code(output, example.prompt, example.entry_point),
                tests=example.tests,
                test_setup=example.test_setup,
                entry_point=example.entry_point,
            )
            for output, example in zip(outputs, examples, strict=True)
        ]
        outcomes = run_all(candidates, allow=allow_code_execution)
        return [float(outcome.passed) for outcome in track(outcomes, f"{task.name}: run tests", len(candidates))]
    metric = {"em": exact_match, "f1": f1, "math": math_match}[task.metric]
    return [metric(output, example.answers) for output, example in zip(outputs, examples, strict=True)]


class _TqdmFace:
    """What vLLM's offline engine uses of tqdm, on our own bar."""

    def __init__(self, bar: Steps) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self.n = 0
        self.postfix = ""

    @property
    def format_dict(self) -> dict[str, float]:
        """`elapsed` seconds, never zero: vLLM divides by it."""
        return {"elapsed": max(time.monotonic() - self._started, 1e-9)}

    def update(self, count: int) -> None:
        """So many requests are done."""
        self.n += count
        self._bar.advance(count)

    def refresh(self) -> None:
        """The bar redraws itself."""

    def close(self) -> None:
        """The bar belongs to the caller."""


def _tqdm_on(bar: Steps) -> Any:
    """vLLM calls it with an iterable while it adds requests (not shown) and with a total while it runs."""
    return lambda iterable=None, **_: _TqdmFace(bar) if iterable is None else iterable


def _free() -> None:
    """Let go of everything that an engine of this process held."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _folder_sha256(folder: Path) -> str:
    """Over the names and bytes of what makes up a model."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES):
        with file.open("rb") as stream:
            of_file = hashlib.file_digest(stream, "sha256")
        digest.update(f"{file.name} {of_file.hexdigest()}\n".encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _hardware() -> str:
    """The GPU where there is one, else the CPU and how many of its cores this process may use."""
    from torch import cuda

    if cuda.is_available():
        return f"{cuda.device_count()} x {cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
