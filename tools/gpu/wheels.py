"""The wheels that a bare machine's image lacks: which, fetched for it, and whether they are all.
Knows: wheels.txt, image_packages.txt, pip. Must not know: what imports them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
_PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def wanted_wheels() -> dict[str, tuple[str, int]]:
    """Return version and first call of each package of wheels.txt."""
    found = {}
    for line in (HERE / "wheels.txt").read_text(encoding="utf-8").splitlines():
        text, _, comment = line.partition("#")
        if text.strip():
            name, _, version = text.strip().partition("==")
            found[name] = version, 2 if "call 2" in comment else 1
    return found


def image_packages() -> set[str]:
    """Return the normalized names of the image's packages."""
    names = (HERE / "image_packages.txt").read_text(encoding="utf-8").split()
    return {normalized(name) for name in names}


def normalized(name: str) -> str:
    """Return a package's name as the registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def make_wheels(out: Path) -> None:
    """Fetch the wheels that are not there; remove those that are not wanted.

    Raises:
        RuntimeError: one cannot be had.
    """
    for call, folder in ((1, out / "wheels"), (2, out / "call2" / "wheels")):
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {
            normalized(name): version for name, (version, first) in wanted_wheels().items() if first == call
        }
        there = {path: wheel_name(path) for path in folder.glob("*.whl")}
        for path, (name, version) in there.items():
            if wanted.get(name) != version:
                path.unlink()
        missing = [
            f"{name}=={version}" for name, version in wanted.items() if (name, version) not in there.values()
        ]
        if not missing:
            continue
        options = [part for platform in _PLATFORMS for part in ("--platform", platform)]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--disable-pip-version-check",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version",
                "3.12",
                "--implementation",
                "cp",
                *options,
                "-d",
                str(folder),
                *missing,
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError(f"wheels cannot be had: {' '.join(missing)}: {lines[-1:]}")


def wheel_name(path: Path) -> tuple[str, str]:
    """Return name and version of a wheel."""
    name, version = path.name.split("-")[:2]
    return normalized(name), version


def unserved(out: Path) -> list[str]:
    """Return what wheels ask for that is neither among them nor in the image, and wheels that are missing."""
    paths = [*out.glob("wheels/*.whl"), *out.glob("call2/wheels/*.whl")]
    names = {wheel_name(path)[0] for path in paths} | image_packages()
    bad = [
        f"{name} {version} is not in {out}"
        for name, (version, _) in wanted_wheels().items()
        if (normalized(name), version) not in map(wheel_name, paths)
    ]
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            lines = archive.read(metadata).decode().splitlines()
        for line in lines:
            match = re.match(r"Requires-Dist: ([\w.-]+)([^;]*);?(.*)", line)
            if (
                match is None
                or "extra" in match[3]
                or re.search(r'python_version\s*>=?\s*"3\.1[3-9]', match[3])
            ):
                continue
            need = normalized(match[1])
            if need not in names and need != "docopt":  # of a command line alone
                bad.append(f"{wheel_name(path)[0]} needs {need}")
    return bad
