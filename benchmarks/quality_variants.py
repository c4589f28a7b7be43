"""The variants of ensembles that quality.py compares: how each is made, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functorch_ens as fe

Params = Callable[[nn.Module, int, torch.Generator], fe.EnsembleParams]


@dataclass(frozen=True)
class Variant:
    """A kind of ensemble, and changes to the training recipe."""

    name: str
    about: str
    params: Params
    groups: Mapping[str, Any] = field(default_factory=dict)
    sees: str = "same"
    smoothing: float = 0.0
    """Of the labels."""
    epochs: int = 1
    """The epochs, as a multiple of --epochs; 0 is E times."""
    fixed: bool = False
    """Do not train r and s; their gradients are then not computed."""
    same_rows: bool = False
    """Give each batch E times as many rows."""
    members: int | None = None
    """The number of members; None is --members."""
    needs_norms: bool = False
    """Skip this variant for a model without norm layers."""
    share_statistics: bool = False
    """Normalise by statistics over the rows of all members; see `SharedNorm`."""
    joint: float = 0.0
    """The share of the loss that is the NLL of the mean probability; see `joint_loss`."""
    turn: tuple[float, float] | None = None
    """Start at the first share of -1 in r and s, and move to the second in the first half of the epochs.

    The variant makes r and s as ones, and `Trial` reverses their signs.
    """

    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of one member."""
        if self.joint:
            return partial(joint_loss, joint=self.joint)
        return partial(F.cross_entropy, label_smoothing=self.smoothing)


def classic(model: nn.Module, E: int, source: torch.Generator) -> fe.EnsembleParams:
    """E independent networks."""
    return fe.ensemble_params(model, E, generator=source)


# One network with as many rows per step as E members, and as many steps: the lower bound of a BatchEnsemble's cost.
SAME_ROWS = Variant(
    "single, E x rows", "one network on E x B rows, E times the epochs", classic, members=1, epochs=0, same_rows=True
)


def variants() -> list[Variant]:
    """All variants, from one network to E networks."""

    def batch(*own: str, **options: Any) -> Params:
        def make(model: nn.Module, E: int, source: torch.Generator) -> fe.EnsembleParams:
            owned = {name for part in own for name in parts(model)[part]}
            given: dict[str, Any] = options if "init" in options else {"flip": 0.5, **options}
            if owned:
                given["stacked"] = lambda name, parameter: name in owned
            return fe.batchensemble_params(model, E, use_base_weights=False, generator=source, **given)

        return make

    def after_norms(share: float) -> Params:
        """r of a convolution stays 1; the scales of the norms are the members' own, and start at 1 or -1."""

        def make(model: nn.Module, E: int, source: torch.Generator) -> fe.EnsembleParams:
            scales = [name for name in parts(model)["norms"] if name.endswith("weight")]
            outputs = [f"{name}_r" for name, parameter in model.named_parameters() if parameter.ndim > 2]
            flip = {**dict.fromkeys(outputs, 0.0), "*": share}
            params = batch(flip=flip, stacked=scales)(model, E, source)
            for name in outputs:
                params.stacked[name].requires_grad_(False)
            with torch.no_grad():
                for name in scales:
                    scale = params.stacked[name]
                    turned = torch.rand(scale.shape, generator=source).to(scale.device) < share
                    scale.mul_(torch.where(turned, -1.0, 1.0))
            return params

        return make

    signs, recipe = "r, s are random signs", batch(flip=None)
    return [
        Variant("single", "one network", classic, members=1),
        Variant("classic", "E networks: everything is stacked", classic),
        Variant("r, s", signs, batch()),
        Variant("+ biases", f"{signs}; own biases", batch("biases")),
        Variant("+ norms", f"{signs}; own norm affines", batch("norms"), needs_norms=True),
        Variant("+ first", f"{signs}; own first layer", batch("first")),
        Variant("+ last", f"{signs}; own last layer", batch("last")),
        Variant("+ first, last", f"{signs}; own first and last layer", batch("first", "last")),
        Variant("normal .5", "r, s ~ N(1, .5)", batch(init="normal")),
        Variant("normal .1", "r, s ~ N(1, .1)", batch(init="normal", r_std=0.1, s_std=0.1)),
        Variant("lr x .1", f"{signs}; r, s learn at a tenth of the rate", batch(), {"rank1_lr_factor": 0.1}),
        Variant("lr x 10", f"{signs}; r, s learn at ten times the rate", batch(), {"rank1_lr_factor": 10.0}),
        Variant("fixed", f"{signs}, not trained", batch(), fixed=True),
        Variant("decay", f"{signs}; weight decay 1e-3, none of r, s", batch(), {"weight_decay": 1e-3}),
        Variant(
            "decay of r, s",
            f"{signs}; weight decay 1e-3, of r, s too",
            batch(),
            {"weight_decay": 1e-3, "rank1_weight_decay": 1e-3},
        ),
        Variant("single, decay", "one network, weight decay 1e-3", classic, {"weight_decay": 1e-3}, members=1),
        Variant("own order", f"{signs}; each member sees the data in an order of its own", batch(), sees="own"),
        Variant("own order, lr x .1", "both", batch(), {"rank1_lr_factor": 0.1}, sees="own"),
        Variant("own order, fixed", "both", batch(), fixed=True, sees="own"),
        *(
            Variant(f"flip {share:g}", f"own order; {share:.0%} of the signs are -1", batch(flip=share), sees="own")
            for share in (0.25, 0.1, 0.05, 0.02, 0)
        ),
        Variant(
            "r alone", "own order; half of the signs of r are -1, s is 1", batch(flip={"*_s": 0, "*": 0.5}), sees="own"
        ),
        Variant(
            "s alone", "own order; half of the signs of s are -1, r is 1", batch(flip={"*_r": 0, "*": 0.5}), sees="own"
        ),
        Variant("recipe", "own order; the default share of signs", recipe, sees="own"),
        Variant("recipe, fixed", "the same, not trained", recipe, fixed=True, sees="own"),
        Variant("recipe, lr x .1", "r, s at a tenth of the rate", recipe, {"rank1_lr_factor": 0.1}, sees="own"),
        Variant("recipe, decay", "weight decay 1e-3", recipe, {"weight_decay": 1e-3}, sees="own"),
        Variant("recipe, smoothing", "label smoothing .1", recipe, sees="own", smoothing=0.1),
        Variant("recipe, + norms", "own norm affines", batch("norms", flip=None), sees="own", needs_norms=True),
        Variant("recipe, + last", "own last layer", batch("last", flip=None), sees="own"),
        Variant("recipe, + norms, last", "both", batch("norms", "last", flip=None), sees="own", needs_norms=True),
        Variant("recipe, normal .5", "r, s ~ N(1, .5)", batch(init="normal"), sees="own"),
        Variant("recipe, long", "four times the epochs", recipe, sees="own", epochs=4),
        Variant("half, long", "half of the signs, four times the epochs", batch(), sees="own", epochs=4),
        Variant("classic, long", "E networks, four times the epochs", classic, sees="own", epochs=4),
        Variant("single, smoothing", "one network, label smoothing .1", classic, members=1, smoothing=0.1),
        Variant("classic, smoothing", "E networks, label smoothing .1", classic, sees="own", smoothing=0.1),
        *(
            Variant(
                f"{start:g} to {end:g}",
                "own order; the share of -1 changes while training",
                batch(flip=0),
                sees="own",
                turn=(start, end),
            )
            for start, end in ((0.02, 0.5), (0.5, 0.02))
        ),
        *(
            Variant(
                f"{name}, joint {share:g}",
                f"{share:.0%} of the loss is the NLL of the mean probability",
                make,
                joint=share,
            )
            for name, make in (("r, s", batch()), ("classic", classic))
            for share in (0.25, 0.5, 1)
        ),
        *(
            Variant(
                f"after norms, {share:g}",
                f"own order; r of convolutions is 1, {share:.0%} of own norm scales are -1",
                after_norms(share),
                sees="own",
                needs_norms=True,
            )
            for share in (0.1, 0.5)
        ),
        *(
            Variant(
                f"flip {share:g}, shared norms",
                "own order; the norms' statistics are over all members",
                batch(flip=share),
                sees="own",
                needs_norms=True,
                share_statistics=True,
            )
            for share in (0.1, 0.5)
        ),
        Variant("split", f"{signs}; each member gets 1/E of a batch", batch(), sees="split"),
        Variant("split, long", "the same for E times as many epochs", batch(), sees="split", epochs=0),
        Variant("long", f"{signs}; twice as many epochs", batch(), epochs=2),
        Variant("single, long", "one network, four times the epochs", classic, members=1, epochs=4),
        SAME_ROWS,
    ]


