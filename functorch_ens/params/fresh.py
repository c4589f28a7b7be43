"""Fresh weights for every member, drawn from one generator; the global random state stays as it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from functorch_ens._torch import reset_of
from functorch_ens.anatomy import Anatomy, is_numeric
from functorch_ens.checks import check_keys
from functorch_ens.copies import copy_structure
from functorch_ens.rng import MAX_SEED, Drawing, RandomState


def fresh_members(
    anatomy: Anatomy,
    copies: Mapping[str, int],
    factory: Callable[[], nn.Module] | None,
    generator: torch.Generator,
    stacklevel: int,
    chosen: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Independently initialised parameters, `{name: [copies[name], ...]}`, with the model's dtypes, on its device.

    Each member comes from `factory()`, or, if that is None, from every module's own `reset_parameters`. Parameters that
    no reset writes to are copied from the model, with one warning that names them. Of the resets only the `chosen`
    parameters are taken (None: all that are not frozen); the others are copied from the model too.
    """
    own = {name: parameter.detach() for name, parameter in anatomy.parameters.items()}
    frozen = [name for name, parameter in anatomy.parameters.items() if not parameter.requires_grad and name in copies]
    asked = chosen is not None
    if chosen is None:
        chosen = [name for name in own if factory is not None or name not in frozen]
    stacks = {name: own[name].new_empty(count, *own[name].shape) for name, count in copies.items()}
    draw = _resetter(anatomy.model, own) if factory is None else partial(_made_by, factory, own)
    copied: set[str] = set()
    for index, seed in enumerate(
        torch.randint(MAX_SEED, (max(copies.values()),), generator=generator, device="cpu").tolist()
    ):
        with Drawing(RandomState.seeded(seed), follow=False), torch.no_grad():
            drawn, untouched = draw()
        copied |= untouched
        for name, stack in stacks.items():
            if index < len(stack):
                stack[index] = drawn[name] if name in chosen else own[name]
    redrawn = [name for name in copies if name in chosen]
    unset = [name for name in redrawn if name in copied]
    if unset:
        warnings.warn(
            f"no reset_parameters initialises {unset}: every member starts from the model's own values there; for a "
            "fresh start give a factory: reset=lambda: MyModel()",
            stacklevel=stacklevel,
        )
    if factory is not None:
        told = [name for name in frozen if not torch.equal(own[name], stacks[name][0])]
    else:
        told = [name for name in redrawn if name not in copied and not asked and _is_another(own[name], stacks[name])]
    if told:
        warnings.warn(
            f"the model's own values of {told} are lost: they are {'frozen' if factory else 'far from a fresh draw'}, "
            'and are drawn anew; keep them with reset=False, or with reset="head.*", which draws what a pattern names '
            "alone; an initialisation in the model's constructor is kept by a factory: reset=lambda: MyModel()",
            stacklevel=stacklevel,
        )
    return stacks


def _is_another(own: Tensor, drawn: Tensor) -> bool:
    """Whether the values of `own` are surely no draw from the distribution of `drawn` `[k, ...]`.

    This is the two-sample test of Kolmogorov and Smirnov, with one false alarm in 10^9. It needs some 40 values, and
    gets at most 4,096, for those of a network are many.
    """
    if not own.is_floating_point() or not own.numel():
        return False
    step = max(1, own.numel() // 4096)  # the same places in both, for the axes of a weight may differ
    values = [x.reshape(-1, own.numel())[:16, ::step].flatten().cpu().double() for x in (own, drawn)]
    n, m = map(len, values)
    every = torch.cat(values).sort().values
    shares = [torch.searchsorted(x.sort().values, every, right=True) / len(x) for x in values]
    distance = (shares[0] - shares[1]).abs().max().item()
    return distance > math.sqrt(-math.log(5e-10) / 2 * (n + m) / (n * m))


Drawn = tuple[dict[str, Tensor], set[str]]
"""One member's parameters, and the names of those that no reset writes to."""


def _resetter(model: nn.Module, own: dict[str, Tensor]) -> Callable[[], Drawn]:
    """A function that draws one member with the `reset_parameters` of a copy of `model` on the CPU.

    Values that no reset writes to come from `own`.
    """
    blank = copy_structure(model, lambda p: p.cpu().clone(), lambda buffer: buffer.detach().cpu().clone())
    parameters = {name: parameter.detach() for name, parameter in zip(own, blank.parameters(), strict=True)}
    # Inner modules first, as constructors run.
    resets = [
        reset_of(module)
        for module in reversed(list(blank.modules()))
        if not any(parameter.is_quantized for parameter in module.parameters(recurse=False))
    ]

    def draw() -> Drawn:
        untouched = set()
        for parameter in parameters.values():
            if is_numeric(parameter):
                parameter.fill_(math.nan)  # a value that is still NaN after the resets was not written to
        for reset in resets:
            if reset is not None:
                reset()
        for name, parameter in parameters.items():
            if is_numeric(parameter) and (unset := parameter.isnan()).any():
                untouched.add(name)
                parameter.copy_(torch.where(unset, own[name].cpu(), parameter))
        return parameters, untouched

    return draw


def _made_by(factory: Callable[[], nn.Module], own: dict[str, Tensor]) -> Drawn:
    """One member's parameters, from a module that `factory` makes; ValueError where it differs from the model."""
    module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"reset: expected a factory that returns a torch.nn.Module, it returned {module!r}")
    made = {name: parameter.detach() for name, parameter in module.named_parameters()}
    check_keys(made, own, "reset: the factory's module")
    wrong = [
        f"{name}: {list(own[name].shape)} != {list(made[name].shape)}"
        for name in own
        if own[name].shape != made[name].shape
    ]
    if wrong:
        raise ValueError(f"reset: the shapes of the factory's module are not the model's: {'; '.join(wrong)}")
    return made, set()
