"""Several devices, one calibration set: each process works on its share of the examples, and sums are exchanged.

    torchrun --nproc-per-node 2 -m taq_vllm.cli score MODEL --task T ...

Every process walks all blocks on its own device with every `world()[1]`-th example. What is computed per example is
gathered in the examples' order, what is summed over tokens is summed over processes; so every process ends with the
same numbers, equal to those of one process up to the order of float sums. Rank 0 writes. With one process everything
here does nothing.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def start(device: str) -> None:
    """Join the processes that `torchrun` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of the examples."""
    rank, size = world()
    return list(items[rank::size])


def gather(values: Tensor) -> Tensor:
    """One value per example of `share` on every process to one value per example, in the examples' order.

    Args:
        values: [local examples, ...], on any device.
    """
    _, size = world()
    if size == 1:
        return values
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
    return together


def total(values: Tensor) -> Tensor:
    """The sum over processes of a tensor that every process has."""
    if world()[1] == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values
