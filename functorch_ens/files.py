"""Write a file whole: after a crash or an exception it has its old content or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block ends, rename that file to `path`.

    The folder is created if it is missing. An exception in the block deletes the temporary file and leaves `path` as it
    was. Close the file before the block ends: data in Python's buffer would be lost.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_whole(f"{folder}/log.txt") as part:
    ...         _ = part.write_text("done")
    ...     Path(f"{folder}/log.txt").read_text()
    'done'

    Args:
        path: the file to write; an existing one is replaced.

    Raises: OSError if the folder or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # fsync before the rename, or a crash can leave an empty file under the final name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
