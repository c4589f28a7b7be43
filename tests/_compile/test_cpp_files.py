"""Kernels in common files: the same results, as few files as processes, and torch's own way where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import compiler
from torch import Tensor

from functorch_ens._compile import cpp_files as kernels
from functorch_ens._compile.cpp_files import with_joined_kernels

pytestmark = pytest.mark.skipif(compiler() != "inductor", reason="it is about files of C++")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are compiled, by two processes, with nothing in it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "get_compile_threads", lambda: 2)
    return tmp_path


def _three(x: Tensor) -> Tensor:
    """Kernels of three kinds, kept apart by products of matrices."""
    return ((x.sin() @ x).relu() @ x).softmax(-1).sum()


def _files(folder: Path, join: Callable[..., Any] = with_joined_kernels) -> list[str]:
    """What a compilation has written to `folder`; its result is right."""
    torch._dynamo.reset()
    x = torch.rand(20, 20)
    torch.testing.assert_close(join(torch.compile(_three, fullgraph=True))(x), _three(x))
    return [path.read_text() for path in sorted(folder.rglob("*.main.cpp"))]


def _by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def test_as_many_files_as_processes(folder: Path) -> None:
    texts = _files(folder)
    assert len(texts) == 2
    assert sorted(text.count("PyInit_kernel") for text in texts) == [1, 2]


def test_what_is_compiled_outside_of_it_is_left_to_torch(folder: Path) -> None:
    with_joined_kernels(lambda: None)()
    assert len(_files(folder, _by_torch)) == 3


def test_one_process_is_left_to_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "get_compile_threads", lambda: 1)
    assert len(_files(folder)) == 3


def test_later_shapes_are_joined_too(folder: Path) -> None:
    function = with_joined_kernels(torch.compile(_three, dynamic=False))
    for size in (24, 28):
        x = torch.rand(size, size)
        torch.testing.assert_close(function(x), _three(x))
    assert len(list(folder.rglob("*.main.cpp"))) == 4


def test_kernels_that_cannot_be_joined_are_compiled_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = kernels._joined
    monkeypatch.setattr(kernels, "_joined", lambda texts: joined(texts) + "\n#error not like this\n")
    assert len(_files(folder)) == 2 + 3


def test_a_torch_that_has_it_otherwise_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: Any, **__: Any) -> Any:
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(kernels._Kernels, "add", changed)
    assert len(_files(folder)) == 3


def test_an_error_leaves_the_next_compilation_to_torch(folder: Path) -> None:
    def fails() -> None:
        raise KeyError("in a call")

    with pytest.raises(KeyError):
        with_joined_kernels(fails)()
    assert len(_files(folder, _by_torch)) == 3


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12), count=st.integers(1, 5))
def test_texts_are_shared_out_evenly(lengths: list[int], count: int) -> None:
    texts = {number: "x" * length for number, length in enumerate(lengths)}
    parts = kernels._shared_out(texts, count)
    assert sorted(number for part in parts for number in part) == sorted(texts)
    sizes = [sum(len(text) for text in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= max(lengths)
    assert 0 < len(parts) <= count


def test_includes_come_first_and_once() -> None:
    texts = {0: "#include <a>\nkernel()\n", 3: '  #include <a>\n# include "b"\nkernel()\n'}
    lines = kernels._joined(texts).splitlines()
    assert lines[: lines.index("#define kernel kernel0")] == ["#include <a>", '# include "b"']
    assert sum("include" in line for line in lines) == 2
    assert "namespace part3 {" in lines
