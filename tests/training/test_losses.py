"""The loss of every member: equal to the loss of one network, member by member."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor

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
    with pytest.raises(TypeError, match=r"values: expected a dict of tensors \[E, ...\], got \[1\]"):
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
