"""What ran: versions, the git commit, the device; for the files of a run.
Knows: installed packages, git. Must not know: options, results.
"""
from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "lhotse", "sentencepiece", "kaldialign", "numpy")


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, git commit and device, for ``run.json``."""
    import platform

    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    cuda = torch.device(device).type == "cuda"
    return {
        "versions": versions,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(torch.device(device)) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str:
    """Return the commit of the code that runs (with "-dirty" when files differ from it), or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
