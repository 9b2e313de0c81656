"""How long a product takes when its weights come from memory: what tuning and benchmarks share.

In a server a layer's weights are read once per step, after all the others', so no cache holds them. Here each
contender gets copies of its weights that together exceed the caches, and its calls walk over them. On a GPU one run is
a CUDA graph of calls over all copies, as servers replay it, without the host's part; on a CPU a run is one call.
Contenders run in turns, so that a change of clocks or another job on the machine falls on all of them alike.

The floor is the time of only reading as many bytes, in the same turns: no product with those weights is faster.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

COPIES = 8
"""Fewest copies of a weight matrix on a GPU."""
GPU_BYTES = 512_000_000
"""Copies together have at least so many: ten times the L2 of an H200."""
CPU_BYTES = 600_000_000
"""More than twice the largest last-level cache at hand (260 MB)."""
MOST_COPIES = 512
"""Of weights so small that a call takes longer to start than to read them."""
MEASURED_RUNS = 20
GRAPH_US = 1500
"""A graph lasts at least so long: some microseconds to start and end it are then less than a hundredth."""
_WARM_UP_CALLS = 2
_SPIN_CYCLES = 1_000_000  # half a millisecond: the host queues a round's graphs while the GPU spins
_WORD = 4  # bytes
_LINE = 128  # bytes: no part begins inside a cache line, nor where wide loads are not allowed

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, one number a run."""

    us: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.us)

    @property
    def minimum(self) -> float:
        """The fastest: on a machine with other work, the one that was disturbed least."""
        return min(self.us)

    @property
    def p90(self) -> float:
        """Nine out of ten are at most so long."""
        ordered = sorted(self.us)
        return ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]


class Runner(Protocol):
    """Something that can be run again and again and timed."""

    calls: int
    """In a run."""

    def run(self) -> Any:
        """Run once; what the last call returned is the result (on a GPU when it has finished)."""


class CallRunner:
    """On a CPU: a run is one call, the next copy each time."""

    calls = 1

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = itertools.cycle(calls)

    def run(self) -> Any:
        """Call the next copy."""
        return next(self._calls)()


