"""Takes large weights out of what git tracks for the time of a call, and brings them back.
Knows: git's index and its lists of ignored files. Must not know: which weights, why.

A tree of tracked files is copied to the machine with the GPU. Weights that the call does not need leave the
index and are ignored meanwhile (.git/info/exclude). The files stay where they are, and the last commit has
them. A commit that would drop them is refused by a hook. `undo` makes the index as it was.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Sequence

_MARK = "# gpu_pack: weights that are left out for a call"
_HOOK = f"""#!/bin/sh
{_MARK}
for file in FILES; do
  if git diff --cached --diff-filter=D --name-only -- "$file" | grep -q .; then
    echo "gpu_pack: $file is left out for a call: bash tools/gpu_pack.sh --undo, then commit" >&2
    exit 1
  fi
done
"""


def git(root: Path, *arguments: str) -> str:
    """Return what a git command prints.

    Raises:
        RuntimeError: it fails; with what it says.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def tracked(root: Path) -> list[str]:
    """Return the tracked files and those that git does not ignore: all that would be copied."""
    names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def leave_out(root: Path, files: Sequence[str]) -> None:
    """Take files out of the index and have them ignored, until `undo`.

    Args:
        root: of the checkout.
        files: relative to it, tracked and unchanged.

    Raises:
        RuntimeError: a file is changed, is not tracked, or a hook of the user's own is there.
    """
    undo(root, files)
    for name in files:
        git(root, "ls-files", "--error-unmatch", "--", name)
        if git(root, "status", "--porcelain", "--", name).strip():
            raise RuntimeError(f"{name} is changed: commit it or bring it back first")
    hook = _path(root, "hooks/pre-commit")
    if hook.exists():
        raise RuntimeError(f"{hook} is there already, so that nothing can guard a commit meanwhile")
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(_HOOK.replace("FILES", " ".join(f"'{name}'" for name in files)), encoding="utf-8")
    hook.chmod(0o755)
    exclude = _path(root, "info/exclude")
    exclude.parent.mkdir(parents=True, exist_ok=True)
    before = exclude.read_text(encoding="utf-8") if exclude.exists() else ""
    lines = "".join(f"/{name}\n" for name in files)
    exclude.write_text(f"{before}{_MARK}\n{lines}{_MARK}: end\n", encoding="utf-8")
    git(root, "rm", "-q", "--cached", "--", *files)


def undo(root: Path, files: Sequence[str]) -> None:
    """Bring the index, the list of ignored files and the hooks back to what they were; twice is as once."""
    hook, exclude = _path(root, "hooks/pre-commit"), _path(root, "info/exclude")
    if hook.exists() and _MARK in hook.read_text(encoding="utf-8", errors="replace"):
        hook.unlink()
    if exclude.exists():
        text = exclude.read_text(encoding="utf-8")
        if _MARK in text:
            before, _, rest = text.partition(f"{_MARK}\n")
            exclude.write_text(before + rest.partition(f"{_MARK}: end\n")[2], encoding="utf-8")
    known = [name for name in files if git(root, "ls-tree", "HEAD", "--", name).strip()]
    if known:
        git(root, "reset", "-q", "HEAD", "--", *known)


def _path(root: Path, name: str) -> Path:
    return (root / git(root, "rev-parse", "--git-path", name).strip()).resolve()
