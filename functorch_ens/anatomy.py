"""Everything that is known of a model before it is called.

A public function makes one `Anatomy` of its model and hands it on. It includes the shapes of the rank-1 vectors `r`,
`s` and of the low-rank factors `A`, `B`, which follow from the class of the layer: `rank1_layout` registers a `Layout`
for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple, TypeVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from functorch_ens import _torch
from functorch_ens.checks import check_callable, shown

# --------------------------------------------------------------------------------------------------------------------
# The layout of a weight


class Layout(NamedTuple):
    """How the axes of a weight are read: axis 0 is the output and axis 1 the input, or the other way round.

    A grouped layer splits axis 0 into `groups`. Each group has its own part of the other side. `axes` is for weights
    in which a side has several axes, which are read as one: `[in, heads, size]` is
    `Layout(transposed=True, axes=(1, 2))`. A stack of n matrices `[n, out, in]` is a layer of n groups,
    `Layout(groups=n, axes=(2, 1))`: `r` is the n outputs one after another, `[n * out]`, and `s` the n inputs.
    """

    groups: int = 1
    transposed: bool = False  # axis 0 is the input
    axes: tuple[int, int] = (1, 1)

    @property
    def turned(self) -> Layout:
        """The layout that reads the first side and the second the other way round."""
        return self._replace(transposed=not self.transposed)

    def fits(self, weight: Tensor) -> bool:
        """Whether `weight` has as many axes as are read."""
        return weight.ndim >= sum(self.axes)

    def spatial(self, weight: Tensor) -> int:
        """The number of axes of `weight` that follow its two sides."""
        return weight.ndim - sum(self.axes)

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """The lengths (out, in) of `r` and `s` for `weight`."""
        rows, both = self.axes[0], sum(self.axes)
        first, second = prod(weight.shape[:rows]), prod(weight.shape[rows:both]) * self.groups
        return (second, first) if self.transposed else (first, second)

    def multiplied(
        self, weight: Tensor, *, r: Tensor | None = None, s: Tensor | None = None, spatial: int = 0
    ) -> Tensor:
        """`weight` times `r` along its output axis and `s` along its input axis, where they are given.

        `spatial` axes follow the two sides. Any of the tensors may have a leading member axis.
        """
        if self.axes != (1, 1):
            rows, both = self.axes[0], sum(self.axes)
            lead = weight.ndim - both - spatial
            matrix = weight.flatten(lead + rows, lead + both - 1).flatten(lead, lead + rows - 1)
            result = self._replace(axes=(1, 1)).multiplied(matrix, r=r, s=s, spatial=spatial)
            return result.reshape(*result.shape[: result.ndim - 2 - spatial], *weight.shape[lead:])
        first, second = (s, r) if self.transposed else (r, s)
        axes, ones = "".join(f" k{i}" for i in range(spatial)), " 1" * spatial
        scales = []
        if first is not None:
            scales.append(rearrange(first, f"... (g a) -> ... g a 1{ones}", g=self.groups))
        if second is not None:
            scales.append(rearrange(second, f"... (g b) -> ... g 1 b{ones}", g=self.groups))
        parts = rearrange(weight, f"... (g a) b{axes} -> ... g a b{axes}", g=self.groups)
        return rearrange(parts * prod(scales), f"... g a b{axes} -> ... (g a) b{axes}")

    def factors(self, weight: Tensor) -> tuple[tuple[int | str, int], tuple[int, int | str]]:
        """The shapes of `A` `[rank, in]` and `B` `[out, rank]` for `weight`; the rank is free.

        The weight is read as a matrix: its first side is one side, all other axes together are the other side.
        """
        rows = self.axes[0]
        first, rest = prod(weight.shape[:rows]), prod(weight.shape[rows:])
        out, into = (rest, first) if self.transposed else (first, rest)
        return (RANK, into), (out, RANK)

    def low_rank(self, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        """`B A`, of the shape of `weight`."""
        delta = B @ A
        return (delta.mT if self.transposed else delta).reshape(weight.shape)


RANK = "rank"
"""In a shape, a size of any number."""


def rank1_names(name: str) -> tuple[str, str]:
    """The names of the `r` and the `s` of the weight called `name`."""
    return f"{name}_r", f"{name}_s"


def lora_names(name: str) -> tuple[str, str]:
    """The names of the low-rank factors `A` and `B` of the weight called `name`."""
    return f"{name}_lora_A", f"{name}_lora_B"


def member_names(name: str) -> tuple[str, str, str, str]:
    """The names of all that a member can have for itself beside a shared weight called `name`: `r`, `s`, `A`, `B`."""
    return *rank1_names(name), *lora_names(name)


def is_numeric(tensor: Tensor) -> bool:
    """Whether `tensor` can be trained: floating or complex, not integer, bool or quantised."""
    return tensor.is_floating_point() or tensor.is_complex()


def can_be_rank1(parameter: Tensor) -> bool:
    """Whether `parameter` has the two axes that `r` and `s` run over, and values to scale."""
    return parameter.ndim >= 2 and is_numeric(parameter)


Layouts = Layout | Mapping[str, Layout]
"""The layout of all weights of a layer; or, by what the layer calls it, that of each of its weights."""

_layouts: dict[type[nn.Module] | str, Callable[[Any], Layouts]] = {}  # the rows of layers/ fill it

Row = TypeVar("Row")


def rows_of(layer: nn.Module, table: Mapping[type[nn.Module] | str, Row]) -> list[tuple[type, Row]]:
    """What `table` has for the class of `layer` and for the bases of that, the nearest first.

    The keys are classes, or patterns of their full names; of several that match one class, the first comes first.
    """
    patterns = [key for key in table if isinstance(key, str)]
    found = []
    for cls in type(layer).__mro__:
        if cls in table:
            found.append((cls, table[cls]))
        name = f"{cls.__module__}.{cls.__qualname__}"
        found += [(cls, table[pattern]) for pattern in patterns if fnmatchcase(name, pattern)]
    return found


def rank1_layout(*layer_types: type[nn.Module], layout: Callable[[Any], Layouts]) -> None:
    """Say how the weights of `layer_types` (and their subclasses) are laid out, as a function of the layer.

    The function returns the `Layout` of all weights of the layer, or a dict of one for each: these then get `r` and `s`
    by default, and no other parameter of the layer does.

    >>> import torch, functorch_ens as fe
    >>> class Mix(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(3, 4))
    ...     def forward(self, x):
    ...         return x @ self.weight  # axis 0 is the input
    >>> fe.rank1_layout(Mix, layout=lambda layer: fe.Layout(transposed=True))
    >>> params = fe.batchensemble_params(Mix(), E=2)
    >>> {name: list(vector.shape) for name, vector in params.stacked.items()}
    {'weight_r': [2, 4], 'weight_s': [2, 3]}

    Raises:
        TypeError: one of `layer_types` is not a module class, or `layout` is not a function of the layer.
    """
    check_layer_types(layer_types)
    check_callable(layout, "layout", "a function of the layer that returns a Layout", ["layer"])
    register_layout(layer_types, layout)


def register_layout(layer_types: Iterable[type[nn.Module] | str], layout: Callable[[Any], Layouts]) -> None:
    """`rank1_layout`, also for classes that are not imported here, by patterns of their full names."""
    for layer_type in layer_types:
        _layouts[layer_type] = layout


def check_layer_types(layer_types: tuple[Any, ...]) -> None:
    """TypeError where one of `layer_types` is not a class of modules, or there are none."""
    if not layer_types:
        raise TypeError("layer_types: expected subclasses of torch.nn.Module, got none")
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
            raise TypeError(f"layer_types: expected subclasses of torch.nn.Module, got {shown(layer_type)}")


def layouts_in(layer: nn.Module) -> Layouts | None:
    """What is registered for the class of `layer`, or else for the nearest of its bases; None where nothing is."""
    for _, layout in rows_of(layer, _layouts):
        found = layout(layer)
        every = list(found.values()) if isinstance(found, Mapping) else [found]
        if not all(isinstance(each, Layout) for each in every):
            raise TypeError(
                "layout: expected a function that returns a Layout, or a dict of Layouts by parameter, it returned "
                f"{shown(found)}"
            )
        return found
    return None


def layout_of(layer: nn.Module, leaf: str = "weight") -> Layout:
    """The layout of the weight `leaf` of `layer`, as it is registered; else output first, then input.

    Raises:
        ValueError: the layout that is registered for this very weight reads more axes than it has.
    """
    found, parameters = layouts_in(layer), _torch.parameters_of(layer)
    parameter = parameters[leaf] if leaf in parameters else None  # TorchScript's dict has no get
    own = found.get(leaf) if isinstance(found, Mapping) else found
    if own is None or parameter is None or own.fits(parameter):
        return own or Layout()
    if isinstance(found, Mapping):
        raise ValueError(
            f"layout: {own} reads {sum(own.axes)} axes, but {leaf} of {type(layer).__name__} is {list(parameter.shape)}"
        )
    return Layout()  # a bias, say, beside weights of more axes


# --------------------------------------------------------------------------------------------------------------------
# The anatomy of a model


class Site(NamedTuple):
    """One place where a parameter or buffer is registered: `module.<leaf>`, under the qualified name `name`."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter registered there. Not by getattr: a template computes some of its weights in properties."""
        parameter = _torch.parameters_of(self.module)[self.leaf]
        assert parameter is not None
        return parameter

    @property
    def buffer(self) -> Tensor | None:
        """The buffer registered there now; a forward may have assigned another tensor."""
        return _torch.buffers_of(self.module)[self.leaf]


