"""Several devices, one calibration set: each process works on its share of the examples, and sums are exchanged.

    torchrun --nproc-per-node 2 -m taq_vllm.cli score MODEL --task T ...

Every process walks all blocks on its own device with every `world()[1]`-th example. What is computed per example is
gathered in the examples' order, what is summed over tokens is summed over processes; so every process ends with the
same numbers, equal to those of one process up to the order of float sums. Rank 0 writes. With one process everything
here does nothing.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def device_of(name: str) -> str:
    """The device that a name on a command line means: `cpu`, `cuda:N`, or `auto`, a GPU if there is one.

    Of the processes that `torchrun` starts, each has the GPU of its number.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"got device {name!r}; there are auto, cpu, cuda and cuda:N")
    if device.type == "cpu":
        return "cpu"
    number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"got device {name!r} (GPU {number}), and torch finds {torch.cuda.device_count()} GPUs here: use --device "
            "cpu, start fewer processes, or install a torch for this machine's GPU"
        )
    return f"cuda:{number}"


def start(device: str) -> str:
    """Join the processes that `torchrun` started, if it did.

    Args:
        device: as `device_of` takes it.

    Returns:
        The device of this process.

    Raises:
        ValueError: see `device_of`.
    """
    chosen = device_of(device)
    if chosen != "cpu":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        # Statistics are kept on the CPU also where blocks run on GPUs: both can be exchanged.
        distributed.init_process_group("gloo" if chosen == "cpu" else "cpu:gloo,cuda:nccl")
        # Threads of gloo that still wait when Python ends would abort a process that has done its work.
        atexit.register(distributed.destroy_process_group)
    return chosen


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of the examples."""
    rank, size = world()
    return list(items[rank::size])


def gather(values: Tensor) -> Tensor:
    """One value per example of `share` on every process to one value per example, in the examples' order.

    Args:
        values: [local examples, ...], on any device; so is what comes back.
    """
    _, size = world()
    if size == 1:
        return values
    home, values = values.device, values.to(exchanging_device(values.device))
    counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(size)]
    distributed.all_gather(counts, torch.tensor([len(values)], device=values.device))
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, *values.shape[1:], dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(parts, padded)
    together = values.new_empty(sum(int(count) for count in counts), *values.shape[1:])
    for place, (part, count) in enumerate(zip(parts, counts, strict=True)):
        together[place::size] = part[: int(count)]
    return together.to(home)


def total(values: Tensor) -> Tensor:
    """The sum over processes of a tensor that every process has."""
    if world()[1] == 1:
        return values
    summed = values.to(exchanging_device(values.device), copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def exchanging_device(device: torch.device) -> torch.device:
    """Where a tensor of a device has to be to be exchanged: there, if the processes' backend can.

    `start` joins processes for both kinds of device; whoever else did may have joined them with NCCL alone, which
    exchanges what is on each process's own GPU only.
    """
    able = {part.partition(":")[0] for part in distributed.get_backend_config().split(",")}
    if device.type in able:
        return device
    return torch.device("cuda", torch.cuda.current_device()) if "cuda" in able else torch.device("cpu")


def first(function: Callable[[], Result]) -> Result:
    """What rank 0 gets from a function that the others do not call, on every process.

    Raises:
        Exception: what the function raised, on every process, so that none waits for another that has left; a
            RuntimeError that names it where it cannot be sent.
    """
    rank, size = world()
    if size == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank == 0:
        try:
            answer[0] = function()
            pickle.dumps(answer[0])
        except Exception as error:  # whatever it is, the others wait for it
            answer = [None, _sendable(error)]
    distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # some can be taken apart and not put together again
    except Exception:  # pickling raises anything
        named = RuntimeError(f"{type(error).__name__}: {error}")
        named.__cause__ = error
        return named
    return error
