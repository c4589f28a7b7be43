"""Everything that is known of a model before it is called.

A public function makes one `Anatomy` of its model and hands it on. It includes the shapes of the rank-1 vectors `r`,
`s` and of the low-rank factors `A`, `B`, which follow from the class of the layer: `rank1_layout` registers a `Layout`
for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from functorch_ens import _torch
from functorch_ens.checks import check_callable, shown

# --------------------------------------------------------------------------------------------------------------------
# The layout of a weight


class Layout(NamedTuple):
    """How the axes of a weight are read: axis 0 is the output and axis 1 the input, or the other way round.

    A grouped layer splits axis 0 into `groups`. Each group has its own part of the other side.
    """

    groups: int = 1
    transposed: bool = False  # axis 0 is the input

    @property
    def turned(self) -> Layout:
        """The layout that reads axis 0 and axis 1 the other way round."""
        return self._replace(transposed=not self.transposed)

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """The lengths (out, in) of `r` and `s` for `weight`."""
        first, second = weight.shape[0], weight.shape[1] * self.groups
        return (second, first) if self.transposed else (first, second)

    def multiplied(
        self, weight: Tensor, *, r: Tensor | None = None, s: Tensor | None = None, spatial: int = 0
    ) -> Tensor:
        """`weight` times `r` along its output axis and `s` along its input axis, where they are given.

        `spatial` axes follow the first two. Any of the tensors may have a leading member axis.
        """
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

        The weight is read as a matrix: axis 0 is one side, all other axes together are the other side.
        """
        first, rest = weight.shape[0], prod(weight.shape[1:])
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


_layouts: dict[type[nn.Module] | str, Callable[[Any], Layout]] = {}  # the rows of layers/ fill it


def class_keys(layer: nn.Module) -> list[type | str]:
    """The classes of `layer`, the nearest first, each followed by its full name: tables may have either."""
    return [key for cls in type(layer).__mro__ for key in (cls, f"{cls.__module__}.{cls.__qualname__}")]


def rank1_layout(*layer_types: type[nn.Module], layout: Callable[[Any], Layout]) -> None:
    """Say how the weights of `layer_types` (and their subclasses) are laid out, as a function of the layer.

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


def register_layout(layer_types: Iterable[type[nn.Module] | str], layout: Callable[[Any], Layout]) -> None:
    """`rank1_layout`, also for classes that are not imported here, by their full names."""
    for layer_type in layer_types:
        _layouts[layer_type] = layout


def check_layer_types(layer_types: tuple[Any, ...]) -> None:
    """TypeError where one of `layer_types` is not a class of modules, or there are none."""
    if not layer_types:
        raise TypeError("layer_types: expected subclasses of torch.nn.Module, got none")
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
            raise TypeError(f"layer_types: expected subclasses of torch.nn.Module, got {shown(layer_type)}")


def has_layout(layer: nn.Module) -> bool:
    """Whether a layout is registered for the class of `layer` or for one of its bases."""
    return any(key in _layouts for key in class_keys(layer))


def layout_of(layer: nn.Module) -> Layout:
    """The layout of the weights of `layer`: the nearest registered class decides; else output first, then input."""
    for key in class_keys(layer):
        if key in _layouts:
            found = _layouts[key](layer)
            if not isinstance(found, Layout):
                raise TypeError(f"layout: expected a function that returns a Layout, it returned {shown(found)}")
            return found
    return Layout()


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
            name: layout_of(self.sites[name][0].module)
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
