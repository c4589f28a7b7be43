"""How `make_forward` works: it is rebuilt here for a network of Linear layers, and checked against the library.

    python examples/how_it_works.py

The library does the same for every layer and model, and adds training mode, buffers, chunks and torch.compile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import functorch_ens as fe

Tensors = dict[str, Tensor]


def make_params(model: nn.Module, E: int) -> tuple[Tensors, Tensors]:
    """The parameters of a BatchEnsemble: the model's own are shared; every weight gets a stacked `r` and `s`."""
    shared = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stacked = {}
    for name, parameter in shared.items():
        if parameter.ndim == 2:  # a weight [out, in]; a bias has one axis
            out, in_ = parameter.shape
            stacked[f"{name}_r"] = 2.0 * torch.randint(2, (E, out)) - 1  # random signs
            stacked[f"{name}_s"] = 2.0 * torch.randint(2, (E, in_)) - 1
    return shared, stacked


class Rank1Linear(nn.Linear):
    """A Linear layer of one member: `y = (W (x * s)) * r + b`, which equals a layer with the weight `W * (r s^T)`."""

    weight_r: Tensor
    weight_s: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`W` multiplies the scaled input, so the member's own weight is never built."""
        return (x * self.weight_s) @ self.weight.T * self.weight_r + self.bias


def make_template(model: nn.Module) -> nn.Module:
    """The structure of one member, without values: a copy on the meta device, which holds shapes but no numbers."""
    template = deepcopy(model).to("meta")
    for layer in template.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = Rank1Linear  # the copy computes by the rule; the model stays as it is
            layer.weight_r = nn.Parameter(torch.empty(layer.out_features, device="meta"))
            layer.weight_s = nn.Parameter(torch.empty(layer.in_features, device="meta"))
    return template


def make_forward(model: nn.Module) -> Callable[[Tensors, Tensors, Tensor], Tensor]:
    """A pure function of the parameters: every member's output, `[E, B, ...]`."""
    template = make_template(model)

    def member(shared: Tensors, stacked: Tensors, x: Tensor) -> Tensor:
        """One member. functional_call runs the template with these tensors in the place of its parameters."""
        result: Tensor = functional_call(template, {**shared, **stacked}, (x,))
        return result

    # vmap runs `member` for all members at once. in_dims: None, all members get the same; 0, member i gets [i].
    return vmap(member, in_dims=(None, 0, None))


def main(argv: list[str] | None = None) -> None:
    """Rebuild the forward, compare it with a loop over members and with the library, and print what it shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5, metavar="E", help="size of the ensemble (default: 5)")
    E = parser.parse_args(argv).members

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(7, 4)
    shared, stacked = make_params(model, E)
    print("shared: ", {name: list(tensor.shape) for name, tensor in shared.items()})
    print("stacked:", {name: list(tensor.shape) for name, tensor in stacked.items()})
    outputs = make_forward(model)(shared, stacked, x)
    print("outputs:", list(outputs.shape))

    # One member after another, with the weight multiplied out: W * (r s^T).
    for i in range(E):
        own: dict[str, Any] = dict(shared)
        for name in shared:
            if f"{name}_r" in stacked:
                own[name] = shared[name] * torch.outer(stacked[f"{name}_r"][i], stacked[f"{name}_s"][i])
        torch.testing.assert_close(outputs[i], functional_call(model, own, (x,)))
    print(f"equal to {E} networks, one after another")

    params = fe.EnsembleParams(shared, stacked)
    torch.testing.assert_close(outputs, fe.make_forward(model)(params, x))
    print("equal to functorch_ens.make_forward")


if __name__ == "__main__":
    main()