def parts(model: nn.Module) -> dict[str, list[str]]:
    """The names of the parameters in the first layer, in the last, of all biases, and of all norm affines."""
    layers: list[list[str]] = []
    norms: list[list[str]] = []
    for name, module in model.named_modules():
        own = [f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_parameters(recurse=False)]
        weight = getattr(module, "weight", None)
        if own and weight is not None:
            (layers if weight.ndim > 1 else norms).append(own)
    affines = [name for own in norms for name in own]
    biases = [name for own in layers for name in own if name.endswith("bias")]
    return {"first": layers[0], "last": layers[-1], "biases": biases, "norms": affines}


# --------------------------------------------------------------------------------------------------------------------
# What members compute together


@torch.library.custom_op("functorch_ens_benchmarks::mean_of_members", mutates_args=())
def mean_of_members(x: Tensor) -> Tensor:
    """The mean of a tensor over the members, for code that is written for one member and runs under vmap.

    The rule of vmap is the whole operator. It is made of torch's own operators, so autograd differentiates it.
    """
    raise RuntimeError("mean_of_members: expected to run under vmap over the members")


@mean_of_members.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@mean_of_members.register_vmap
def _(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, None]:
    return x.mean(in_dims[0]), None


def joint_loss(logits: Tensor, y: Tensor, joint: float) -> Tensor:
    """(1 - joint) * the cross-entropy of this member + joint * the NLL of the members' mean probability.

    The sum over members is E times the loss of the ensemble. All members need the same rows.
    """
    probability = logits.softmax(1).gather(1, y[:, None])
    return (1 - joint) * F.cross_entropy(logits, y) - joint * mean_of_members(probability).log().mean()


class SharedNorm(nn.BatchNorm2d):
    """BatchNorm that, in training mode, takes mean and variance over the rows of all members.

    The gradient flows through both, from every member to every other. The running statistics are equal for all members.
    Unlike torch's, the variance is not multiplied by n / (n - 1); n is at least 2,560 in these benchmarks.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        mean = mean_of_members(input.mean((0, 2, 3)))
        centred = input - mean[:, None, None]
        var = mean_of_members(centred.square().mean((0, 2, 3)))
        self.running_mean = self.running_mean.lerp(mean.detach(), self.momentum)
        self.running_var = self.running_var.lerp(var.detach(), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def share_statistics(model: nn.Module) -> nn.Module:
    """Make every BatchNorm2d of a new `model` a `SharedNorm`."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedNorm
    return model
