"""The guards of a compiled step: few of them, none on what never changes, and all on what the user may change."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens._compile.guards import filter_for, with_own_code
from functorch_ens.training.gradients import Objective

Step = Callable[[Any, Any], Any]


class _Plan(NamedTuple):
    size: int
    table: dict[str, Any]


class _House:
    """Stands for a forward: it holds objects of its own, and the user's model beside its own copy of it."""

    __module__ = "functorch_ens.house"  # by which an object of this package is known

    def __init__(self) -> None:
        self.own = nn.Sequential(nn.Linear(3, 2))
        self.users = nn.Sequential(nn.Linear(3, 2))
        self.pairs = [(self.users, self.own), (self.users[0], self.own[0])]
        self.plan = _Plan(3, {"a b": self.own})
        self.aliases = {"weight": ["0.weight"]}

    def compute(self, batch: Any) -> Any: ...


def _kept(method: Any, names: Sequence[str], made: Sequence[object], theirs: Any = None) -> list[bool]:
    keep = filter_for(method, made, theirs)
    return list(keep([SimpleNamespace(name=name) for name in names]))


def test_what_never_changes_is_not_guarded_and_the_rest_is() -> None:
    house = _House()
    made = [*house.own.modules(), house.aliases]
    dropped = [
        "self",
        "self.pairs",
        "self.pairs[1]",
        "self.pairs[1][1]",
        "self.pairs[1][1]._parameters['weight']",
        "self.own._modules['0'].in_features",
        "self.plan.table['a b'].training",
        "self.aliases['weight'][0]",
    ]
    kept = [
        "batch[0]",
        "self.pairs[1][0]",
        "self.pairs[1][0].training",
        "self.users._modules['0'].in_features",
        "self.plan.size",
        "dict(type(self.pairs[1][1]).__dict__)['factor']",
        "self.pairs[1][1].function.__closure__[0].cell_contents",
        "self.pairs[1][1].function.__code__",
        "self.owner",
        "",
    ]
    assert _kept(house.compute, dropped, made) == [False] * len(dropped)
    assert _kept(house.compute, kept, made) == [True] * len(kept)


def test_what_a_class_of_this_package_defines_is_not_guarded() -> None:
    """A change of class is seen by the guard on `work.__class__`; a module's class may be made from the user's."""
    house = _House()
    work = fe.Gradients({}, torch.ones(2), {})
    values = {"work": work, "theirs": SimpleNamespace(), "layer": house.users[0], "work.__class__": fe.Gradients}
    of_classes = [f"dict(type({name}).__dict__)['_make'].__closure__[0]" for name in ("work", "theirs", "layer", "new")]
    guards = [SimpleNamespace(name=name, value=value) for name, value in values.items()]
    guards += [SimpleNamespace(name=name, value=None) for name in of_classes]
    assert list(filter_for(house.compute, [])(guards)) == [True, True, True, True, False, True, True, True]


def test_another_name_of_an_attribute_changes_nothing() -> None:
    house = _House()
    house.renamed = house.__dict__.pop("own")  # type: ignore[attr-defined]  # that is the test
    assert _kept(house.compute, ["self.renamed.training"], [house.renamed]) == [False]  # type: ignore[attr-defined]


def test_what_torch_and_this_package_define_is_not_guarded() -> None:
    scope = {"_tuple_new": tuple.__new__, "scale": 3.0, "weight": torch.ones(2), "relu": F.relu}
    users = ModuleType("torchvision")
    given = {
        "__name__": "functorch_ens.house",
        "Gradients": fe.Gradients,
        "__import_torch_dot_nn": torch.nn,
        "__import_torchvision": users,
        "__builtins_dict___0": vars(builtins),
        "___unnamed_scope_7_c0": scope,
    }
    house = _House()
    method = MethodType(FunctionType(_House.compute.__code__, given), house)
    dropped = [
        "G['Gradients']",
        "dict(G['Gradients'].__dict__)['__new__'].__func__.__code__",
        "G['__import_torch_dot_nn'].functional",
        "list(dict.keys(__import__('torch').utils._pytree.SUPPORTED_NODES))[0]",
        "__import__('collections').OrderedDict",
        "G['__builtins_dict___0']['len']",
        "G['___unnamed_scope_7_c0']['_tuple_new']",
    ]
    kept = [
        "G['__import_torchvision']",
        "G['__import_torchvision'].factor",
        "__import__('torchvision')",
        "G['___unnamed_scope_7_c0']['scale']",
        "G['___unnamed_scope_7_c0']['weight']",
        "G['___unnamed_scope_7_c0']['relu']",
        "G['unknown']",
    ]
    assert _kept(method, dropped, []) == [False] * len(dropped)
    assert _kept(method, kept, []) == [True] * len(kept)


