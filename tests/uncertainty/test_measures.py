"""The measures equal SciPy's member by member, keep their bounds, are numerically stable, and are pure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, compile_whole, snapshot
from torch import Tensor
from torch.func import grad, vmap

from functorch_ens.uncertainty.logits import shows_values
from functorch_ens.uncertainty.measures import (
    Uncertainty,
    classification_uncertainty,
    disagreement,
    mean_log_probs,
    mean_probs,
    pairwise_kl,
    regression_uncertainty,
)

OF_LOGITS: dict[str, Any] = {
    function.__name__: function
    for function in (mean_log_probs, mean_probs, classification_uncertainty, disagreement, pairwise_kl)
}
BY_ROW = [name for name in OF_LOGITS if name != "pairwise_kl"]


@st.composite
def _logits(draw: st.DrawFn) -> Tensor:
    """Draw logits `[E, ..., C]` in float64: members equal, similar or far apart, some with logits of -inf."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    between = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    E, C = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    logits = randn(*between, C) + draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e4])) * randn(E, *between, C)
    if draw(st.booleans()):
        ruled_out = torch.rand(logits.shape) < 0.3
        ruled_out[..., draw(st.integers(0, C - 1))] = False
        logits[ruled_out] = -math.inf
    return logits


def _scipy_mean_log_probs(logits: np.ndarray) -> Any:
    log_p = scipy.special.log_softmax(logits, axis=-1)
    return scipy.special.logsumexp(log_p, axis=0, b=1 / len(logits))


def _close(got: Tensor, want: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-10, atol=atol)


@given(logits=_logits())
def test_the_mean_prediction_is_scipys(logits: Tensor) -> None:
    with np.errstate(divide="ignore"):
        want = _scipy_mean_log_probs(logits.numpy())
    _close(mean_log_probs(logits), want)
    _close(mean_probs(logits), scipy.special.softmax(logits.numpy(), axis=-1).mean(0))


@given(logits=_logits())
def test_uncertainty_is_that_of_scipys_entropies(logits: Tensor) -> None:
    p = scipy.special.softmax(logits.numpy(), axis=-1)
    got = classification_uncertainty(logits)
    _close(got.total, scipy.stats.entropy(p.mean(0), axis=-1))
    _close(got.aleatoric, scipy.stats.entropy(p, axis=-1).mean(0))
    _close(got.epistemic, scipy.stats.entropy(p.mean(0), axis=-1) - scipy.stats.entropy(p, axis=-1).mean(0))


