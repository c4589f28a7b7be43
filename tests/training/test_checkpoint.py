"""A checkpoint is written whole or not at all, and loads with the same values and types."""

from __future__ import annotations

import errno
import logging
import random
import resource
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

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


def _small() -> dict[str, Any]:
    torch.manual_seed(0)
    params = fe.batchensemble_params(nn.Linear(3, 2), 2)
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.1))
    return {"params": params, "epoch": 3, "optimizer": optimizer.state_dict()}


def _equal(got: Any, want: Any) -> bool:
    """Whether two states are the same to the last bit."""
    mine, theirs = tree_flatten(got), tree_flatten(want)
    return mine[1] == theirs[1] and all(
        torch.equal(a, b) and (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else (type(a), a) == (type(b), b)
        for a, b in zip(mine[0], theirs[0], strict=True)
    )


def _damaged(data: bytes, draw: random.Random, times: int) -> Iterator[tuple[str, bytes]]:
    """`times` damages of each kind."""
    for _ in range(times):
        at, length = draw.randrange(len(data)), draw.choice([1, 2, 8, 64, 512])
        yield "truncated", data[:at]
        yield "zeroed", data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        yield "inserted", data[:at] + draw.randbytes(length) + data[at:]
        yield "removed", data[:at] + data[at + length :]
        yield "overwritten", data[:at] + draw.randbytes(length) + data[at + length :]


def _flipped(data: bytes, bits: Any) -> Iterator[tuple[str, bytes]]:
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


def _check_all(tmp_path: Path, bits: int | None, times: int) -> Counter[str]:
    """Every damage is a ValueError that names the file, or the state is equal to the last bit."""
    path = tmp_path / "run.pt"
    fe.save_checkpoint(_small(), path)
    data, want, found = path.read_bytes(), fe.load_checkpoint(path), Counter[str]()
    draw = random.Random(5)
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    entries = [i for i in range(start, len(data)) if data[i : i + 4] == b"PK\1\2"]
    folders = [8 * (i + 38) + 4 for i in entries]  # the bits that make an entry a folder, to torch's reader alone
    chosen = range(8 * len(data)) if bits is None else [*draw.sample(range(8 * len(data)), bits), *folders]
    for what, damaged in [*_flipped(data, chosen), *_damaged(data, draw, times)]:
        path.write_bytes(damaged)
        try:
            got = fe.load_checkpoint(path)
        except ValueError as error:
            assert repr(str(path)) in str(error)
            found["noticed"] += 1
        else:
            assert _equal(got, want), f"{what}: other values, and no error"
            found["harmless"] += 1
    return found


def test_damage_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    found = _check_all(tmp_path, 120, 12)
    assert found["noticed"] > 100 and found["harmless"] > 10  # bytes between the entries hold nothing


def test_every_bit_that_flips_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    assert _check_all(tmp_path, None, 100)["noticed"] > 15_000


def test_files_without_checksums_load_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, path = _small(), tmp_path / "run.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as torch did before 1.6
    assert _equal(fe.load_checkpoint(path), state) and not caplog.records
    torch.serialization.set_crc32_options(False)
    try:
        fe.save_checkpoint(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with caplog.at_level(logging.WARNING, logger="functorch_ens"):
        assert _equal(fe.load_checkpoint(path), state)
    assert "run.pt: has no checksums" in caplog.text


class _Own:
    """A class that the user lets torch load."""


def test_torch_load_reads_params_and_the_users_classes_stay_allowed(tmp_path: Path) -> None:
    state, path = _small(), tmp_path / "run.pt"
    torch.save(state["params"], path)
    assert _equal(torch.load(path), state["params"])
    torch.save({"own": _Own(), **state}, path)

    def save_and_load(i: int) -> bool:
        fe.save_checkpoint(state, tmp_path / f"{i}.pt")
        return _equal(fe.load_checkpoint(tmp_path / f"{i}.pt"), state)

    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([_Own]):
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(save_and_load, range(40)))
        assert isinstance(fe.load_checkpoint(path)["own"], _Own)
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([fe.EnsembleParams]):
        pass  # takes it off the list
    assert save_and_load(0)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: both stop torch's writer, which does not say why."""
    path = tmp_path / "run.pt"
    fe.save_checkpoint({"epoch": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match=r"File too large: '.*/run\.pt'") as caught:
            fe.save_checkpoint({"weight": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert fe.load_checkpoint(path) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_pickled_is_a_type_error(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (lambda: 3, deep, iter([1]), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="state: expected tensors, numbers and text"):
            fe.save_checkpoint({"value": value}, tmp_path / "run.pt")
    with pytest.raises(IsADirectoryError):
        fe.load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="path: expected the path of a file, got 3"):
        fe.load_checkpoint(3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


_INTERRUPTED = """
import os, random, signal, sys, torch, functorch_ens as fe
signal.signal(signal.SIGALRM, signal.default_int_handler)
state = {f"w{i}": torch.ones(200) for i in range(40)}
draw, count = random.Random(0), 0
for path in sys.argv[2:]:
    fe.save_checkpoint({"n": -1, **state}, path)
    for n in range(int(sys.argv[1])):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, 0.01))
                fe.save_checkpoint({"n": n, **state}, path)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            count += 1
        found = fe.load_checkpoint(path)
        assert len(found) == 41 and found["n"] <= n
    fe.save_checkpoint({"n": -1}, path)  # removes what an interrupt during the removal has left
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(count)
"""


def test_an_interrupt_during_a_save_is_an_interrupt(tmp_path: Path) -> None:
    """It neither aborts the process nor becomes another error, also where torch cannot write to the name itself."""
    paths = [tmp_path / folder / "run.pt" for folder in ("a", "ä")]
    command = [sys.executable, "-c", _INTERRUPTED, "25", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
