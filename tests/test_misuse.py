"""Every public function, called with every wrong kind of every argument, says which argument is wrong.

`ROWS` has a valid call of each. The sweep replaces one argument after another by values of the wrong kind and wants a
TypeError or ValueError that names the argument, before the model, a loss or a user's function is called. A row names
the kinds that its arguments do take.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import functorch_ens as fe
from functorch_ens import anatomy
from functorch_ens.layers import registry

matplotlib.use("Agg")

E = 3
WORK: list[str] = []
"""What has been done since the list was emptied: calls of the model, the loss and the user's functions."""


class Net(nn.Module):
    """A model that notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        WORK.append("model")
        return self.norm(self.layer(x))


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        WORK.append(function.__name__)
        return function(*args, **kwargs)

    return noted


# --------------------------------------------------------------------------------------------------------------------
# Wrong kinds

KINDS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "3": lambda: 3,
    "0.5": lambda: 0.5,
    "nan": lambda: float("nan"),
    "1j": lambda: 1j,
    "text": lambda: "x",
    "empty text": lambda: "",
    "bytes": lambda: b"x",
    "empty list": list,
    "list": lambda: [1.0],
    "tuple": lambda: (1.0, "x"),
    "set": lambda: {1.0},
    "dict": lambda: {"x": 1.0},
    "array": lambda: np.ones((2, 3)),
    "array scalar": lambda: np.float64(0.5),
    "0-d": lambda: torch.tensor(1.0),
    "0-d int": lambda: torch.tensor(1),
    "no rows": lambda: torch.ones(0, 3),
    "vector": lambda: torch.ones(7),
    "int tensor": lambda: torch.ones(7, dtype=torch.long),
    "bool tensor": lambda: torch.ones(7, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(7, dtype=torch.complex64),
    "meta tensor": lambda: torch.ones(7, device="meta"),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "module": lambda: nn.Linear(3, 2),
    "module class": lambda: nn.Linear,
    "class": lambda: int,
    "lambda": lambda: lambda: None,
    "object": object,
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "generator": torch.Generator,
    "optimizer": lambda: torch.optim.SGD([torch.ones(1)], lr=0.1),
    "params": lambda: fe.EnsembleParams({}, {"x": torch.ones(2, 3)}),
    "iterator": lambda: iter([1.0]),
}
"""Values that are wrong nearly everywhere."""

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "as array": lambda x: x.detach().numpy(),
    "as list": lambda x: x.tolist(),
    "as 0-d": lambda x: x.flatten()[0],
    "as no rows": lambda x: x[:0],
    "as one row less": lambda x: x[:-1],
    "as int": lambda x: x.detach().int(),
    "as bool": lambda x: x.detach().bool(),
    "as complex": lambda x: x.detach().to(torch.complex64),
    "on meta": lambda x: x.detach().to("meta"),
    "as sparse": lambda x: x.detach().to_sparse(),
    "with an axis more": lambda x: x[..., None],
    "as None": lambda x: None,
}
"""Changes of a tensor that is right, and of the first tensor in a dict that is right."""


def _wrong(valid: Any) -> Iterator[tuple[str, Any]]:
    """The wrong values, each with its kind, in the place of a `valid` one."""
    for kind, make in KINDS.items():
        yield kind, make()
    for kind, change in CHANGES.items():
        if isinstance(valid, Tensor):
            if kind != "as None":
                yield kind, change(valid)
        elif any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(valid)) and not isinstance(valid, list):
            first = next(leaf for leaf in tree_leaves(valid) if isinstance(leaf, Tensor) and leaf.ndim)
            yield (
                kind,
                tree_map(lambda leaf, first=first, change=change: change(leaf) if leaf is first else leaf, valid),
            )


# --------------------------------------------------------------------------------------------------------------------
# A valid call of every function

NOTHING: MappingProxyType[str, tuple[str, ...]] = MappingProxyType({})


class Row(NamedTuple):
    """A valid call, `function(*positional, **named)`."""

    function: Callable[..., Any]
    valid: Callable[..., dict[str, Any]]
    """The arguments by name. That of `*args` is a tuple of one or more."""
    takes: MappingProxyType[str, tuple[str, ...]] | dict[str, tuple[str, ...]] = NOTHING
    """By argument, the kinds that it takes; `~` before one that reaches the user's own code, which may refuse it."""
    user: tuple[str, ...] = ()
    """Arguments that are handed to the user's own code as they are."""


