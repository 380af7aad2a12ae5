"""Files that are whole or absent: written under a temporary name, then renamed.
Knows: paths. Must not know: torch, formats, models.
"""
from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, Union

PathLike = Union[str, Path]
_SAMPLE = 2**16  # bytes
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def opener(path: PathLike) -> Callable[..., Any]:
    """Return the function that opens a file of this name: gzip's for .gz (modes "rt", "wt" for text)."""
    return gzip.open if str(path).endswith(".gz") else open


@contextlib.contextmanager
def name_full_disk(path: PathLike) -> Iterator[None]:
    """Name the file in the error of a full disk: the system's own error does not.

    Args:
        path: the file that is written.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and error.filename2 is None  # of a copy, shutil names the source
        if error.errno in _NO_ROOM and not named:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends without an error.

    A kill or a full disk therefore never leaves a half-written file under the final name.

    Args:
        path: the final name; missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with name_full_disk(path):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; others must be able to read results
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: PathLike) -> str:
    """Return a short digest of a file, or of the files of a folder: names, sizes and samples of the content.

    At most 2 MB of each file are read, so that folders of many gigabytes take no time; retrained weights
    differ everywhere. What is not there (a name on the Hugging Face hub) gives an empty digest.

    Args:
        path: a file or folder; folders in it are left out.
    """
    path = Path(path)
    digest = hashlib.sha1()
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as content:
            for start in range(0, max(size, 1), max(_SAMPLE, size // 32)):
                content.seek(start)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16] if files else ""


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file at once."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
