"""What the quantizer's methods work on: one block with its plan, its inputs, and where wanted its outputs.

A block is a transformer block, or the head (or some of its rows) as a block of one matrix. Methods ask it for the
inputs of its matrices; matrices that read the same tensor (q, k, v) are found by running the block, so no names of
any architecture are needed here. Sums over tokens are exchanged between processes (`distributed.total`).
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from taq_vllm import methods
from taq_vllm.distributed import total
from taq_vllm.experts import experts_in
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.methods import METHODS
from taq_vllm.plan import MatrixPlan
from taq_vllm.settings import settings_from
from taq_vllm.stream import Batch, matrices_of


class _Seen(Exception):
    """Ends a run of a block early."""


@dataclass(frozen=True)
class Block:
    """What a method fits.

    Attributes:
        module: the loaded block, full-precision weights in the walk's dtype.
        entries: bits of every matrix, by its name in the block; 16 means leave.
        apply: what calls the module, or a function in its place, on one batch's hidden states [B, T, d], with gradients
            where they are asked for.
        dtype: of the checkpoint: of scales, and of what stays at 16 bits.
        batches: the calibration set; empty for methods that read none.
        hidden: hidden states entering the block.
        target: outputs of the full-precision block on the full-precision model's hidden states.
        unseen: matrices whose inputs were asked for and that have none, in any process: experts to which no token is
            sent.
    """

    module: nn.Module
    entries: Mapping[str, MatrixPlan]
    apply: Callable[[Callable[..., Tensor], Tensor], Tensor]
    dtype: torch.dtype
    batches: Sequence[Batch] = ()
    hidden: HiddenStates | None = None
    target: HiddenStates | None = None
    unseen: set[str] = field(default_factory=set)

    @property
    def matrices(self) -> dict[str, nn.Linear]:
        """The matrices that get fewer than 16 bits, by name."""
        found = matrices_of(self.module)
        return {name: found[name] for name, entry in self.entries.items() if entry.bits < 16}

    def groups(self) -> list[tuple[str, ...]]:
        """The matrices below 16 bits in the order in which they run; those that read one tensor together.

        Found on one token, which all experts see.
        """
        found: list[tuple[Tensor, list[str]]] = []

        def observe(name: str, states: Tensor) -> None:
            for seen, names in found:
                if seen is states:
                    names.append(name)
                    return
            found.append((states, [name]))

        experts = experts_in(self.module)
        with self._observed(list(self.matrices), observe), experts.all_running() if experts else nullcontext():
            self._run_until_seen(self.hidden[0][:1, :1])
        return [tuple(names) for _, names in found]

    def observe(self, names: Sequence[str], function: Callable[[str, Tensor], None]) -> None:
        """Run the block on every batch, and show a function the inputs of some matrices.

        Args:
            names: of matrices; the block runs no further than the last of them.
            function: called with a name and the real tokens' inputs, [tokens, K] in the walk's dtype; for every name at
                least once, for an expert that no token is sent to with no tokens, and noted in `unseen`.

        Raises:
            ValueError: an input that is not finite.
        """
        is_token: Tensor | None = None
        experts = experts_in(self.module)
        seen = dict.fromkeys(names, 0)

        def on_tokens(name: str, states: Tensor) -> None:
            inputs = states[is_token.flatten()[experts.tokens] if states.dim() == 2 else is_token]
            if not torch.isfinite(inputs).all():
                raise ValueError(
                    f"{name}: got activations that are not finite; check the model's weights with `taq verify`, or "
                    "run it in bfloat16"
                )
            seen[name] += len(inputs)
            function(name, inputs)

        with self._observed(names, on_tokens):
            for batch, states in zip(self.batches, self.hidden, strict=True):
                is_token = batch.is_token.to(states.device)
                self._run_until_seen(states)
        found = matrices_of(self.module)
        for name in names:
            if not seen[name]:
                weight = found[name].weight
                function(name, weight.new_empty(0, weight.shape[1]))
        if experts is not None:
            everywhere = total(torch.tensor([seen[name] for name in names], device=self.device))
            self.unseen.update(name for name, count in zip(names, everywhere.tolist(), strict=True) if not count)

    def tokens(self) -> int:
        """Real tokens of the whole calibration set, over all processes."""
        return int(total(torch.tensor([sum(int(batch.lengths.sum()) for batch in self.batches)], device=self.device)))

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return next(self.module.parameters()).device

    def energy(self) -> dict[str, Tensor]:
        """E[x_k^2] over the real tokens for every matrix's inputs: [K] float64 by name."""
        groups = self.groups()
        sums: dict[str, Tensor] = {}

        def add(name: str, inputs: Tensor) -> None:
            energy = inputs.float().square().sum(0).double()
            sums[name] = sums[name] + energy if name in sums else energy

        self.observe([names[0] for names in groups], add)
        tokens = self.tokens()
        return {name: total(sums[names[0]]) / tokens for names in groups for name in names}

    @contextmanager
    def _observed(self, names: Sequence[str], function: Callable[[str, Tensor], None]) -> Iterator[None]:
        waiting: set[str] = set()

        def start(module: nn.Module, inputs: Any) -> None:
            waiting.update(names)

        def see(name: str, states: Tensor) -> None:
            function(name, states)
            waiting.discard(name)
            if not waiting:
                raise _Seen

        found = matrices_of(self.module)
        handles = [self.module.register_forward_pre_hook(start)]
        handles += [
            found[name].register_forward_pre_hook(lambda module, inputs, name=name: see(name, inputs[0]))
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _run_until_seen(self, states: Tensor) -> None:
        try:
            self.apply(self.module, states)
        except _Seen:
            return
        assert experts_in(self.module), "a matrix of the block was not run"


def method_named(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"got method {name!r}; there are {', '.join(METHODS)}")
    return importlib.import_module(f"{methods.__name__}.{name}")


def settings_of(method: str, settings: Mapping[str, Any]) -> Any:
    """A method's settings, the given ones over its defaults.

    Raises:
        ValueError: no such method or setting, or a value that is not allowed.
    """
    return settings_from(method_named(method), f"method {method}", settings)
