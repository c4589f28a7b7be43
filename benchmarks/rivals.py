"""Other ways to train an ensemble, which the benchmarks compare with this library."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NotebookLinear(nn.Module):
    """A BatchEnsemble linear layer as notebooks write it: r and s are repeated for every row of a tiled batch."""

    def __init__(self, inputs: int, outputs: int, E: int) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs)
        self.weight, self.bias = plain.weight, plain.bias
        self.r = nn.Parameter(1 + 0.5 * torch.randn(E, outputs))
        self.s = nn.Parameter(1 + 0.5 * torch.randn(E, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[E * B, in]` -> `[E * B, out]`."""
        rows = len(x) // len(self.r)
        r, s = self.r.repeat_interleave(rows, 0), self.s.repeat_interleave(rows, 0)
        return F.linear(x * s, self.weight) * r + self.bias


class NotebookEnsemble(nn.Module):
    """A BatchEnsemble MLP that repeats the batch for every member."""

    def __init__(self, sizes: Sequence[int], E: int) -> None:
        super().__init__()
        self.E = E
        self.layers = nn.ModuleList(NotebookLinear(a, b, E) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` -> `[E, B, C]`."""
        y = x.flatten(1).repeat(self.E, 1)
        for layer in self.layers[:-1]:
            y = layer(y).relu()
        return self.layers[-1](y).unflatten(0, (self.E, -1))


def tabm_ensemble(sizes: Sequence[int], E: int) -> nn.Module | None:
    """A BatchEnsemble MLP of tabm's layers, `[B, in]` -> `[B, E, C]`; None if tabm is not installed."""
    try:
        import tabm
    except ImportError:
        return None
    layers: list[nn.Module] = [nn.Flatten(), tabm.EnsembleView(k=E)]
    for a, b in pairwise(sizes):
        layers += [tabm.LinearBatchEnsemble(a, b, k=E, scaling_init="normal"), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def member_after_member(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of `logits` `[E, B, C]`, averaged over the members in a Python loop."""
    return torch.stack([F.cross_entropy(member, y) for member in logits]).mean()


def member_as_rows(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of `logits` `[B, E, C]`, averaged over the members in one call, as tabm trains."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(logits.shape[1]))


def adam(modules: Sequence[nn.Module], **options: Any) -> list[torch.optim.Optimizer]:
    """One Adam for each of `modules`."""
    return [torch.optim.Adam(module.parameters(), lr=1e-3, **options) for module in modules]
