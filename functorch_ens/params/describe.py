"""What an ensemble is made of, as a table: what is shared, what is stacked, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from functorch_ens.anatomy import Site, is_compiled, parameter_sites
from functorch_ens.layers.registry import rank1_layouts, rank1_names, rule_for
from functorch_ens.params.fits import Expected
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.tables import aligned


class Row(NamedTuple):
    """One parameter of the model in the ensemble."""

    module: str
    """The qualified name of the module that has it; `""` is the model."""
    kind: str
    """The class of that module."""
    name: str
    """What the module calls it."""
    shape: tuple[int, ...]
    """Its shape in the model, without the member axis."""
    held: str
    """`"shared"` or `"stacked"`; with `" + r, s"` where it is rank-1."""
    rule: str
    """How a rank-1 weight is computed with: `"fast"`, `"fallback"` (the exact `W * (r s^T)`); else `"none"`."""
    parameters: int
    """How many numbers the ensemble keeps for it, `r` and `s` included."""
    bytes: int


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns; `print` shows it as a table."""

    model: str
    E: int
    rows: list[Row]
    model_parameters: int
    """Of one model."""
    model_bytes: int

    @property
    def parameters(self) -> int:
        """All numbers in the ensemble's parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        head = ["module", "parameter", "shape", "held", "rank-1 rule", "parameters", "MB"]
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
        return f"{self.model}, E = {self.E}\n{table}\n{share}"

    def __repr__(self) -> str:
        return str(self)


def describe(model: nn.Module, params: EnsembleParams) -> Description:
    """What the ensemble `params` of `model` is made of: by module, its parameters, how they are held and computed with.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    >>> print(fe.describe(model, fe.batchensemble_params(model, E=4, stacked="2.*")))
    Sequential, E = 4
    module             parameter  shape     held           rank-1 rule  parameters    MB
    ------------------------------------------------------------------------------------
    0 (Linear)         weight     [64, 20]  shared + r, s  fast              1,616  0.01
                       bias       [64]      shared         none                 64  0.00
    2 (Linear)         weight     [3, 64]   stacked        none                768  0.00
                       bias       [3]       stacked        none                 12  0.00
    ------------------------------------------------------------------------------------
    this ensemble                                                            2,460  0.01
    one model                                                                1,539  0.01
    4 separate models                                                        6,156  0.02
    1.6 times the size of one model, 0.4 times that of 4 separate ones

    A parameter that is tied to others is listed once, under its first name; its rule is "fast" where it is everywhere.

    Raises:
        TypeError, ValueError: `model` is no module with parameters, or `params` are not its.
    """
    sites = parameter_sites(model)
    E = Expected(model, sites).check_params(params)
    tensors = {**params.shared, **params.stacked}
    layouts = rank1_layouts(sites)
    by_layer: dict[nn.Module, dict[str, str]] = {}  # a layer to its weights that can be rank-1, and their names
    for name in layouts:
        for site in sites[name]:
            by_layer.setdefault(site.module, {})[site.leaf] = name

    def is_fast(layer: nn.Module) -> bool:
        leaves = by_layer[layer]
        given = {leaf for leaf, name in leaves.items() if rank1_names(name)[0] in tensors}
        found = rule_for(layer, {leaf: layouts[name] for leaf, name in leaves.items()})
        return found is not None and found.weights == given

    def rule(places: list[Site]) -> str:
        return "fast" if all(is_fast(site.module) for site in places) else "fallback"

    rows = []
    for name, places in sites.items():
        first = places[0]
        vectors = rank1_names(name) if name in layouts else ()
        mine = [tensors[name], *(tensors[vector] for vector in vectors if vector in tensors)]
        rows.append(
            Row(
                module=first.name.rpartition(".")[0],
                kind=type(first.module).__name__,
                name=first.leaf,
                shape=tuple(first.parameter.shape),
                held=("stacked" if name in params.stacked else "shared") + (" + r, s" if len(mine) > 1 else ""),
                rule=rule(places) if len(mine) > 1 else "none",
                parameters=_count(mine, Tensor.numel),
                bytes=_count(mine, _bytes),
            )
        )
    own = list(model.parameters())
    written = next(module for module in model.modules() if not is_compiled(module))
    return Description(type(written).__name__, E, rows, _count(own, Tensor.numel), _count(own, _bytes))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count(tensors: Iterable[Tensor], measure: Callable[[Tensor], int]) -> int:
    return sum(measure(tensor) for tensor in tensors)


def _size(parameters: int, bytes: int) -> list[str]:
    return [f"{parameters:,}", f"{bytes / 1e6:,.2f}"]
