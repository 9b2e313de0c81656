"""A mixture's experts as what they are on disk: a multilayer perceptron each, of three matrices.

transformers holds the experts of a block as two tensors with an axis of experts, and runs them together. Here every
expert's matrices are modules of their own, with the names that the checkpoint has (`mlp.experts.7.gate_proj`), so that
everything that looks at a block's matrices sees them as it sees all others. A token goes to the experts that the
block's router picks for it; one that no token of the calibration set is sent to cannot be fitted to anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """[tokens, d] to [tokens, d]."""
        return self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))


class Experts(nn.ModuleList):
    """The experts of one block, called as transformers' own.

    Attributes:
        tokens: [tokens sent] int64: which tokens of the call the expert that runs now is given.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Take the place of a block's fused experts, which hold no weights yet.

        Args:
            fused: transformers' module, its `gate_up_proj` [E, 2 I, d] on the meta device.
        """
        count, both, hidden = fused.gate_up_proj.shape
        with torch.device("meta"):
            dtype = fused.gate_up_proj.dtype
            super().__init__(Expert(hidden, both // 2, fused.act_fn, dtype) for _ in range(count))
        self.tokens = torch.empty(0, dtype=torch.long)
        self._all = False

    @contextmanager
    def all_running(self) -> Iterator[None]:
        """Send every token to every expert."""
        self._all = True
        try:
            yield
        finally:
            self._all = False

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of what the chosen experts make of each token.

        Args:
            states: [tokens, d].
            chosen: [tokens, k] int64, experts of each token.
            weights: [tokens, k], their shares.

        Returns:
            [tokens, d].
        """
        output = torch.zeros_like(states)
        for index, expert in enumerate(self):
            if self._all:
                self.tokens = torch.arange(len(states), device=states.device)
                expert(states.view_as(states))  # a tensor of its own: experts do not read one together
                continue
            self.tokens, place = (chosen == index).nonzero(as_tuple=True)
            if len(self.tokens):
                part = expert(states[self.tokens]) * weights[self.tokens, place, None]
                output.index_add_(0, self.tokens, part.to(output.dtype))
        return output


def separate_experts(decoder: nn.Module) -> None:
    """Give every block that has experts of transformers' kind separate ones, in place; all on the meta device."""
    for layer in decoder.layers:
        fused: Any = getattr(layer.mlp, "experts", None)
        if fused is not None:
            layer.mlp.experts = Experts(fused)


def experts_in(block: nn.Module) -> Experts | None:
    """A block's experts, if it has any."""
    return next((module for module in block.modules() if isinstance(module, Experts)), None)
