"""write_whole: the file is replaced in one rename, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from functorch_ens.files import write_whole


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with write_whole(path) as part:
        part.write_text("new")
        assert part.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new" and _names(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(error), write_whole(path) as part:
        part.write_text("half of it")
        raise error
    assert path.read_text() == "old" and _names(tmp_path) == ["result.txt"]


def test_an_interruption_before_anything_is_written_leaves_the_folder_empty(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_whole(tmp_path / "result.txt"):
        raise KeyboardInterrupt
    assert _names(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), write_whole(path):
        pass
    assert path.read_text() == "old" and _names(tmp_path) == ["result.txt"]


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own: Any
    for name, own in (("fsync", os.fsync), ("replace", os.replace)):

        def recorded(*args: Any, name: str = name, own: Any = own) -> None:
            calls.append(name)
            own(*args)

        monkeypatch.setattr(os, name, recorded)
    with write_whole(tmp_path / "result.txt") as part:
        part.write_text("new")
        assert not calls
    assert calls == ["fsync", "replace"]


def test_missing_folders_are_created_and_text_paths_are_taken(tmp_path: Path) -> None:
    with write_whole(f"{tmp_path}/a/b/result.bin") as part:
        part.write_bytes(b"\0")
    assert (tmp_path / "a" / "b" / "result.bin").read_bytes() == b"\0"
    with pytest.raises(OSError), write_whole(tmp_path / "a" / "b" / "result.bin" / "c"):
        raise AssertionError("the block must not start: its folder is a file")
