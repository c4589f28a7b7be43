"""The parameters and buffers of a new ensemble, made from a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from einops import repeat
from torch import Tensor, nn

from functorch_ens._torch import normal
from functorch_ens.anatomy import Anatomy, is_numeric, rank1_names
from functorch_ens.checks import (
    check_bool,
    check_callable,
    check_generator,
    check_option,
    check_positive_int,
)
from functorch_ens.params.fresh import fresh_members
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.params.select import Selector, choose_parameters, choose_rank1
from functorch_ens.params.vectors import Init, Starts
from functorch_ens.rng import cpu_generator


def ensemble_params(
    model: nn.Module,
    E: int,
    *,
    reset: bool | str | Iterable[str] | Callable[[], nn.Module] = True,
    stacked: Selector | None = None,
    generator: torch.Generator | None = None,
) -> EnsembleParams:
    """The parameters of a classic (deep) ensemble: every member has its own copy of every parameter.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> params = fe.ensemble_params(model, E=5)
    >>> params.stacked["weight"].shape
    torch.Size([5, 2, 3])

    Args:
        model: the network; it is only read.
        E: the number of members.
        reset: True draws fresh, independent parameters by every module's own `reset_parameters`; what has none is
            copied from the model, with one warning that names it, and what is frozen is copied too. A name pattern
            (`"head.*"`) or a list of them draws these parameters alone, for pretrained models. False copies all. A
            factory (`lambda: resnet18()`) is called once per member, and keeps what the model does in its constructor.
        stacked: the parameters that each member owns: a name pattern, a list of them, or a predicate on
            (name, parameter). The others are shared, with the model's own values: `stacked="head.*"` is a sub-ensemble.
            None: all of them.
        generator: the source of randomness; None is torch's global one, of which one number is drawn.

    Returns: parameters that own their memory and are autograd leaves, in the model's dtype and on its device.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `E` < 1, `stacked` chooses nothing, the factory's modules are not like `model`, or `model` has no
            parameters or lazy ones.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474.
    """
    anatomy = Anatomy(model)
    E = check_positive_int(E, "E")
    check_generator(generator)
    expected = "True, False, a name pattern, a list of patterns, or a function that makes a new module"
    own = anatomy.parameters
    factory: Callable[[], nn.Module] | None = None
    drawn: list[str] | None = None
    if callable(reset) and not isinstance(reset, nn.Module):
        check_callable(reset, "reset", expected, [], classes=True)
        factory = reset
    elif not isinstance(reset, bool):
        drawn = choose_parameters(reset, anatomy, "reset", expected)
        if not drawn:
            raise ValueError(f"reset: chooses no parameter of the model, got {reset!r}")
    if stacked is None:  # a quantised weight cannot be stacked, nor would its members ever differ
        owned = [name for name, parameter in own.items() if not parameter.is_quantized]
    else:
        owned = choose_parameters(stacked, anatomy)
    if not owned:
        raise ValueError(f"stacked: chooses no parameter of the model, got {stacked!r}")
    if drawn is not None and not set(drawn) & set(owned):
        raise ValueError(f"reset: {drawn} are shared by all members, with the model's own values; stacked: {owned}")
    shared = {name: own[name].detach().clone() for name in own if name not in owned}
    if reset is False:
        stacks = repeated(own, owned, E)
    else:
        stacks = fresh_members(anatomy, dict.fromkeys(owned, E), factory, cpu_generator(generator), 3, drawn)
    return EnsembleParams(_leaves(shared, own), _leaves(stacks, own))


def batchensemble_params(
    model: nn.Module,
    E: int,
    *,
    init: Init = None,
    flip: float | Mapping[str, float] | None = None,
    r_mean: float | None = None,
    r_std: float | None = None,
    s_mean: float | None = None,
    s_std: float | None = None,
    bias: str = "shared",
    use_base_weights: bool = True,
    layers: Selector | None = None,
    stacked: Selector | None = None,
    generator: torch.Generator | None = None,
) -> EnsembleParams:
    """Make the parameters of a BatchEnsemble: shared weights, and stacked rank-1 vectors `r`, `s` for each of them.

    Member i has the weight `W * (r_i s_i^T)`: `s` `[E, in]` scales a layer's input, `r` `[E, out]` its output.

    >>> import torch, functorch_ens as fe
    >>> params = fe.batchensemble_params(torch.nn.Linear(3, 2), E=5)
    >>> {name: list(tensor.shape) for name, tensor in {**params.shared, **params.stacked}.items()}
    {'weight': [2, 3], 'bias': [2], 'weight_r': [5, 2], 'weight_s': [5, 3]}

    Args:
        model: the network; it is only read.
        E: the number of members.
        init: how `r`, `s` start: `"random_sign"` (+1 or -1), `"normal"` or `"ones"` (equal members); a dict of these by
            pattern of layers or vectors (`{"*_s": "ones"}`; the first match decides, else None); or a function
            `(name, shape, generator) -> tensor`. None: `"normal"` if a mean or std is given, else `"random_sign"`.
        flip: the probability of -1 for `"random_sign"`, or a dict by pattern. None: .5; with convolutions in it .1.
        r_mean, r_std, s_mean, s_std: for `"normal"`, N(1, .5) by default.
        bias: `"shared"`, or `"stacked"`: own biases in the layers that have `r` and `s`, from the same start.
        use_base_weights: start from the model's own parameters; False draws fresh ones, as `ensemble_params` does.
        layers: the modules whose weights get `r` and `s`: a name pattern (`"net.*"`), a list of them, or a predicate
            on (name, module). None: Linear, Conv, ConvTranspose, Bilinear, Embedding, attention, RNNs, experts of
            transformers, layers of a registered layout, bare matrices.
        stacked: the parameters of which every member has a whole copy, chosen as in `ensemble_params`. None: none.
        generator: the source of randomness; None draws one number from torch's global one.

    Returns: new autograd leaves, in the model's dtype and on its device. `r`, `s` of frozen weights are trainable.

    Raises: TypeError or ValueError for a bad argument, a pattern without effect, or a model in which nothing would get
        `r`, `s` or be stacked.

    Source: Wen, Tran & Ba 2020, arXiv:2002.06715 (where `r` scales the input and `s` the output).
    """
    anatomy = Anatomy(model)
    E = check_positive_int(E, "E")
    check_generator(generator)
    starts = Starts(init, flip, {"r_mean": r_mean, "r_std": r_std, "s_mean": s_mean, "s_std": s_std})
    check_option(bias, ("shared", "stacked"), "bias")
    check_bool(use_base_weights, "use_base_weights")

    own = anatomy.parameters
    owned = [] if stacked is None else choose_parameters(stacked, anatomy)
    chosen = choose_rank1(layers, anatomy) - set(owned)
    weights = [name for name in own if name in chosen]
    if not weights and not owned:
        raise ValueError(
            f"layers, stacked: nothing in {anatomy.kind} would get r and s or be stacked; its parameters: {list(own)}"
        )
    biases = [name for name in _biases(anatomy, weights) if bias == "stacked" and name not in owned]

    if not weights and init is not None:
        raise ValueError(f"init: no weight gets r and s, got {init!r}")
    source = cpu_generator(generator)
    base: Mapping[str, Tensor] = own
    if use_base_weights:
        stacks = repeated(own, owned, E)
    else:
        copies = {name: E if name in owned else 1 for name in own}
        stacks = fresh_members(anatomy, copies, None, source, stacklevel=3)
        base = {name: stacks.pop(name)[0] for name in own if name not in owned}
    stacks |= repeated(base, biases, E)
    shared = {name: base[name].detach().clone() for name in own if name not in stacks}

    drawn = starts(anatomy, weights, E, source)
    vectors = {vector: drawn[vector].to(own[name]) for name in weights for vector in rank1_names(name)}
    stacks = vectors | stacks
    tell_if_one(stacks, E, "start from random signs")
    return EnsembleParams(_leaves(shared, own), _leaves(stacks, own))


def ensemble_buffers(model: nn.Module, E: int) -> dict[str, Tensor]:
    """The model's buffers (BatchNorm statistics, masks), a copy per member: `{name: [E, ...]}`, `{}` where it has none.

    Raises TypeError or ValueError as `ensemble_params` does.
    """
    buffers = Anatomy(model).buffers
    return repeated(buffers, buffers, check_positive_int(E, "E"))


def tell_if_one(stacks: Mapping[str, Tensor], E: int, remedy: str) -> None:
    """Warn the caller of a public function of members that are no ensemble: of one, or of such that are all equal."""
    if E == 1:
        warnings.warn("E: got 1, and one member is no ensemble", stacklevel=3)
    elif not any(stack.is_meta or (stack != stack[0]).any() for stack in stacks.values()):
        warnings.warn(
            f"init: all members start equal, and stay equal as long as they see the same rows; {remedy}, or give each "
            'member rows of its own: index_batches(..., sees="own")',
            stacklevel=3,
        )


def _biases(anatomy: Anatomy, weights: Sequence[str]) -> list[str]:
    """The biases of the layers that the rank-1 `weights` are in."""
    layers = {site.module for name in weights for site in anatomy.sites[name]}
    return [
        name
        for name, places in anatomy.sites.items()
        if any(s.module in layers and "bias" in s.leaf for s in places) and name not in weights
    ]


def repeated(tensors: Mapping[str, Tensor], names: Iterable[str], E: int) -> dict[str, Tensor]:
    """`{name: [E, ...]}`, the same values for every member."""
    return {name: normal(repeat(tensors[name].detach(), "... -> E ...", E=E).clone()) for name in names}


def _leaves(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New `tensors` as autograd leaves; frozen where the model's parameter is. `r` and `s` are always trained."""
    return {
        name: normal(tensor).requires_grad_(is_numeric(tensor) and (name not in own or own[name].requires_grad))
        for name, tensor in tensors.items()
    }
