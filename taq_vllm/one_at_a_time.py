"""One unit at a time: what the end of a model makes of one quantized unit (the walk that `taqo` and `kl` share).

Quantizing a unit in block l changes nothing before it (prefix reuse). So the hidden states entering l are kept, and for
every unit of l and every bitwidth only blocks l..N run:

    N + sum over (unit, bits) of (N - l)     block executions, instead of N per (unit, bits) and N for the full model

Two sets of hidden states are held at a time, those entering l and those of the unit at work (during the first block
also those leaving it), and one block's weights.
What is read at the end is journalled per (unit, bits), one JSON line each; the same command goes on after the last
whole line and then repeats only the walk of the full model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from taq_vllm import journal
from taq_vllm.distributed import world
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.progress import duration, steps
from taq_vllm.rounding import is_quantizable
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, Head, StreamedModel, matrices_of, replace_weight
from taq_vllm.units import HEAD, layer_of

Values = dict[str, Tensor]
"""By name, one float64 per calibration example."""

Key = tuple[str, int]
"""(unit, bits)"""

Read = Callable[[Key | None, HiddenStates, Head, Head], Values]
"""(what is perturbed, the last block's output, the head to apply, the full-precision head) to values of all examples,
gathered. Nothing is perturbed when the time of reading is measured."""


def walk(
    run: Run,
    batches: Sequence[Batch],
    bits: Sequence[int],
    perturb: Callable[[str, Tensor, int], Tensor],
    read: Read,
    description: str,
) -> tuple[dict[Key, Values], HiddenStates]:
    """Perturb every unit alone at every bitwidth, and read the model's end.

    Args:
        run: model, units and journal.
        batches: this process's calibration examples.
        bits: bitwidths of each unit.
        perturb: name, weight [N, K] in the model's dtype and bits to another weight; called where groups divide K.
        read: what is kept of the last block's output.
        description: of the progress bar.

    Returns:
        What was read, by (unit, bits), and the full model's last hidden states.
    """
    model = run.model
    done = _finished(run.journal)
    by_layer: dict[int | None, list[Key]] = {}
    for unit in run.units:
        wanted = [(unit, width) for width in bits if (unit, width) not in done]
        by_layer.setdefault(None if unit == HEAD else layer_of(unit), []).extend(wanted)

    def finish(key: Key, states: HiddenStates, head: Head, full: Head) -> None:
        done[key] = read(key, states, head, full)
        if world()[0] == 0:
            values = {name: of_examples.tolist() for name, of_examples in done[key].items()}
            journal.append(run.journal, {"unit": key[0], "bits": key[1]} | values)

    walks = sum(len(by_layer.get(layer, ())) * (model.layers - layer) for layer in range(model.layers))
    hidden = model.embed(batches)
    with steps(description, len(batches) * (model.layers + walks)) as progress:
        # The full model's first block runs first: its time tells how long all of it will take.
        started = time.monotonic()
        with model.block(0) as block:
            after = hidden.map(lambda states, block=block: model.run(0, block, states))
        block_s = time.monotonic() - started
        progress.advance(len(batches))
        started = time.monotonic()
        with model.head() as head:
            read(None, after, head, head)
        read_s = time.monotonic() - started
        waiting = sum(map(len, by_layer.values()))
        progress.say(
            f"{description}: {waiting} of {len(run.units) * len(bits)} to do, {model.layers + walks} block runs, "
            f"estimated time {duration(block_s * (model.layers + walks) + read_s * (waiting + 1))}"
        )
        for layer in range(model.layers):
            for unit, width in by_layer.get(layer, ()):
                with model.block(layer) as block:
                    _perturb(model, layer, block, run.units[unit], width, perturb)
                    perturbed = hidden.map(lambda states, layer=layer, block=block: model.run(layer, block, states))
                progress.advance(len(batches))
                for later in range(layer + 1, model.layers):
                    with model.block(later) as block:
                        perturbed.replace(lambda states, later=later, block=block: model.run(later, block, states))
                    progress.advance(len(batches))
                with model.head() as head:
                    finish((unit, width), perturbed, head, head)
                del perturbed
            if layer == 0:
                hidden, after = after, None
            else:
                with model.block(layer) as block:
                    hidden.replace(lambda states, layer=layer, block=block: model.run(layer, block, states))
                progress.advance(len(batches))
    for unit, width in by_layer.get(None, ()):
        with model.head() as head:
            weight = head.weight
            if is_quantizable(weight.shape[1]):
                weight = perturb(HEAD, weight.to(model.dtype), width).to(weight.device, weight.dtype)
            finish((unit, width), hidden, replace(head, weight=weight), head)
    return done, hidden


def _perturb(
    model: StreamedModel,
    layer: int,
    block: nn.Module,
    matrices: Sequence[str],
    bits: int,
    perturb: Callable[[str, Tensor, int], Tensor],
) -> None:
    for inside, matrix in matrices_of(block).items():
        name = f"model.layers.{layer}.{inside}"
        if name in matrices and is_quantizable(matrix.in_features):
            replace_weight(matrix, perturb(name, matrix.weight.to(model.dtype), bits))


def _finished(journal_file: Path) -> dict[Key, Values]:
    done = {}
    for entry in journal.read(journal_file, mend=world()[0] == 0):
        key = (entry.pop("unit"), entry.pop("bits"))
        done[key] = {name: torch.tensor(values, dtype=torch.float64) for name, values in entry.items()}
    return done
