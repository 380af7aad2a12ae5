"""The compiled part of the prefix search: built once by the C++ compiler that is there, and loaded.
Knows: compilers, a cache folder, ctypes. Must not know: what the search does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional

_SOURCE = Path(__file__).with_name("prefix_search.cpp")
# without -fno-math-errno every exponential is a call that the compiler may not move
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


def compiler() -> Optional[str]:
    """Return the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++; None: there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


@functools.lru_cache(maxsize=1)
def load_native() -> tuple[Optional[ctypes.CDLL], str]:
    """Return the library of the prefix search and "", or None and why there is none; builds it if needed."""
    with_what = compiler()
    if with_what is None:
        return None, "there is no C++ compiler (set CXX, or install g++ or clang++)"
    try:
        return _declare(ctypes.CDLL(str(_build(with_what)))), ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()[-500:]
        return None, f"{with_what} could not build {_SOURCE.name}: {error} {said}".strip()


def cache_folder() -> Path:
    """Return where built libraries are kept: ``$ICEFALL_FUSION_CACHE``, or the user's cache."""
    given = os.environ.get("ICEFALL_FUSION_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(given or os.path.join(home, "icefall_fusion"))


def _build(with_what: str) -> Path:
    """Build the library unless that of this source, compiler and processor is there; return its path."""
    version = subprocess.run([with_what, "--version"], capture_output=True, text=True, check=True).stdout
    made_of = "\n".join([_SOURCE.read_text(encoding="utf-8"), version, *_FLAGS, _processor()])
    folder = cache_folder()
    library = folder / f"prefix_search-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    logging.info("building the prefix search (%s) into %s", with_what, library)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:  # a home that may not be written: built for this process alone
        folder = Path(tempfile.mkdtemp(prefix="icefall_fusion-"))
        library = folder / library.name
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        command = [with_what, *_FLAGS, "-o", temporary, str(_SOURCE)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(temporary, library)  # whole or not at all: other processes may build it too
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _processor() -> str:
    """Return what tells processors apart: a library built for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.startswith(("flags", "Features"))]
        return kept[0] if kept else platform.processor()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.prefix_search_open.restype = _POINTER
    library.prefix_search_open.argtypes = [
        *[_NUMBER] * 5, *[ctypes.c_int] * 2, ctypes.c_double, _POINTER, *[ctypes.c_double] * 2,
        _NUMBER, ctypes.c_int, _POINTER, *[ctypes.c_double] * 2, _NUMBER,
    ]  # fmt: skip
    library.ngram_open.restype = _POINTER
    library.ngram_open.argtypes = [_NUMBER, _NUMBER, ctypes.c_int, *[_POINTER] * 4]
    library.ngram_close.restype = None
    library.ngram_close.argtypes = [_POINTER]
    library.prefix_search_close.restype = None
    library.prefix_search_close.argtypes = [_POINTER]
    library.prefix_search_run.restype = None
    library.prefix_search_run.argtypes = [
        _POINTER, _POINTER, _NUMBER, _NUMBER, *[_POINTER] * 3, _NUMBER, _NUMBER, ctypes.c_int,
        _NUMBER, _NUMBER, *[_POINTER] * 12,
    ]  # fmt: skip
    library.prefix_search_show.restype = None
    pairs = [_POINTER, _NUMBER]  # an array and its stride
    library.prefix_search_show.argtypes = [
        _POINTER, _NUMBER, _NUMBER, *pairs, *pairs, _POINTER, *pairs, _POINTER,
    ]  # fmt: skip
    return library
