"""The compiled code: built once by the C++ compiler that is there, and loaded.
Knows: compilers, a cache folder, names and types of functions. Must not know: what they compute.

One library of the prefix search, of the token tree's growth and of closed words; all has a twin in Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Optional

from icefall_fusion.common.unavailable import Unavailable, asked_once

_PACKAGE = Path(__file__).parents[1]
_OUT_OF_MEMORY = -9  # as in guarded.h
# without -fno-math-errno every exponential is a call that the compiler may not move
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


def compiler() -> Optional[list[str]]:
    """Return the C++ compiler's command: ``$CXX`` (options allowed), or c++, g++ or clang++; None: none."""
    wanted = os.environ.get("CXX")
    commands = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    return next(([path, *more] for name, *more in commands if (path := shutil.which(name))), None)


@asked_once
def load_native() -> ctypes.CDLL:
    """Return the library, which is built if needed.

    Raises:
        Unavailable: there is no compiler, or it fails; the message says why.
    """
    command = compiler()
    if command is None:
        raise Unavailable("there is no C++ compiler (set CXX, or install g++ or clang++)", unusual=True)
    try:
        return _declare(str(_build(command)))
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or "").strip()[-500:]
        reason = f"{' '.join(command)} could not build the compiled code: {error} {output}".strip()
        raise Unavailable(reason, unusual=True) from error


def cache_folder() -> Path:
    """Return where built libraries are kept: ``$ICEFALL_FUSION_CACHE``, or the user's cache."""
    folder = os.environ.get("ICEFALL_FUSION_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder or os.path.join(home, "icefall_fusion"))


def _build(command: list[str]) -> Path:
    """Build the library unless that of this source, compiler and processor is there; return its path.

    The name holds a hash of the sources, compiler and processor, and one of the content: a file that was cut
    short, or that somebody else put there under this name, is not loaded but built again.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(_PACKAGE.rglob("*.cpp"))
    texts = (path.read_text(encoding="utf-8") for path in [*sources, *sorted(_PACKAGE.rglob("*.h"))])
    made_of = "\n".join([*texts, version, *command[1:], *_FLAGS, _processor()])
    name = f"icefall_fusion-{_hash(made_of.encode())}"
    folder = _usable_folder()
    for library in folder.glob(f"{name}-*.so"):
        if _only_ours(library) and library.stem == f"{name}-{_hash(library.read_bytes())}":
            return library
    logging.info("building the compiled code (%s) into %s", " ".join(command), folder)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        build = [*command, *_FLAGS, "-o", temporary, *map(str, sources)]
        subprocess.run(build, capture_output=True, text=True, check=True)
        os.chmod(temporary, 0o644)  # other users may load it from a shared cache, not change it
        library = folder / f"{name}-{_hash(Path(temporary).read_bytes())}.so"
        os.replace(temporary, library)  # whole or not at all: other processes may build it too
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _usable_folder() -> Path:
    """Return the cache folder, or one for this process alone where that is not ours to write or not safe."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        if _only_ours(folder) and os.access(folder, os.W_OK):
            return folder
        if not _only_ours(folder):
            logging.warning("%s is not used: other users can write there, and code is loaded from it", folder)
    except OSError:
        pass  # a home that may not be written
    return Path(tempfile.mkdtemp(prefix="icefall_fusion-"))


def _only_ours(path: Path) -> bool:
    """Return whether nobody but this user (and root) can write a file or folder."""
    status = path.stat()
    owners = (0, os.geteuid()) if hasattr(os, "geteuid") else (status.st_uid,)
    return status.st_uid in owners and not status.st_mode & 0o022


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    """Return the features of the processor: a library built for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.startswith(("flags", "Features"))]
        return kept[0] if kept else platform.processor()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


_INT = ctypes.c_int
_PAIR = [_POINTER, _NUMBER]  # an array and its stride or length
_FUNCTIONS = {  # types of the result and of the arguments
    "prefix_search_open": (_POINTER, [_POINTER]),
    "prefix_search_close": (None, [_POINTER]),
    "prefix_search_run": (_INT, [_POINTER, _POINTER, _NUMBER, _INT, _NUMBER, _NUMBER]),
    "prefix_search_forget": (_INT, [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER]),
    "transducer_open": (_POINTER, [_POINTER, *[_NUMBER] * 4]),
    "transducer_close": (None, [_POINTER]),
    "transducer_step": (_INT, [*[_POINTER] * 4, _NUMBER, _NUMBER, _INT]),
    "ngram_open": (_POINTER, [_NUMBER, _NUMBER, _INT, *[_POINTER] * 4]),
    "ngram_close": (None, [_POINTER]),
    "token_tree_open": (_POINTER, [_NUMBER]),
    "token_tree_close": (None, [_POINTER]),
    "token_tree_bind": (_INT, [_POINTER, _NUMBER, *[_POINTER] * 6]),
    "token_tree_size": (_NUMBER, [_POINTER]),
    "token_tree_first": (_INT, [_POINTER, _NUMBER, _NUMBER, _POINTER]),
    "token_tree_insert": (_INT, [_POINTER, _POINTER, *_PAIR]),
    "token_tree_children": (_INT, [_POINTER, _POINTER, *_PAIR, _POINTER]),
    "token_tree_climb": (_NUMBER, [_POINTER, *_PAIR, _INT, _POINTER]),
    "token_tree_set_scores": (None, [_POINTER, *_PAIR, _POINTER]),
    "spellings_open": (_POINTER, []),
    "spellings_close": (None, [_POINTER]),
    "spellings_learn": (_INT, [_POINTER, *_PAIR, _INT, _INT, *_PAIR, _NUMBER, _NUMBER]),
    "histories_open": (_POINTER, [_NUMBER, *[_POINTER] * 3]),
    "histories_close": (None, [_POINTER]),
    "histories_count": (_NUMBER, [_POINTER]),
    "histories_nodes": (_INT, [*[_POINTER] * 3, *_PAIR, *[_POINTER] * 7, _NUMBER, _POINTER]),
    "histories_keep": (_INT, [_POINTER, *_PAIR, _POINTER]),
}


def _memory_was_there(result: Any, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the result of compiled code, unless it means that memory ran out."""
    failed = result is None if function.restype is _POINTER else result == _OUT_OF_MEMORY
    if failed and function.restype is not None:
        raise MemoryError("the compiled code ran out of memory")
    return result


def _declare(path: str) -> ctypes.CDLL:
    library, locked = ctypes.CDLL(path), ctypes.PyDLL(path)
    for name, (returned, taken) in _FUNCTIONS.items():
        # searches run beside each other; tables that threads may share are used under Python's lock
        function = getattr(library if name.startswith("prefix_search") else locked, name)
        function.restype, function.argtypes, function.errcheck = returned, taken, _memory_was_there
        setattr(library, name, function)
    return library
