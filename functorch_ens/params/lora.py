"""The parameters of a LoRA ensemble: a frozen pretrained network, and low-rank factors for each member."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from functorch_ens._torch import normal
from functorch_ens.anatomy import Anatomy, is_numeric, lora_names
from functorch_ens.checks import (
    check_callable,
    check_generator,
    check_number,
    check_option,
    check_positive_int,
)
from functorch_ens.params.make import repeated, tell_if_one
from functorch_ens.params.pytree import EnsembleParams, check_names
from functorch_ens.params.select import Selector, choose_parameters, choose_rank1
from functorch_ens.params.vectors import Draw, drawn_by
from functorch_ens.rng import cpu_generator


def lora_params(
    model: nn.Module,
    E: int,
    *,
    rank: int = 8,
    alpha: float | None = None,
    layers: Selector | None = None,
    stacked: Selector | None = None,
    init: str | Draw = "uniform",
    generator: torch.Generator | None = None,
) -> EnsembleParams:
    """The parameters of a LoRA ensemble: the frozen `model`, and low-rank factors `A`, `B` for each member.

    Member i has the weight `W + B_i A_i`: `A` is `[E, rank, in]`, and `B` is `[E, out, rank]` and starts at 0.

    >>> import torch, functorch_ens as fe
    >>> params = fe.lora_params(torch.nn.Linear(3, 2), E=5, rank=1)
    >>> {name: list(tensor.shape) for name, tensor in params.stacked.items()}
    {'weight_lora_A': [5, 1, 3], 'weight_lora_B': [5, 2, 1]}

    Args:
        model: the pretrained network, as which every member starts; it is only read.
        E: the number of members.
        rank: the rank of `B A`; a weight smaller than that gets factors of this rank too.
        alpha: `A` starts `alpha / rank` times as large, and the gradient of `B` with it. No factor is left in the
            forward. None: `rank`, a factor of 1.
        layers: the modules whose weights get `A`, `B`, chosen as in `batchensemble_params`. None: the same weights.
        stacked: the parameters of which every member trains a whole copy (a new head), as in `ensemble_params`.
        init: the start of `A`: `"uniform"`, U(-b, b) with b = 1 / sqrt(in); `"normal"`, N(0, 1 / in); or a callable
            (name, shape, generator) -> tensor. `in` is that of one group or expert. In an embedding, which sums
            nothing, 1 stands for it.
        generator: the source of randomness; None draws one number from torch's global one.

    Returns: new tensors in the model's dtype, on its device. `stacked` is trained, `shared` is frozen.

    Raises: TypeError or ValueError for a bad argument, a pattern without effect, or a `rank` too large for any weight.

    Source: Hu et al. 2021, arXiv:2106.09685; Mühlematter et al. 2024, arXiv:2405.14438.
    """
    anatomy = Anatomy(model)
    E, rank = check_positive_int(E, "E"), check_positive_int(rank, "rank")
    check_generator(generator)
    scale = 1.0 if alpha is None else check_number(alpha, "alpha", minimum=0) / rank
    if not scale:
        raise ValueError(f"alpha: expected a finite number > 0, got {alpha!r}: A and B would both be 0 for ever")
    if isinstance(init, str | nn.Module) or not callable(init):
        check_option(init, ("uniform", "normal"), "init", or_else="or a function (name, shape, generator)")
    else:
        check_callable(init, "init", "a function (name, shape, generator)", ["name", "shape", "generator"])

    own = anatomy.parameters
    owned = [] if stacked is None else choose_parameters(stacked, anatomy)
    chosen = choose_rank1(layers, anatomy) - set(owned)
    weights = [name for name in own if name in chosen]
    if not weights:
        raise ValueError(
            f"layers: no weight of {anatomy.kind} would get lora_A and lora_B; its parameters: {list(own)}"
        )
    sides: dict[str, tuple[int, int]] = {}
    for name in weights:
        check_names(name, anatomy)
        (_, into), (out, _) = (anatomy.factors[factor] for factor in lora_names(name))
        sides[name] = int(into), int(out)
    most = max(map(min, sides.values()))
    if rank > most:
        raise ValueError(
            f"rank: expected at most {most}, the largest rank that the chosen weights can have, got {rank}"
        )

    source = cpu_generator(generator)
    factors: dict[str, Tensor] = {}
    for name, (into, out) in sides.items():
        A, B = lora_names(name)
        sums_nothing = isinstance(anatomy.sites[name][0].module, nn.Embedding | nn.EmbeddingBag) or not into
        layout = anatomy.layouts[name]
        terms = into // layout.groups if layout.transposed else into  # each group sums its own part of `in`
        start = _start(init, A, (E, rank, into), 1 if sums_nothing else terms, own[name], source)
        if start.numel() and not start.any():
            raise ValueError(f"init: {A} starts at 0, as B does, and so both would be 0 for ever")
        factors[A] = (scale * start).to(own[name])
        factors[B] = own[name].new_zeros(E, out, rank)
    shared = {name: normal(own[name].detach().clone()) for name in own if name not in owned}
    trained = factors | repeated(own, owned, E)
    tell_if_one(trained, E, "draw another A for each")
    return EnsembleParams(shared, {name: normal(x).requires_grad_(is_numeric(x)) for name, x in trained.items()})


def _start(
    init: str | Draw, name: str, shape: tuple[int, ...], terms: int, like: Tensor, source: torch.Generator
) -> Tensor:
    """`A`, drawn in float64 on the CPU, so that every dtype and device gets the same numbers.

    `terms` is the number of values that an output of `A` sums.
    """
    if not isinstance(init, str):
        return drawn_by(init, name, shape, like, source)
    if init == "normal":
        return torch.randn(shape, generator=source, dtype=torch.float64, device="cpu") * terms**-0.5
    return (2 * torch.rand(shape, generator=source, dtype=torch.float64, device="cpu") - 1) * terms**-0.5