def _model() -> dict[str, Any]:
    return {"model": Net()}


def _params() -> fe.EnsembleParams:
    return fe.ensemble_params(Net(), E)


def _params_of(model: nn.Module) -> dict[str, Any]:
    return {"model": model, "params": fe.ensemble_params(model, E)}


def _logits() -> dict[str, Any]:
    return {"logits": torch.randn(E, 4, 2)}


def _labelled() -> dict[str, Any]:
    return {"logits": torch.randn(E, 4, 2), "y": torch.tensor([0, 1, 1, 0])}


def _forward() -> dict[str, Any]:
    model = Net()
    return {
        "forward": fe.make_forward(model),
        "params": fe.ensemble_params(model, E),
        "buffers": fe.ensemble_buffers(model, E),
    }


def _called_forward() -> dict[str, Any]:
    given = _forward()
    return {"self": given.pop("forward"), **given, "args": (torch.randn(4, 3),)}


def _step() -> dict[str, Any]:
    given = _forward()
    optimizer = torch.optim.SGD(tree_leaves(given["params"]), lr=0.1)
    return {
        "step": fe.make_train_step(given["forward"], _noted(F.cross_entropy), optimizer, compile=False),
        "params": given["params"],
        "buffers": given["buffers"],
    }


def _called_step() -> dict[str, Any]:
    given = _step()
    return {"self": given.pop("step"), **given, "batch": (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))}


def _updated() -> dict[str, Any]:
    given = _called_step()
    batch = given.pop("batch")
    return {**given, "found": given["self"].gradients(given["params"], *batch, buffers=given["buffers"])}


def _made_step() -> dict[str, Any]:
    given = _forward()
    optimizer = torch.optim.SGD(tree_leaves(given["params"]), lr=0.1)
    values = {"label_smoothing": torch.rand(E)}
    return {"forward": given["forward"], "loss": fe.cross_entropy, "optimizer": optimizer, "values": values}


def _fit() -> dict[str, Any]:
    given = _step()
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])

    def batches(generator: torch.Generator) -> list[Any]:
        WORK.append("batches")
        return [batch]

    def evaluate(params: Any, buffers: Any) -> dict[str, Any]:
        WORK.append("evaluate")
        return {"nll": 1.0}

    return {**given, "batches": batches, "evaluate": evaluate, "epochs": 1, "monitor": "nll", "progress": False}


def _saved(folder: Path) -> dict[str, Any]:
    fe.save_checkpoint({"epoch": 3}, folder / "run.pt")
    return {"path": folder / "run.pt"}


AXES = Figure().add_subplot()


def _axes() -> dict[str, Any]:
    return {"ax": AXES}


_OPTIONAL = ("None",)
_COMPLEX = ("~as complex",)
_TENSORS = ("vector", "int tensor", "bool tensor", "complex tensor", "meta tensor")
_CHANGED = ("as one row less", "as int", "as bool", "as complex", "on meta", "with an axis more")
_FLOATS = ("-1", "3", "0.5", "array scalar")
_POSITIVE = ("3", "0.5", "array scalar")

ROWS: dict[str, Row] = {}
_metric: Any


def _row(
    function: Callable[..., Any],
    valid: Callable[..., dict[str, Any]],
    *,
    user: tuple[str, ...] = (),
    name: str | None = None,
    **takes: Any,
) -> None:
    ROWS[name or function.__name__] = Row(function, valid, takes, user)


for _metric in (fe.mean_log_probs, fe.mean_probs, fe.classification_uncertainty, fe.disagreement, fe.pairwise_kl):
    _row(_metric, _logits, logits=("on meta", "as one row less"))
for _metric in (fe.metrics.nll, fe.metrics.brier, fe.metrics.accuracy):
    _row(_metric, _labelled, name=f"metrics.{_metric.__name__}", logits=("as one row less",), y=("as int",))
for _metric in (fe.metrics.calibration_error, fe.metrics.confidence_bins):
    _row(
        _metric, _labelled, name=f"metrics.{_metric.__name__}", logits=("as one row less",), y=("as int",), bins=("3",)
    )
