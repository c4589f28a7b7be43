"""How the rank-1 vectors `r` and `s` of a new BatchEnsemble start: as signs, as numbers around 1, or as ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens.anatomy import Anatomy, rank1_names
from functorch_ens.checks import check_callable, check_has_values, check_number, check_tensor, shown
from functorch_ens.layers.conv import CONVOLUTION
from functorch_ens.params.pytree import check_names

INITS = ("normal", "random_sign", "ones")

Draw = Callable[[str, tuple[int, ...], torch.Generator], Tensor]
"""A function of the user's, `(name, shape, generator) -> tensor`, for the tensor of this name and shape (`[E, n]`)."""

Init = str | Draw | Mapping[str, str | Draw] | None

NUMBERS = {"r_mean": 1.0, "r_std": 0.5, "s_mean": 1.0, "s_std": 0.5}
"""The means and standard deviations of `"normal"`, where none are given."""

FLIP = 0.5
"""The share of -1 among random signs, where none is given: members are as far apart as they can be."""

FLIP_OF_SMALL = 0.1
"""The same for a model with convolutions. It has few weights for what it must learn, and members that have little in
common would not learn it; benchmarks/README.md has the figures."""


class Starts:
    """Draws the `r` and `s` of a BatchEnsemble, as the arguments of `batchensemble_params` say.

    Raises:
        TypeError: `init` or `flip` is of the wrong kind, or one of `numbers` is no number.
        ValueError: `init` is unknown, a standard deviation is below 0, a share is not between 0 and 1, or an argument
            would have no effect with this `init`.
    """

    def __init__(self, init: Any, flip: Any, numbers: Mapping[str, Any]) -> None:
        given = {name: value for name, value in numbers.items() if value is not None}
        for name, value in given.items():
            check_number(value, name, **({"minimum": 0.0} if name.endswith("std") else {}))
        self._numbers = {**NUMBERS, **given}
        self._inits = _Choice("init", init, "normal" if given else "random_sign", _check_init)
        self._flips = _Choice("flip", flip, None, _check_share)
        self._given = {"normal": list(given), "random_sign": [] if flip is None else ["flip"]}

    def __call__(
        self, anatomy: Anatomy, weights: Iterable[str], E: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The vectors of `weights`, `{name: [E, n]}`.

        They are in float64 on the CPU, so that every dtype and device gets the same numbers.

        Raises ValueError where a pattern matches no vector, or the model has a parameter of the name of one.
        """
        vectors: dict[str, Tensor] = {}
        parameters = anatomy.parameters
        usual = FLIP_OF_SMALL if anatomy.instances(CONVOLUTION) else FLIP
        for weight in weights:
            check_names(weight, anatomy)
            for name, side in zip(rank1_names(weight), "rs", strict=True):
                names = _names(anatomy, weight, side)
                (length,) = anatomy.vectors[name]
                init, shape = self._inits(names), (E, length)
                if callable(init):
                    vectors[name] = drawn_by(init, name, shape, parameters[weight], generator)
                elif init == "ones":
                    vectors[name] = torch.ones(shape, dtype=torch.float64, device="cpu")
                elif init == "random_sign":
                    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
                    share = self._flips(names)
                    vectors[name] = torch.where(numbers < (usual if share is None else share), -1.0, 1.0).double()
                else:
                    mean, std = self._numbers[f"{side}_mean"], self._numbers[f"{side}_std"]
                    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
                    vectors[name] = mean + std * numbers
        for init, arguments in self._given.items():
            if arguments and init not in self._inits.taken:
                raise ValueError(f"{', '.join(arguments)}: only init={init!r} uses this, and no vector starts so")
        self._inits.check(vectors)
        self._flips.check(vectors)
        return vectors


class _Choice:
    """Values by name pattern, of which the first that matches decides; `default` where none does."""

    def __init__(self, argument: str, value: Any, default: Any, check: Callable[[Any, str], Any]) -> None:
        self._argument = argument
        self._values = {"*": default}
        self._patterns: set[str] = set()
        """The user's patterns that have decided nothing yet."""
        self.taken: list[Any] = []
        """The values that were taken."""
        if isinstance(value, Mapping):
            if not value or not all(isinstance(pattern, str) for pattern in value):
                raise (TypeError if value else ValueError)(
                    f"{argument}: expected name patterns as keys, got {shown(list(value))}"
                )
            checked = {pattern: check(each, f"{argument}[{pattern!r}]") for pattern, each in value.items()}
            self._values = checked if "*" in checked else {**checked, "*": default}
            self._patterns = set(checked)
        elif value is not None:
            self._values = {"*": check(value, argument)}

    def __call__(self, names: Iterable[str]) -> Any:
        pattern = next(key for key in self._values if any(fnmatchcase(name, key) for name in names))
        self._patterns.discard(pattern)
        self.taken.append(self._values[pattern])
        return self._values[pattern]

    def check(self, vectors: Iterable[str]) -> None:
        """ValueError for a pattern that decides nothing, and so would be silently without effect."""
        if self._patterns:
            raise ValueError(
                f"{self._argument}: pattern {min(self._patterns)!r} decides nothing: it is the first to match none of "
                f"{list(vectors)} that starts so, nor their layers"
            )


def _check_init(value: Any, argument: str) -> str | Draw:
    if isinstance(value, str):
        if value not in INITS:
            raise ValueError(f"{argument}: expected one of {list(INITS)}, got {value!r}")
        return value
    if isinstance(value, nn.Module):
        raise TypeError(f"{argument}: expected a function, got {shown(value)}")
    expected = f"one of {list(INITS)}, a dict of them by name pattern, or a function (name, shape, generator) -> tensor"
    check_callable(value, argument, expected, ["name", "shape", "generator"])
    draw: Draw = value
    return draw


def _check_share(value: Any, argument: str) -> float:
    expected = f"{argument}: expected a probability, from 0 to 1, got {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(expected)
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(expected)
    return share


def _names(anatomy: Anatomy, weight: str, side: str) -> list[str]:
    """What a pattern may call a vector: its own name, its weight's, or its layer's; tied weights have several."""
    found = []
    for site in anatomy.sites[weight]:
        module = site.name.rpartition(".")[0]
        found += [f"{site.name}_{side}", site.name, module]
    return found


def drawn_by(init: Draw, name: str, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """What a user's function draws for `name`, beside the weight `like`.

    Raises TypeError or ValueError where that is no tensor `shape` of numbers.
    """
    drawn = init(name, shape, generator)
    check_tensor(drawn, "init", f"a function that returns a tensor {list(shape)} for {name}")
    if tuple(drawn.shape) != shape:
        raise ValueError(f"init: expected a tensor {list(shape)} for {name}, it returned {list(drawn.shape)}")
    check_has_values(drawn, "init")
    if drawn.is_complex() and not like.is_complex():
        raise TypeError(f"init: expected real numbers for {name}, the function returned {drawn.dtype}")
    if not drawn.isfinite().all():
        raise ValueError(f"init: expected finite numbers for {name}, it returned others")
    return drawn.detach()
