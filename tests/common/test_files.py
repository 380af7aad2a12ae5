"""Files are whole or absent: a full disk, an error or a kill changes nothing under a final name.
Knows: icefall_fusion.common.files. Must not know: jobs.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from icefall_fusion.common.files import atomic_path, fingerprint, write_json, write_text

FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from icefall_fusion.common.files import write_text
try:
    write_text(sys.argv[1], "x" * 100_000)
except OSError as error:
    sys.exit(7)
"""

KILLED = """
import os, signal, sys
from icefall_fusion.common.files import atomic_path
with atomic_path(sys.argv[1]) as path, open(path, "w") as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path) -> None:
    write_text(tmp_path / "results.json", "old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "results.json")])
    assert done.returncode == 7
    assert os.listdir(tmp_path) == ["results.json"] and (tmp_path / "results.json").read_text() == "old"


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model.pt")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "model.pt").exists()
    assert all(name.startswith(".model.pt.") for name in os.listdir(tmp_path))  # hidden: globs leave it out


def test_an_error_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "deep" / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path / "deep") == []
    write_json(tmp_path / "deep" / "a.json", {"ü": 1})
    assert (tmp_path / "deep" / "a.json").read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'


def test_a_fingerprint_changes_with_names_sizes_and_content(tmp_path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40_000)  # 10 MB: read in samples
    (tmp_path / "b").write_text("small")
    (tmp_path / "folder").mkdir()
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path) and len(first) == 16
    (tmp_path / "a").write_bytes(bytes(reversed(range(256))) * 40_000)
    second = fingerprint(tmp_path)
    (tmp_path / "b").write_text("smalk")
    third = fingerprint(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({first, second, third, fingerprint(tmp_path)}) == 4
    assert fingerprint(tmp_path / "c") not in ("", first)
    assert fingerprint("some-team/some-model") == ""
