"""Files of arrays with a head: ``.npz`` whose member ``head`` is JSON and has the number of the format.
Knows: numpy, JSON. Must not know: graphs, lattices, torch.
"""
from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from typing import Any, Iterator, Mapping

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path

FORMAT = 2  # of graphs and lattices; raise it when names or meanings of arrays change
_HEAD = "head"


def write_npz(
    path: PathLike, head: Mapping[str, Any], arrays: Mapping[str, np.ndarray], compress: bool = False
) -> None:
    """Write a file; whole or not at all.

    Raises:
        ValueError: the path does not end with .npz.
    """
    check(str(path).endswith(".npz"), f"the path {str(path)!r}", "end with .npz", str(path))
    text = json.dumps({"format": FORMAT, **head}, ensure_ascii=False)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write = np.savez_compressed if compress else np.savez
        write(file, **{_HEAD: text_array(text)}, **arrays)


@contextlib.contextmanager
def open_npz(path: PathLike, name: str) -> Iterator[tuple[dict[str, Any], Mapping[str, np.ndarray]]]:
    """Yield the head and the arrays of a file; an array is read when it is looked up.

    Args:
        path: the file.
        name: of such a file, for messages.

    Raises:
        ValueError: the file is broken, or of another format; also if the block looks up a broken array.
    """
    try:
        with np.load(path) as archive:
            head = json.loads(array_text(archive[_HEAD])) if _HEAD in archive.files else {}
            version = head.pop("format", 1)
            if version == FORMAT:
                yield head, archive
                return
    except (OSError, KeyError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be loaded as {name}: {error!r}") from error
    raise ValueError(f"{path} must have the format {FORMAT}; make it again, for it has the format {version}")


def text_array(text: str) -> np.ndarray:
    """Return a text as an array of bytes."""
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def array_text(array: np.ndarray) -> str:
    """Return the text of an array of bytes."""
    return array.tobytes().decode("utf-8")
