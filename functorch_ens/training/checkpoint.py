"""Checkpoints of a training run: written whole or not at all, and loaded without running code from the file."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from functorch_ens.checks import check_device, check_mapping, check_path, first_line
from functorch_ens.files import write_whole
from functorch_ens.params.pytree import allow_to_load

log = logging.getLogger(__name__)

_FOLDER = 0x10
"""The attribute of a folder, in a zip's list of its entries."""


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` in one rename: an interruption leaves the previous checkpoint.

    >>> import tempfile, torch, functorch_ens as fe
    >>> params = fe.batchensemble_params(torch.nn.Linear(3, 2), E=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fe.save_checkpoint({"params": params, "epoch": 3}, f"{folder}/run.pt")
    ...     again = fe.load_checkpoint(f"{folder}/run.pt")
    >>> again["params"].E, again["epoch"]
    (5, 3)

    Args:
        state: a dict of everything that the run needs to continue: `EnsembleParams`, buffers, the `state_dict()` of an
            optimiser, the `get_state()` of a generator. Its values are tensors, numbers and text, in dicts, lists and
            tuples.
        path: the file; its folder is created if it is missing. A symbolic link is followed, and the permissions of an
            existing file are kept.

    Raises:
        TypeError: `state` is not a dict, or has a value of another type. NumPy's scalars are such: give `float(x)`.
        OSError: the file cannot be written; it names the path, and what the operating system says.
    """
    check_mapping(state, "state", "a dict")
    check_path(path, "path")
    with write_whole(path) as part:
        _write(dict(state), part)
        try:
            # Read the file back before the rename: torch.save pickles anything, and load_checkpoint would refuse it.
            # mmap leaves the data of the tensors on the disk.
            _read(part, mmap=True)
        except OSError:
            raise
        except Exception as error:
            raise _of_state(error) from error


def load_checkpoint(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> dict[str, Any]:
    """Load the state that `save_checkpoint` or `torch.save` wrote to `path`, if its checksums are right.

    Args:
        path: the file. Code in it is not run.
        device: the device of the loaded tensors; None is the one that each was saved from.

    Returns: the dict that was saved. The leaves of its `EnsembleParams` are autograd leaves again.

    Raises:
        OSError: the file cannot be opened; FileNotFoundError: there is none.
        ValueError: the file is damaged or incomplete, is no checkpoint, or has values other than tensors, numbers and
            text.
    """
    check_path(path, "path")
    check_device(device)
    with Path(path).open("rb"):
        pass  # an OSError from here on is of what is in the file
    try:
        _check_sums(path)
        state = _read(path, map_location=device)
    except Exception as error:  # torch raises many kinds: for a broken zip, a truncated pickle, a forbidden class
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise
        raise ValueError(f"path: {os.fspath(path)!r} is no checkpoint that can be read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"path: {os.fspath(path)!r} holds no dict, but {type(state).__name__}")
    return state


def _read(path: str | os.PathLike[str], **options: Any) -> Any:
    """Unpickle `path` with torch's allowlist of classes, which has `EnsembleParams`."""
    allow_to_load()
    with torch.inference_mode(False):  # else what is loaded inside of it could not be trained
        return torch.load(path, weights_only=True, **options)


def _check_sums(path: str | os.PathLike[str]) -> None:
    """An error where `path` is a damaged zip: torch writes checksums, and does not compare them."""
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the format before torch 1.6 has no checksums
            return
        with zipfile.ZipFile(file) as archive:
            if not any(info.CRC for info in archive.infolist()):
                log.warning(
                    "%s: has no checksums, since torch.serialization.set_crc32_options(False) was in force when it was "
                    "written; damage cannot be noticed",
                    path,
                )
                return
            # To torch's reader, but not to Python's, an entry with the attribute of a folder is one, and has no bytes.
            folders = [info.filename for info in archive.infolist() if info.external_attr & _FOLDER]
            damaged = next(iter(folders), None) or archive.testzip()
    if damaged is not None:
        raise ValueError(f"it is damaged: {damaged!r} is not what was written")


def _write(state: dict[str, Any], part: Path) -> None:
    """torch.save to a path: with a file of Python's, an interrupt inside of torch's writer aborts the process."""
    try:
        with _in_ascii(part) as name:
            torch.save(state, name)
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # closing the file failed after it
            raise error.__context__ from None
        if isinstance(error, OSError | MemoryError):
            raise
        _probe(part)
        if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStream" in str(error)):
            raise OSError(errno.EIO, first_line(error), str(part)) from error
        raise _of_state(error) from error


@contextmanager
def _in_ascii(path: Path) -> Iterator[str]:
    """A name of the file in ASCII, which torch's writer needs: otherwise it takes a file of Python's."""
    if str(path).isascii() or not os.path.exists("/dev/fd"):
        yield str(path)
        return
    with path.open("rb+") as file:
        yield f"/dev/fd/{file.fileno()}"


def _probe(part: Path) -> None:
    """OSError where the disk takes no more bytes: torch's writer does not say why it failed."""
    with part.open("ab") as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())


def _of_state(error: Exception) -> TypeError:
    return TypeError(f"state: expected tensors, numbers and text in dicts and lists: {first_line(error)}")
