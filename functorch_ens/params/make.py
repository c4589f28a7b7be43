"""The parameters and buffers of a new ensemble, made from a model."""

from __future__ import annotations

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
    check_number,
    check_option,
    check_positive_int,
)
from functorch_ens.params.fresh import fresh_members
from functorch_ens.params.pytree import EnsembleParams, check_names
from functorch_ens.params.select import Selector, choose_parameters, choose_rank1
from functorch_ens.rng import cpu_generator


def ensemble_params(
    model: nn.Module,
    E: int,
    *,
    reset: bool | Callable[[], nn.Module] = True,
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
            copied from the model, with one warning that names it. A factory (`lambda: resnet18()`) is called once per
            member, and keeps an initialisation that the model does in its constructor. False copies the model's.
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
    if isinstance(reset, nn.Module) or not callable(reset):
        check_bool(reset, "reset", or_else="or a function that makes a new module")
    else:
        check_callable(reset, "reset", "a function that makes a new module", [], classes=True)
    own = anatomy.parameters
    if stacked is None:  # a quantised weight cannot be stacked, nor would its members ever differ
        owned = [name for name, parameter in own.items() if not parameter.is_quantized]
    else:
        owned = choose_parameters(stacked, anatomy)
    if not owned:
        raise ValueError(f"stacked: chooses no parameter of the model, got {stacked!r}")
    shared = {name: own[name].detach().clone() for name in own if name not in owned}
    if reset is False:
        stacks = repeated(own, owned, E)
    else:
        factory = None if reset is True else reset
        stacks = fresh_members(anatomy, dict.fromkeys(owned, E), factory, cpu_generator(generator), stacklevel=3)
    return EnsembleParams(_leaves(shared, own), _leaves(stacks, own))


def batchensemble_params(
    model: nn.Module,
    E: int,
    *,
    init: str = "normal",
    r_mean: float = 1.0,
    r_std: float = 0.5,
    s_mean: float = 1.0,
    s_std: float = 0.5,
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
        init: of `r` and `s`: `"normal"`, `"random_sign"` (+1 or -1; better from scratch) or `"ones"` (equal members).
        r_mean, r_std, s_mean, s_std: of the normal distributions; only `init="normal"` uses them.
        bias: `"shared"`, or `"stacked"`: own biases in the layers that have `r` and `s`, from the same start.
        use_base_weights: start from the model's own parameters; False draws fresh ones, as `ensemble_params` does.
        layers: the modules whose weights get `r` and `s`: a name pattern (`"net.*"`), a list of them, or a predicate
            on (name, module). None: Linear, Conv, ConvTranspose, Bilinear, Embedding, attention, RNNs, bare matrices.
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
    check_option(init, ("normal", "random_sign", "ones"), "init")
    check_option(bias, ("shared", "stacked"), "bias")
    check_bool(use_base_weights, "use_base_weights")
    r_mean, s_mean = check_number(r_mean, "r_mean"), check_number(s_mean, "s_mean")
    r_std, s_std = check_number(r_std, "r_std", minimum=0), check_number(s_std, "s_std", minimum=0)

    own = anatomy.parameters
    owned = [] if stacked is None else choose_parameters(stacked, anatomy)
    chosen = choose_rank1(layers, anatomy) - set(owned)
    weights = [name for name in own if name in chosen]
    if not weights and not owned:
        raise ValueError(
            f"layers, stacked: nothing in {anatomy.kind} would get r and s or be stacked; its parameters: {list(own)}"
        )
    biases = [name for name in _biases(anatomy, weights) if bias == "stacked" and name not in owned]

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

    vectors: dict[str, Tensor] = {}
    for name in weights:
        r_name, s_name = rank1_names(name)
        check_names(name, anatomy)
        for vector, mean, std in ((r_name, r_mean, r_std), (s_name, s_mean, s_std)):
            (length,) = anatomy.vectors[vector]
            vectors[vector] = _vector(init, E, length, mean, std, source).to(own[name])
    return EnsembleParams(_leaves(shared, own), _leaves(vectors | stacks, own))


def ensemble_buffers(model: nn.Module, E: int) -> dict[str, Tensor]:
    """The model's buffers (BatchNorm statistics, masks), a copy per member: `{name: [E, ...]}`, `{}` where it has none.

    Raises TypeError or ValueError as `ensemble_params` does.
    """
    buffers = Anatomy(model).buffers
    return repeated(buffers, buffers, check_positive_int(E, "E"))


def _biases(anatomy: Anatomy, weights: Sequence[str]) -> list[str]:
    """The biases of the layers that the rank-1 `weights` are in."""
    layers = {site.module for name in weights for site in anatomy.sites[name]}
    return [
        name
        for name, places in anatomy.sites.items()
        if any(s.module in layers and "bias" in s.leaf for s in places) and name not in weights
    ]


def _vector(init: str, E: int, length: int, mean: float, std: float, source: torch.Generator) -> Tensor:
    """`r` or `s`: `[E, length]`, drawn in float64 on the CPU, so that every dtype and device gets the same numbers."""
    if init == "ones":
        return torch.ones(E, length, dtype=torch.float64, device="cpu")
    if init == "random_sign":
        return 2.0 * torch.randint(2, (E, length), generator=source, dtype=torch.float64, device="cpu") - 1.0
    return mean + std * torch.randn(E, length, generator=source, dtype=torch.float64, device="cpu")


def repeated(tensors: Mapping[str, Tensor], names: Iterable[str], E: int) -> dict[str, Tensor]:
    """`{name: [E, ...]}`, the same values for every member."""
    return {name: normal(repeat(tensors[name].detach(), "... -> E ...", E=E).clone()) for name in names}


def _leaves(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New `tensors` as autograd leaves; frozen where the model's parameter is. `r` and `s` are always trained."""
    return {
        name: normal(tensor).requires_grad_(is_numeric(tensor) and (name not in own or own[name].requires_grad))
        for name, tensor in tensors.items()
    }