_row(
    fe.metrics.selective_accuracy,
    lambda: {**_labelled(), "score": torch.rand(4)},
    name="metrics.selective_accuracy",
    logits=("as one row less",),
    y=("as int",),
    score=_OPTIONAL,
)
_row(
    fe.metrics.gaussian_nll,
    lambda: {"outputs": torch.randn(E, 4, 2), "y": torch.randn(4)},
    name="metrics.gaussian_nll",
    outputs=("as one row less",),
)
_row(
    fe.metrics.auroc,
    lambda: {"inside": torch.rand(4), "outside": torch.rand(5)},
    name="metrics.auroc",
    inside=("as one row less", "vector"),
    outside=("as one row less", "vector"),
)
_row(
    fe.regression_uncertainty,
    lambda: {"outputs": torch.randn(E, 4, 2)},
    outputs=("on meta", "as one row less"),
)
_row(fe.fit_temperature, _labelled, logits=("as one row less",), y=("as int",), per_member=("True",))

_row(
    fe.plots.reliability_diagram,
    lambda: {**_labelled(), **_axes()},
    name="plots.reliability_diagram",
    logits=("as one row less",),
    y=("as int",),
    bins=("3",),
    ax=_OPTIONAL,
)
_row(
    fe.plots.selective_accuracy_curve,
    lambda: {"curves": {"a": torch.randn(E, 4, 2)}, "y": torch.tensor([0, 1, 1, 0]), **_axes()},
    name="plots.selective_accuracy_curve",
    curves=("as one row less",),
    y=("as int",),
    ax=_OPTIONAL,
)
_row(
    fe.plots.ood_histograms,
    lambda: {"inside": torch.rand(4), "outside": torch.rand(5), **_axes()},
    name="plots.ood_histograms",
    inside=("as one row less", "vector"),
    outside=("as one row less", "vector"),
    ax=_OPTIONAL,
)
_row(
    fe.plots.uncertainty_plane,
    lambda: {
        "predict": _noted(lambda x: torch.stack([x, x])),
        "points": torch.randn(4, 2),
        "labels": torch.tensor([0, 1, 1, 0]),
        "resolution": 3,
        **_axes(),
    },
    name="plots.uncertainty_plane",
    predict=("~module",),
    labels=(*_OPTIONAL, "as int"),
    resolution=("3",),
    ax=_OPTIONAL,
)
_row(
    fe.plots.training_curves,
    lambda: {"losses": torch.rand(4, E), **_axes()},
    name="plots.training_curves",
    losses=("as one row less",),
    ax=_OPTIONAL,
)

_row(
    fe.rank1_layout,
    lambda: {"layer_types": (Net,), "layout": lambda layer: fe.Layout()},
    layer_types=("module class",),
    layout=("~module",),
)
_row(
    fe.rank1_rule,
    lambda: {"layer_types": (Net,), "when": lambda layer: True, "lora": True},
    layer_types=("module class",),
    when=("~module",),
    lora=("True",),
)
_row(
    fe.ensemble_params,
    lambda: {**_model(), "E": E},
    model=("module",),
    E=("3",),
    reset=("True",),
    stacked=_OPTIONAL,
    generator=(*_OPTIONAL, "generator"),
)
_row(
    fe.batchensemble_params,
    lambda: {**_model(), "E": E},
    model=("module",),
    E=("3",),
    use_base_weights=("True",),
    layers=_OPTIONAL,
    stacked=(*_OPTIONAL, "empty list"),
    generator=(*_OPTIONAL, "generator"),
    init=("None", "~module"),
    flip=("None", "0.5", "array scalar"),
    r_mean=("None", *_FLOATS),
    s_mean=("None", *_FLOATS),
    r_std=("None", *_POSITIVE),
    s_std=("None", *_POSITIVE),
)
_row(
    fe.lora_params,
    lambda: {**_model(), "E": E, "rank": 1, "init": lambda name, shape, generator: torch.ones(shape)},
    model=("module",),
    E=("3",),
    alpha=("None", *_POSITIVE),
    layers=_OPTIONAL,
    stacked=(*_OPTIONAL, "empty list"),
    generator=(*_OPTIONAL, "generator"),
)
_row(fe.ensemble_buffers, lambda: {**_model(), "E": E}, model=("module",), E=("3",))
_row(fe.stack_params, lambda: {"members": [nn.Linear(3, 2)], "model": nn.Linear(3, 2)}, model=("None", "module"))
_row(fe.stack_buffers, lambda: {"members": [Net()], "model": Net()}, model=("None", "module"))
_row(fe.member_params, lambda: {**_params_of(nn.Linear(3, 2)), "i": 0}, model=("module",), params=("as complex",))
_row(fe.describe, lambda: _params_of(nn.Linear(3, 2)), model=("module",), params=("as complex",))

