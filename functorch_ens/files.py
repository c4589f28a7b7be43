"""Write a file whole: after a crash or an exception it has its old content or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What the operating system says of a disk; write_whole adds the path.
_OF_THE_DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")}

_active: set[str] = set()
"""The names of the temporary files that this process writes now."""


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block ends, rename that file to `path`.

    The folder is created if it is missing. A symbolic link stays, and the file that it points to is written. An
    existing file keeps its permissions. An exception in the block deletes the temporary file and leaves `path` as it
    was; the next call for `path` deletes temporary files of processes that were killed. Any number of threads and
    processes may write one path: the last rename wins. Close the file before the block ends: data in Python's buffer
    would be lost.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_whole(f"{folder}/log.txt") as part:
    ...         _ = part.write_text("done")
    ...     Path(f"{folder}/log.txt").read_text()
    'done'

    Args:
        path: the file to write; an existing one is replaced.

    Raises: OSError if the folder or the file cannot be written, also when the disk is full; it names `path`.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, got {path!r}")
    target = Path(os.path.realpath(Path(path)))
    old = _status(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    part = target.with_name(f"{_beginning(target)}{os.getpid()}-{uuid.uuid4().hex[:12]}.part")
    _active.add(part.name)
    try:
        # A file that others may not read has no readable copy either while it is written.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666 if old is None else 0o600))
        os.utime(part, ns=(0, 0))
        yield part
        if part.stat().st_mtime_ns == 0:
            raise FileNotFoundError(errno.ENOENT, "the block has written nothing to the temporary file", str(path))
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # fsync before the rename, or a crash can leave an empty file under the final name
        if old is not None:
            _take_over(part, old)
        os.replace(part, target)
    except OSError as error:
        if error.filename == str(part) or (error.filename is None and error.errno in _OF_THE_DISK):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        part.unlink(missing_ok=True)
        _active.discard(part.name)


def _status(target: Path) -> os.stat_result | None:
    """The status of the file to replace; None where there is none. OSError where it is a folder or a device."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file or none", str(target))
    return status


def _take_over(part: Path, old: os.stat_result) -> None:
    """Give `part` the owner and the permissions of the file that it replaces."""
    new = part.stat()
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError):  # only root may give a file to another owner
            os.chown(part, old.st_uid, old.st_gid)
    part.chmod(stat.S_IMODE(old.st_mode))


def _beginning(target: Path) -> str:
    """The name of a temporary file up to the number of its process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    where = hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]  # where the number means one
    name = os.fsencode(target.name)
    shown = target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()
    return f".{shown}.{where}-"


def _remove_stale(target: Path) -> None:
    """Delete temporary files for `target` that no process writes any more."""
    pattern = re.compile(re.escape(_beginning(target)) + r"(\d+)-[0-9a-f]{12}\.part")
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found and entry.name not in _active and not _is_running(int(found[1])):
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_running(process: int) -> bool:
    """Whether another process has this number."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # on Windows os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True
