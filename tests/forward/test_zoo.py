"""Every layer of torch.nn, the ways models are written, random models and a sample of torchvision, as ensembles."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import random_models
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, both_kinds, gradients_of, loop, member_weights, snapshot, tensors_of
from plain import member_loss, plain_members
from sample import Sample
from torch import Tensor, nn
from zoo import NOT_LAYERS, Case, cases, exact, torchvision_names

import functorch_ens as fe

pytestmark = [
    # Dynamo reads the .grad of every tensor that it wraps.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # torch says of an operator without a derivative of its own that its kernel is differentiated.
    pytest.mark.filterwarnings("ignore:functorch_ens_zoo"),
]


def test_every_layer_of_torch_nn_is_in_the_zoo() -> None:
    tried = {case.name.partition(",")[0] for case in cases("nn")}
    missing = set(nn.modules.__all__) - NOT_LAYERS - tried
    assert not missing
    assert len(torchvision_names("classification")) >= 80


def _check(
    sample: Sample, params: fe.EnsembleParams, *options: dict[str, Any], tolerance: float | None = None
) -> list[fe.Forward]:
    """Compare a forward with each of the `options` with the plain loop, which is computed once.

    Outputs, new buffers and gradients are equal, nothing is written to, and a second call finds no cache of the first.
    """
    model, args, kwargs = sample
    buffers = fe.ensemble_buffers(model, params.E)
    before = snapshot(model, params, buffers, args)

    def call(forward: Any) -> Any:
        torch.manual_seed(1)
        return forward(params, *args, buffers=buffers, **kwargs)

    want = call(partial(loop, model, seed=1))
    want_gradients = gradients_of(want, params)
    forwards = [fe.make_forward(model, randomness="same", **each) for each in options]
    for forward in forwards:
        assert_same(call(forward), want, tolerance)
        assert_same(gradients_of(call(forward), params), want_gradients, tolerance)
        assert_untouched(before, model, params, buffers, args)
    return forwards


def _check_step(sample: Sample, params: fe.EnsembleParams) -> None:
    """Compare the gradients of a train step, not compiled, with those of the plain loop's summed losses."""
    model, args, kwargs = sample
    buffers = fe.ensemble_buffers(model, params.E)
    trained = {name: tensor for name, tensor in tensors_of(params).items() if tensor.requires_grad}
    forward = fe.make_forward(model, randomness="same")
    step = fe.make_train_step(forward, member_loss, torch.optim.SGD(trained.values()), compile=False)
    torch.manual_seed(1)
    found = step.gradients(params, *args, torch.zeros(()), buffers=buffers, **kwargs)
    weights = [member_weights(model, params, i) for i in range(params.E)]
    outputs, _ = plain_members(model, weights, buffers, args, kwargs, seed=1)
    losses = torch.stack([member_loss(output) for output in outputs])
    assert_same(found.losses, losses.detach().to(found.losses))
    losses.sum().backward()  # autograd.grad() fails with reentrant checkpointing
    want = {name: torch.zeros_like(x) if x.grad is None else x.grad.to_dense() for name, x in trained.items()}
    for tensor in trained.values():
        tensor.grad = None
    assert_same(found.gradients, want)


# The models of the zoo that `strategy="auto"` runs one member after another. It runs all others by vmap.
_BY_LOOP = (
    "RNN",
    "GRU",
    "LSTM",
    "RReLU",
    "CrossMapLRN2d",
    "AdaptiveLogSoftmaxWithLoss",
    "data-dependent control flow",
    "hooks",
    "spectral_norm, old",
    "scales a gradient",
    "scales a gradient, in a forward hook",
    "set_grad_enabled by a weight",
    "detaches what has no grad_fn",
    "detaches leaves",
    "retain_grad",
    "a hook on a weight",
    "forces",
    "autograd.Function, old",
    "autograd.Function, new",
    "index_fill, a member's number",
    "select_scatter, a member's column",
    "pow_ by a tensor",
    "fork_rng, manual_seed, rand_like",
    "fork_rng, manual_seed, dropout",
)