_row(
    fe.make_forward,
    lambda: _model(),
    model=("module",),
    chunk_size=("None", "3"),
    member_inputs=("True",),
)
_row(fe.Forward.__call__, _called_forward, name="forward", user=("args", "kwargs"), params=_COMPLEX, buffers=_COMPLEX)
_row(
    fe.predict,
    lambda: {**_forward(), "inputs": (torch.randn(4, 3),)},
    user=("kwargs",),
    batch_size=("3",),
    prepare=(*_OPTIONAL, "~module"),
    progress=("None", "True"),
    compile=("True",),
    params=_COMPLEX,
    buffers=_COMPLEX,
    inputs=("as one row less", *(f"~{kind}" for kind in (*_TENSORS, *_CHANGED))),
)
_row(
    fe.member_losses,
    lambda: {
        "loss": _noted(F.cross_entropy),
        "outputs": torch.randn(E, 4, 2),
        "targets": (torch.tensor([0, 1, 1, 0]),),
    },
    loss=("~module",),
    outputs=tuple(f"~{kind}" for kind in (*_TENSORS, *_CHANGED, "params")),
    targets=tuple(
        f"~{kind}"
        for kind in ("nothing", "0-d", "0-d int", "no rows", *_TENSORS, "as no rows", "as 0-d", *_CHANGED, "params")
    ),
    values=_OPTIONAL,
)
_row(
    fe.cross_entropy,
    lambda: {"logits": torch.randn(4, 2), "y": torch.tensor([0, 1, 1, 0])},
    y=("as int",),
    label_smoothing=("0.5", "array scalar", "0-d", "0-d int"),
    temperature=("3", "0.5", "array scalar", "0-d", "0-d int"),
)
_row(
    fe.make_train_step,
    _made_step,
    loss=("~module",),
    optimizer=("~optimizer",),
    values=(
        *_OPTIONAL,
        *(f"~{kind}" for kind in CHANGES if kind not in ("as array", "as list", "as 0-d", "as sparse")),
    ),
    prepare=(*_OPTIONAL, "~module", "~lambda"),
    clip_norm=("None", *_POSITIVE),
    accumulate=("3",),
    member_targets=("True",),
    autocast=_OPTIONAL,
    compile=("True",),
)
for _method, _name in ((fe.TrainStep.__call__, "step"), (fe.TrainStep.gradients, "step.gradients")):
    _row(_method, _called_step, name=_name, user=("batch", "kwargs"), params=_COMPLEX, buffers=_COMPLEX)
_row(fe.TrainStep.update, _updated, name="step.update", params=_COMPLEX, buffers=_OPTIONAL)
_row(
    fe.fit,
    _fit,
    epochs=("3",),
    generator=(*_OPTIONAL, "generator"),
    scheduler=_OPTIONAL,
    buffers=_COMPLEX,
    evaluate=("~module",),
    monitor=(*_OPTIONAL, "~text"),
    monitor_mode=_OPTIONAL,
    patience=("None", "3"),
    checkpoint=("None", "text"),
    progress=("None", "True"),
)
_row(
    fe.param_groups,
    lambda: {"params": _params(), "values": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}},
    rank1_lr_factor=_POSITIVE,
    rank1_weight_decay=(*_POSITIVE, "0-d", "0-d int", "~vector", "~int tensor"),
    params=(
        "params",
        "as no rows",
        "as one row less",
        "as int",
        "as bool",
        "as complex",
        "on meta",
        "with an axis more",
    ),
    lr=(*_POSITIVE, "0-d", "0-d int"),
    weight_decay=(*_POSITIVE, "0-d", "0-d int"),
    momentum=(*_POSITIVE, "0-d", "0-d int"),
)
_row(
    fe.bootstrap,
    lambda: {"N": 10, "E": E},
    N=("3",),
    E=("3",),
    size=("None", "3"),
    generator=(*_OPTIONAL, "generator"),
    device=("None", "device"),
)
_row(
    fe.index_batches,
    lambda: {"rows": torch.arange(8), "batch_size": 2},
    rows=("3", "int tensor", "as int", "as one row less"),
    batch_size=("3",),
    E=("None", "3"),
    drop_last=("True",),
    generator=(*_OPTIONAL, "generator"),
    device=("None", "device"),
)
_row(
    fe.save_checkpoint,
    lambda folder: {"state": {"epoch": 3}, "path": folder / "run.pt"},
    state=("dict",),
    path=("text",),
)
_row(fe.load_checkpoint, _saved, device=("None", "device"), path=("~text",))

