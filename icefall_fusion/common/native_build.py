"""The compiled code: built once by the C++ compiler that is there, and loaded.
Knows: compilers, a cache folder, what can be called. Must not know: what it does.

One library of the prefix search, of the token tree's growth and of closed words; all has a twin in Python.
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

_PACKAGE = Path(__file__).parents[1]
_SOURCES = [
    _PACKAGE / name
    for name in ("search/engines/prefix_search.cpp", "lm/token_tree.cpp", "fusion/closed_words.cpp")
]
_READ = [*_SOURCES, _PACKAGE / "lm/token_tree.h"]
# without -fno-math-errno every exponential is a call that the compiler may not move
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


def compiler() -> Optional[str]:
    """Return the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++; None: there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


@functools.lru_cache(maxsize=1)
def load_native() -> tuple[Optional[ctypes.CDLL], str]:
    """Return the library and "", or None and why there is none; builds it if needed."""
    with_what = compiler()
    if with_what is None:
        return None, "there is no C++ compiler (set CXX, or install g++ or clang++)"
    try:
        return _declare(str(_build(with_what))), ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()[-500:]
        return None, f"{with_what} could not build the compiled part: {error} {said}".strip()


def cache_folder() -> Path:
    """Return where built libraries are kept: ``$ICEFALL_FUSION_CACHE``, or the user's cache."""
    given = os.environ.get("ICEFALL_FUSION_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(given or os.path.join(home, "icefall_fusion"))


def _build(with_what: str) -> Path:
    """Build the library unless that of this source, compiler and processor is there; return its path."""
    version = subprocess.run([with_what, "--version"], capture_output=True, text=True, check=True).stdout
    sources = (path.read_text(encoding="utf-8") for path in _READ)
    made_of = "\n".join([*sources, version, *_FLAGS, _processor()])
    folder = cache_folder()
    library = folder / f"icefall_fusion-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    logging.info("building the compiled part (%s) into %s", with_what, library)
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
        command = [with_what, *_FLAGS, "-o", temporary, *map(str, _SOURCES)]
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


_INT, _DOUBLE = ctypes.c_int, ctypes.c_double
_PAIR = [_POINTER, _NUMBER]  # an array and its stride or length
_FUNCTIONS = {  # what each returns and takes
    "prefix_search_open": (_POINTER, [
        *[_NUMBER] * 5, _INT, _INT, _DOUBLE, _POINTER, _DOUBLE, _DOUBLE,
        _NUMBER, _INT, _POINTER, _DOUBLE, _DOUBLE, _NUMBER,
    ]),
    "prefix_search_close": (None, [_POINTER]),
    "prefix_search_run": (None, [
        _POINTER, _POINTER, _NUMBER, _NUMBER, *[_POINTER] * 3, _NUMBER, _NUMBER, _INT,
        _NUMBER, _NUMBER, *[_POINTER] * 12,
    ]),
    "prefix_search_show": (None, [
        _POINTER, _NUMBER, _NUMBER, *_PAIR, *_PAIR, _POINTER, *_PAIR, _POINTER,
    ]),
    "ngram_open": (_POINTER, [_NUMBER, _NUMBER, _INT, *[_POINTER] * 4]),
    "ngram_close": (None, [_POINTER]),
    "token_tree_open": (_POINTER, [_NUMBER]),
    "token_tree_close": (None, [_POINTER]),
    "token_tree_bind": (None, [_POINTER, _NUMBER, *[_POINTER] * 6]),
    "token_tree_size": (_NUMBER, [_POINTER]),
    "token_tree_first": (_NUMBER, [_POINTER, _NUMBER, _NUMBER]),
    "token_tree_insert": (_NUMBER, [_POINTER, _NUMBER, *_PAIR]),
    "token_tree_children": (_INT, [_POINTER, _POINTER, *_PAIR, _POINTER]),
    "token_tree_climb": (_NUMBER, [_POINTER, *_PAIR, _INT, _POINTER]),
    "token_tree_set_scores": (None, [_POINTER, *_PAIR, _POINTER]),
    "sayings_open": (_POINTER, []),
    "sayings_close": (None, [_POINTER]),
    "sayings_learn": (None, [_POINTER, *_PAIR, _INT, _INT, *_PAIR, _NUMBER]),
    "histories_open": (_POINTER, [_NUMBER, _POINTER, _POINTER]),
    "histories_close": (None, [_POINTER]),
    "histories_count": (_NUMBER, [_POINTER]),
    "histories_place": (_INT, [*[_POINTER] * 3, *_PAIR, *[_POINTER] * 7, _NUMBER, _POINTER]),
    "histories_keep": (None, [_POINTER, *_PAIR, _POINTER]),
}  # fmt: skip


def _declare(path: str) -> ctypes.CDLL:
    library, locked = ctypes.CDLL(path), ctypes.PyDLL(path)
    for name, (returned, taken) in _FUNCTIONS.items():
        # searches run beside each other; tables that threads may share are used under Python's lock
        function = getattr(library if name.startswith("prefix_search") else locked, name)
        function.restype, function.argtypes = returned, taken
        setattr(library, name, function)
    return library