class GraphRunner:
    """On a GPU: a run replays a CUDA graph that holds calls of each copy, as often as makes it last `GRAPH_US`."""

    def __init__(self, calls: Sequence[Call]) -> None:
        """Warm up and capture.

        Whatever a call compiles, allocates or tunes when it first sees its shapes happens before the capture.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._capture(calls)
        self.run()  # the first replay uploads the graph
        [us] = _gpu_round({"": self}).values()
        if (repeats := repeats_needed(us * self.calls)) > 1:
            self._capture([*calls] * repeats)

    def _capture(self, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                self._result = call()

    def run(self) -> Any:
        """Replay."""
        self._graph.replay()
        return self._result


def random_codes(bits: int, rows: int, columns: int, group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A symmetric matrix whose products with inputs of unit variance have about unit variance.

    Random throughout: on zeros fewer transistors switch and kernels run faster, and swapped codes would not show.

    Args:
        bits: 4 or 8.
        rows: N.
        columns: K.
        group_size: columns that share a scale.
        device: where it is made.

    Returns:
        Codes [N, K] uint8 and scales [N, K / group_size] bf16.
    """
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    # Uniform codes have a standard deviation of 2^bits / sqrt(12).
    scale = 12**0.5 / 2**bits * columns**-0.5
    scales = (0.5 + torch.rand(rows, columns // group_size, device=device)) * scale
    return codes, scales.to(torch.bfloat16)


def make_runner(calls: Sequence[Call], device: torch.device) -> Runner:
    """The device's way to run calls."""
    return CallRunner(calls) if device.type == "cpu" else GraphRunner(calls)


def repeats_needed(graph_us: float) -> int:
    """How often a graph that lasts so long has to be repeated in one that lasts `GRAPH_US`."""
    return max(1, math.ceil(GRAPH_US / graph_us))


def copies_needed(weight_bytes: int, device: torch.device) -> int:
    """How many copies of so many bytes exceed the device's caches."""
    fewest, total_bytes = (2, CPU_BYTES) if device.type == "cpu" else (COPIES, GPU_BYTES)
    return min(max(fewest, -(-total_bytes // weight_bytes)), MOST_COPIES)


def time_in_turns(
    runners: Mapping[Name, Runner], device: torch.device, runs: int = MEASURED_RUNS, seconds: float | None = None
) -> dict[Name, Times]:
    """Time one call of each contender.

    Args:
        runners: by name; all have been run before.
        device: that they run on.
        runs: of each.
        seconds: after so many no further round starts, but three runs are always made; None for no limit.
    """
    one_round = _cpu_round if device.type == "cpu" else _gpu_round
    times: dict[Name, list[float]] = {name: [] for name in runners}
    started = time.monotonic()
    for done in range(runs):
        if seconds is not None and done >= 3 and time.monotonic() - started > seconds:
            break
        for name, us in one_round(runners).items():
            times[name].append(us)
    return {name: Times(tuple(values)) for name, values in times.items()}


def _cpu_round(runners: Mapping[Name, Runner]) -> dict[Name, float]:
    times = {}
    for name, runner in runners.items():
        started = time.perf_counter()
        runner.run()
        times[name] = (time.perf_counter() - started) * 1e6 / runner.calls
    return times


def _gpu_round(runners: Mapping[Name, Runner]) -> dict[Name, float]:
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in runners}
    torch.cuda._sleep(_SPIN_CYCLES)
    for name, runner in runners.items():
        before, after = events[name]
        before.record()
        runner.run()
        after.record()
    torch.cuda.synchronize()
    return {name: before.elapsed_time(after) * 1e3 / runners[name].calls for name, (before, after) in events.items()}


class Floor:
    """A buffer larger than the caches, and calls that only read so many bytes of it."""

    def __init__(self, device: torch.device, total_bytes: int | None = None) -> None:
        """Fill the buffer with random bytes.

        Args:
            device: whose memory is read.
            total_bytes: of the buffer; by default more than the caches hold.
        """
        self._device = device
        total = total_bytes or (CPU_BYTES if device.type == "cpu" else GPU_BYTES)
        self._words = torch.randint(-(2**31), 2**31, (total // _WORD,), dtype=torch.int32, device=device)
        self._fastest: dict[int, str] = {}

    def calls(self, read_bytes: int) -> list[Call]:
        """Calls that read one part of the buffer after the other, in the way that is fastest for their size.

        Args:
            read_bytes: by each call; rounded up to whole cache lines. The buffer grows where it would hold few parts.
        """
        words = -(-read_bytes // _LINE) * (_LINE // _WORD)
        fewest = 2 if self._device.type == "cpu" else COPIES
        if fewest * words > self._words.numel():
            self._words = self._words.repeat(-(-fewest * words // self._words.numel()))
        parts = self._words[: self._words.numel() // words * words].view(-1, words)
        ways = _cpu_reads() if self._device.type == "cpu" else _gpu_reads()
        calls = {name: [lambda part=part, read=read: read(part) for part in parts] for name, read in ways.items()}
        if words not in self._fastest:
            runners = {name: make_runner(parts_calls, self._device) for name, parts_calls in calls.items()}
            for runner in runners.values():
                runner.run()
            times = time_in_turns(runners, self._device, runs=5)
            self._fastest[words] = min(times, key=lambda name: times[name].median)
        return calls[self._fastest[words]]


def _cpu_reads() -> dict[str, Callable[[Tensor], Any]]:
    """Reductions that torch vectorises and splits over its threads; others of its sums take ten times as long."""
    return {
        "largest byte": lambda words: words.view(torch.uint8).amax(),
        "sum of int64": lambda words: words.view(torch.int64).sum(),
    }


def _gpu_reads() -> dict[str, Callable[[Tensor], Any]]:
    from taq_kernels import read

    return {str(launch): lambda words, launch=launch: read.read(words, *launch) for launch in read.LAUNCHES}
