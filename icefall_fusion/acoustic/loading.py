"""Errors of broken model files and saved log-probs, by the file's name.
Knows: what libraries raise. Must not know: models, what is in the files.
"""
from __future__ import annotations

import contextlib
import pickle
import textwrap
import zipfile
import zlib
from typing import Iterator

import torch
from safetensors import SafetensorError

from icefall_fusion.common.files import PathLike

_BROKEN = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
    torch.jit.Error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)


@contextlib.contextmanager
def loading(name: PathLike, what: str) -> Iterator[None]:
    """Turn what libraries raise for broken files, or a hub out of reach, into a ValueError with the name."""
    try:
        yield
    except _BROKEN as error:
        reason = textwrap.shorten(str(error), 500)
        raise ValueError(f"{name} cannot be loaded as {what}: {reason}") from error
