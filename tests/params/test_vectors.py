"""How r and s start: init, flip, means and standard deviations, and what is told of members that are equal."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import small_net, source
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_written import Tied

import functorch_ens as fe

WIDE = nn.Linear(400, 300)
DEEP = nn.Sequential(nn.Linear(90, 80), nn.ReLU(), nn.Sequential(nn.Linear(80, 70)), nn.Conv1d(70, 60, 3))


def _stacked(model: nn.Module = WIDE, E: int = 4, **options: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fe.batchensemble_params(model, E, generator=source(), **options).stacked


def _kind(vector: Tensor) -> str:
    """Which of the three inits a drawn vector shows."""
    values = set(vector.unique().tolist())
    return "ones" if values == {1.0} else "random_sign" if values == {-1.0, 1.0} else "normal"


def _kinds(model: nn.Module = DEEP, **options: Any) -> dict[str, str]:
    return {name: _kind(vector) for name, vector in _stacked(model, **options).items()}


# --------------------------------------------------------------------------------------------------------------------
# One init for all


def test_random_signs_by_default_and_half_of_them_are_flipped() -> None:
    for vectors in (_stacked(), _stacked(init="random_sign"), _stacked(flip=0.5)):
        assert {_kind(vector) for vector in vectors.values()} == {"random_sign"}
        assert all(abs(vector.mean().item()) < 0.1 for vector in vectors.values())
        assert torch.equal(vectors["weight_r"], _stacked()["weight_r"])


def test_a_model_with_convolutions_flips_fewer() -> None:
    model = nn.Sequential(nn.Conv2d(500, 400, 3), nn.Flatten(), nn.Linear(400, 300))
    for name, vector in _stacked(model).items():
        assert vector.mean().item() == pytest.approx(0.8, abs=0.1), name
    for name, vector in _stacked(model, flip={"0": 0.5}).items():
        assert vector.mean().item() == pytest.approx(0.0 if name[0] == "0" else 0.8, abs=0.1), name


def test_ones() -> None:
    assert {_kind(vector) for vector in _stacked(init="ones").values()} == {"ones"}


@pytest.mark.parametrize("init", [None, "normal"])
def test_normal_where_a_mean_or_a_standard_deviation_is_given(init: Any) -> None:
    normal = _stacked(init=init, r_mean=2.0, r_std=0.1, s_mean=-1.0, s_std=3.0)
    assert normal["weight_r"].mean().item() == pytest.approx(2.0, abs=0.02)
    assert normal["weight_r"].std().item() == pytest.approx(0.1, rel=0.1)
    assert normal["weight_s"].mean().item() == pytest.approx(-1.0, abs=0.4)
    assert normal["weight_s"].std().item() == pytest.approx(3.0, rel=0.1)
    exact = _stacked(init=init, r_mean=1.5, r_std=0, s_mean=0, s_std=0)
    assert (exact["weight_r"] == 1.5).all() and not exact["weight_s"].any()
    each: list[dict[str, Any]] = [{"r_mean": 1.0}, {"r_std": 0.5}, {"s_mean": 1.0}, {"s_std": 0.5}]
    for one in each:  # the others have these values
        same = _stacked(init=init, **one)
        assert same["weight_r"].mean().item() == pytest.approx(1.0, abs=0.1)
        assert same["weight_s"].std().item() == pytest.approx(0.5, rel=0.1)


# --------------------------------------------------------------------------------------------------------------------
# The dial


@given(share=st.sampled_from([i / 20 for i in range(21)]), seed=st.integers(0, 1000))
def test_flip_is_the_probability_of_a_minus_one(share: float, seed: int) -> None:
    stacked = fe.batchensemble_params(WIDE, 4, flip=share, generator=source(seed)).stacked
    for vector in stacked.values():
        assert set(vector.unique().tolist()) <= {-1.0, 1.0}
        assert (vector < 0).double().mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / 1200) ** 0.5)


def test_flip_by_side_and_by_layer() -> None:
    one_sided = _stacked(DEEP, flip={"*_r": 0.5, "*_s": 0})
    assert {name[-1]: _kind(vector) for name, vector in one_sided.items()} == {"r": "random_sign", "s": "ones"}
    by_layer = _stacked(DEEP, flip={"0": 1, "2.*": 0, "3.weight": 0.25})
    assert (by_layer["0.weight_r"] == -1).all() and (by_layer["2.0.weight_s"] == 1).all()
    assert by_layer["3.weight_r"].mean().item() == pytest.approx(0.5, abs=0.2)


# --------------------------------------------------------------------------------------------------------------------
# By pattern, and by a function


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        pytest.param({"0": "random_sign", "*": "ones"}, {"0": "rr", "2.0": "11", "3": "11"}, id="TabM"),
        pytest.param({"*_s": "ones"}, {"0": "r1", "2.0": "r1", "3": "r1"}, id="one-sided"),
        pytest.param({"[02]*": "normal", "3": "random_sign"}, {"0": "nn", "2.0": "nn", "3": "rr"}, id="trunk"),
        pytest.param({"2.0.weight": "ones"}, {"0": "rr", "2.0": "11", "3": "rr"}, id="weight"),
        pytest.param(
            {"0.weight_r": "ones", "0": "normal", "*": "ones"}, {"0": "1n", "2.0": "11", "3": "11"}, id="first"
        ),
    ],
)
def test_init_by_pattern(init: Any, expected: dict[str, str]) -> None:
    letters = {"random_sign": "r", "ones": "1", "normal": "n"}
    kinds = _kinds(init=init)
    for layer, both in expected.items():
        assert letters[kinds[f"{layer}.weight_r"]] + letters[kinds[f"{layer}.weight_s"]] == both


def test_every_name_of_a_tied_weight_counts() -> None:
    for pattern in ("embed", "embed.weight", "score.weight", "score.weight_r", "embed.weight_r"):
        assert _kinds(Tied(), init={pattern: "ones"})["embed.weight_r"] == "ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_gets_name_shape_and_generator(dtype: torch.dtype) -> None:
    calls: list[tuple[str, tuple[int, int]]] = []

    def near_one(name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        calls.append((name, shape))
        return 1 + 0.1 * torch.randn(shape, generator=generator, dtype=dtype)

    vectors = _stacked(init=near_one)
    assert calls == [("weight_r", (4, 300)), ("weight_s", (4, 400))]
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == dict(calls)
    assert vectors["weight_s"].std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(vectors["weight_r"], _stacked(init=near_one)["weight_r"])
    assert all(vector.requires_grad and vector.dtype == torch.float32 for vector in vectors.values())
    mixed = _kinds(init={"3": near_one, "*": "ones"})
    assert mixed["3.weight_r"] == "normal" and mixed["0.weight_r"] == "ones"


# --------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "ones", "r_std": 0.1}, ValueError, "r_std: only init='normal' uses this"),
        ({"init": "random_sign", "s_mean": 1.0, "r_mean": 0}, ValueError, "r_mean, s_mean: only init='normal'"),
        ({"init": {"*": "ones"}, "s_std": 0.5}, ValueError, "s_std: only init='normal'"),
        ({"init": lambda name, shape, generator: torch.ones(shape), "r_std": 1}, ValueError, "r_std: only"),
        ({"init": "normal", "flip": 0.5}, ValueError, "flip: only init='random_sign' uses this"),
        ({"r_std": 0.5, "flip": 0.1}, ValueError, "flip: only init='random_sign'"),
        ({"init": "ones", "flip": {"*": 0.1}}, ValueError, "flip: only init='random_sign'"),
        ({"init": "signs"}, ValueError, "init: expected one of"),
        ({"init": {"*": "signs"}}, ValueError, "init['*']: expected one of"),
        ({"init": {}}, ValueError, "init: expected name patterns as keys, got []"),
        ({"init": {3: "ones"}}, TypeError, "init: expected name patterns as keys, got [3]"),
        ({"init": {"4": "ones"}}, ValueError, "init: pattern '4' decides nothing"),
        ({"init": {"*": "normal", "0": "ones"}}, ValueError, "init: pattern '0' decides nothing"),
        ({"init": 3}, TypeError, "init: expected one of"),
        ({"init": lambda name: torch.ones(2)}, TypeError, "init: expected one of"),
        ({"init": lambda name, shape, generator: 1.0}, TypeError, "init: expected a function that returns a tensor"),
        (
            {"init": lambda name, shape, generator: torch.ones(2)},
            ValueError,
            "init: expected a tensor [4, 80] for 0.weight_r",
        ),
        ({"init": lambda name, shape, generator: torch.ones(shape) / 0}, ValueError, "init: expected finite numbers"),
        ({"init": lambda name, shape, generator: torch.full(shape, 2j)}, TypeError, "init: expected real numbers for"),
        ({"init": nn.Linear(1, 1)}, TypeError, "init: expected a function, got Linear"),
        ({"init": "ones", "layers": [], "stacked": "0.*"}, ValueError, "init: no weight gets r and s, got 'ones'"),
        ({"flip": 1.5}, ValueError, "flip: expected a probability, from 0 to 1, got 1.5"),
        ({"flip": -0.1}, ValueError, "flip: expected a probability, from 0 to 1, got -0.1"),
        ({"flip": True}, TypeError, "flip: expected a probability, from 0 to 1, got True"),
        ({"flip": {"*_r": 2}}, ValueError, "flip['*_r']: expected a probability"),
        ({"flip": {"9*": 0.1}}, ValueError, "flip: pattern '9*' decides nothing"),
        ({"init": {"0": "ones"}, "flip": {"0": 0.1}}, ValueError, "flip: pattern '0' decides nothing"),
        ({"r_std": -1}, ValueError, "r_std: expected a finite number >= 0"),
        ({"s_mean": "x"}, TypeError, "s_mean: expected a finite number"),
    ],
)
def test_what_is_wrong_or_without_effect_is_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fe.batchensemble_params(DEEP, 4, **options)


def test_numbers_of_numpy_are_numbers() -> None:
    assert torch.equal(_stacked(flip=np.float64(0.25))["weight_r"], _stacked(flip=0.25)["weight_r"])
    assert torch.equal(_stacked(r_std=np.float32(0.25))["weight_r"], _stacked(r_std=0.25)["weight_r"])


# --------------------------------------------------------------------------------------------------------------------
# Told


@pytest.mark.parametrize("options", [{"init": "ones"}, {"flip": 0}, {"flip": 1}, {"r_std": 0, "s_std": 0}])
def test_equal_members_are_told(options: Any) -> None:
    model = small_net()
    with pytest.warns(UserWarning, match="all members start equal") as told:
        fe.batchensemble_params(model, 3, **options)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.batchensemble_params(model, 3, use_base_weights=False, stacked="3.*", **options)  # heads of their own
        fe.batchensemble_params(model, 3)


def test_on_the_meta_device_nothing_is_compared() -> None:
    params = fe.batchensemble_params(nn.Linear(3, 2, device="meta"), 2)
    assert all(tensor.is_meta for part in params for tensor in part.values())


def test_one_member_is_told() -> None:
    with pytest.warns(UserWarning, match="E: got 1, and one member is no ensemble") as told:
        fe.batchensemble_params(small_net(), 1)
    assert told[0].filename == __file__ and len(told) == 1
