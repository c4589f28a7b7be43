"""A checkpoint is written whole or not at all, and loads with the same values and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same
from torch import nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    params = fe.batchensemble_params(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 2)).to(torch.bfloat16), 3)
    optimizer = torch.optim.AdamW(fe.param_groups(params, lr=0.1))
    state = {
        "params": params,
        "optimizer": optimizer.state_dict(),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "history": [{"loss": torch.ones(3)}],
        "stopped": {2: "no better"},
        "nothing": None,
    }
    fe.save_checkpoint(state, tmp_path / "new" / "run.pt")
    again = fe.load_checkpoint(tmp_path / "new" / "run.pt")
    assert isinstance(again["params"], fe.EnsembleParams)
    assert_same(again["params"], params)
    assert all(tensor.dtype == torch.bfloat16 and tensor.requires_grad for tensor in tree_leaves(again["params"]))
    assert again["optimizer"] == state["optimizer"]
    assert again["stopped"] == {2: "no better"} and again["nothing"] is None
    assert torch.equal(again["generator"], state["generator"])  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.pt"]


def test_an_interrupted_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    fe.save_checkpoint({"epoch": 1}, path)

    def interrupted(state: Any, file: str) -> None:
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fe.save_checkpoint({"epoch": 2}, path)
    assert fe.load_checkpoint(path) == {"epoch": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]


class _Opens:
    """Its pickle calls print when it is loaded."""

    def __reduce__(self) -> Any:
        return print, ("code in a checkpoint ran",)


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(FileNotFoundError, match=r"run.pt"):
        fe.load_checkpoint(path)
    path.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"path: '.*run.pt' is no checkpoint that can be read"):
        fe.load_checkpoint(path)
    torch.save({"a": _Opens()}, path)
    with pytest.raises(ValueError, match=r"path: '.*run.pt' is no checkpoint that can be read"):
        fe.load_checkpoint(path)
    assert "ran" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"path: '.*run.pt' holds no dict, but list"):
        fe.load_checkpoint(path)
    fe.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(TypeError, match=r"state: expected tensors, numbers and text in dicts and lists: "):
        fe.save_checkpoint({"lr": np.float64(0.1)}, path)
    assert fe.load_checkpoint(path) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError, match="state: expected a dict, got list"):
        fe.save_checkpoint([1], path)  # type: ignore[arg-type]  # that is the test