# Records, and what other functions return: those have rows of their own, as far as they are called with arguments.
WITHOUT_ROWS = {
    *("Description", "EnsembleParams", "Fitted", "Gradients", "Layout", "Rank1", "Uncertainty"),
    *("Forward", "TrainStep", "metrics", "plots", "metrics.SelectiveAccuracy", "metrics.Bins"),
    "compile",  # its options are those of torch.compile; tests/_compile/test_compiling.py
}

# --------------------------------------------------------------------------------------------------------------------
# The sweep


def _arguments(row: Row) -> list[str]:
    """The arguments that are given wrong values."""
    return [name for name in inspect.signature(row.function).parameters if name not in (*row.user, "self")]


def _cases(row: Row, valid: Callable[[], dict[str, Any]], argument: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Wrong values of one `argument`: its name, the kind, and all arguments with it."""
    parameter = inspect.signature(row.function).parameters[argument]
    given = valid().get(argument, parameter.default)
    if parameter.kind is parameter.VAR_POSITIONAL:
        yield argument, "nothing", {**valid(), argument: ()}
        for kind, value in _wrong(given[0]):
            yield argument, kind, {**valid(), argument: (value, *given[1:])}
    elif parameter.kind is parameter.VAR_KEYWORD:
        for key in given:
            for kind, value in _wrong(given[key]):
                yield key, kind, {**valid(), argument: {**given, key: value}}
    else:
        for kind, value in _wrong(given):
            yield argument, kind, {**valid(), argument: value}


def _call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call `function` with these arguments, those of `*args` and `**kwargs` in their places."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters.values()
    in_order = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    for parameter in parameters:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.kind is parameter.POSITIONAL_ONLY or (in_order and parameter.kind is not parameter.KEYWORD_ONLY):
            positional.append(value)
        else:
            named[parameter.name] = value
    return function(*positional, **named)


def found_wrong(row: Row, argument: str, folder: Path) -> tuple[int, list[str]]:
    """The number of misuses, and what is wrong with the answers to them."""
    takes_folder = "folder" in inspect.signature(row.valid).parameters
    valid: Callable[[], dict[str, Any]] = partial(row.valid, folder) if takes_folder else row.valid
    count, wrong = 0, []
    for name, kind, given in _cases(row, valid, argument):
        if f"~{kind}" in row.takes.get(name, ()):
            continue
        count += 1
        WORK.clear()
        accepted = kind in row.takes.get(name, ())
        try:
            _call(row.function, given)
        except (TypeError, ValueError) as error:
            message = str(error).partition("\n")[0]
            if accepted:
                wrong.append(f"{name}, {kind}: refused: {message}")
            elif not re.search(rf"(^|, |\b(?=\w\w)){name}\b", message):
                wrong.append(f"{name}, {kind}: unnamed {type(error).__name__}: {message}")
            elif WORK:
                wrong.append(f"{name}, {kind}: after {WORK[:3]}: {message}")
        except Exception as error:
            wrong.append(f"{name}, {kind}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            if not accepted:
                wrong.append(f"{name}, {kind}: taken")
    return count, wrong


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """torch imports its compiler with the first optimiser, and that takes seconds."""
    KINDS["optimizer"]()


@pytest.mark.parametrize(("name", "argument"), [(name, each) for name, row in ROWS.items() for each in _arguments(row)])
@pytest.mark.filterwarnings("ignore")  # of what is taken
def test_every_wrong_kind_of_every_argument_is_named(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, table in ((anatomy, "_layouts"), (registry, "_kinds")):  # what is taken registers a layer
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    count, wrong = found_wrong(ROWS[name], argument, tmp_path)
    if name.startswith("plots."):
        plt.close("all")
    assert count > 10
    assert not wrong, "\n".join(wrong)


def test_every_public_function_has_a_row() -> None:
    public = {*fe.__all__}
    for space in (fe.metrics, fe.plots):
        here = space.__name__.rpartition(".")[2]
        public |= {f"{here}.{name}" for name, value in vars(space).items() if _is_public(name, value, space.__name__)}
    assert public - WITHOUT_ROWS == {name for name in ROWS if not name.startswith(("step", "forward"))}


def _is_public(name: str, value: Any, module: str) -> bool:
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module
