"""What is left where a torch lacks a private name that its own layers call: the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same, gradients, loop
from torch import nn

import functorch_ens as fe
from functorch_ens import _torch


def test_a_base_class_is_found_without_its_name() -> None:
    assert _torch.common_base(nn.Conv1d, nn.Conv2d).__name__ == "_ConvNd"
    assert _torch.common_base(nn.ConvTranspose1d, nn.ConvTranspose3d).__name__ == "_ConvTransposeNd"
    assert _torch.common_base(nn.BatchNorm1d, nn.InstanceNorm1d).__name__ == "_NormBase"
    assert _torch.common_base(nn.BatchNorm1d, nn.BatchNorm2d).__name__ == "_BatchNorm"
    assert _torch.common_base(nn.Linear, nn.Conv1d) is nn.Module


def _renamed(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str, method: Any) -> None:
    """Torch's `cls`, as if it had a private method under another name."""
    monkeypatch.setattr(cls, "_renamed", getattr(cls, name), raising=False)
    monkeypatch.setattr(cls, "forward", method)
    _without(monkeypatch, cls, name)


def _without(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> None:
    """Torch's `cls` and its bases without the method."""
    for base in cls.__mro__:
        if name in vars(base):
            monkeypatch.delattr(base, name)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_convolutions_with_a_renamed_method_are_multiplied_out(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self._renamed(x, self.weight, self.bias)

    _renamed(monkeypatch, nn.Conv1d, "_conv_forward", forward)
    model = nn.Conv1d(2, 3, 2, padding=1, padding_mode="circular").double()
    params, x = fe.batchensemble_params(model, 3), torch.randn(4, 2, 5, dtype=torch.float64)
    assert [row.rule for row in fe.describe(model, params).rows] == ["fallback", "none"]
    made = fe.make_forward(model, strategy=strategy)
    assert_same(made(params, x), loop(model, params, x))
    assert_same(gradients(made, params, x), gradients(lambda p, x: loop(model, p, x), params, x))


def test_transposed_convolutions_with_a_renamed_method_are_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        return torch.conv_transpose1d(x, self.weight, self.bias)

    _renamed(monkeypatch, nn.ConvTranspose1d, "_output_padding", forward)
    model = nn.ConvTranspose1d(2, 3, 2).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    for params in (fe.batchensemble_params(model, 3), fe.ensemble_params(model, 3)):
        assert_same(fe.make_forward(model)(params, x), loop(model, params, x))


def test_a_norm_with_a_renamed_check_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.BatchNorm1d(3, momentum=None).double().train()
    params, buffers = fe.ensemble_params(model, 2), fe.ensemble_buffers(model, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    want = fe.make_forward(model)(params, x, buffers=buffers)
    _without(monkeypatch, nn.BatchNorm1d, "_check_input_dim")
    got = fe.make_forward(model)(params, x, buffers=buffers)
    assert_same(got, want, tolerance=0)


def test_the_version_counter_of_a_tensor() -> None:
    tensor = torch.zeros(2)
    before = _torch.version(tensor)
    tensor.add_(1)
    assert _torch.version(tensor) == before + 1
    assert _torch.version(object()) == 0  # type: ignore[arg-type]  # a tensor of a torch that has no counter


def test_wrappers_of_transforms_are_told_apart() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((_torch.is_batched(x), _torch.is_under_vmap(x), _torch.inside_transform()))
        return x.sum()

    x = torch.ones(3, 2)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(x)
    torch.func.vmap(torch.func.grad(look))(x)
    assert seen == [
        (False, False, False),
        (True, True, True),
        (False, False, True),
        (True, True, True),
        (False, True, True),
    ]


def test_below_grad_is_the_tensor_that_grad_wraps() -> None:
    def look(x: torch.Tensor) -> torch.Tensor:
        below = _torch.below_grad(x)
        assert below is not x and torch.equal(below, torch.ones(2)) and not _torch.is_batched(below)
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    plain = torch.ones(2)
    assert _torch.below_grad(plain) is plain


@pytest.mark.parametrize("when", ["pre", "post"])
def test_without_the_registry_of_hooks_there_may_be_some(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    assert not _torch.has_step_hooks(optimizer)
    monkeypatch.setitem(_torch._private, ("torch.optim.optimizer", f"_global_optimizer_{when}_hooks"), None)
    assert _torch.has_step_hooks(optimizer)
