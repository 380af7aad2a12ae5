"""Knows: how tools/install_kaldifeat.sh refuses and when it has nothing to do. Must not know: features.
(CI builds with it; that what it builds is right: test_kaldifeat.py.)
"""
from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_kaldifeat.sh"
VENV = Path(sys.executable).parent.parent
NEEDED = ("bash", "cat", "dirname", "mkdir", "mktemp", "nproc", "rm", "sed", "sort", "tail", "tar")


def _run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VENV": str(VENV), **environment}
    return subprocess.run(["bash", str(SCRIPT), *options], capture_output=True, text=True, env=env)


def test_unknown_options_and_missing_environments_are_named(tmp_path: Path) -> None:
    done = _run("--rebuidl")
    assert done.returncode == 2 and "unknown option --rebuidl" in done.stderr
    done = _run(VENV=str(tmp_path / "none"))
    assert done.returncode == 1 and f"no environment at {tmp_path / 'none'}: run" in done.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    done = _run(VENV=str(tmp_path / "bare"))
    assert done.returncode == 1 and "has no torch to build for: run 'bash tools/setup_env.sh'" in done.stderr


@pytest.mark.parametrize(
    ("there", "message"),
    [((), "needs a C++17 compiler"), (("c++",), "needs make"), (("c++", "make"), "pip could not fetch")],
)
def test_what_a_build_needs_is_said(tmp_path: Path, there: tuple[str, ...], message: str) -> None:
    for name in (*NEEDED, *there):
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"this machine has no {name}")
        (tmp_path / name).symlink_to(found)
    away = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}  # no network
    done = _run("--rebuild", PATH=str(tmp_path), KALDIFEAT_CACHE=str(tmp_path / "cache"), CXX="c++", **away)
    assert done.returncode == 1 and message in done.stderr and "://" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_nothing_is_done_twice() -> None:
    if importlib.util.find_spec("kaldifeat") is None:
        pytest.skip("kaldifeat is not installed: bash tools/install_kaldifeat.sh")
    done = _run(PIP_NO_INDEX="1", CXX="none")
    assert done.returncode == 0 and "is installed in" in done.stdout, done.stderr