@given(logits=_logits(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_uncertainty_is_within_its_bounds(logits: Tensor, dtype: torch.dtype) -> None:
    total, aleatoric, epistemic = classification_uncertainty(logits.to(dtype))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (aleatoric >= 0).all() and (epistemic >= 0).all()
    assert (epistemic <= total).all() and (aleatoric <= total).all()
    rounding = 10 * torch.finfo(total.dtype).eps
    assert (total <= math.log(logits.shape[-1]) + rounding).all()
    assert (epistemic <= math.log(len(logits)) + rounding).all()


@given(E=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_members_that_agree_have_no_epistemic_uncertainty(E: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(4, 3).expand(E, 4, 3)
    assert (
        classification_uncertainty(logits).epistemic.max() < 1e-12
    )  # in float32: the rounding of each term is squared
    assert disagreement(logits).eq(0).all() and pairwise_kl(logits).eq(0).all()


@pytest.mark.parametrize(("E", "C"), [(1, 2), (2, 2), (3, 3), (4, 7)])
def test_members_certain_of_different_classes_have_no_aleatoric_uncertainty(E: int, C: int) -> None:
    got = classification_uncertainty(1e4 * torch.eye(C)[:E, None])
    _close(got.aleatoric, [0.0])
    torch.testing.assert_close(got.epistemic, torch.tensor([math.log(E)]))
    assert disagreement(1e4 * torch.eye(C)[:E, None]).item() == (E > 1)


def test_small_disagreement_survives_float32() -> None:
    """A difference of two entropies near 1 has no correct digit of a mutual information of 1e-7."""
    logits = (randn(1, 50, 4) + 3e-4 * randn(5, 50, 4)).float()
    got, want = classification_uncertainty(logits).epistemic, classification_uncertainty(logits.double()).epistemic
    assert want.max() < 2e-7
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=0)
    # Rounding of a member's log softmax, 1e-7, times the difference of the members' logits, 3e-4, bounds the error.
    kl = pairwise_kl(logits).double()
    torch.testing.assert_close(kl, pairwise_kl(logits.double()), rtol=0, atol=2e-8)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_extreme_logits_give_finite_values_and_gradients(name: str) -> None:
    for scale in (1e4, -1e4, 1e30):
        logits = (scale * torch.randn(3, 5, 4)).requires_grad_()
        values = torch.utils._pytree.tree_leaves(OF_LOGITS[name](logits))
        assert all(value.isfinite().all() for value in values)
        if name != "disagreement":
            sum(value.sum() for value in values).backward()
            assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mean_log_probs", "mean_probs", "classification_uncertainty", "pairwise_kl"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits = randn(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(OF_LOGITS[name], logits)
    assert torch.autograd.gradgradcheck(OF_LOGITS[name], logits)


@given(logits=_logits())
def test_gradients_are_those_of_the_plain_formulas(logits: Tensor) -> None:
    logits = logits.clamp(min=-30, max=30)  # beyond, the plain formulas lose their digits

    def plain(logits: Tensor) -> Uncertainty:
        p = logits.softmax(-1)
        total = torch.special.entr(p.mean(0)).sum(-1)
        aleatoric = torch.special.entr(p).sum(-1).mean(0)
        return Uncertainty(total, aleatoric, total - aleatoric)

    for part in Uncertainty._fields:
        got, want = (
            grad(lambda x, f=f, part=part: getattr(f(x), part).sum())(logits)
            for f in (classification_uncertainty, plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_class_that_all_rule_out_might_as_well_not_be_there() -> None:
    logits = randn(4, 6, 3)
    with_it = torch.cat([logits, torch.full((4, 6, 1), -math.inf, dtype=torch.float64)], -1).requires_grad_()
    assert_same(classification_uncertainty(with_it), classification_uncertainty(logits))
    assert_same(pairwise_kl(with_it), pairwise_kl(logits))
    assert mean_log_probs(with_it)[:, 3].eq(-math.inf).all() and mean_probs(with_it)[:, 3].eq(0).all()
    for function in (classification_uncertainty, pairwise_kl, mean_probs, lambda x: mean_log_probs(x)[:, :3]):
        leaves: Any = torch.utils._pytree.tree_leaves(function(with_it))
        (slope,) = torch.autograd.grad(sum((leaf**2).sum() for leaf in leaves), with_it)
        assert slope.isfinite().all() and slope[..., :3].abs().max() > 0 and slope[..., 3].eq(0).all()


@given(logits=_logits())
def test_pairwise_kl_is_scipys(logits: Tensor) -> None:
    p = scipy.special.softmax(logits.double().numpy(), axis=-1).reshape(len(logits), -1, logits.shape[-1])
    want = np.array([[scipy.special.rel_entr(a, b).sum(-1).mean() for b in p] for a in p])
    got = pairwise_kl(logits)
    assert (got >= 0).all() and got.diagonal().eq(0).all()
    impossible = torch.isneginf(logits).reshape(len(logits), -1)
    infinite = torch.stack([(~impossible[i] & impossible).any(1) for i in range(len(logits))])
    assert torch.equal(got.isinf(), infinite)
    # If a probability underflows, SciPy returns inf, but pairwise_kl computes the number from the logits.
    exact = torch.as_tensor(np.isfinite(want)) & ~infinite
    torch.testing.assert_close(got[exact], torch.as_tensor(want)[exact], rtol=1e-9, atol=1e-12)


def test_pairwise_kl_of_logits_too_far_apart_for_probabilities() -> None:
    _close(pairwise_kl(torch.tensor([[[0.0, 1e4]], [[1e4, 0.0]]]).double()), [[0, 1e4], [1e4, 0]])


def test_autocast_does_not_take_digits() -> None:
    logits = torch.randn(3, 200, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [OF_LOGITS[name](logits) for name in OF_LOGITS]
    assert_same(got, [OF_LOGITS[name](logits) for name in OF_LOGITS], tolerance=1e-6)


@given(logits=_logits())
def test_disagreement_counts_the_pairs(logits: Tensor) -> None:
    predicted, E = logits.argmax(-1), len(logits)
    pairs = [(i, j) for i in range(E) for j in range(E) if i != j]
    want = sum((predicted[i] != predicted[j]).double() for i, j in pairs) / max(len(pairs), 1)
    _close(disagreement(logits), want + torch.zeros(logits.shape[1:-1]))


@given(logits=_logits(), seed=st.integers(0, 2**16))
def test_the_order_of_the_members_does_not_matter(logits: Tensor, seed: int) -> None:
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    for name in BY_ROW:
        got = torch.utils._pytree.tree_leaves(OF_LOGITS[name](logits[order]))
        for mine, theirs in zip(got, torch.utils._pytree.tree_leaves(OF_LOGITS[name](logits)), strict=True):
            _close(mine, theirs)
    _close(pairwise_kl(logits[order]), pairwise_kl(logits)[order][:, order])


@given(logits=_logits(), size=st.integers(1, 3))
def test_chunks_of_the_batch_are_the_whole(logits: Tensor, size: int) -> None:
    flat = logits.flatten(1, -2)
    for name in BY_ROW:
        whole = torch.utils._pytree.tree_leaves(OF_LOGITS[name](logits))
        chunks = [torch.utils._pytree.tree_leaves(OF_LOGITS[name](chunk)) for chunk in flat.split(size, 1)]
        for mine, theirs in zip(zip(*chunks, strict=True), whole, strict=True):
            axes = 2 if name.startswith("mean") else 1
            _close(torch.cat(mine), theirs.reshape(-1, *theirs.shape[theirs.ndim + 1 - axes :]))


@given(E=st.integers(1, 5), B=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_regression_uncertainty_is_the_law_of_total_variance(E: int, B: int, seed: int) -> None:
    torch.manual_seed(seed)
    outputs = 3 * randn(E, B, 2)
    means, variances = outputs[..., 0].numpy(), np.exp(outputs[..., 1].numpy())
    mean, parts = regression_uncertainty(outputs)
    _close(mean, means.mean(0))
    _close(parts.aleatoric, variances.mean(0))
    _close(parts.epistemic, means.var(0))
    _close(parts.total, (variances + means**2).mean(0) - means.mean(0) ** 2, atol=1e-9)
    alone, of_means = regression_uncertainty(outputs[..., 0])
    _close(alone, means.mean(0))
    assert of_means.aleatoric.eq(0).all() and torch.equal(of_means.total, of_means.epistemic)
    _close(of_means.epistemic, means.var(0))
    assert torch.autograd.gradcheck(lambda x: regression_uncertainty(x)[1], outputs.requires_grad_())


@pytest.mark.parametrize("name", OF_LOGITS)
def test_compiled_and_under_transforms_as_eager(name: str) -> None:
    function = OF_LOGITS[name]
    logits = randn(2, 3, 5, 4)
    logits[0, 1, :, 2] = -math.inf
    want = [function(one) for one in logits]
    stacked = torch.utils._pytree.tree_map(lambda *each: torch.stack(each), *want)
    assert_same(vmap(function)(logits), stacked)
    assert_same(compile_whole(function)(logits[0]), want[0])

    def total(one: Tensor) -> Tensor:
        return sum((leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(function(one))), torch.zeros(()))

    if name != "disagreement":
        one = randn(3, 5, 4)
        assert_same(compile_whole(grad(total))(one), grad(total)(one))
        assert_same(vmap(grad(total))(one[None])[0], grad(total)(one))


def test_regression_compiled_and_under_vmap_as_eager() -> None:
    outputs = randn(4, 3, 5, 2)
    want = regression_uncertainty(outputs[0])
    assert_same(compile_whole(regression_uncertainty)(outputs[0]), want)
    assert_same(torch.utils._pytree.tree_map(lambda each: each[0], vmap(regression_uncertainty)(outputs)), want)


def test_regression_uncertainty_of_half_precision_is_of_float32() -> None:
    outputs = torch.randn(3, 5, 2).bfloat16()
    assert_same(regression_uncertainty(outputs), regression_uncertainty(outputs.float()), tolerance=0)


def test_arguments_are_untouched() -> None:
    logits, outputs = randn(3, 5, 4), randn(3, 5, 2)
    before = snapshot((logits, outputs))
    for function in OF_LOGITS.values():
        function(logits)
    regression_uncertainty(outputs)
    assert_untouched(before, (logits, outputs))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_bad_logits_are_named(name: str) -> None:
    function = OF_LOGITS[name]
    for logits, error, message in (
        ([[1.0]], TypeError, "logits: expected a floating tensor, got list"),
        (torch.zeros(3, 4, 5, dtype=torch.long), TypeError, "logits: .* got one of torch.int64"),
        (torch.zeros(4, 5), ValueError, r"logits: expected members first, .*logits\[None\]; got shape \[4, 5\]"),
        (torch.zeros(0, 4, 5), ValueError, r"logits: .*at least one member and one input, got shape \[0, 4, 5\]"),
        (torch.zeros(3, 0, 5), ValueError, r"logits: .*at least one member and one input, got shape \[3, 0, 5\]"),
        (torch.zeros(3, 4, 1), ValueError, r"logits: expected at least 2 classes .*\[3, 4, 1\]; .*sigmoid"),
    ):
        with pytest.raises(error, match=message):
            function(logits)
    strange = torch.zeros(4, 2, 3)
    strange[1, 0, 2], strange[3, 1, 0], strange[0, 0, 0], strange[2, 1] = math.nan, math.nan, math.inf, -math.inf
    message = r"logits: .*got nan in the members \[1, 3\], inf in .* \[0\], -inf for all classes in .* \[2\]"
    for call in (lambda: function(strange), lambda: grad(lambda x: function(x)[0].sum())(strange)):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_regression_outputs_are_named() -> None:
    nothing: Any = None
    for outputs, error, message in (
        (nothing, TypeError, "outputs: expected a floating tensor, got NoneType"),
        (torch.zeros(3, 4, dtype=torch.int32), TypeError, "outputs: .*torch.int32"),
        (torch.zeros(4), ValueError, r"outputs: expected \[E, B, 2\], .*or \[E, B\].*got shape \[4\]"),
        (torch.zeros(3, 4, 1), ValueError, r"outputs: .*got shape \[3, 4, 1\]"),
        (torch.zeros(0, 4), ValueError, r"outputs: .*at least one member and one input, got shape \[0, 4\]"),
        (torch.zeros(3, 0, 2), ValueError, r"outputs: .*got shape \[3, 0, 2\]"),
        (torch.tensor([[0.0], [math.inf]]), ValueError, r"outputs: .*finite.*members \[1\]"),
    ):
        with pytest.raises(error, match=message):
            regression_uncertainty(outputs)


def test_whether_values_can_be_seen() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(shows_values(x))
        return x.sum()

    x = torch.ones(2, 3)
    look(x), grad(look)(x), vmap(look)(x), vmap(grad(look))(x), look(x.to("meta"))
    grad(lambda x: vmap(look)(x).sum())(x)
    assert seen == [True, True, False, False, False, False]