class Anatomy:
    """What is known of `model` before it is called; the dicts are in the order of `named_parameters()` and its like.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `model` has no parameters, or lazy ones whose shape no input has fixed yet.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {shown(model)}")
        self.model = model
        self.modules = dict(model.named_modules())
        """Every module once, under its first name."""
        self.written = [module for module in self.modules.values() if not _torch.is_compiled(module)]
        """The modules without the wrappers of torch.compile."""
        self.kind = next(type(module).__name__ for module in self.modules.values() if not _torch.is_compiled(module))
        """The name of the class of the model as it was written, without the wrapper of torch.compile."""
        self.sites = _sites(self.modules, _torch.parameters_of)
        """By name, the sites of every parameter. Tied ones have several; the first gives the parameter its name."""
        self.buffer_sites = _sites(self.modules, _torch.buffers_of)
        parameters, buffers = self.parameters, self.buffers
        if not parameters:
            raise ValueError(f"model: {self.kind} has no parameters, so there is nothing to make an ensemble of")
        lazy = [name for name, tensor in [*parameters.items(), *buffers.items()] if is_lazy(tensor)]
        if lazy:
            raise ValueError(
                f"model: {self.kind} has lazy parameters or buffers without a shape yet: {lazy}; "
                "call the model once on an input first"
            )
        first: dict[int, str] = {}
        every_name = list(model.named_parameters(remove_duplicate=False))
        self.names = {name: first.setdefault(id(parameter), name) for name, parameter in every_name}
        """Every name that a parameter has, to its first one."""
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.buffer_shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        self.whole_numbers = frozenset(name for name, x in {**parameters, **buffers}.items() if not is_numeric(x))
        """The names of parameters and buffers that are not floating or complex."""
        self.layouts = {
            name: layout_of(self.sites[name][0].module, self.sites[name][0].leaf)
            for name, parameter in parameters.items()
            if can_be_rank1(parameter) and parameters.keys().isdisjoint(member_names(name))
        }
        """The layout of every parameter that can have `r` and `s`, or `A` and `B`: that of the first layer it is in."""
        self.vectors: dict[str, tuple[int]] = {}
        """The shapes of the `r` and `s` that the parameters can have."""
        self.factors: dict[str, tuple[int | str, int | str]] = {}
        """The shapes of the `A` and `B` that the parameters can have."""
        self.weights: dict[nn.Module, dict[str, str]] = {}
        """By layer, those of its parameters that have a layout: what the layer calls each, and its name."""
        for name, layout in self.layouts.items():
            (r, s), (A, B) = rank1_names(name), lora_names(name)
            out, into = layout.sizes(parameters[name])
            self.vectors |= {r: (out,), s: (into,)}
            self.factors |= dict(zip((A, B), layout.factors(parameters[name]), strict=True))
            for site in self.sites[name]:
                self.weights.setdefault(site.module, {})[site.leaf] = name
        self.pairs = [pair for name in self.layouts for pair in (rank1_names(name), lora_names(name))]
        """The names of what belongs together: `r` and `s`, `A` and `B`."""
        self.factor_pairs = [lora_names(name) for name in self.layouts]
        """Those of `A` and `B` alone."""
        self.every_shape: dict[str, tuple[int | str, ...]] = {**self.shapes, **self.vectors, **self.factors}
        """The shapes of all tensors that the parameters of an ensemble can have, without the member axis."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now: the model may have been moved to another device since."""
        return {name: places[0].parameter for name, places in self.sites.items()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers as they are now."""
        return dict(self.model.named_buffers())

    @property
    def own_buffers(self) -> dict[str, Tensor]:
        """The same, by the sites: Dynamo traces this with fewer guards."""
        found = {name: places[0].buffer for name, places in self.buffer_sites.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    @property
    def facts(self) -> list[object]:
        """Names and shapes alone, which never change; nothing among them is, or holds, a part of the model."""
        return [
            self.kind,
            self.shapes,
            self.buffer_shapes,
            self.whole_numbers,
            self.vectors,
            self.factors,
            self.pairs,
            self.factor_pairs,
            self.every_shape,
        ]

    def layouts_of(self, layer: nn.Module) -> dict[str, Layout]:
        """The layouts of the weights of `layer` that have one, by what the layer calls them."""
        return {leaf: self.layouts[name] for leaf, name in self.weights.get(layer, {}).items()}

    def instances(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """The modules that are a `kind`, by name."""
        return {name: module for name, module in self.modules.items() if isinstance(module, kind)}


def _sites(modules: dict[str, nn.Module], registry: Callable[[nn.Module], Any]) -> dict[str, list[Site]]:
    """The sites of every tensor in the `registry` of each module. A module used in two places has one site, not two."""
    found: dict[int, list[Site]] = {}
    for prefix, module in modules.items():
        for leaf, tensor in registry(module).items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Site(f"{prefix}.{leaf}" if prefix else leaf, module, leaf))
    return {places[0].name: places for places in found.values()}
