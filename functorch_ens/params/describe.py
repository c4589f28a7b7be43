"""A table of the parameters of an ensemble: which are shared, which are stacked, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from functorch_ens.anatomy import Anatomy, Site, lora_names, rank1_names
from functorch_ens.layers.registry import rule_for
from functorch_ens.params.pytree import EnsembleParams, check_kinds, check_params
from functorch_ens.params.stack import effective
from functorch_ens.tables import aligned

NEAR = 0.05
"""Members whose weights differ by less than this are said to be near each other."""


class Row(NamedTuple):
    """One parameter of the model in the ensemble."""

    module: str
    """The qualified name of the module that has it; `""` is the model."""
    kind: str
    """The class of that module."""
    name: str
    """Its name in that module."""
    shape: tuple[int, ...]
    """Its shape in the model, without the member axis."""
    held: str
    """`"shared"` or `"stacked"`; with `" + r, s"` where it is rank-1, and `" + lora 8"` with factors of rank 8."""
    rule: str
    """`"none"` for a plain weight; otherwise `"fast"`, or `"fallback"`: the exact `(W + B A) * (r s^T)` per member."""
    parameters: int
    """The number of values that the ensemble has for it, those of `r`, `s`, `A` and `B` included."""
    bytes: int


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns; `print` shows it as a table."""

    model: str
    E: int
    rows: list[Row]
    model_parameters: int
    """The number of values in one model."""
    model_bytes: int
    distance: float
    """How far members are apart in the weights that they do not share, as a share of the norm of these: 1.4 where
    independent, 0 where equal. The mean over neighbours among the first four; nan for one member, or without values."""

    @property
    def parameters(self) -> int:
        """The number of values in the ensemble's parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        head = ["module", "parameter", "shape", "held", "rule", "parameters", "MB"]
        body, before = [], None
        for row in self.rows:
            module = "" if row.module == before else f"{row.module} ({row.kind})".lstrip()
            before = row.module
            body.append([module, row.name, str(list(row.shape)), row.held, row.rule, *_size(row.parameters, row.bytes)])
        separate = self.E * self.model_parameters, self.E * self.model_bytes
        totals = [
            ["this ensemble", "", "", "", "", *_size(self.parameters, self.bytes)],
            ["one model", "", "", "", "", *_size(self.model_parameters, self.model_bytes)],
            [f"{self.E} separate models", "", "", "", "", *_size(*separate)],
        ]
        table = aligned([head, *body, *totals], left=5, totals=len(totals))
        share = (
            f"{self.bytes / self.model_bytes:.3g} times the size of one model, "
            f"{self.bytes / separate[1]:.3g} times that of {self.E} separate ones"
        )
        told = f"{self.model}, E = {self.E}\n{table}\n{share}"
        if self.distance < NEAR and not any("lora" in row.held for row in self.rows):
            told += f"\nthe members' weights differ by only {self.distance:.2g} of their norm"
        return told

    def __repr__(self) -> str:
        return str(self)


def describe(model: nn.Module, params: EnsembleParams) -> Description:
    """List the parameters of an ensemble by module: their shapes, how they are held, and by which rule they compute.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    >>> print(fe.describe(model, fe.batchensemble_params(model, E=4, stacked="2.*")))
    Sequential, E = 4
    module             parameter  shape     held           rule  parameters    MB
    -----------------------------------------------------------------------------
    0 (Linear)         weight     [64, 20]  shared + r, s  fast       1,616  0.01
                       bias       [64]      shared         none          64  0.00
    2 (Linear)         weight     [3, 64]   stacked        none         768  0.00
                       bias       [3]       stacked        none          12  0.00
    -----------------------------------------------------------------------------
    this ensemble                                                     2,460  0.01
    one model                                                         1,539  0.01
    4 separate models                                                 6,156  0.02
    1.6 times the size of one model, 0.4 times that of 4 separate ones

    A tied parameter is listed once, under its first name. Its rule is "fast" if it is fast in every layer.

    Args:
        model: the network; it is only read.
        params: the parameters of an ensemble of it.

    Returns: a `Description`, which prints as this table; its `rows` have the same values as fields.

    Raises:
        TypeError, ValueError: `model` is not a module with parameters, or `params` do not fit it.
    """
    anatomy = Anatomy(model)
    E = check_params(params, anatomy)
    check_kinds(params, None, anatomy)
    tensors = {**params.shared, **params.stacked}

    kinds = {"r, s": rank1_names, "lora": lora_names}
    added = {
        name: {
            kind: [tensors[each] for each in names(name)] for kind, names in kinds.items() if names(name)[0] in tensors
        }
        for name in anatomy.layouts
    }
    """By weight, what members add to it, of each kind."""

    def held(name: str) -> str:
        mine = added.get(name, {})
        rank = f" {mine['lora'][0].shape[-2]}" if "lora" in mine else ""
        return " + ".join(["stacked" if name in params.stacked else "shared", *mine]) + rank

    def is_fast(layer: nn.Module) -> bool:
        given = {leaf: added[name] for leaf, name in anatomy.weights[layer].items() if added[name]}
        found = rule_for(layer, anatomy.layouts_of(layer))
        return found is not None and found.serves(given.keys(), any("lora" in kinds for kinds in given.values()))

    def rule(places: list[Site]) -> str:
        return "fast" if all(is_fast(site.module) for site in places) else "fallback"

    rows = []
    for name, places in anatomy.sites.items():
        first = places[0]
        mine = [tensors[name], *(x for xs in added.get(name, {}).values() for x in xs)]
        rows.append(
            Row(
                module=first.name.rpartition(".")[0],
                kind=type(first.module).__name__,
                name=first.leaf,
                shape=anatomy.shapes[name],
                held=held(name),
                rule=rule(places) if len(mine) > 1 else "none",
                parameters=_count(mine, Tensor.numel),
                bytes=_count(mine, _bytes),
            )
        )
    own = list(anatomy.parameters.values())
    of_members = [
        name
        for name, tensor in anatomy.parameters.items()
        if tensor.dtype.itemsize > 1 and (added.get(name) or (name in params.stacked and tensors[name].requires_grad))
    ]
    distance = _distance(params, anatomy, of_members)
    return Description(anatomy.kind, E, rows, _count(own, Tensor.numel), _count(own, _bytes), distance)


def _distance(params: EnsembleParams, anatomy: Anatomy, names: Collection[str]) -> float:
    """`Description.distance` by the weights `names`. It needs those of one member after another, never those of all."""
    if params.E == 1 or not names or any(tensor.is_meta for part in params for tensor in part.values()):
        return math.nan
    apart = norms = 0.0
    last: list[Tensor] = []
    with torch.no_grad():
        for i in range(min(params.E, 4)):
            found = [weight for name, weight in effective(params, anatomy, i) if name in names]
            weights = [weight.to(torch.complex128 if weight.is_complex() else torch.float64) for weight in found]
            if last:
                apart += _norm(weight - before for weight, before in zip(weights, last, strict=True))
                norms += _norm(weights)
            last = weights
    return apart / norms if norms else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.abs().square().sum()) for tensor in tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count(tensors: Iterable[Tensor], measure: Callable[[Tensor], int]) -> int:
    return sum(measure(tensor) for tensor in tensors)


def _size(parameters: int, bytes: int) -> list[str]:
    return [f"{parameters:,}", f"{bytes / 1e6:,.2f}"]
