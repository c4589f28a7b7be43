"""The loss of every member: equal to the loss of one network, member by member."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor
from torch.func import grad, vmap

import functorch_ens as fe


def test_the_losses_of_an_output_that_is_a_tree() -> None:
    logits, hidden = randn(3, 5, 4), randn(3, 5, 2)
    outputs = {"logits": logits, "hidden": (hidden, None)}
    y, weight = torch.randint(4, (5,)), randn(5).abs()

    def loss(output: Any, y: Tensor, weight: Tensor) -> Tensor:
        assert output["hidden"][1] is None
        each = F.cross_entropy(output["logits"], y, reduction="none")
        return (each * weight).sum() + output["hidden"][0].square().sum()

    each = [loss({"logits": a, "hidden": (b, None)}, y, weight) for a, b in zip(logits, hidden, strict=True)]
    assert_same(fe.member_losses(loss, outputs, y, weight), torch.stack(each))
    many = torch.randint(4, (3, 5))
    want = torch.stack([F.cross_entropy(logits[i], many[i]) for i in range(3)])
    assert_same(fe.member_losses(F.cross_entropy, logits, many, member_targets=True), want)


@given(E=st.integers(1, 4), B=st.integers(1, 5), C=st.integers(1, 5), own_labels=st.booleans(), seed=st.integers(0, 99))
def test_hyperparameters_of_each_member_are_those_of_separate_losses(
    E: int, B: int, C: int, own_labels: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = randn(E, B, C).requires_grad_()
    y = torch.randint(C, (E, B) if own_labels else (B,))
    smoothing, temperature = torch.rand(E, dtype=torch.float64) * 0.9, 0.2 + torch.rand(E, dtype=torch.float64)
    got = fe.member_losses(
        fe.cross_entropy,
        logits,
        y,
        member_targets=own_labels,
        values={"label_smoothing": smoothing, "temperature": temperature},
    )
    want = torch.stack(
        [
            F.cross_entropy(logits[i] / temperature[i], y[i] if own_labels else y, label_smoothing=smoothing[i].item())
            for i in range(E)
        ]
    )
    assert_same(got.detach(), want.detach())
    assert_same(torch.autograd.grad(got.sum(), logits), torch.autograd.grad(want.sum(), logits))


def test_cross_entropy_is_torchs() -> None:
    logits, y = randn(6, 4), torch.randint(4, (6,))
    assert_same(fe.cross_entropy(logits, y), F.cross_entropy(logits, y))
    want = F.cross_entropy(logits / 2, y, label_smoothing=0.1)
    assert_same(fe.cross_entropy(logits, y, label_smoothing=0.1, temperature=2.0), want)


def test_labels_that_are_left_out_and_positions() -> None:
    logits, y = randn(6, 4, 3), torch.randint(4, (6, 3))
    y[::2, 1] = -100
    for smoothing in (0.0, 0.2):
        want = F.cross_entropy(logits, y, label_smoothing=smoothing)
        assert_same(fe.cross_entropy(logits, y, label_smoothing=smoothing), want)
    stacked = torch.stack([logits, 2 * logits])
    want = torch.stack([F.cross_entropy(each, y) for each in stacked])
    assert_same(fe.member_losses(F.cross_entropy, stacked, y), want)
    y[5, 2] = 9
    with pytest.raises(ValueError, match=r"labels: expected 0 <= y < 4, .* got 9 at \[5, 2\]"):
        fe.member_losses(F.cross_entropy, stacked, y)


def test_bad_arguments() -> None:
    logits, y = randn(2, 5, 3), torch.zeros(5, dtype=torch.long)
    for label in (3, -1):
        wrong = y.clone()
        wrong[4] = label
        with pytest.raises(ValueError, match=rf"labels: expected 0 <= y < 3, .* got {label} at \[4\]"):
            fe.member_losses(F.cross_entropy, logits, wrong)
    with pytest.raises(ValueError, match=r"labels: expected 0 <= y < 3, .* got 7 at \[1, 2\]"):
        many = torch.zeros(2, 5, dtype=torch.long)
        many[1, 2] = 7
        fe.member_losses(F.cross_entropy, logits, many, member_targets=True)
    with pytest.raises(ValueError, match=r"outputs: an empty batch has no loss, got the shapes \[\[2, 0, 3\]\]"):
        fe.member_losses(F.cross_entropy, logits[:, :0], y[:0])
    with pytest.raises(ValueError, match=r"values\['label_smoothing'\]: expected \[2, ...\], .* got the shape \[3\]"):
        fe.member_losses(fe.cross_entropy, logits, y, values={"label_smoothing": torch.zeros(3)})
    with pytest.raises(TypeError, match=r"values\['temperature'\]: expected a tensor \[2, ...\], .* got 1.0"):
        fe.member_losses(fe.cross_entropy, logits, y, values={"temperature": 1.0})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"values: expected a dict of tensors \[E, ...\], got list"):
        fe.member_losses(fe.cross_entropy, logits, y, values=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss: expected a tensor, got 1.0"):
        fe.member_losses(lambda output, y: 1.0, logits, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outputs: .* got the shapes \[\[2, 5, 3\], \[4\]\]"):
        fe.member_losses(F.mse_loss, (logits, torch.ones(4)), y)
    with pytest.raises(ValueError, match=r"outputs: .* members first, .* got outputs \[5, 3\] and a target \[5\]"):
        fe.member_losses(F.cross_entropy, logits[0], y)
    with pytest.raises(TypeError) as caught:
        fe.member_losses(F.cross_entropy, logits, y, values={"label_smoothing": torch.zeros(2, 2)})
    assert any("functorch_ens.cross_entropy can" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 <= it <= 1, got 1.5"):
        fe.cross_entropy(logits[0], y, label_smoothing=1.5)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        fe.cross_entropy(logits[0], y, temperature=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_out", ["none", "some", "all"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_classes_that_are_ruled_out(dtype: torch.dtype, left_out: str, shape: tuple[int, ...]) -> None:
    y = torch.randint(3, (4, *shape[2:]))
    logits = randn(*shape).to(dtype).scatter(1, ((y + 1) % 3).unsqueeze(1), -math.inf)
    y[: {"none": 0, "some": 2, "all": 4}[left_out]] = -100

    def same(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
        torch.testing.assert_close(got, want, equal_nan=True)
        slopes = [torch.autograd.grad(value, leaf) for value, leaf in zip((got, want), leaves, strict=True)]
        torch.testing.assert_close(*slopes, equal_nan=True)

    for smoothing in (0.0, 0, 0.1):
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        same(fe.cross_entropy(a, y, label_smoothing=smoothing), F.cross_entropy(b, y, label_smoothing=smoothing), a, b)
        of_tensor = torch.tensor(smoothing, dtype=dtype)
        same(fe.cross_entropy(a, y, label_smoothing=of_tensor), F.cross_entropy(b, y, label_smoothing=smoothing), a, b)
    values = {
        "label_smoothing": torch.tensor([0, 0.1, 0], dtype=dtype),
        "temperature": torch.tensor([1, 2, 4]).to(dtype),
    }
    a, b = (torch.stack([logits, logits + 1, logits - 1]).requires_grad_() for _ in range(2))
    each = zip(b, values["label_smoothing"], values["temperature"], strict=True)
    want = torch.stack([F.cross_entropy(x / T, y, label_smoothing=smoothing.item()) for x, smoothing, T in each])
    some = [0, 2] if left_out != "all" else [0]  # the loss of the other is inf
    same(fe.member_losses(fe.cross_entropy, a, y, values=values)[some].sum(), want[some].sum(), a, b)
    assert fe.cross_entropy(torch.tensor([[0, 1, -math.inf]]), torch.tensor([0])).item() == pytest.approx(
        1.3133, abs=1e-4
    )


def test_a_temperature_has_a_gradient_where_a_class_is_ruled_out() -> None:
    logits, y = torch.tensor([[0, 1, -math.inf]], dtype=torch.float64), torch.tensor([0])
    temperature = torch.tensor(2.0, dtype=torch.float64)
    got = grad(lambda T: fe.cross_entropy(logits, y, temperature=T))(temperature)
    assert_same(got, grad(lambda T: F.cross_entropy(logits[:, :2] / T, y))(temperature))


def test_a_random_loss_by_the_loop_differs_between_members() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output.sum().item() * 0 + output * torch.rand(5)).sum()

    losses = fe.member_losses(loss, torch.ones(3, 5), torch.ones(5))
    torch.manual_seed(0)
    assert_same(losses, torch.stack([torch.rand(5).sum() for _ in range(3)]))


INNER: dict[str, Any] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce": lambda output, y: F.binary_cross_entropy_with_logits(output, y.sigmoid()),
    "poisson": F.poisson_nll_loss,
    "whole": lambda output, y: F.mse_loss(output, y.long()),
    "cross_entropy": lambda output, y: F.cross_entropy(torch.stack([output, -output], 1), (y > 0).long()),
}


def _nested(name: str, E: int, own: tuple[bool, bool], compiled: bool) -> None:
    """`member_losses` and its gradient under a vmap over samples, against a loop over both."""
    loss = INNER[name]
    outputs, y = randn(4, E, 5), randn(4, 5)
    given = (outputs if own[0] else outputs[0], y if own[1] else y[0])

    def total(outputs: Tensor, y: Tensor) -> Tensor:
        return fe.member_losses(loss, outputs, y).square().sum()

    axes = (0 if own[0] else None, 0 if own[1] else None)

    def both(outputs: Tensor, y: Tensor) -> Any:
        losses = vmap(lambda outputs, y: fe.member_losses(loss, outputs, y), in_dims=axes)(outputs, y)
        return losses, vmap(grad(total), in_dims=axes)(outputs, y)

    got, slopes = (torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both)(*given)
    for k in range(4):
        leaf = (given[0][k] if own[0] else given[0]).clone().requires_grad_()
        want = torch.stack([loss(one, given[1][k] if own[1] else given[1]) for one in leaf])
        assert_same(got[k], want.detach())
        assert_same(slopes[k], torch.autograd.grad(want.square().sum(), leaf)[0])


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's own, of huber_loss
@pytest.mark.parametrize("own", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("name", INNER)
def test_inside_another_vmap(name: str, E: int, own: tuple[bool, bool]) -> None:
    _nested(name, E, own, compiled=False)


@pytest.mark.parametrize("own", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("name", [name for name in INNER if name != "whole"])
def test_compiled_inside_another_vmap(name: str, E: int, own: tuple[bool, bool]) -> None:
    _nested(name, E, own, compiled=True)
