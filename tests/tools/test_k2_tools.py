"""The scripts that install k2: what they say where something is missing; nothing is downloaded.
Knows: scripts of tools/. Must not know: what k2 does.
"""
from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    given = {**os.environ, **environment}
    command = ["bash", str(ROOT / "tools" / script), *options]
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=ROOT)


@pytest.fixture()
def no_python39(tmp_path):
    """An environment with neither Python 3.9 nor pyenv."""
    for name in ("bash", "sed", "dirname", "sh", "env"):
        found = next(p for p in ("/bin", "/usr/bin") if (Path(p) / name).exists())
        (tmp_path / name).symlink_to(Path(found) / name)
    return {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path), "PYTHON39": "",
            "VENV_K2": str(tmp_path / "venv")}


def test_without_python_39_the_k2_tests_are_skipped_and_in_ci_failed(no_python39) -> None:
    skipped = run("setup_k2_ci_env.sh", CI="", **no_python39)
    assert skipped.returncode == 77
    assert "no Python 3.9 on PATH or in pyenv" in skipped.stderr and "SKIPPED" in skipped.stderr
    for failed in (run("setup_k2_ci_env.sh", CI="true", **no_python39),
                   run("setup_k2_ci_env.sh", "--required", CI="", **no_python39)):
        assert failed.returncode == 1 and "it is required here: failed" in failed.stderr
    assert run("test_k2.sh", CI="", **no_python39).returncode == 0
    assert run("test_k2.sh", "--required", CI="", **no_python39).returncode == 1


def test_the_line_that_installs_k2_names_torch_cuda_and_python() -> None:
    done = run("install_k2.sh", "--version", "1.24.4.dev20260423", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    cuda = f"cuda{torch.version.cuda}" if torch.version.cuda else "cpu"
    line = f"-m pip install k2==1.24.4.dev20260423+{cuda}.torch{torch.__version__.split('+')[0]} -f https://k2-fsa"
    assert line in done.stdout and "add --yes to run it" in done.stdout


def test_without_torch_k2_cannot_be_chosen(tmp_path) -> None:
    done = run("install_k2.sh", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1 and "has no torch: install torch first" in done.stderr


def test_a_k2_that_does_not_work_is_told_with_the_remedy(tmp_path) -> None:
    (tmp_path / "k2.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    command = [sys.executable, str(ROOT / "tools" / "check_k2.py")]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert "undefined symbol" in done.stderr and "remedy: pip uninstall k2" in done.stderr


def test_a_second_build_of_lmplz_waits_for_the_first(tmp_path) -> None:
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["bash", str(ROOT / "tools" / "build_lmplz.sh")]
        environment = {**os.environ, "LMPLZ_DIR": str(tmp_path), "PYTHON": sys.executable}
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            second.communicate(timeout=2)
        program = tmp_path / "build" / "bin" / "lmplz"
        program.parent.mkdir(parents=True)
        program.touch(0o755)
    assert second.communicate()[0] == f"{program}\n" and second.returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["build"]  # no download
