"""write_whole: the file is replaced in one rename, or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from functorch_ens import files
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


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    for name in ("there", "dangling"):
        target, link = tmp_path / name / "run.pt", tmp_path / f"{name}.pt"
        link.symlink_to(target)
        if name == "there":
            target.parent.mkdir()
            target.write_text("old")
        with write_whole(link) as part:
            part.write_text("new")
        assert link.is_symlink() and target.read_text() == "new" and _names(target.parent) == ["run.pt"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"), write_whole(loop):
        raise AssertionError("the block must not start")


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o444, 0o755])
def test_an_existing_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    path.chmod(mode)
    with write_whole(path) as part:
        part.write_text("new")
        assert part.stat().st_mode & 0o077 == 0  # nobody else reads it meanwhile
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == mode


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    with write_whole(tmp_path / "result.txt") as part:
        part.write_text("new")
    assert (tmp_path / "result.txt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    code = "import os, runpy, sys\nwith runpy.run_path(sys.argv[1])['write_whole'](sys.argv[2]): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, files.__file__, path], check=True)
    assert len(_names(tmp_path)) == 1
    foreign = tmp_path / ".result.txt.00000000-1-0123456789ab.part"  # of another host
    foreign.write_text("")
    with write_whole(path) as part, write_whole(path) as other:  # that of a live writer is left alone
        part.write_text("first")
        other.write_text("second")
        assert len({part.name, other.name, foreign.name, *_names(tmp_path)}) == 3
    assert path.read_text() == "first" and _names(tmp_path) == [foreign.name, "result.txt"]
    left = part.with_name(part.name.replace(f"-{os.getpid()}-", "-1-"))  # process 1 is alive
    left.write_text("")
    part.write_text("")  # ours, and no longer written: an interrupt has kept it from being removed
    with write_whole(path) as new:
        new.write_text("third")
    assert _names(tmp_path) == sorted([foreign.name, left.name, "result.txt"])


def test_threads_on_one_path_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    seen = []

    def write(letter: str) -> None:
        for _ in range(20):
            with write_whole(path) as part:
                part.write_text(letter * 20_000)
            seen.append(set(path.read_text()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert len(seen) == 80 and all(len(letters) == 1 for letters in seen)
    assert len(path.read_text()) == 20_000 and _names(tmp_path) == ["result.txt"]


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/result\.txt'") as caught, write_whole(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    with pytest.raises(ConnectionError, match=r"^lost$"), write_whole(path):
        raise ConnectionError("lost")  # nothing of the disk
    assert path.read_text() == "old" and _names(tmp_path) == ["result.txt"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, os.devnull):
        with pytest.raises(OSError, match=str(path)), write_whole(path):
            raise AssertionError("the block must not start")
    wrong: Any
    for wrong in (3, None, b"result.txt"):
        with pytest.raises(TypeError, match="path: expected a path, got "), write_whole(wrong):
            raise AssertionError("the block must not start")
    long = tmp_path / ("ä" * 120)  # 240 bytes, of 255 that a name may have
    for text in ("old", "new"):
        with write_whole(long) as part:
            part.write_text(text)
    assert long.read_text() == "new" and len(_names(tmp_path)) == 1