def test_a_filter_of_the_users_own_drops_guards_too() -> None:
    house = _House()

    def none(guards: Sequence[Any]) -> list[bool]:
        return [guard.name != "batch[0]" for guard in guards]

    assert _kept(house.compute, ["batch[0]", "batch[1]", "self.aliases"], [house.aliases], none) == [False, True, False]


def test_guards_that_are_made_otherwise_are_all_kept() -> None:
    house = _House()
    assert list(filter_for(house.compute, [house.aliases])([object(), object()])) == [True, True]


def test_each_object_has_code_of_its_own() -> None:
    house = _House()
    method: Any = house.compute
    first, second = with_own_code(method), with_own_code(method)
    codes = {id(each.__func__.__code__) for each in (first, second, method)}
    assert len(codes) == 3 and first.__self__ is second.__self__ is house


def _guards(monkeypatch: pytest.MonkeyPatch, model: nn.Module, params: fe.EnsembleParams, x: Any) -> tuple[int, int]:
    """How many guards Dynamo makes for a step, and how many of them it keeps."""
    counts: list[tuple[int, int]] = []
    compile = torch.compile

    def counted(function: Any, **options: Any) -> Any:
        theirs = options["options"]["guard_filter_fn"]

        def count(guards: Sequence[Any]) -> Any:
            kept = theirs(guards)
            counts.append((len(guards), sum(kept)))
            return kept

        return compile(function, **{**options, "options": {**options["options"], "guard_filter_fn": count}})

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", counted)
        optimizer = torch.optim.SGD(tree_leaves(params))
        options = {"backend": "eager", "fullgraph": True}
        step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=options)
        step.gradients(params, x, torch.randint(4, (5,)), buffers=fe.ensemble_buffers(model, params.E))
    assert step.compiled_by == "functorch_ens" and len(counts) == 1
    return counts[0]


@pytest.mark.compile
@pytest.mark.parametrize("make", [fe.ensemble_params, fe.batchensemble_params, partial(fe.lora_params, rank=2)])
@pytest.mark.parametrize("norm", [False, True])
def test_few_guards_are_kept_however_deep_the_model(monkeypatch: pytest.MonkeyPatch, make: Any, norm: bool) -> None:
    """Of each module its class and its mode; of each tensor its shape; of each norm its statistics and name."""

    def model(layers: int) -> nn.Module:
        block = [nn.Linear(4, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.ReLU()]
        return nn.Sequential(*(part for _ in range(layers) for part in block))

    counts = {}
    for layers in (2, 7):
        torch.compiler.reset()
        deep = model(layers)
        params = make(deep, 2)
        given, kept = _guards(monkeypatch, deep, params, torch.randn(5, 4))
        parts, tensors = len(list(deep.modules())), len(tree_leaves(params)) + len(list(deep.buffers()))
        assert kept < 90 + 2 * parts + tensors + 8 * norm * layers
        counts[layers] = given, kept
    assert counts[7][1] < counts[7][0] / 8
    assert counts[7][1] - counts[2][1] <= 5 * (20 if norm else 10)


def test_the_compiled_function_is_one_of_this_package() -> None:
    """Otherwise its globals would be the user's, and those must be guarded."""
    code: Any = Objective.__call__
    assert code.__globals__ is vars(sys.modules["functorch_ens.training.gradients"])
    assert code.__code__.co_varnames[0] == "self"
