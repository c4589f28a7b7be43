"""Ways to write a model: the family "written" of the zoo."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sample import Sample, integers, of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


class Matrices(nn.Module):
    """Bare parameters, lists and dicts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.offset = nn.Parameter(torch.randn(4))
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(2, 4)])
        self.named = nn.ParameterDict({"a": torch.randn(2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T + self.offset) @ self.many[0].T @ self.many[1].T @ self.named["a"].T


class Tied(nn.Module):
    """A language model's tied weight: an embedding's `[words, features]` is also the output layer's `[out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.score = nn.Linear(3, 5, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.mix(self.embed(x)).tanh())


class Residual(nn.Module):
    """Branches that are added and concatenated, and one layer used twice; several inputs, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = x + scale * self.norm(self.layer(x)).relu()
        branch = self.layer(hidden if other is None else other)
        return {"hidden": hidden, "logits": self.head(torch.cat([hidden, branch], -1))}


@dataclass
class Answer:
    """An output that no pytree library knows."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "text"


class Dataclass(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Answer:
        hidden = self.first(x).tanh()
        return Answer(self.second(hidden), (hidden,))


class DirectAccess(nn.Module):
    """Reads the weights of its layers itself, as torchvision's Swin transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.linear(x, self.inner.weight, self.inner.bias).tanh())


class ControlFlow(nn.Module):
    """Takes a branch by the values that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        steps = 0
        while hidden.abs().mean() > 0.1 and steps < 4:
            hidden, steps = hidden / 2, steps + 1
        return self.second(hidden)


class Checkpointed(nn.Module):
    """Computes its layers again in the backward pass, to save memory."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)  # for reentrant checkpointing the input must have a gradient
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Cached(nn.Module):
    """Keeps a mask and its last output on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.mask: Tensor | None = None
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape != x.shape[1:]:
            self.mask = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        y = self.layer(x) * self.mask
        self.last.append(y)
        return y


class Buffers(nn.Module):
    """A buffer that is saved and updated, one that is not persistent, and a frozen layer."""

    steps: Tensor
    mean: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x + self.positions)
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.frozen(hidden - self.mean)


class Hooked(nn.Module):
    """Hooks that change what enters and what leaves a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.first.register_forward_pre_hook(_double_inputs)
        self.first.register_forward_hook(_tanh)
        self.second.register_full_backward_hook(_halve_gradients)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _double_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2 * x for x in args)


def _tanh(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.tanh()


def _halve_gradients(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else g / 2 for g in inputs)


class Autocast(nn.Module):
    """Computes in bfloat16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.second(self.first(x).relu()).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth as it is often written: random numbers written to a new tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.layer(x)
        keep = x.new_empty((x.shape[0], 1)).bernoulli_(0.8)
        return x + self.layer(x) * keep.div_(0.8)


class FilledIn(nn.Module):
    """Writes its result into a tensor that it has made before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        out[:, :2] = self.layer(x)
        out[:, 2] = x.sum(-1)
        return out


class Complex(nn.Module):
    """A complex weight, with the Fourier transform around it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) @ self.weight.T, n=x.shape[-1])


# --------------------------------------------------------------------------------------------------------------------
# Models that ask about gradients, or change how they flow


class Two(nn.Module):
    """Two linear layers; the models below differ in what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.tanh()


class SlowTrunk(Two):
    """A hook on a hidden tensor gives the first layer a tenth of its gradient."""

    def between(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            hidden.register_hook(_tenth)
        return hidden


def _tenth(gradient: Tensor) -> Tensor:
    return gradient / 10


class SlowTrunkByHook(Two):
    """The same, in a forward hook of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(_slow)


def _slow(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_tenth)


class GradWhereTrained(Two):
    """Records gradients of a layer only where its weight is trained."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.first.weight.requires_grad):
            hidden = self.first(x)
        return self.second(hidden)


class DetachedConstants(Two):
    """Detaches what has no history."""

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.detach() if hidden.grad_fn is None else hidden


class DetachedLeaves(Two):
    """Detaches leaves of the graph."""

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.detach() if hidden.is_leaf else hidden


class InputGradients(Two):
    """A frozen first layer, whose output a hook gives a gradient, as is done before checkpointing a frozen base."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.first.register_forward_hook(_require_gradient)


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


class Retains(Two):
    """Keeps the gradient of a hidden tensor."""

    def between(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            hidden.retain_grad()
        return hidden.tanh()


class MaskedRows(Two):
    """A hook on a weight freezes half of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.register_hook(_mask_rows)


def _mask_rows(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(len(gradient)) % 2)[:, None]


class Forces(Two):
    """Returns the derivative of an energy by the input, as models of molecules do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class SavedOnCpu(Two):
    """Keeps what the backward pass needs on the CPU."""

    def between(self, hidden: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return hidden.tanh()


class SavedTwice(Two):
    """Hooks on saved tensors pack them as something else."""

    def between(self, hidden: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(_halved, _doubled):
            return hidden.tanh() * hidden


def _halved(saved: Tensor) -> Tensor:
    return saved / 2


def _doubled(packed: Tensor) -> Tensor:
    return packed * 2


class Inference(Two):
    """A part is computed in inference mode, as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            constant = self.first(x)
        return self.second(self.first(x) * constant.clone())


class NoGrad(Two):
    """A part is computed without a gradient."""

    def between(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + hidden.abs().mean(-1, keepdim=True)
        return hidden / scale


# --------------------------------------------------------------------------------------------------------------------
# Operators


class AttentionBias(Two):
    """Attention with a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 1, 3, 3))

    def between(self, hidden: Tensor) -> Tensor:
        heads = hidden[None, None]
        return F.scaled_dot_product_attention(heads, heads, heads, self.bias)[0, 0]


class MultiheadBias(Two):
    """torch's layer of attention with a learned bias for its mask."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bias = nn.Parameter(torch.randn(3, 3))
        self.need_weights = need_weights

    def between(self, hidden: Tensor) -> Tensor:
        rows = hidden[None]
        return self.attention(rows, rows, rows, attn_mask=self.bias, need_weights=self.need_weights)[0][0]


_LIBRARY = torch.library.Library("functorch_ens_zoo", "DEF")
for _name, _key in {"triple": "CompositeExplicitAutograd", "triple_cpu": "CPU"}.items():
    _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    _LIBRARY.impl(_name, lambda x: 3 * x, _key)


@torch.library.custom_op("functorch_ens_zoo::square", mutates_args=())
def _square(x: Tensor) -> Tensor:
    return x * x


@torch.library.custom_op("functorch_ens_zoo::square_vmap", mutates_args=())
def _square_vmap(x: Tensor) -> Tensor:
    return x * x


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _slope_of_square(ctx: Any, gradient: Tensor) -> Tensor:
    return 2 * ctx.saved_tensors[0] * gradient


for _op in (_square, _square_vmap):
    _op.register_autograd(_slope_of_square, setup_context=_save_input)
    _op.register_fake(torch.empty_like)
_square_vmap.register_vmap(lambda info, dims, x: (_square_vmap(x), dims[0]))


class OldFunction(torch.autograd.Function):
    """A function with its own derivative, in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _slope_of_square(ctx, gradient)


class NewFunction(torch.autograd.Function):
    """The same, in the new style."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_input(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _slope_of_square(ctx, gradient)


class VmapFunction(NewFunction):
    """The same, for which torch makes the rule of vmap."""

    generate_vmap_rule = True


class Calls(Two):
    """Calls a function between the layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def between(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


class FilledIndex(Two):
    """Fills a shared tensor with a member's own number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.index_fill(x, 1, torch.tensor([0]), self.first(x).mean()))


class ScatteredSlice(Two):
    """Replaces a column by a member's own."""

    def between(self, hidden: Tensor) -> Tensor:
        return torch.select_scatter(hidden, hidden.mean(1), 1, 0)


class Strided(Two):
    """Looks at a tensor's memory from its second element on."""

    def between(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.as_strided((2, 4), (4, 1), 1).sum(0)


class InPlacePower(Two):
    """Raises to powers that are a tensor, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.rand(4) + 1)

    def between(self, hidden: Tensor) -> Tensor:
        positive = hidden * hidden + 1
        positive.pow_(self.power)
        return positive


# --------------------------------------------------------------------------------------------------------------------
# Random numbers


class Fourier(Two):
    """Random Fourier features, the same at each call, from a new generator."""

    def between(self, hidden: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return (hidden @ torch.randn(4, 4, generator=generator, dtype=hidden.dtype)).cos()


class FourierKept(Two):
    """Random Fourier features from a generator on the model, which is seeded at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def between(self, hidden: Tensor) -> Tensor:
        self.generator.manual_seed(3)
        return (hidden @ torch.randn(4, 4, generator=self.generator, dtype=hidden.dtype)).cos()


class Permuted(Two):
    """Permutes its features, at each call in the same way."""

    def between(self, hidden: Tensor) -> Tensor:
        return hidden[:, torch.randperm(4, generator=torch.Generator().manual_seed(1))]


class FixedNoise(Two):
    """Adds noise from torch's own generator with a fixed seed."""

    def between(self, hidden: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return hidden + torch.rand_like(hidden)


class FixedDropout(Two):
    """Drops the same elements at each call."""

    def between(self, hidden: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return F.dropout(hidden, 0.5, self.training)


# --------------------------------------------------------------------------------------------------------------------
# What a forward leaves behind


class KeepsActivations(Two):
    """A forward hook keeps activations in a list on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.first.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)


_KEPT: list[Tensor] = []


class KeepsGlobally(Two):
    """A forward hook keeps the last activations in a global list."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(_keep_globally)


def _keep_globally(module: nn.Module, args: Any, output: Tensor) -> None:
    _KEPT[:] = [*_KEPT[-3:], output]


class Prints(Two):
    """Prints a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.log = io.StringIO()

    def between(self, hidden: Tensor) -> Tensor:
        print(tuple(hidden.shape), file=self.log)
        return hidden.tanh()


class Logs(Two):
    """Logs a shape."""

    def between(self, hidden: Tensor) -> Tensor:
        logging.getLogger("functorch_ens_zoo").info("hidden: %s", tuple(hidden.shape))
        return hidden.tanh()


class Warns(Two):
    """Warns at each call."""

    def between(self, hidden: Tensor) -> Tensor:
        with warnings.catch_warnings(action="ignore"):
            warnings.warn("the zoo warns", stacklevel=1)
        return hidden.tanh()


# --------------------------------------------------------------------------------------------------------------------
# All of them


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _compiled() -> nn.Module:
    compiled: Any = torch.compile(_mlp(), backend="eager")
    return compiled


def _compiled_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), _compiled())


def _compiled_in_place() -> nn.Module:
    model = _mlp()
    model.compile(backend="eager")
    return model


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(nn.Linear(4, 3))


def written() -> dict[str, Callable[[], Sample]]:
    """Models as people write them, by what is special about them."""
    x = [3, 4]
    return {
        "mlp": of(_mlp, x),
        "bare parameters, ParameterList, ParameterDict": of(Matrices, [5, 3]),
        "tied weights": of(Tied, integers(5, 2, 3)),
        "a layer in two places": of(shared_layer, x),
        "several inputs, kwargs, a dict out": of(Residual, x, x, scale=0.5),
        "a dataclass out": of(Dataclass, x),
        "reads a layer's weight": of(DirectAccess, [5, 3]),
        "data-dependent control flow": of(ControlFlow, x),
        "checkpointing": of(lambda: Checkpointed(False), x),
        "checkpointing, reentrant": of(lambda: Checkpointed(True), x),
        "caches": of(Cached, x),
        "buffers, frozen parts": of(Buffers, x),
        "hooks": of(Hooked, x),
        "autocast inside": of(Autocast, [3, 8]),
        "drop path": of(DropPath, x),
        "writes into a new tensor": of(FilledIn, x),
        "complex weights": of(Complex, x),
        "weight_norm": of(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), x),
        "weight_norm, old": of(_old_weight_norm, x),
        "spectral_norm": of(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), x),
        "spectral_norm, old": of(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), x),
        "orthogonal": of(lambda: parametrizations.orthogonal(nn.Linear(4, 3)), x),
        "pruned": of(_pruned, x),
        "torch.compile": of(_compiled, x),
        "torch.compile, inside": of(_compiled_inside, x),
        "torch.compile, in place": of(_compiled_in_place, x),
        # Gradients
        "scales a gradient": of(SlowTrunk, x),
        "scales a gradient, in a forward hook": of(SlowTrunkByHook, x),
        "set_grad_enabled by a weight": of(GradWhereTrained, x),
        "detaches what has no grad_fn": of(DetachedConstants, x),
        "detaches leaves": of(DetachedLeaves, x),
        "requires_grad_ in a hook": of(InputGradients, x),
        "retain_grad": of(Retains, x),
        "a hook on a weight": of(MaskedRows, x),
        "forces": of(Forces, x),
        "save_on_cpu": of(SavedOnCpu, x),
        "saved_tensors_hooks": of(SavedTwice, x),
        "inference_mode inside": of(Inference, x),
        "no_grad inside": of(NoGrad, x),
        # Operators
        "attention, learned bias": of(AttentionBias, x),
        "MultiheadAttention, learned bias": of(lambda: MultiheadBias(False), x),
        "MultiheadAttention, learned bias, weights": of(lambda: MultiheadBias(True), x),
        "torch.library, CompositeExplicitAutograd": of(lambda: Calls(torch.ops.functorch_ens_zoo.triple), x),
        "torch.library, CPU": of(lambda: Calls(torch.ops.functorch_ens_zoo.triple_cpu), x),
        "custom_op": of(lambda: Calls(lambda hidden: _square(hidden)), x),
        "custom_op, register_vmap": of(lambda: Calls(lambda hidden: _square_vmap(hidden)), x),
        "autograd.Function, old": of(lambda: Calls(OldFunction.apply), x),
        "autograd.Function, new": of(lambda: Calls(NewFunction.apply), x),
        "autograd.Function, generate_vmap_rule": of(lambda: Calls(VmapFunction.apply), x),
        "index_fill, a member's number": of(FilledIndex, x),
        "select_scatter, a member's column": of(ScatteredSlice, x),
        "as_strided, storage_offset": of(Strided, x),
        "pow_ by a tensor": of(InPlacePower, x),
        # Random numbers
        "Fourier features, a new generator": of(Fourier, x),
        "Fourier features, a generator on the model": of(FourierKept, x),
        "a seeded permutation": of(Permuted, x),
        "fork_rng, manual_seed, rand_like": of(FixedNoise, x),
        "fork_rng, manual_seed, dropout": of(FixedDropout, x),
        # What is left behind
        "keeps activations on the model": of(KeepsActivations, x),
        "keeps activations in a global list": of(KeepsGlobally, x),
        "prints": of(Prints, x),
        "logs": of(Logs, x),
        "warns": of(Warns, x),
    }