@pytest.mark.parametrize("case", [*cases("nn"), *cases("written")], ids=lambda case: case.name)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_every_model_equals_the_plain_loop(case: Case, train: bool) -> None:
    sample = exact(case)
    model, args, kwargs = sample
    model.train(train)
    kinds = both_kinds(model, 3)
    for params in kinds:
        _check(sample, params, {"strategy": "auto"}, {"strategy": "loop"})
        _check_step(sample, params)
    if train:
        forward = fe.make_forward(model)  # with its default, random numbers that differ between members
        forward(kinds[0], *args, buffers=fe.ensemble_buffers(model, 3), **kwargs)
        by_loop = case.name in _BY_LOOP or case.name.partition(",")[0] in _BY_LOOP[:6]
        assert forward.strategy == ("loop" if by_loop else "vmap"), forward.reason


@settings(max_examples=40)
@given(
    case=random_models,
    E=st.integers(1, 3),
    train=st.booleans(),
    strategy=st.sampled_from(["auto", "loop"]),
    chunk=st.sampled_from([None, 1, 2]),
    batchensemble=st.booleans(),
)
def test_random_models_equal_the_plain_loop(
    case: Any, E: int, train: bool, strategy: str, chunk: int | None, batchensemble: bool
) -> None:
    case.model.train(train)
    params = both_kinds(case.model, E)[batchensemble]
    _check(Sample(case.model, case.args, {}), params, {"strategy": strategy, "chunk_size": chunk})


@settings(max_examples=15)
@given(case=random_models, E=st.integers(1, 3), data=st.data())
def test_random_models_with_any_part_stacked(case: Any, E: int, data: st.DataObject) -> None:
    names = [name for name, _ in case.model.named_parameters()]
    owned = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    _check(Sample(case.model, case.args, {}), fe.batchensemble_params(case.model, E, stacked=owned), {})


_TORCHVISION = {
    "classification": ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1"],
    "segmentation": ["lraspp_mobilenet_v3_large"],
    "optical_flow": ["raft_small"],
    "detection": ["ssdlite320_mobilenet_v3_large"],
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in _TORCHVISION.items() for name in names]
)
def test_a_sample_of_torchvision(family: str, name: str) -> None:
    """One of each family; benchmarks/model_coverage.py tries them all."""
    (case,) = (case for case in cases(family) if case.name == name)
    sample = case.make() if family == "optical_flow" else exact(case)  # RAFT computes in float32, whatever it is given
    params = fe.batchensemble_params(sample.model, 2, r_std=0.1, s_std=0.1)
    tolerance = 1e-2 if family == "optical_flow" else 1e-6
    (forward,) = _check(sample, params, {}, tolerance=tolerance)
    assert forward.strategy == ("loop" if family == "detection" else "vmap")


def test_detections_come_as_lists() -> None:
    """Every member finds its own number of boxes, so they come as a list of E tensors."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(2, 1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": image[self.score(image)[:, 0] > 0], "mean": image.mean(0)} for image in images]

    model = Detector()
    images = [torch.randn(9, 2), torch.randn(5, 2)]
    params = fe.ensemble_params(model, 4)
    for options in ({}, {"strategy": "loop"}, {"strategy": "loop", "chunk_size": 1}):
        found = fe.make_forward(model, **options)(params, images)
        assert len(found) == 2
        for image, answer in zip(images, found, strict=True):
            assert isinstance(answer["boxes"], list) and len(answer["boxes"]) == 4
            assert len({len(boxes) for boxes in answer["boxes"]}) > 1  # else nothing is shown
            assert answer["mean"].shape == (4, 2)
            for i, boxes in enumerate(answer["boxes"]):
                weights = fe.member_params(model, params, i)
                alone = torch.func.functional_call(model, weights, ([image],))
                assert torch.equal(boxes, alone[0]["boxes"])
