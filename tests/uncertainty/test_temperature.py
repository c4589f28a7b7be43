"""fit_temperature finds SciPy's minimum, keeps its bounds, and works under no_grad and inference_mode."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from cases import labelled
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_untouched, snapshot
from torch import Tensor

from functorch_ens.metrics import nll
from functorch_ens.uncertainty.temperature import fit_temperature


@given(case=labelled(), per_member=st.booleans())
@settings(max_examples=30)
def test_the_temperature_is_scipys_minimum(case: tuple[Tensor, Tensor], per_member: bool) -> None:
    logits, y = case
    before = snapshot((logits, y))
    temperatures = fit_temperature(logits, y, per_member=per_member)
    assert_untouched(before, (logits, y))
    assert temperatures.shape == ((len(logits),) if per_member else ())
    chosen = y.numpy().reshape(-1, 1).astype(int)
    for T, some in zip(temperatures.reshape(-1), logits.split(1) if per_member else [logits], strict=True):
        members = some.numpy().reshape(len(some), -1, some.shape[-1])

        def loss(log_t: Any, members: Any = members) -> Any:
            log_p = scipy.special.log_softmax(members / np.exp(log_t)[..., None, None, None], axis=-1)
            log_q = scipy.special.logsumexp(log_p, axis=-3, b=1 / len(members))
            return -np.take_along_axis(log_q, np.broadcast_to(chosen, (*log_q.shape[:-1], 1)), -1).mean((-1, -2))

        grid = np.linspace(-4.6, 4.6, 300)
        start = grid[loss(grid).argmin()]
        bounds = max(start - 0.1, -4.6), min(start + 0.1, 4.6)
        found = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        assert 0.01 <= T.item() <= 100
        assert loss(T.log().numpy()) <= found.fun + 1e-9
        if 0.02 < T.item() < 50:  # at a minimum inside the bounds the slope is 0
            log_t = T.log().requires_grad_()
            (slope,) = torch.autograd.grad(nll(some / log_t.exp(), y), log_t)
            assert abs(slope.item()) < 1e-7


def test_a_temperature_that_was_put_in_is_found() -> None:
    logits = 2 * torch.randn(4, 4000, 3)
    y = torch.distributions.Categorical(probs=logits.softmax(-1).mean(0)).sample()
    assert fit_temperature(logits, y).item() == pytest.approx(1, abs=0.1)
    assert fit_temperature(7 * logits, y).item() == pytest.approx(7 * fit_temperature(logits, y).item(), rel=1e-5)
    assert fit_temperature(logits, y, per_member=True).min() > 1.2  # one member alone is too sure


def test_the_temperature_of_a_nearly_flat_loss() -> None:
    """With 501 of 1000 correct, the NLL differs by less than 1e-6 between neighbours on the grid."""
    logits, y = torch.tensor([0.0, 0.2]).double().expand(1, 1000, 2), (torch.arange(1000) < 501).long()
    assert fit_temperature(logits, y).item() == pytest.approx(0.2 / math.log(501 / 499), rel=2e-5)


def test_the_temperature_of_all_right_and_all_wrong_is_bounded() -> None:
    certain, right = 9 * torch.eye(3)[None], torch.arange(3)
    wrong = (right + 1) % 3
    for logits, y, bound in ((certain, right, 0.01), (certain, wrong, 100.0), (1e4 * certain, wrong, 100.0)):
        T = fit_temperature(logits, y)
        assert T.item() == pytest.approx(bound, rel=0.5) and 0.01 <= T.item() <= 100
    assert fit_temperature(torch.zeros(2, 3, 4), y).isfinite()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_temperature_in_the_callers_no_grad(mode: Any) -> None:
    logits, y = torch.randn(2, 50, 3).requires_grad_(), torch.randint(3, (50,))
    want = fit_temperature(logits, y)
    with mode():
        got = fit_temperature(logits, y)
        again = fit_temperature(logits.double() * 1, y * 1, per_member=True)
    assert got.item() == want.item() and not want.requires_grad
    assert again.dtype == torch.float64 and fit_temperature(logits.bfloat16(), y).dtype == torch.bfloat16
    assert fit_temperature(logits.bfloat16(), y, per_member=True).dtype == torch.bfloat16


def test_the_temperature_with_classes_ruled_out() -> None:
    logits, y = torch.randn(2, 50, 3).double(), torch.randint(3, (50,))
    more = torch.cat([logits, torch.full((2, 50, 1), -math.inf)], -1)
    assert fit_temperature(more, y).item() == pytest.approx(fit_temperature(logits, y).item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"y: .* possible, got one whose logits are -inf in all members"):
        fit_temperature(more, torch.full((50,), 3))
